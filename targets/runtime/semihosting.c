/* Files and text of the host through semihosting, on Arm and RISC-V.
 * Arm: "Semihosting for AArch32 and AArch64", version 2.0; RISC-V uses the same calls. */
#include "host.h"

typedef uintptr_t word;

enum {
    SYS_OPEN = 0x01,
    SYS_CLOSE = 0x02,
    SYS_WRITE0 = 0x04,
    SYS_WRITE = 0x05,
    SYS_READ = 0x06,
    SYS_EXIT_EXTENDED = 0x20
};
enum { OPEN_READ_BINARY = 1, OPEN_WRITE_BINARY = 5 };
#define APPLICATION_EXIT 0x20026u

#if defined(__riscv)
word semihosting_call(word operation, const void *block); /* start.S */
#else
static word semihosting_call(word operation, const void *block) {
    register word r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}
#endif

int host_open(const char *path, int for_writing) {
    word length = 0;
    while (path[length] != 0) ++length;
    word block[3] = {(word)path, for_writing ? OPEN_WRITE_BINARY : OPEN_READ_BINARY, length};
    return (int)semihosting_call(SYS_OPEN, block);
}

uint32_t host_read(int file, void *to, uint32_t bytes) {
    word block[3] = {(word)file, (word)to, bytes};
    return bytes - (uint32_t)semihosting_call(SYS_READ, block); /* it returns what is missing */
}

int host_write(int file, const void *from, uint32_t bytes) {
    word block[3] = {(word)file, (word)from, bytes};
    return (int)semihosting_call(SYS_WRITE, block);
}

void host_close(int file) {
    word block[1] = {(word)file};
    semihosting_call(SYS_CLOSE, block);
}

void host_print(const char *text) { semihosting_call(SYS_WRITE0, text); }

_Noreturn void host_exit(int status) {
    word block[2] = {APPLICATION_EXIT, (word)status};
    semihosting_call(SYS_EXIT_EXTENDED, block);
    for (;;) {
    }
}
