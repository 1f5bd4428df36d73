"""conv(x, w) => conv(x[alive], w[alive, alive]) + what the dead channels of x always add.

Trained with decay, many channels end with weights that are all zero once they are integers: of the
MLPerf Tiny person detector's 13 pointwise layers, the last six compute 4 % to 45 % of theirs. Such
a channel is the same number at every place whatever the input: it leaves the tensor, and what the
next layers would have made of it goes into their biases. A channel whose readers' weights are all
zero leaves as well. The integers that remain do not change.

Works on the graph form, on chains of convolutions and linear layers with quantisers between them,
through pooling, ReLU and reshapes; channels of all other tensors stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import Expr

from .ir import array_const, bindings, constant, immediate, ints, op_name, shape_of
from .quantize_weights import weight_layout

DEAD_CHANNELS_ATTR = "tvm_compress.dead_channels"
"""Of `main` (JSON): layer => how many of its channels stay, in words."""

UNIT = 4
"""Channels are kept in multiples of it, which kernels load as words."""

CERTAIN = 0.01
"""Of a step: a constant nearer to the middle between two codes might be rounded either way. Rules
that round twice do so to whole sums first, so what one more in a sum is comes on top."""

_KEEPS_CHANNELS = frozenset(
    f"relax.{name}"
    for name in (
        "quantize", "dequantize", "nn.relu", "clip", "nn.avg_pool2d", "nn.adaptive_avg_pool2d",
        "mean", "reshape",
    )
)  # fmt: skip

Var: TypeAlias = tvm.ir.Var
Channels: TypeAlias = NDArray[
    np.float64
]  # the value of each channel where it is the same everywhere, or NaN


@dataclass
class _Tensor:
    """What is known about a variable with channels."""

    axis: int
    values: Channels
    grain: NDArray[np.float64]
    """What one more in its integers is."""
    group: int
    """Tensors of one group keep the same channels."""


@dataclass
class _Weights:
    """A constant in codes that one operator reads."""

    codes: np.ndarray
    scales: np.ndarray
    axis: int

    def reals(self) -> NDArray[np.float64]:
        scales = self.scales.astype(np.float64)
        if self.scales.size > 1:
            shape = [1] * self.codes.ndim
            shape[self.axis] = -1
            scales = scales.reshape(shape)
        return self.codes.astype(np.float64) * scales


@dataclass
class _Layer:
    """A convolution or product of `data`; `weight` and `bias` are bindings of codes."""

    data: Var
    weight: Var
    sums: NDArray[np.int64]  # [O, I]: weights added up over the kernel
    is_used: NDArray[np.bool_]  # [O, I]: some weight is not zero
    is_depthwise: bool
    is_padded: bool
    grain: NDArray[np.float64]
    bias: Var | None = None
    """What a sum can be corrected by: its codes count what the sums count."""


@tvm.transform.module_pass(opt_level=0, name="RemoveDeadChannels")
class RemoveDeadChannels:
    """Works on `main`; a graph with branches stays as it is."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        function = module["main"]
        if any(
            not isinstance(b, relax.VarBinding) or isinstance(b.value, relax.If)
            for b in bindings(function)
        ):
            return module
        removal = _Removal(function)
        if not removal.removes:
            return module
        result = module.clone()
        noted = {"global_symbol": "main", DEAD_CHANNELS_ATTR: json.dumps(removal.words())}
        result["main"] = removal.rewritten().with_attrs(noted)
        return result


@dataclass
class _Removal:
    function: relax.Function
    tensors: dict[Var, _Tensor] = field(default_factory=dict)
    layers: dict[Var, _Layer] = field(default_factory=dict)
    biases: dict[Var, int] = field(default_factory=dict)  # and the group that they are added to
    kept: dict[int, NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = {b.var: b.value for b in bindings(self.function)}
        self.readers: dict[Var, list[Var | None]] = {}
        for var, value in self.values.items():
            for used in relax.analysis.free_vars(value):
                self.readers.setdefault(used, []).append(var)
        for used in relax.analysis.free_vars(self.function.body.body):
            self.readers.setdefault(used, []).append(None)
        for var, value in self.values.items():
            tensor = self._tensor(var, value)
            if tensor is not None:
                self.tensors[var] = tensor
        self._mark()

    @property
    def removes(self) -> bool:
        return any(not kept.all() for kept in self.kept.values())

    def words(self) -> dict[str, str]:
        """Layer => how many of its channels stay, where some leave."""
        masks = {layer.name: self.kept[self._of(layer)] for layer in self.layers}
        return {
            name: f"{len(kept)} -> {int(kept.sum())} channels, the others dead"
            for name, kept in masks.items()
            if not kept.all()
        }

    # --- forwards: what is constant -------------------------------------------------------------

    def _tensor(self, var: Var, value: Expr) -> _Tensor | None:
        shape, operator = shape_of(var), op_name(value)
        if shape is None or operator is None:
            return None
        if operator in ("relax.nn.conv2d", "relax.matmul"):
            return self._layer(var, value)
        source = self.tensors.get(value.args[0]) if isinstance(value.args[0], tvm.ir.Var) else None
        if source is None:
            return None
        before = shape_of(value.args[0])
        assert before is not None
        if operator == "relax.add":
            return self._biased(var, value, source)
        if operator not in _KEEPS_CHANNELS or not _is_unpadded(value):
            return None
        axis = source.axis
        if operator == "relax.mean":
            axes = [a % len(before) for a in ints(value.attrs.axis or range(len(before)))]
            if axis in axes or 0 in axes:
                return None
            if not bool(value.attrs.keepdims):
                axis -= sum(a < axis for a in axes)
        elif operator == "relax.reshape":
            if any(side != 1 for i, side in enumerate(before) if i not in (0, axis)):
                return None
            if shape[0] != before[0] or sorted(shape[1:])[-1:] != [before[axis]]:
                return None
            axis = 1 + shape[1:].index(before[axis])
        values, grain = source.values, source.grain
        if operator in ("relax.quantize", "relax.dequantize"):
            scale, zero = constant(value.args[1]), constant(value.args[2])
            if scale is None or zero is None or scale.size > 1 or zero.size > 1:
                return None
            step, offset = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
            if operator == "relax.quantize":
                certain = np.minimum(CERTAIN + grain / step, 0.49)
                values = _codes(values / step + offset, certain, str(value.attrs.out_dtype))
            else:
                values = (values - offset) * step
            grain = np.full(len(values), step)
        elif operator == "relax.nn.relu":
            values = np.maximum(values, 0.0)
        elif operator == "relax.clip":
            low, high = (immediate(bound) for bound in value.args[1:3])
            values = np.clip(values, low, high)
        return _Tensor(axis, values, grain, source.group)

    def _layer(self, var: Var, value: Expr) -> _Tensor | None:
        """Also of an input whose channels nothing is known about."""
        data, weight = value.args
        found = self._weights(weight)
        if (
            found is None
            or not isinstance(data, tvm.ir.Var)
            or len(self.readers.get(weight, [])) != 1
        ):
            return None
        is_matmul = op_name(value) == "relax.matmul"
        shape, layout = shape_of(data), weight_layout(value)
        if shape is None or len(layout) != found.codes.ndim:
            return None
        groups = 1 if is_matmul else int(value.attrs.groups)
        data_axis = len(shape) - 1 if is_matmul else str(value.attrs.data_layout).index("C")
        axis = data_axis if is_matmul else str(value.attrs.out_layout).index("C")
        order = [layout.index("O"), layout.index("I")]
        moved = np.moveaxis(found.codes, order, (0, 1)).astype(np.int64)
        moved = moved.reshape(*moved.shape[:2], -1)  # [O, I, kernel]
        outputs = moved.shape[0]
        is_depthwise = groups > 1
        if is_depthwise and not (groups == outputs == shape[data_axis] and moved.shape[1] == 1):
            return None
        source = self.tensors.get(data)
        if (source is None and is_depthwise) or (source and source.axis != data_axis):
            return None
        is_padded = not is_matmul and any(ints(value.attrs.padding))
        grain = found.scales.astype(np.float64) * np.ones(outputs) * self._step(data)
        layer = _Layer(
            data, weight, moved.sum(2), (moved != 0).any(2), is_depthwise, is_padded, grain
        )
        self.layers[var] = layer
        inputs = np.full(shape[data_axis], np.nan) if source is None else source.values
        reals = np.moveaxis(found.reals(), order, (0, 1)).reshape(*moved.shape).sum(2)  # [O, I]
        usable = np.asarray((inputs == 0.0) | (~np.isnan(inputs) & (not is_padded)))
        if is_depthwise:
            known = usable | ~layer.is_used[:, 0]
            values = np.where(known, np.nan_to_num(inputs) * reals[:, 0], np.nan)
        else:
            known = ~(layer.is_used & ~usable).any(1)
            values = np.where(known, reals @ np.nan_to_num(inputs), np.nan)
        group = source.group if is_depthwise and source is not None else self._group(outputs)
        return _Tensor(axis, values, grain, group)

    def _step(self, data: Var) -> float:
        """Of the codes that a variable is dequantised from; NaN: it is not."""
        value = self.values.get(data)
        is_dequantized = value is not None and op_name(value) == "relax.dequantize"
        scale = constant(value.args[1]) if value is not None and is_dequantized else None
        return float(scale.reshape(-1)[0]) if scale is not None and scale.size == 1 else np.nan

    def _group(self, channels: int) -> int:
        self.kept[len(self.kept)] = np.zeros(channels, bool)
        return len(self.kept) - 1

    def _biased(self, var: Var, value: Expr, source: _Tensor) -> _Tensor | None:
        bias, shape = self._weights(value.args[1]), shape_of(var)
        if bias is None or shape is None or len(self.readers[value.args[1]]) != 1:
            return None
        wanted = [1] * len(shape)
        wanted[source.axis] = len(source.values)
        if [1] * (len(shape) - bias.codes.ndim) + list(bias.codes.shape) != wanted:
            return None
        self.biases[value.args[1]] = source.group
        layer = self.layers.get(value.args[0])
        if (
            layer is not None
            and len(self.readers[value.args[0]]) == 1
            and np.allclose(bias.scales, layer.grain, rtol=1e-4, atol=0.0)
        ):
            layer.bias = value.args[1]
        values = source.values + bias.reals().reshape(-1)
        return _Tensor(source.axis, values, source.grain, source.group)

    def _weights(self, expr: Expr) -> _Weights | None:
        value = self.values.get(expr) if isinstance(expr, tvm.ir.Var) else None
        if value is None or op_name(value) != "relax.dequantize":
            return None
        codes, scales, zeros = (constant(argument) for argument in value.args)
        if codes is None or scales is None or zeros is None or np.any(zeros):
            return None
        axis = int(value.attrs.axis) % max(codes.ndim, 1)
        return _Weights(codes, scales.reshape(-1), axis)

    # --- backwards: what is needed --------------------------------------------------------------

    def _mark(self) -> None:
        """Least sets of kept channels that hold all that is needed, in whole units."""
        for var in self.tensors:
            if any(not self._is_known(reader, var) for reader in self.readers.get(var, [None])):
                self.kept[self.tensors[var].group][:] = True
        again = True
        while again:
            before = sum(int(kept.sum()) for kept in self.kept.values())
            for var, layer in self.layers.items():
                source = self.tensors.get(layer.data)
                if source is not None and not layer.is_depthwise:
                    self.kept[source.group] |= self._needed(layer, self.kept[self._of(var)], source)
            for kept in self.kept.values():
                missing = -int(kept.sum()) % UNIT if kept.any() else min(UNIT, len(kept))
                kept[np.flatnonzero(~kept)[:missing]] = True
            again = before != sum(int(kept.sum()) for kept in self.kept.values())

    def _of(self, var: Var) -> int:
        return self.tensors[var].group

    def _is_known(self, reader: Var | None, var: Var) -> bool:
        """Whether a reader can do with fewer channels of `var`."""
        if reader in self.layers:
            return self.layers[reader].data.same_as(var)
        return reader in self.tensors

    def _needed(self, layer: _Layer, outputs: NDArray[np.bool_], source: _Tensor) -> NDArray:
        """Channels of its input that a layer cannot do without."""
        read = layer.is_used[outputs].any(0)
        is_zero = source.values == 0.0
        can_add = layer.bias is not None and not layer.is_padded
        return read & ~(is_zero | (~np.isnan(source.values) & can_add))

    # --- the new function -----------------------------------------------------------------------

    def rewritten(self) -> relax.Function:
        builder = relax.BlockBuilder()
        renamed: dict[Var, Var] = {}
        constants = dict(self._constants())
        listed = []
        for var, value in self.values.items():
            new = constants.get(var)
            if new is None:
                new = self._rewritten(var, value, renamed)
            new = builder.normalize(new)
            renamed[var] = relax.Var(var.name, new.ty)
            listed.append(relax.VarBinding(renamed[var], new))
        result = _renamed(self.function.body.body, renamed)
        function = self.function
        return relax.Function(
            function.params,
            relax.SeqExpr([relax.BindingBlock(listed)], result),
            function.ret_ty,
            function.is_pure,
            function.attrs,
        )

    def _constants(self) -> Iterator[tuple[Var, Expr]]:
        """Weights and biases with what is left of them."""
        corrections: dict[Var, NDArray[np.int64]] = {}
        for var, layer in self.layers.items():
            outputs = self.kept[self._of(var)]
            source = self.tensors.get(layer.data)
            inputs = None if source is None or layer.is_depthwise else self.kept[source.group]
            call = self.values[var]
            layout = weight_layout(call)
            axes = {layout.index("O"): outputs}
            if inputs is not None:
                axes[layout.index("I")] = inputs
            yield layer.weight, self._sliced(layer.weight, axes)
            if layer.bias is not None and inputs is not None:
                counted = self._counted(layer.data, ~inputs)
                corrections[layer.bias] = layer.sums[:, ~inputs] @ counted
        for var, group in self.biases.items():
            codes = constant(self.values[var].args[0])
            assert codes is not None
            if var in corrections:
                codes = (codes + corrections[var].reshape(codes.shape)).astype(codes.dtype)
            axis = int(np.argmax(codes.shape))
            yield var, self._sliced(var, {axis: self.kept[group]}, codes)

    def _counted(self, data: Var, channels: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The values of removed channels in steps of their quantiser; 0 for those nobody reads."""
        steps = self.tensors[data].values[channels] / self._step(data)
        return np.rint(np.nan_to_num(steps)).astype(np.int64)

    def _sliced(
        self, var: Var, axes: dict[int, NDArray[np.bool_]], codes: np.ndarray | None = None
    ) -> Expr:
        value = self.values[var]
        found = self._weights(var)
        assert found is not None
        codes = found.codes if codes is None else codes
        for axis, kept in axes.items():
            codes = np.compress(kept, codes, axis)
        scales = constant(value.args[1])
        assert scales is not None
        if scales.size > 1 and found.axis in axes:
            scales = scales.reshape(-1)[axes[found.axis]]
        arguments = [array_const(codes), array_const(scales), value.args[2]]
        return relax.Call(value.op, arguments, value.attrs)

    def _rewritten(self, var: Var, value: Expr, renamed: dict[Var, Var]) -> Expr:
        if var in self.layers and self.layers[var].is_depthwise:
            attrs = value.attrs
            return relax.op.nn.conv2d(
                *(renamed.get(argument, argument) for argument in value.args),
                strides=ints(attrs.strides),
                padding=ints(attrs.padding),
                dilation=ints(attrs.dilation),
                groups=int(self.kept[self._of(var)].sum()),
                data_layout=str(attrs.data_layout),
                kernel_layout=str(attrs.kernel_layout),
                out_layout=str(attrs.out_layout),
                out_dtype=attrs.out_dtype or None,
            )
        if op_name(value) == "relax.reshape" and var in self.tensors:
            tensor, shape = self.tensors[var], shape_of(var)
            assert shape is not None
            sides = list(shape)
            sides[tensor.axis] = int(self.kept[tensor.group].sum())
            return relax.op.reshape(renamed.get(value.args[0], value.args[0]), sides)
        return _renamed(value, renamed)


def _codes(steps: Channels, certain: NDArray[np.float64], dtype: str) -> Channels:
    """The codes that real numbers become, NaN where rules of rounding might differ."""
    limits = np.iinfo(dtype)
    inside = (steps > limits.min + 0.5 - certain) & (steps < limits.max - 0.5 + certain)
    unsure = inside & (np.abs(steps - np.floor(steps) - 0.5) < certain)
    return np.where(unsure, np.nan, np.clip(np.rint(steps), limits.min, limits.max))


def _is_unpadded(value: Expr) -> bool:
    if op_name(value) != "relax.nn.avg_pool2d":
        return True
    return not any(ints(value.attrs.padding)) and not bool(value.attrs.ceil_mode)


def _renamed(expr: Expr, renamed: dict[Var, Var]) -> Expr:
    if isinstance(expr, tvm.ir.Var):
        return renamed.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_renamed(item, renamed) for item in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_renamed(expr.tuple_value, renamed), expr.index)
    if isinstance(expr, tvm.ir.Call):
        arguments = [_renamed(item, renamed) for item in expr.args]
        return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
    return expr
