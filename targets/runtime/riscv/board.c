#include "../host.h"

extern uint32_t __stack_limit;

/* mtime of QEMU's virt board. */
uint32_t host_ticks(void) { return *(volatile uint32_t *)0x0200BFF8u; }

uint32_t host_ticks_period(void) { return 0; /* all 32 bits */ }

uintptr_t host_stack_limit(void) { return (uintptr_t)&__stack_limit; }
