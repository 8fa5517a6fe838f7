/* Moves the wall clock of one process, as it sees it: loaded before the C library, it adds to what CLOCK_REALTIME says the
   seconds that stand in a file which the harness writes to, and counts there how often it did. Monotonic clocks, timers and the
   times of files are the kernel's, as they are when a real host's clock is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct shared {
    int64_t offset_s;
    uint64_t answered;
};

static struct shared *shared;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CHAOS_CLOCK");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) shared = memory;
}

int clock_gettime(clockid_t id, struct timespec *at) {
    int said = real(id, at);
    if (said == 0 && shared && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        int64_t offset_s = __atomic_load_n(&shared->offset_s, __ATOMIC_RELAXED);
        if (offset_s != 0) {
            at->tv_sec += offset_s;
            __atomic_fetch_add(&shared->answered, 1, __ATOMIC_RELAXED);
        }
    }
    return said;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int said = clock_gettime(CLOCK_REALTIME, &now);
    *at = (struct timeval){.tv_sec = now.tv_sec, .tv_usec = now.tv_nsec / 1000};
    return said;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
