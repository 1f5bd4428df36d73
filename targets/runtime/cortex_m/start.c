/* From reset to main() on a Cortex-M, and its SysTick timer. */
#include "../host.h"

extern uint32_t __data_load, __data_start, __data_end, __bss_start, __bss_end, __stack_limit;
extern uint32_t __stack_top;
int main(void);

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define SYST_CSR REGISTER(0xE000E010u)
#define SYST_RVR REGISTER(0xE000E014u)
#define SYST_CVR REGISTER(0xE000E018u)
#define CCR REGISTER(0xE000ED14u)
#define CPACR REGISTER(0xE000ED88u)
#define SYSTICK_PERIOD 0x1000000u

void reset(void);

static void fault(void) {
    host_print("fault: the processor stopped (bad address, or an instruction it does not have)\n");
    host_exit(3);
}

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))(uintptr_t)&__stack_top,
    reset,
    fault, /* NMI */
    fault, /* HardFault, which the others become as long as they are not enabled */
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
    fault,
};

void reset(void) {
    uint32_t *from = &__data_load;
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    CPACR |= 0xFu << 20; /* FPU and Helium */
#endif
#if __ARM_ARCH >= 8
    CCR |= 1u << 19; /* loops without branches, where the core has them */
#endif
    __asm__ volatile("dsb\n\tisb" ::: "memory");
    for (uint32_t *to = &__data_start; to < &__data_end;) *to++ = *from++;
    for (uint32_t *to = &__bss_start; to < &__bss_end;) *to++ = 0;
    SYST_RVR = SYSTICK_PERIOD - 1;
    SYST_CVR = 0;
    SYST_CSR = 5; /* the processor's clock, no interrupt */
    host_exit(main());
}

uint32_t host_ticks(void) { return SYSTICK_PERIOD - 1 - SYST_CVR; }

uint32_t host_ticks_period(void) { return SYSTICK_PERIOD; }

uintptr_t host_stack_limit(void) { return (uintptr_t)&__stack_limit; }
