// A program whose threads leave the driver in every way but a return. Each line of input is an order to one thread.
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void *, void *);
typedef int (*sync_t)(void *);
typedef int (*retain_t)(void **, int);
typedef size_t (*calls_t)(const char *);

// Streams of the fake driver: a call in the first never returns, one in the second ends its thread.
#define STAYS ((void *)0xcc)
#define EXITS ((void *)0xcd)

static launch_t launch;
static sync_t synchronize;
static __thread sigjmp_buf back;

static void say(const char *text) {
    puts(text);
    fflush(stdout);
}

static void jump(int signal) {
    (void)signal;
    siglongjmp(back, 1);
}

static int launch_in(void *stream) {
    return launch(NULL, 1, 1, 1, 1, 1, 1, 0, stream, NULL, (void *)3);
}

static void *run(void *stream) {
    launch_in(stream);
    return NULL;
}

// A thread that jumps out of a launch or a wait whenever it is told to, and stays.
static pthread_t jumper;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char order[64];

static void jump_out_of(int (*call)(void *), void *stream) {
    if (sigsetjmp(back, 1) == 0) {
        call(stream);
        say("returned");
    } else {
        say("jumped");
    }
}

static void *jumps(void *unused) {
    (void)unused;
    for (;;) {
        char mine[64];
        pthread_mutex_lock(&lock);
        while (!order[0])
            pthread_cond_wait(&changed, &lock);
        strcpy(mine, order);
        order[0] = 0;
        pthread_mutex_unlock(&lock);
        if (!strcmp(mine, "stay"))
            jump_out_of(launch_in, STAYS);
        else if (!strcmp(mine, "wait"))
            jump_out_of(synchronize, STAYS);
        else if (!strcmp(mine, "launch"))
            jump_out_of(launch_in, NULL);
    }
    return NULL;
}

static void tell(const char *what) {
    pthread_mutex_lock(&lock);
    strcpy(order, what);
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

int main(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    assert(driver);
    launch = (launch_t)dlsym(driver, "cuLaunchKernel");
    synchronize = (sync_t)dlsym(driver, "cuStreamSynchronize");
    retain_t retain = (retain_t)dlsym(driver, "cuDevicePrimaryCtxRetain");
    calls_t calls = (calls_t)dlsym(driver, "fake_calls");
    void *context;
    assert(launch && synchronize && retain && calls && retain(&context, 0) == 0);
    struct sigaction action = {.sa_handler = jump};
    sigaction(SIGUSR1, &action, NULL);
    assert(pthread_create(&jumper, NULL, jumps, NULL) == 0);
    pthread_t other;
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        size_t before = calls("cuLaunchKernel");
        void *result;
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "cancel")) {
            assert(pthread_create(&other, NULL, run, STAYS) == 0);
            while (calls("cuLaunchKernel") == before)
                sched_yield();
            pthread_cancel(other);
            pthread_join(other, &result);
            say(result == PTHREAD_CANCELED ? "cancelled" : "not cancelled");
        } else if (!strcmp(line, "exit")) {
            assert(pthread_create(&other, NULL, run, EXITS) == 0);
            pthread_join(other, &result);
            say("exited");
        } else if (!strcmp(line, "new")) {
            assert(pthread_create(&other, NULL, run, NULL) == 0);
            pthread_join(other, &result);
            say("returned");
        } else if (!strcmp(line, "jump")) {
            pthread_kill(jumper, SIGUSR1);
        } else {
            tell(line);
            if (!strcmp(line, "stay")) {
                while (calls("cuLaunchKernel") == before)
                    sched_yield();
                say("inside");
            }
        }
    }
    return 0;
}
