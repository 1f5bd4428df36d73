"""lrint(float(x) * m) of a float32 m by its bits, kept within +-2^22, as assembly.

    int32_t NAME(int32_t x, uint32_t bits)

The whole product with 16 bits of its fraction decides where no tie is near; else the compiler's own
float32 routines, whose rounding it is that counts: adding 1.5 * 2^23 rounds half to even.
"""

from __future__ import annotations

from ...targets import Target

NAME = "tvmc_scaled_exactly"
_MAGIC = 0x4B400000  # 1.5 * 2^23


def exact_product(target: Target) -> str:
    """The function for a core without an FPU."""
    if target.has("riscv"):
        return _function([], _RISCV)
    head = [".syntax unified", ".thumb", ".thumb_func"]
    return _function(head, (_THUMB2 if target.has("thumb2") else _THUMB1_START) + _THUMB_FLOAT)


def _function(head: list[str], body: str) -> str:
    lines = [f'.section .text.{NAME},"ax",%progbits', ".balign 4", *head]
    lines += [f".type {NAME}, %function", f"{NAME}:"]
    return "\n".join([*lines, body.strip(), f".size {NAME}, . - {NAME}"])


_THUMB1_START = """
push {r4, lr}
movs r4, r1
"""
_THUMB2 = """
push {r4, lr}
lsrs r2, r1, #23
rsb r2, r2, #134
sub r3, r2, #5
cmp r3, #26
bhi 1f
ubfx r3, r1, #0, #23
orr r3, r3, #0x800000
smull r12, r3, r0, r3
lsr r12, r12, r2
rsb r4, r2, #32
lsl r4, r3, r4
orr r12, r12, r4
asr r3, r3, r2
cmp r3, r12, asr #30
bne 2f
movw r4, #0x8008
add r12, r12, r4
movw r4, #0xfff0
tst r12, r4
beq 1f
asr r0, r12, #16
pop {r4, pc}
2:
mov r0, r3
b 3f
1:
mov r4, r1
"""
_THUMB_FLOAT = f"""
bl __aeabi_i2f
movs r1, r4
bl __aeabi_fmul
lsls r1, r0, #1
ldr r2, =0x95000000
cmp r1, r2
bhs 3f
ldr r1, ={_MAGIC:#x}
bl __aeabi_fadd
ldr r1, ={_MAGIC:#x}
subs r0, r0, r1
pop {{r4, pc}}
3:
asrs r0, r0, #31
movs r1, #1
orrs r0, r1
lsls r0, r0, #22
pop {{r4, pc}}
.balign 4
.ltorg
"""
_RISCV = f"""
srli a2, a1, 23
li a3, 134
sub a2, a3, a2
addi a3, a2, -5
sltiu a3, a3, 27
beqz a3, 1f
slli a3, a1, 9
srli a3, a3, 9
lui a4, 0x800
or a3, a3, a4
mulh a4, a0, a3
mul a5, a0, a3
srl a5, a5, a2
li t0, 32
sub t0, t0, a2
sll t1, a4, t0
or a5, a5, t1
sra a4, a4, a2
srai t1, a5, 30
bne a4, t1, 2f
lui t0, 8
addi t0, t0, 8
add a5, a5, t0
slli t1, a5, 16
srli t1, t1, 20
beqz t1, 1f
srai a0, a5, 16
ret
2:
mv a0, a4
j 3f
1:
addi sp, sp, -16
sw ra, 12(sp)
sw s0, 8(sp)
mv s0, a1
call __floatsisf
mv a1, s0
call __mulsf3
lw s0, 8(sp)
slli a1, a0, 1
li a2, 0x95000000
bgeu a1, a2, 4f
li a1, {_MAGIC:#x}
call __addsf3
li a1, {_MAGIC:#x}
sub a0, a0, a1
lw ra, 12(sp)
addi sp, sp, 16
ret
4:
lw ra, 12(sp)
addi sp, sp, 16
3:
srai a0, a0, 31
ori a0, a0, 1
slli a0, a0, 22
ret
"""
