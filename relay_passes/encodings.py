"""Stored forms of a compressed weight that no standard operator decodes.

    w  =>  decode(codes, scales)        a private Relax function tagged `tvm_compress.encoding`

The function's body, in plain TIR, is the definition of the decoding, so every intermediate module
runs anywhere; kernels that read the parts directly replace it when they can. Plain int8/int16
weights need none of this: `R.dequantize` of a constant is their encoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..schedules.weights import pack_int4, unpack_int4
from .ir import constant, shape_of

ENCODING_ATTR = "tvm_compress.encoding"


@dataclass(frozen=True)
class GroupWise:
    """int8 or int4 codes with one scale per `group_size` weights of an output channel.

    w[k, n] = (codes[k, n] - zero_points[k // g, n]) * scales[k // g, n], k counting the flattened
    (kernel row, kernel column, input channel) as the kernels do; the last group may be shorter.
    `layout` names the axes of the weight in the graph (OIHW, HWIO, OIW, IO ...), `shape` its shape.
    """

    dtype: str  # "int8" | "int4"
    group_size: int
    layout: str
    shape: tuple[int, ...]
    stored: np.ndarray
    """int8 [K, N], or uint8 [ceil(K/2), N] with position 2j in the low nibble."""
    scales: np.ndarray
    """float32 [ceil(K/g), N]."""
    zero_points: np.ndarray | None = None
    """int8 [ceil(K/g), N]."""

    @staticmethod
    def kernel_order(layout: str) -> str:
        """The layout's axes as kernels flatten them: space, input channels, output channels."""
        return "".join(letter for letter in "HWIO" if letter in layout)

    @classmethod
    def flatten(cls, weight: np.ndarray, layout: str) -> np.ndarray:
        """Weight in graph layout => [K, N]."""
        order = [layout.index(letter) for letter in cls.kernel_order(layout)]
        return np.ascontiguousarray(weight.transpose(order)).reshape(
            -1, weight.shape[layout.index("O")]
        )

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
            dtype, group_size, layout, tuple(shape), stored, scales.astype(np.float32), zero_points
        )

    @property
    def reduction_size(self) -> int:
        return int(np.prod(self.shape)) // self.shape[self.layout.index("O")]

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
        values = values * self.scales[k]
        order = self.kernel_order(self.layout)
        ordered = values.reshape([self.shape[self.layout.index(letter)] for letter in order])
        return np.ascontiguousarray(ordered.transpose([order.index(x) for x in self.layout]))

    def call(self, builder: relax.BlockBuilder) -> tvm.ir.Call:
        """`decode(parts)` as an expression; adds the decoding function to the builder's module."""
        decode = builder.add_func(self._decoder(), f"decode_group_{self.dtype}")
        params = [
            relax.Var(f"part{k}", relax.TensorType(list(part.shape), str(part.dtype)))
            for k, part in enumerate(self.parts)
        ]
        out_type = relax.TensorType(list(self.shape), "float32")
        weight = relax.Var("weight", out_type)
        body = builder.normalize(relax.call_tir(decode, relax.Tuple(params), out_ty=out_type))
        block = relax.BindingBlock([relax.VarBinding(weight, body)])
        spec = {
            "kind": "group_wise", "dtype": self.dtype, "group_size": self.group_size,
            "layout": self.layout, "shape": self.shape,
        }  # fmt: skip
        function = relax.Function(params, relax.SeqExpr([block], weight), out_type, is_pure=True)
        function = function.with_attr(ENCODING_ATTR, json.dumps(spec))
        global_var = builder.add_func(function, f"weight_group_{self.dtype}")
        return tvm.ir.Call(global_var, [relax.const(part) for part in self.parts])

    def _decoder(self) -> tirx.PrimFunc:
        parts = [
            te.placeholder(part.shape, str(part.dtype), name=f"part{k}")
            for k, part in enumerate(self.parts)
        ]
        order = self.kernel_order(self.layout)
        sizes = [self.shape[self.layout.index(letter)] for letter in order[:-1]]

        def value(*index: tirx.Var) -> tirx.PrimExpr:
            k: tirx.PrimExpr = tirx.const(0, "int32")
            for letter, size in zip(order[:-1], sizes, strict=True):
                k = k * size + index[self.layout.index(letter)]
            n = index[self.layout.index("O")]
            if self.dtype == "int4":
                byte = parts[0][k // 2, n].astype("int32")
                nibble = tirx.bitwise_and(byte >> (k % 2 * 4), tirx.const(15, "int32"))
                code = tirx.bitwise_xor(nibble, tirx.const(8, "int32")) - tirx.const(8, "int32")
            else:
                code = parts[0][k, n].astype("int32")
            if self.zero_points is not None:
                code = code - parts[2][k // self.group_size, n].astype("int32")
            return code.astype("float32") * parts[1][k // self.group_size, n]

        out = te.compute(self.shape, value, name="decoded")
        return te.create_prim_func([*parts, out]).without_attr("global_symbol")


def match_encoding(expr: tvm.ir.Expr, module: tvm.IRModule) -> GroupWise | None:
    """The encoding behind `decode(parts)`, `None` for any other expression."""
    if not isinstance(expr, tvm.ir.Call) or not isinstance(expr.op, tvm.ir.GlobalVar):
        return None
    attrs = module[expr.op].attrs or {}
    if ENCODING_ATTR not in attrs:
        return None
    spec = json.loads(str(attrs[ENCODING_ATTR]))
    parts = [constant(argument) for argument in expr.args]
    if spec["kind"] != "group_wise" or any(part is None for part in parts):
        return None
    stored, scales, *zero_points = parts
    assert stored is not None and scales is not None
    assert shape_of(expr) in (None, tuple(spec["shape"]))
    return GroupWise(
        spec["dtype"],
        int(spec["group_size"]),
        spec["layout"],
        tuple(spec["shape"]),
        stored,
        scales,
        zero_points[0] if zero_points else None,
    )
