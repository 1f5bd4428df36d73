"""conv(pad(x, 0), w) => conv(x, w, padding): TensorFlow's "same" arrives as an explicit pad."""

from __future__ import annotations

import math

import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import constant, ints, op_name, shape_of
from .anchors import CONVOLUTIONS, with_data_and_padding
from .rewrite import Rewriter, Var, rewrite_module


@tvm.transform.module_pass(opt_level=0, name="FoldPad")
class FoldPad:
    """conv(pad(x), w) => conv with (asymmetric) padding; average and maximum pooling alike.

    A convolution takes zero padding of its spatial axes, also as `conv(dequantize(pad(q, zero
    point)))`. An average pool without padding of its own then counts the padding; a maximum pool
    takes `-inf`, or zero where its input is never negative.
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _FoldPad)


class _FoldPad(Rewriter):
    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        name = op_name(value)
        if name not in CONVOLUTIONS and name not in ("relax.nn.avg_pool2d", "relax.nn.max_pool2d"):
            return None
        pad = self.value(value.args[0])
        quantised = None
        if op_name(pad) == "relax.dequantize":
            quantised, pad = pad, self.value(pad.args[0])
        if op_name(pad) != "relax.nn.pad" or str(pad.attrs.pad_mode) != "constant":
            return None
        layout = str(value.attrs.data_layout if name in CONVOLUTIONS else value.attrs.layout)
        widths = _spatial(ints(pad.attrs.pad_width), layout)
        if widths is None:
            return None
        before, after = widths
        fill = float(pad.attrs.pad_value)
        data = pad.args[0]
        if quantised is not None:
            # Integers padded with their zero point are reals padded with zero.
            zero_point = constant(quantised.args[2])
            if name == "relax.nn.max_pool2d" or zero_point is None or zero_point.size != 1:
                return None
            if constant(quantised.args[1]) is None or fill != int(zero_point.reshape(())):
                return None
            fill = 0.0
            data = relax.Call(
                quantised.op, [data, *quantised.args[1:]], quantised.attrs, quantised.ty_args
            )
        rank = len(before)
        own = _expand(ints(value.attrs.padding), rank)
        if name in CONVOLUTIONS:
            if fill != 0:
                return None
            padding = [a + b for a, b in zip(before + after, own, strict=True)]
            return with_data_and_padding(value, data, padding)
        if any(own) or value.attrs.ceil_mode:
            return None
        if name == "relax.nn.avg_pool2d":
            return _pool(value, data, before + after, True) if fill == 0 else None
        harmless = fill == -math.inf or (fill == 0 and self._never_negative(data))
        kernel = ints(value.attrs.pool_size)
        if harmless and all(w < k for w, k in zip(before + after, kernel * 2, strict=True)):
            return _pool(value, data, before + after, bool(value.attrs.count_include_pad))
        return None

    def _never_negative(self, expr: Expr) -> bool:
        source = self.value(expr)
        if op_name(source) == "relax.clip":
            return float(getattr(source.args[1], "value", -1)) >= 0
        return op_name(source) in ("relax.nn.relu", "relax.sigmoid")


def _spatial(widths: tuple[int, ...], layout: str) -> tuple[list[int], list[int]] | None:
    """(begins, ends) of the spatial axes; `None` when batch or channels are padded too."""
    pairs = [widths[2 * i : 2 * i + 2] for i in range(len(widths) // 2)]
    if len(pairs) != len(layout):
        return None
    if any(any(pair) for pair, axis in zip(pairs, layout, strict=True) if axis in "NC"):
        return None
    spatial = [pair for pair, axis in zip(pairs, layout, strict=True) if axis not in "NC"]
    return [pair[0] for pair in spatial], [pair[1] for pair in spatial]


def _expand(padding: tuple[int, ...], rank: int) -> list[int]:
    """1, `rank` or `2 * rank` numbers => all begins, then all ends."""
    if len(padding) == 1:
        return list(padding) * (2 * rank)
    return list(padding) * 2 if len(padding) == rank else list(padding)


def _pool(value: Expr, data: Expr, padding: list[int], include: bool) -> Expr:
    attrs = value.attrs
    operator = (
        relax.op.nn.avg_pool2d
        if op_name(value) == "relax.nn.avg_pool2d"
        else relax.op.nn.max_pool2d
    )
    assert shape_of(value) is not None
    return operator(
        data,
        [int(k) for k in attrs.pool_size],
        [int(s) for s in attrs.strides],
        padding,
        [int(d) for d in attrs.dilation],
        False,
        include,
        str(attrs.layout),
        str(attrs.out_layout) or None,
    )
