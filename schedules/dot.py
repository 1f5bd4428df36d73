"""The inner instruction of a matrix kernel: what one step of the reduction does.

A step multiplies `group` consecutive reduction positions of one data value, broadcast, with as many
of `lanes` outputs and adds to their accumulators. The forms of integers are each instruction set's
own (`x86/dot.py`, `neon/dot.py`); floats are multiplied by an FMA everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tvm import ir


@dataclass(frozen=True)
class Dot:
    """Base: `lanes` 32-bit accumulators a register."""

    lanes: int
    weight_dtype: str
    """dtype of the codes in the packed weight."""
    fused: bool
    """Whether multiplication and addition are one instruction."""
    zero_point: int = 0
    """Subtracted from a code when it is widened."""
    chain: int = 1
    """Steps that are added before their sum goes to the accumulators."""

    name: ClassVar[str] = ""
    is_chained: ClassVar[bool] = False
    """Whether products are added by `pairs` in 16 bits, and a chain of them by `add_pairs`."""
    speed: ClassVar[int] = 1
    """Multiply-adds a cycle, compared with float32."""
    group: ClassVar[int] = 1
    acc_dtype: ClassVar[str] = "int32"
    data_dtype: ClassVar[str] = "float32"

    def convert(self, value: ir.Expr) -> ir.Expr:
        """A value of the layer's input (any lanes) as the kernel reads it."""
        raise NotImplementedError

    def convert_constant(self, value: int, dtype: str) -> int:
        """The same for a number."""
        return value + self.offset(dtype)

    def offset(self, dtype: str) -> int:
        """What `convert` adds to data of that dtype: sums are corrected by it times the weights."""
        return 0

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        """`group` converted values in every lane."""
        raise NotImplementedError

    def widen(self, weight: ir.Expr) -> ir.Expr:
        """lanes * group packed codes as an operand."""
        raise NotImplementedError

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        """acc + data * weight."""
        raise NotImplementedError

    def pairs(self, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        """The products of one step of a chain, in 16 bits."""
        raise NotImplementedError

    def add_pairs(self, acc: ir.Expr, pairs: ir.Expr) -> ir.Expr:
        """acc + what the chain has summed."""
        raise NotImplementedError


class FloatDot(Dot):
    """acc[l] += x * w[l]"""

    name = "fma"
    acc_dtype = "float32"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return value

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        return tirx.Broadcast(value, self.lanes)

    def widen(self, weight: ir.Expr) -> ir.Expr:
        if self.weight_dtype == "float32":
            return weight
        # Through int32: AVX2 and AVX-512F have no conversion from bytes to float.
        return weight.astype(f"int32x{self.lanes}").astype(f"float32x{self.lanes}")

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        from tvm import tirx

        if not self.fused:
            return acc + data * weight
        return tirx.call_llvm_pure_intrin(
            f"float32x{self.lanes}", f"llvm.fma.v{self.lanes}f32", data, weight, acc
        )


def element(value: ir.Expr) -> str:
    """The dtype of a scalar's or a vector's elements."""
    return str(value.ty.dtype).partition("x")[0]


def as_dtype(value: ir.Expr, dtype: str) -> ir.Expr:
    """Elements converted, lanes kept."""
    return value.astype(str(value.ty.dtype).replace(element(value), dtype))


def flip_sign(value: ir.Expr) -> ir.Expr:
    """int8 x => uint8 x + 128, uint8 x => int8 x - 128: the top bit turned over."""
    from tvm import tirx

    dtype, kind = str(value.ty.dtype), element(value)
    other = "uint8" if kind == "int8" else "int8"
    lanes = int(dtype.partition("x")[2] or 1)
    flip = tirx.const(-128 if kind == "int8" else 128, kind)
    flipped = tirx.bitwise_xor(value, flip if lanes == 1 else tirx.Broadcast(flip, lanes))
    return tirx.reinterpret(dtype.replace(kind, other), flipped)
