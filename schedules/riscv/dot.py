"""The inner instructions of the matrix kernels with RISC-V's vectors.

Vectors are groups of up to eight registers: the wider the group, the more multiply-adds an
instruction, and the fewer groups there are. Weights lie by channels; a byte of data is an operand
from a scalar register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...targets import Target
from ..dot import Dot, FloatDot
from ..spec import WeightedSpec

if TYPE_CHECKING:
    from tvm import ir

MOST_REGISTERS = 8
"""Of a group."""


class WideningDot(Dot):
    """acc[l] += x * w[l] (`vwmacc.vx` on 16-bit operands)"""

    name = "vwmacc"
    speed = 2
    data_dtype = "int8"

    def convert(self, value: ir.Expr) -> ir.Expr:
        return value

    def broadcast(self, value: ir.Expr) -> ir.Expr:
        from tvm import tirx

        return tirx.Broadcast(value.astype("int16"), self.lanes)

    def widen(self, weight: ir.Expr) -> ir.Expr:
        return weight.astype(f"int16x{self.lanes}")

    def accumulate(self, acc: ir.Expr, data: ir.Expr, weight: ir.Expr) -> ir.Expr:
        dtype = f"int32x{self.lanes}"
        return acc + data.astype(dtype) * weight.astype(dtype)


class UnsignedWideningDot(WideningDot):
    """The same for unsigned data."""

    data_dtype = "uint8"


def select_dot(spec: WeightedSpec, lanes: int) -> Dot | None:
    """The dot of a layer; None: no form for its numbers."""
    if spec.weight_zero_point or spec.group_size or spec.table_channels:
        return None
    return dot_for(spec.data_dtype, spec.weight_dtype, spec.acc_dtype, lanes)


def dot_for(data_dtype: str, weight_dtype: str, acc_dtype: str, lanes: int) -> Dot | None:
    """The dot of data, weights and sums of these dtypes; None: no form for them."""
    if data_dtype == "float32":
        is_float = weight_dtype == "float32"
        return FloatDot(lanes, "float32", fused=True) if is_float else None
    if weight_dtype != "int8" or acc_dtype != "int32":
        return None
    kinds: dict[str, type[Dot]] = {"int8": WideningDot, "uint8": UnsignedWideningDot}
    kind = kinds.get(data_dtype)
    return None if kind is None else kind(lanes, "int8", fused=True)


def registers_of_group(lanes: int, target: Target) -> int:
    """Registers that 32-bit numbers of all lanes take."""
    return max(1, lanes * 32 // target.vector_bits)
