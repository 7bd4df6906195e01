/* A second preloaded library in the usual style: it wraps `getppid` and asks for the next one by RTLD_NEXT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int depth;

pid_t getppid(void) {
    if (depth++ > 0) abort();
    pid_t (*next)(void) = (pid_t (*)(void))dlsym(RTLD_NEXT, "getppid");
    pid_t parent = next();
    depth--;
    return -parent;
}
