"""conv(x, w) => conv(x[kept], w[kept, kept]) for all tensors of a function at once

`masked` is the function with zeros for all that leaves: what `shrunk` has to equal, and what it is
cut from. A weight of either is the same array, so the two differ in the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import Expr
from tvm_ffi import structural_equal

from .canonicalize.anchors import CONVOLUTIONS
from .channel_groups import (
    ELEMENTWISE,
    RESHAPES,
    Channels,
    Labels,
    LayerChannels,
    kept_along,
    pad_widths,
    sides,
    split_bounds,
)
from .graph import Graph, rebuild
from .ir import array_const, constant_slices, ints, op_name, shape_of
from .placement import bias_vector, channel_axis, spread_bias
from .quantize_weights import weight_layout

Keep = NDArray[np.bool_]
"""By label: whether it stays."""


def bias_at(graph: Graph, layer: relax.Var) -> tuple[relax.Var, int] | None:
    """The addition of a layer's bias, and which of its arguments that is; None: it has none."""
    readers = graph.readers[layer]
    if len(readers) != 1 or readers[0] is None or graph.op(readers[0]) != "relax.add":
        return None
    for index, operand in enumerate(graph.values[readers[0]].args):
        array = graph.constant(operand)
        if array is not None and bias_vector(array, graph.values[layer], layer) is not None:
            return readers[0], index
    return None


def masked(
    channels: Channels,
    keep: Keep,
    weights: Mapping[LayerChannels, NDArray],
    shifts: Mapping[LayerChannels, NDArray[np.float64]],
) -> tuple[relax.Function, Channels]:
    """The function with other `weights`, `shifts` [O] added to biases, and zeros in the weights and
    biases of the channels that leave; labels of what it adds come with it.

    A layer without a bias that has a shift gets one.
    """
    graph = channels.graph
    replace: dict[relax.Var, Expr] = {}
    after: dict[relax.Var, list[relax.VarBinding]] = {}
    biased: dict[relax.Var, relax.Var] = {}
    for layer in channels.layers:
        layout = weight_layout(layer.call)
        weight = weights.get(layer, layer.weight).copy()
        for axis, labels in (("I", layer.inputs), ("O", layer.outputs)):
            np.moveaxis(weight, layout.index(axis), 0)[~keep[labels]] = 0
        stored = array_const(weight)
        shift = shifts.get(layer)
        bias = None
        changed: dict[Expr, Expr] = {}  # biases: one constant for all steps of a loop
        for variable in layer.calls:
            replace[variable] = _with_argument(graph.values[variable], 1, stored)
            found = bias_at(graph, variable)
            if found is not None:
                add, index = found
                call = graph.values[add]
                original = call.args[index]
                if original not in changed:
                    array = graph.constant(original)
                    assert array is not None
                    array = spread_bias(array, graph.values[variable], variable).copy()
                    vector = array.reshape(-1)
                    vector += 0 if shift is None else shift.astype(array.dtype)
                    vector[~keep[layer.outputs]] = 0
                    changed[original] = array_const(array)
                replace[add] = _with_argument(call, index, changed[original])
            elif shift is not None:
                rank, place = len(shape_of(variable) or ()), channel_axis(layer.call)
                shape = [-1 if i == place else 1 for i in range(rank)]
                values = np.where(keep[layer.outputs], shift, 0).astype(layer.weight.dtype)
                bias = bias or array_const(values.reshape(shape))
                total = type(variable)(f"{variable.name}_shifted", variable.ty)
                after[variable] = [relax.VarBinding(total, relax.op.add(variable, bias))]
                biased[variable] = total

    def read(reader: relax.Var | None, variable: relax.Var) -> relax.Var:
        total = biased.get(variable)
        is_own = total is None or (reader is not None and reader.same_as(total))
        return variable if is_own or total is None else total

    function = rebuild(graph.function, read=read, replace=replace, after=after)
    added = {total: channels.labels[variable] for variable, total in biased.items()}
    known = {**channels.labels, **added}
    return function, Channels(Graph(function), channels.atoms, known, channels.layers)


def shrunk(channels: Channels, keep: Keep) -> relax.Function:
    """The function without the labels that are not in `keep`."""
    return _Shrinker(channels, keep).run()


@dataclass(eq=False)
class _Shrinker:
    channels: Channels
    keep: Keep
    renamed: dict[relax.Var, relax.Var] = field(default_factory=dict)
    # One constant for all that reads it: the steps of a loop go on sharing their weight.
    cut: dict[tuple[Expr, tuple[bytes, ...]], Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.channels.graph
        self.layer_of = {call: layer for layer in self.channels.layers for call in layer.calls}

    def run(self) -> relax.Function:
        function = self.graph.function
        builder = relax.BlockBuilder()
        blocks = []
        for block in function.body.blocks:
            bindings = []
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    bindings.append(binding)  # nothing that it reads has changed
                    continue
                value = builder.normalize(self._value(binding.var, binding.value))
                variable = binding.var
                if not structural_equal(value.ty, variable.ty):
                    self.renamed[variable] = type(variable)(variable.name, value.ty)
                    variable = self.renamed[variable]
                bindings.append(relax.VarBinding(variable, value))
            is_dataflow = isinstance(block, relax.DataflowBlock)
            blocks.append((relax.DataflowBlock if is_dataflow else relax.BindingBlock)(bindings))
        return relax.Function(
            function.params,
            relax.SeqExpr(blocks, function.body.body),
            function.ret_ty,
            function.is_pure,
            function.attrs,
        )

    # --- values ---------------------------------------------------------------------------------

    def _value(self, variable: relax.Var, value: Expr) -> Expr:
        name = op_name(value)
        labels = self.channels.labels[variable]
        if variable in self.layer_of:
            return self._layer(value, self.layer_of[variable])
        if name in ELEMENTWISE:
            return self._elementwise(value, labels[0], shape_of(variable) or ())
        if name in RESHAPES or name == "relax.broadcast_to":
            return self._reshape(value, labels[0], shape_of(variable) or ())
        rule: Callable[[relax.Call], Expr] | None = {
            "relax.split": self._split,
            "relax.strided_slice": self._slice,
            "relax.take": self._take,
        }.get(name or "")
        if rule is not None and self._labels(value.args[0]) is not None:
            return rule(value)
        if name == "relax.concat":
            return self._concat(value, labels[0])
        if name == "relax.nn.pad":
            return self._pad(value, labels[0])
        return self._read(value)

    def _layer(self, call: relax.Call, layer: LayerChannels) -> Expr:
        layout = weight_layout(layer.call)
        axes = {
            layout.index("O"): self.keep[layer.outputs],
            layout.index("I"): self.keep[layer.inputs],
        }
        if layer.is_depthwise:
            axes.pop(layout.index("I"))
        data, weight = self._read(call.args[0]), self._cut(call.args[1], axes)
        if not layer.is_depthwise:
            return relax.Call(call.op, [data, weight], call.attrs, call.ty_args)
        attrs = call.attrs
        groups = int(attrs.groups) * int(self.keep[layer.outputs].sum()) // len(layer.outputs)
        return CONVOLUTIONS[str(op_name(call))](
            data, weight, strides=ints(attrs.strides), padding=ints(attrs.padding),
            dilation=ints(attrs.dilation), groups=groups, data_layout=str(attrs.data_layout),
            kernel_layout=layout, out_layout=str(attrs.out_layout),
            out_dtype=attrs.out_dtype or None,
        )  # fmt: skip

    def _elementwise(self, call: relax.Call, labels: Labels, shape: tuple[int, ...]) -> Expr:
        arguments = []
        for argument in call.args:
            array = self.graph.constant(argument)
            if array is None:
                arguments.append(self._read(argument))
                continue
            lead = len(shape) - array.ndim
            axes = {
                axis - lead: kept_along(labels, axis, self.keep)
                for axis, size in enumerate(labels.shape)
                if size > 1 and axis >= lead and array.shape[axis - lead] > 1
            }
            arguments.append(self._cut(argument, axes))
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def _reshape(self, call: relax.Call, labels: Labels, shape: tuple[int, ...]) -> Expr:
        data = self._read(call.args[0])
        after = sides(labels, shape, self.keep)
        if after == shape:
            return self._read(call)
        if op_name(call) == "relax.broadcast_to":
            return relax.op.broadcast_to(data, after)
        return relax.op.reshape(data, after)

    def _split(self, call: relax.Call) -> Expr:
        axis, places = self._places(call, int(call.attrs.axis))
        bounds = split_bounds(call, len(places) - 1)
        return relax.op.split(
            self._read(call.args[0]), [int(places[bound]) for bound in bounds[1:-1]], axis
        )

    def _slice(self, call: relax.Call) -> Expr:
        labels = self._labels(call.args[0])
        assert labels is not None
        slices = constant_slices(call, shape_of(call.args[0]) or ()) or {}
        if not any(labels.shape[axis] > 1 for axis in slices):
            return self._read(call)
        found = []
        for axis, (begin, end, step) in slices.items():
            _, places = self._places(call, axis)
            is_whole = step > 1  # of an axis that loses nothing
            bounds = (begin, end) if is_whole else (int(places[begin]), int(places[end]))
            found.append((axis, *bounds, step))
        axes, begins, ends, steps = zip(*found, strict=True)
        return relax.op.strided_slice(self._read(call.args[0]), axes, begins, ends, steps)

    def _take(self, call: relax.Call) -> Expr:
        axis, places = self._places(call, int(call.attrs.axis))
        indices = self.graph.constant(call.args[1])
        assert indices is not None
        stays = places[indices + 1] > places[indices]
        left = places[indices][stays] if indices.ndim else places[indices]
        chosen = array_const(np.asarray(left).astype(indices.dtype))
        return relax.op.take(self._read(call.args[0]), chosen, axis, str(call.attrs.mode))

    def _pad(self, call: relax.Call, labels: Labels) -> Expr:
        widths: list[int] = []
        for axis, (low, high) in enumerate(pad_widths(call)):
            if labels.shape[axis] > 1:
                kept = kept_along(labels, axis, self.keep)
                low, high = int(kept[:low].sum()), int(kept[len(kept) - high :].sum())
            widths += [low, high]
        value = float(call.attrs.pad_value)
        return relax.op.nn.pad(self._read(call.args[0]), widths, str(call.attrs.pad_mode), value)

    def _concat(self, call: relax.Call, labels: Labels) -> Expr:
        axis = int(call.attrs.axis) % labels.ndim
        parts, start = [], 0
        for item in call.args[0].fields:
            end = start + (shape_of(item) or ())[axis]
            is_cut = self.graph.constant(item) is not None and labels.shape[axis] > 1
            kept = kept_along(labels, axis, self.keep)[start:end]
            parts.append(self._cut(item, {axis: kept}) if is_cut else self._read(item))
            start = end
        return relax.op.concat(parts, axis)

    # --- parts ----------------------------------------------------------------------------------

    def _labels(self, expr: Expr) -> Labels | None:
        found = self.channels.labels.get(expr) if isinstance(expr, relax.Var) else None
        return None if found is None or len(found) != 1 else found[0]

    def _places(self, call: relax.Call, axis: int) -> tuple[int, NDArray[np.int64]]:
        """An axis of the first argument, and how many places before each one of it stay. [n + 1]"""
        shape, labels = shape_of(call.args[0]) or (), self._labels(call.args[0])
        axis %= len(shape)
        kept = np.ones(shape[axis], bool)
        if labels is not None and labels.shape[axis] > 1:
            kept = kept_along(labels, axis, self.keep)
        return axis, np.concatenate([[0], np.cumsum(kept)])

    def _cut(self, expr: Expr, axes: Mapping[int, Keep]) -> Expr:
        """A constant without the places of an axis that leave."""
        if all(kept.all() for kept in axes.values()):
            return self._read(expr)
        key = (expr, tuple(np.packbits(kept).tobytes() for kept in axes.values()))
        if key not in self.cut:
            array = self.graph.constant(expr)
            assert array is not None
            for axis, kept in axes.items():
                array = np.compress(kept, array, axis)
            self.cut[key] = array_const(array)
        return self.cut[key]

    def _read(self, expr: Expr) -> Expr:
        if isinstance(expr, relax.Var):
            return self.renamed.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._read(item) for item in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._read(expr.tuple_value), expr.index)
        if isinstance(expr, tvm.ir.Call):
            arguments = [self._read(argument) for argument in expr.args]
            return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
        return expr


def _with_argument(call: relax.Call, index: int, argument: Expr) -> relax.Call:
    arguments = [*call.args[:index], argument, *call.args[index + 1 :]]
    return relax.Call(call.op, arguments, call.attrs, call.ty_args)
