/* Files and text under Linux. */
#define _POSIX_C_SOURCE 200809L
#include "../host.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int host_open(const char *path, int for_writing) {
    return open(path, for_writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0644);
}

uint32_t host_read(int file, void *to, uint32_t bytes) {
    uint32_t done = 0;
    while (done < bytes) {
        ssize_t got = read(file, (char *)to + done, bytes - done);
        if (got <= 0) break;
        done += (uint32_t)got;
    }
    return done;
}

int host_write(int file, const void *from, uint32_t bytes) {
    uint32_t done = 0;
    while (done < bytes) {
        ssize_t put = write(file, (const char *)from + done, bytes - done);
        if (put <= 0) return -1;
        done += (uint32_t)put;
    }
    return 0;
}

void host_close(int file) { close(file); }

void host_print(const char *text) {
    if (write(2, text, strlen(text)) < 0) exit(7);
}

_Noreturn void host_exit(int status) { exit(status); }

/* Microseconds. */
uint32_t host_ticks(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t)((uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u);
}

uint32_t host_ticks_period(void) { return 0; }

uintptr_t host_stack_limit(void) { return 0; }
