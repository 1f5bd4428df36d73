"""Stored forms of a compressed weight that no standard operator decodes.

    w  =>  decode(codes, scales)        a private Relax function tagged `tvm_compress.encoding`

The function's body, in plain TIR, is the definition of the decoding, so every intermediate module
runs anywhere; kernels that read the parts directly replace it when they can. Plain int8/int16
weights need none of this: `R.dequantize` of a constant is their encoding.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..schedules.weights import pack_int4, unpack_int4
from .ir import constant, shape_of

ENCODING_ATTR = "tvm_compress.encoding"


def kernel_order(layout: str) -> str:
    """The layout's axes as kernels flatten them: space, input channels, output channels."""
    return "".join(letter for letter in "HWIO" if letter in layout)


def flatten(weight: np.ndarray, layout: str) -> np.ndarray:
    """Weight in graph layout => [K, N]."""
    order = [layout.index(letter) for letter in kernel_order(layout)]
    return np.ascontiguousarray(weight.transpose(order)).reshape(
        -1, weight.shape[layout.index("O")]
    )


@dataclass(frozen=True)
class Encoding(ABC):
    """A weight stored as parts, in the order in which kernels read it: [K, N], K counting the
    flattened (kernel row, kernel column, input channel).

    `layout` names the axes of the weight in the graph (OIHW, HWIO, OIW, IO ...), `shape` its shape.
    """

    layout: str
    shape: tuple[int, ...]

    @property
    def reduction_size(self) -> int:
        return int(np.prod(self.shape)) // self.shape[self.layout.index("O")]

    @property
    @abstractmethod
    def parts(self) -> list[np.ndarray]:
        """The stored arrays, in the order of the decoding function's parameters."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, for reports."""

    @abstractmethod
    def decode(self) -> np.ndarray:
        """float32 weight in the graph's layout."""

    def call(self, builder: relax.BlockBuilder) -> tvm.ir.Call:
        """`decode(parts)` as an expression; adds the decoding function to the builder's module."""
        fields = self._fields
        decode = builder.add_func(self._decoder(), f"decode_{fields['kind']}")
        params = [
            relax.Var(f"part{k}", relax.TensorType(list(part.shape), str(part.dtype)))
            for k, part in enumerate(self.parts)
        ]
        out_type = relax.TensorType(list(self.shape), "float32")
        weight = relax.Var("weight", out_type)
        body = builder.normalize(relax.call_tir(decode, relax.Tuple(params), out_ty=out_type))
        block = relax.BindingBlock([relax.VarBinding(weight, body)])
        spec = {**fields, "layout": self.layout, "shape": self.shape}
        function = relax.Function(params, relax.SeqExpr([block], weight), out_type, is_pure=True)
        function = function.with_attr(ENCODING_ATTR, json.dumps(spec))
        global_var = builder.add_func(function, f"weight_{fields['kind']}")
        return tvm.ir.Call(global_var, [relax.const(part) for part in self.parts])

    def _decoder(self) -> tirx.PrimFunc:
        """The decoding body: the definition of the encoding."""
        parts = [
            te.placeholder(part.shape, str(part.dtype), name=f"part{k}")
            for k, part in enumerate(self.parts)
        ]
        order = kernel_order(self.layout)
        sizes = [self.shape[self.layout.index(letter)] for letter in order[:-1]]

        def value(*index: tirx.Var) -> tirx.PrimExpr:
            k: tirx.PrimExpr = tirx.const(0, "int32")
            for letter, size in zip(order[:-1], sizes, strict=True):
                k = k * size + index[self.layout.index(letter)]
            return self._value(parts, k, index[self.layout.index("O")])

        out = te.compute(self.shape, value, name="decoded")
        return te.create_prim_func([*parts, out]).without_attr("global_symbol")

    @property
    @abstractmethod
    def _fields(self) -> dict[str, Any]:
        """What is not a part, as JSON; `kind` names the class."""

    @abstractmethod
    def _value(self, parts: list[te.Tensor], k: tirx.PrimExpr, n: tirx.PrimExpr) -> tirx.PrimExpr:
        """The weight's value at [k, n]."""

    def _unflatten(self, values: np.ndarray) -> np.ndarray:
        """[K, N] => the graph's layout."""
        order = kernel_order(self.layout)
        ordered = values.reshape([self.shape[self.layout.index(letter)] for letter in order])
        return np.ascontiguousarray(ordered.transpose([order.index(x) for x in self.layout]))


@dataclass(frozen=True)
class GroupWise(Encoding):
    """int8 or int4 codes with one scale per `group_size` weights of an output channel.

    w[k, n] = (codes[k, n] - zero_points[k // g, n]) * scales[k // g, n]; the last group may be
    shorter. For float activations.
    """

    dtype: str  # "int8" | "int4"
    group_size: int
    stored: np.ndarray
    """int8 [K, N], or uint8 [ceil(K/2), N] with position 2j in the low nibble."""
    scales: np.ndarray
    """float32 [ceil(K/g), N]."""
    zero_points: np.ndarray | None = None
    """int8 [ceil(K/g), N]."""

    @classmethod
    def from_codes(
        cls,
        codes: np.ndarray,
        scales: np.ndarray,
        layout: str,
        shape: tuple[int, ...],
        dtype: str,
        group_size: int,
        zero_points: np.ndarray | None = None,
    ) -> GroupWise:
        """codes int8 [K, N] in kernel order, scales [ceil(K/g), N]."""
        if dtype not in ("int8", "int4"):
            raise ValueError(f"group-wise codes of {dtype}; allowed: int8, int4")
        stored = pack_int4(codes) if dtype == "int4" else codes.astype(np.int8)
        return cls(
            layout, tuple(shape), dtype, group_size, stored, scales.astype(np.float32), zero_points
        )

    @property
    def parts(self) -> list[np.ndarray]:
        """The stored arrays, in the order of the decoding function's parameters."""
        zero_points = [] if self.zero_points is None else [self.zero_points]
        return [self.stored, self.scales, *zero_points]

    def codes(self) -> np.ndarray:
        """int8 [K, N]."""
        return (
            unpack_int4(self.stored, self.reduction_size) if self.dtype == "int4" else self.stored
        )

    def decode(self) -> np.ndarray:
        """float32 weight in the graph's layout."""
        k = np.arange(self.reduction_size) // self.group_size
        values = self.codes().astype(np.float32)  # [K, N]
        if self.zero_points is not None:
            values = values - self.zero_points[k].astype(np.float32)
        return self._unflatten(values * self.scales[k])

    @property
    def words(self) -> str:
        """What it is, for reports."""
        zero_points = "" if self.zero_points is None else " with zero points"
        return f"{self.dtype}/group {self.group_size}{zero_points}"

    def _value(self, parts: list[te.Tensor], k: tirx.PrimExpr, n: tirx.PrimExpr) -> tirx.PrimExpr:
        if self.dtype == "int4":
            code = _signed(_nibble(parts[0], k, n))
        else:
            code = parts[0][k, n].astype("int32")
        if self.zero_points is not None:
            code = code - parts[2][k // self.group_size, n].astype("int32")
        return code.astype("float32") * parts[1][k // self.group_size, n]

    @property
    def _fields(self) -> dict[str, Any]:
        return {"kind": "group_wise", "dtype": self.dtype, "group_size": self.group_size}


@dataclass(frozen=True)
class FourBit(Encoding):
    """4-bit codes of small integers, with one scale for each output channel.

    w[k, n] = integers[k, n] * multiples[k // g, n] * scales[n]
    integers[k, n] = codes[k, n], -8..7, or tables[n // c, codes[k, n]]

    For integer activations: everything but `scales` is in the integer sum.
    """

    stored: np.ndarray
    """uint8 [ceil(K/2), N], position 2j in the low nibble."""
    scales: np.ndarray
    """float32 [N]."""
    multiples: np.ndarray | None = None
    """uint8 [ceil(K/g), N]."""
    tables: np.ndarray | None = None
    """int8 [ceil(N/c), 16]."""
    group_size: int = 0
    """0 without multiples."""
    table_channels: int = 0
    """0 without tables."""

    @property
    def parts(self) -> list[np.ndarray]:
        optional = [part for part in (self.multiples, self.tables) if part is not None]
        return [self.stored, self.scales, *optional]

    @property
    def words(self) -> str:
        groups = f"group {self.group_size}" if self.group_size else "channel"
        if self.tables is None:
            return f"int4/{groups}"
        tables = "a table" if len(self.tables) == 1 else f"a table for {self.table_channels}"
        return f"{tables}/{groups}"

    def integers(self) -> np.ndarray:
        """What the scales multiply: int64 [K, N]."""
        codes = unpack_int4(self.stored, self.reduction_size)
        values = codes.astype(np.int64)
        if self.tables is not None:
            owners = np.arange(codes.shape[1]) // self.table_channels
            values = self.tables[owners, codes & 15].astype(np.int64)
        if self.multiples is not None:
            values = values * self.multiples[np.arange(len(values)) // self.group_size]
        return values

    def decode(self) -> np.ndarray:
        return self._unflatten(self.integers().astype(np.float32) * self.scales)

    def _value(self, parts: list[te.Tensor], k: tirx.PrimExpr, n: tirx.PrimExpr) -> tirx.PrimExpr:
        value = _nibble(parts[0], k, n)
        if self.tables is None:
            value = _signed(value)
        else:
            value = parts[-1][n // self.table_channels, value].astype("int32")
        if self.multiples is not None:
            value = value * parts[2][k // self.group_size, n].astype("int32")
        return value.astype("float32") * parts[1][n]

    @property
    def _fields(self) -> dict[str, Any]:
        return {
            "kind": "four_bit", "group_size": self.group_size,
            "table_channels": self.table_channels,
        }  # fmt: skip


def _nibble(stored: te.Tensor, k: tirx.PrimExpr, n: tirx.PrimExpr) -> tirx.PrimExpr:
    """The unsigned code at [k, n] of two in a byte."""
    byte = stored[k // 2, n].astype("int32")
    return tirx.bitwise_and(byte >> (k % 2 * 4), tirx.const(15, "int32"))


def _signed(nibble: tirx.PrimExpr) -> tirx.PrimExpr:
    """0..15 => -8..7"""
    return tirx.bitwise_xor(nibble, tirx.const(8, "int32")) - tirx.const(8, "int32")


def match_encoding(expr: tvm.ir.Expr, module: tvm.IRModule) -> GroupWise | FourBit | None:
    """The encoding behind `decode(parts)`, `None` for any other expression."""
    if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.GlobalVar):
        return None
    attrs = module[expr.op].attrs or {}
    if ENCODING_ATTR not in attrs:
        return None
    spec = json.loads(str(attrs[ENCODING_ATTR]))
    arrays = [constant(argument) for argument in expr.args]
    parts = [array for array in arrays if array is not None]
    if len(parts) < len(arrays):
        return None
    layout, shape, size = spec["layout"], tuple(spec["shape"]), int(spec["group_size"])
    assert shape_of(expr) in (None, shape)
    stored, scales, *others = parts
    if spec["kind"] == "group_wise":
        zero_points = others[0] if others else None
        return GroupWise(layout, shape, spec["dtype"], size, stored, scales, zero_points)
    channels = int(spec["table_channels"])
    multiples = others.pop(0) if size else None
    tables = others.pop(0) if channels else None
    return FourBit(layout, shape, stored, scales, multiples, tables, size, channels)
