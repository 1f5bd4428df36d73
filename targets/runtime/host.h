/* What the example program asks of the machine that it runs under: files, text, an end, and marks.
 * Bare metal: semihosting (semihosting.c). Linux: the C library (linux/host.c). */
#ifndef HOST_H
#define HOST_H

#include <stdint.h>

/* Opens a file of the host for reading or writing; -1: it cannot be opened. */
int host_open(const char *path, int for_writing);
/* The number of bytes that were read; fewer than `bytes` at the end of the file. */
uint32_t host_read(int file, void *to, uint32_t bytes);
/* 0: all bytes were written. */
int host_write(int file, const void *from, uint32_t bytes);
void host_close(int file);
void host_print(const char *text);
_Noreturn void host_exit(int status);

/* A counter that goes up with time, and after how many ticks it starts again (0: after 2^32). */
uint32_t host_ticks(void);
uint32_t host_ticks_period(void);

/* Lowest address that the stack may reach; 0: unknown. */
uintptr_t host_stack_limit(void);

/* Do nothing: the emulator counts the instructions between the two. */
void mark_begin(void);
void mark_end(void);

#endif
