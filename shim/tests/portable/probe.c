/* A program under the portable library. Its first argument says what to do; what it prints is compared with what it
 * prints without the library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int launch_fn(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                      void **);

/* Where an address lies: file, and distance from its beginning. */
static void show(const char *what, const char *name, void *address) {
    Dl_info info;
    if (!address) {
        const char *error = dlerror();
        printf("%s %s: none; %s\n", what, name, error ? error : "no error");
    } else if (!dladdr(address, &info)) {
        printf("%s %s: unknown\n", what, name);
    } else {
        const char *slash = strrchr(info.dli_fname, '/');
        printf("%s %s: %s+%lx\n", what, name, slash ? slash + 1 : info.dli_fname,
               (unsigned long)((char *)address - (char *)info.dli_fbase));
    }
}

/* Look-ups that the library has no part in. */
static int ordinary(void) {
    static const char *const names[] = {"malloc", "getpid", "pthread_create", "getppid", "cuInit", "cu", "", "none"};
    void *self = dlopen(NULL, RTLD_LAZY);
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        show("default", names[i], dlsym(RTLD_DEFAULT, names[i]));
        show("next", names[i], dlsym(RTLD_NEXT, names[i]));
        show("self", names[i], dlsym(self, names[i]));
#ifdef VERSION
        show("version", names[i], dlvsym(RTLD_DEFAULT, names[i], VERSION));
        show("next version", names[i], dlvsym(RTLD_NEXT, names[i], VERSION));
        show("no version", names[i], dlvsym(RTLD_DEFAULT, names[i], "GLIBC_9.9"));
#endif
    }
    return 0;
}

static void *open_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) {
        printf("%s\n", dlerror());
        exit(1);
    }
    return driver;
}

/* Each name's place, as found by `dlsym` or, with a version, by `dlvsym`. */
static int driver(const char *version, char **names) {
    void *handle = open_driver();
    for (; *names; names++) {
#ifdef VERSION
        if (*version) {
            show("dlvsym", *names, dlvsym(handle, *names, version));
            continue;
        }
#endif
        show("dlsym", *names, dlsym(handle, *names));
    }
    return 0;
}

/* Launches through every way to the function; the driver answers with the last argument and counts. */
static int launch(void) {
    void *handle = open_driver(), *found = NULL;
    int status = -1;
    int (*calls)(void) = dlsym(handle, "fake_calls");
    int (*ask)(const char *, void **, int, unsigned long, int *) = dlsym(handle, "cuGetProcAddress_v2");
    launch_fn *direct = dlsym(handle, "cuLaunchKernel");
    printf("%d", direct(0, 1, 1, 1, 1, 1, 1, 0, 0, 0, (void **)41));
    printf(" %d", ask("cuLaunchKernel", &found, 12000, 0, &status));
    show(" asked", "cuLaunchKernel", found);
    printf("%d", ((launch_fn *)found)(0, 1, 1, 1, 1, 1, 1, 0, 0, 0, (void **)42));
    printf(" after %d calls\n", calls());
    return 0;
}

#ifdef VERSION
#include <pthread.h>
#include <unistd.h>

static void *synchronise(void *handle) {
    int (*function)(void) = dlsym(handle, "cuCtxSynchronize");
    function();
    return NULL;
}

/* Cancels a thread that waits inside the driver. */
static int cancel(void) {
    void *handle = open_driver(), *result = NULL;
    int *waits = dlsym(handle, "fake_waits");
    pthread_t thread;
    if (pthread_create(&thread, NULL, synchronise, handle)) return 1;
    while (!__atomic_load_n(waits, __ATOMIC_SEQ_CST)) usleep(1000);
    pthread_cancel(thread);
    pthread_join(thread, &result);
    printf("%s\n", result == PTHREAD_CANCELED ? "cancelled" : "ended");
    return 0;
}
#endif

static int panics(void) {
    void *library = dlopen("libpanics.so", RTLD_NOW);
    if (!library) {
        printf("%s\n", dlerror());
        return 1;
    }
    int (*function)(int) = dlsym(library, "cuPanics");
    printf("%d frames\n", function(9));
    return 0;
}

int main(int count, char **words) {
    const char *mode = count > 1 ? words[1] : "";
    if (!strcmp(mode, "ordinary")) return ordinary();
    if (!strcmp(mode, "driver") && count > 2) return driver(words[2], words + 3);
    if (!strcmp(mode, "launch")) return launch();
#ifdef VERSION
    if (!strcmp(mode, "cancel")) return cancel();
#endif
    if (!strcmp(mode, "panics")) return panics();
    return 2;
}
