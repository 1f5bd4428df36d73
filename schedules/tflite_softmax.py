"""Softmax under the TFLite rule; numerics in relay_passes/numerics/tflite_softmax.py.

Exponentials of all distances to the maximum come from a table; what is left is the reciprocal of
their sum, once a row: by Newton steps for 8-bit codes, from a second table for 16-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import te, tirx

from .prim import OPAQUE, make_prim_func
from .requantize import rounding_divide_by_pot, rounding_doubling_high_mul

# Sums of 8-bit exponentials have 12 integer and 19 fraction bits.
SUM_INTEGER_BITS = 12
# Start of the Newton iteration for 1/d, d in [1/2, 1): 48/17 - 32/17 d, 29 fraction bits.
NEWTON_FRACTION_BITS = 29
NEWTON_OFFSET = 1515870810
NEWTON_SLOPE = -1010580540
NEWTON_STEPS = 3


def _const(value: int, dtype: str = "int32") -> tirx.PrimExpr:
    return tirx.const(value, dtype)


def _shift_left_saturating(x: tirx.PrimExpr, bits: int) -> tirx.PrimExpr:
    wide = x.astype("int64") << _const(bits, "int64")
    low, high = _const(-(2**31), "int64"), _const(2**31 - 1, "int64")
    return te.max(te.min(wide, high), low).astype("int32")


class _Rows:
    """Maximum, exponentials and their sum along one axis."""

    def __init__(self, shape: Sequence[int], axis: int, dtype: str, table_dtype: str) -> None:
        self.shape, self.axis = list(shape), axis
        self.reduced = [dim for k, dim in enumerate(shape) if k != axis]
        entries = 256 if dtype.endswith("int8") else 65536
        self.x = te.placeholder(shape, dtype, name="x")
        self.table = te.placeholder((entries,), table_dtype, name="table")
        x, position = self.x, te.reduce_axis((0, shape[axis]), "k_max")
        peak = te.compute(
            self.reduced,
            lambda *i: te.max(x[self.full(i, position)].astype("int32"), axis=position),
            name="peak",
        )
        self.exponentials = te.compute(
            shape,
            lambda *i: self.table[peak[self.outer(i)] - x[i].astype("int32")].astype("int32"),
            name="exponentials",
        )

    def full(
        self, index: Sequence[tirx.PrimExpr], position: tirx.PrimExpr
    ) -> tuple[tirx.PrimExpr, ...]:
        return (*index[: self.axis], position, *index[self.axis :])

    def outer(self, index: Sequence[tirx.PrimExpr]) -> tuple[tirx.PrimExpr, ...]:
        return (*index[: self.axis], *index[self.axis + 1 :])

    def each(self, compute: Callable[..., tirx.PrimExpr], name: str) -> te.Tensor:
        """One value a row."""
        return te.compute(self.reduced, compute, name=name)

    def total(self, term: Callable[[tirx.PrimExpr], tirx.PrimExpr]) -> te.Tensor:
        """Sum of a function of the exponentials."""
        position = te.reduce_axis((0, self.shape[self.axis]), "k_sum")
        exps = self.exponentials
        return self.each(
            lambda *i: te.sum(term(exps[self.full(i, position)]), axis=position), "total"
        )

    def bit_length(self, total: te.Tensor) -> te.Tensor:
        """Bits of a positive int32."""
        bit = te.reduce_axis((0, 31), "bit")
        return self.each(
            lambda *i: te.sum(((total[i] >> bit) > _const(0)).astype("int32"), axis=bit),
            "bit_length",
        )


def _newton_start(half: tirx.PrimExpr) -> tirx.PrimExpr:
    return _const(NEWTON_OFFSET) + rounding_doubling_high_mul(half, _const(NEWTON_SLOPE))


def _newton_step(rows: _Rows, half: te.Tensor, x: te.Tensor, step: int) -> te.Tensor:
    """x + x (1 - half * x)."""
    one = _const(1 << NEWTON_FRACTION_BITS)
    rest = rows.each(
        lambda *i: one - rounding_doubling_high_mul(half[i], x[i]), f"newton_rest_{step}"
    )
    return rows.each(
        lambda *i: x[i] + _shift_left_saturating(rounding_doubling_high_mul(x[i], rest[i]), 2),
        f"newton_{step}",
    )


def tflite_softmax_8(shape: Sequence[int], axis: int, dtype: str, out_dtype: str) -> tirx.PrimFunc:
    """(codes, exponentials int32 [256]) -> codes of `out_dtype` along `axis`; scale 1/2^bits."""
    rows = _Rows(shape, axis, dtype, "int32")
    bits = 16 if out_dtype.endswith("16") else 8
    lowest = 0 if out_dtype.startswith("u") else -(1 << (bits - 1))
    total = rows.total(lambda e: rounding_divide_by_pot(e, _const(SUM_INTEGER_BITS)))
    length = rows.bit_length(total)
    # The sum scaled to [1/2, 1), 31 fraction bits.
    half = rows.each(lambda *i: total[i] << (_const(31) - length[i]), "half")
    x = rows.each(lambda *i: _newton_start(half[i]), "newton")
    for step in range(NEWTON_STEPS):
        x = _newton_step(rows, half, x, step)
    inverse = rows.each(lambda *i: _shift_left_saturating(x[i], 1), "inverse")

    def scale(*i: tirx.Var) -> tirx.PrimExpr:
        row = rows.outer(i)
        scaled = rounding_doubling_high_mul(rows.exponentials[i], inverse[row])
        exponent = length[row] + _const(SUM_INTEGER_BITS - 1 - bits)
        code = rounding_divide_by_pot(scaled, exponent) + _const(lowest)
        return te.min(code, _const(lowest + (1 << bits) - 1)).astype(out_dtype)

    out = te.compute(shape, scale, name="softmax")
    return make_prim_func(
        "tflite_softmax", [rows.x, rows.table], out, ["data", "table"], OPAQUE, {"axis": axis}
    )


def tflite_softmax_16(shape: Sequence[int], axis: int) -> tirx.PrimFunc:
    """(int16 codes, exponentials, reciprocals) -> int16 codes at scale 2^-15.

    Both tables are int16 [65536]; reciprocals[k] = 1 / (1 + k / 65535), 15 fraction bits.
    """
    rows = _Rows(shape, axis, "int16", "int16")
    reciprocals = te.placeholder((65536,), "int16", name="reciprocals")
    total = rows.total(lambda e: e)
    length = rows.bit_length(total)

    def position(*i: tirx.Var) -> tirx.PrimExpr:
        # The sum in [1, 2) with 16 fraction bits, less 1.
        aligned = total[i].astype("int64") << (_const(31) - length[i]).astype("int64")
        rounded = (aligned + _const(1 << 13, "int64")) >> _const(14, "int64")
        wanted = rounded.astype("int32") - _const(1 << 16)
        return te.max(te.min(wanted, _const(65535)), _const(0))

    where = rows.each(position, "position")

    def scale(*i: tirx.Var) -> tirx.PrimExpr:
        row = rows.outer(i)
        shift = (length[row] - _const(1)).astype("int64")
        inverse = reciprocals[where[row]].astype("int64")
        product = rows.exponentials[i].astype("int64") * inverse
        rounded = (product + (_const(1, "int64") << (shift - _const(1, "int64")))) >> shift
        low, high = _const(0, "int64"), _const(32767, "int64")
        return te.max(te.min(rounded, high), low).astype("int16")

    out = te.compute(shape, scale, name="softmax")
    return make_prim_func(
        "tflite_softmax", [rows.x, rows.table, reciprocals], out, ["data", "table", "table"],
        OPAQUE, {"axis": axis},
    )  # fmt: skip
