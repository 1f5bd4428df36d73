"""What the lowering knows about a tensor while it walks the graph.

A float tensor of graph form is kept as the integer expression that it came from for as long as the
operators behind it have an integer form; only `Lowering.native` turns it into real floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm

from ..encodings import FourBit, GroupWise


@dataclass(frozen=True)
class QuantParams:
    """real = scale * (code - zero_point), one scale for the whole tensor."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code of the dtype."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)

    @property
    def span(self) -> int:
        """The largest |code - zero_point|."""
        return max(abs(bound - self.zero_point) for bound in self.bounds)


@dataclass(frozen=True)
class Tensor:
    """A tensor that exists in the lowered graph.

    `shape` is the logical shape of graph form; physical axis i of `expr` is logical axis `perm[i]`.
    `quant` is set for codes.
    """

    expr: tvm.ir.Expr
    shape: tuple[int, ...]
    dtype: str
    perm: tuple[int, ...]
    quant: QuantParams | None = None

    @property
    def physical_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.perm)

    @property
    def is_native(self) -> bool:
        """Whether the physical order is the logical one (axes of size 1 may go anywhere)."""
        long_axes = [axis for axis in self.perm if self.shape[axis] != 1]
        return long_axes == sorted(long_axes)


@dataclass(frozen=True)
class Dequantised:
    """real = scale * (codes - zero_point)."""

    codes: Tensor


@dataclass(frozen=True)
class Unary:
    """A function of one tensor of codes: `values[code - min]` is its float value.

    `call` is the operator when it is a single one.
    """

    codes: Tensor
    values: np.ndarray
    call: tvm.ir.Call | None = None


@dataclass(frozen=True)
class Accumulator:
    """real = clip((sums + bias) * scale, *clamp); `bias` (int64) and `scale` (float64) broadcast
    against the logical shape. `limit`, as broadcastable, is a proven bound of |sums|.

    `centre` is the part of `bias` that takes the data's zero point out, and `reach` a proven bound
    of |sums + centre|: the same whether codes are counted from zero or not."""

    sums: Tensor
    scale: np.ndarray
    bias: np.ndarray
    clamp: tuple[float, float] = (-np.inf, np.inf)
    layer: str | None = None
    limit: np.ndarray | None = None
    centre: np.ndarray | None = None
    reach: np.ndarray | None = None

    @property
    def is_clamped(self) -> bool:
        return self.clamp != (-np.inf, np.inf)


@dataclass(frozen=True)
class Sum:
    """real = clip(Σ sign_k * term_k + offset, *clamp); terms and `offset` broadcast as in NumPy."""

    terms: tuple[tuple[float, Accumulator | Dequantised], ...]
    offset: np.ndarray
    clamp: tuple[float, float] = (-np.inf, np.inf)

    @property
    def is_clamped(self) -> bool:
        return self.clamp != (-np.inf, np.inf)


@dataclass(frozen=True)
class Many:
    """The fields of a tuple."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Concat:
    """Quantised tensors with different parameters, to be joined along a logical axis."""

    parts: tuple[Tensor, ...]
    axis: int


@dataclass(frozen=True)
class Lazy:
    """An integer kernel that needs the output's parameters: called with them, returns the codes."""

    emit: Callable[[QuantParams, str], Tensor | None]


@dataclass(frozen=True)
class Constant:
    """A constant; `codes` and `scale` are set when it was stored quantised."""

    array: np.ndarray
    expr: tvm.ir.Expr
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int = 0
    encoding: GroupWise | FourBit | None = None


@dataclass(frozen=True)
class Other:
    """Anything that is not one tensor: tuples, shapes, the result of an `If`."""

    expr: tvm.ir.Expr


Value = Tensor | Dequantised | Unary | Accumulator | Sum | Concat | Lazy | Many | Constant | Other

__all__ = [
    "Accumulator",
    "Concat",
    "Constant",
    "Dequantised",
    "Lazy",
    "Many",
    "Other",
    "QuantParams",
    "Sum",
    "Tensor",
    "Unary",
    "Value",
]
