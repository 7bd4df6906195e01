/* A program that says that it started, who started it (negative under `second_preload.c`), and whether the shim is
 * loaded and the loader distrusts its environment. */
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

int main(void) {
    char line[4096];
    int loaded = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps)) loaded |= strstr(line, "libnvshare.so") != NULL;
    printf("started%s%s%s\n", loaded ? " loaded" : "", getauxval(AT_SECURE) ? " secure" : "",
           getppid() < 0 ? " wrapped" : "");
    return 0;
}
