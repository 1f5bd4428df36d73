/* From reset to main() on a RISC-V machine without an operating system, and the semihosting call. */
    .option arch, +zicsr
    .section .vectors, "ax"
    .globl _start
_start:
    .option push
    .option norelax
    la gp, __global_pointer$
    .option pop
    la sp, __stack_top
    la t0, trap
    csrw mtvec, t0
    li t0, 0x6600 /* FS, VS: FPU and vectors on, where the core has them */
    csrs mstatus, t0
    la t0, __data_load
    la t1, __data_start
    la t2, __data_end
1:  bgeu t1, t2, 2f
    lw t3, 0(t0)
    sw t3, 0(t1)
    addi t0, t0, 4
    addi t1, t1, 4
    j 1b
2:  la t1, __bss_start
    la t2, __bss_end
3:  bgeu t1, t2, 4f
    sw zero, 0(t1)
    addi t1, t1, 4
    j 3b
4:  call main
    call host_exit

    .balign 4
trap:
    la a0, trapped
    call host_print
    li a0, 3
    call host_exit

    .section .rodata
trapped:
    .asciz "fault: the processor stopped (bad address, or an instruction it does not have)\n"

    .text
    .globl semihosting_call
    .balign 16 /* the three instructions must lie in one page */
semihosting_call:
    .option push
    .option norvc
    slli zero, zero, 0x1f
    ebreak
    srai zero, zero, 7
    .option pop
    ret
