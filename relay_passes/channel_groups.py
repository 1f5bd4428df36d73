"""Which channels of a graph can only leave together.

Every number of a tensor gets the label of the channel that it belongs to. An operator that ties two
channels (an addition, a depthwise convolution, the heads of attention) joins their labels; label 0
is what never leaves, such as the model's inputs and outputs. What is left are sets of channels that
leave or stay as one, at exactly known places of exactly known tensors: reshapes, concatenations and
splits need no rule about who depends on whom.

The idea of propagating dependencies through all operators is that of DepGraph (Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", section 3.2), which joins whole layers, not channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from .graph import Graph
from .ir import constant_slices, immediate, ints, op_name, shape_of
from .op_kinds import BINARY, UNARY
from .placement import channel_axis
from .quantize_weights import weight_layout

Labels: TypeAlias = NDArray[np.int64]
"""Of a tensor: an axis has its side, or 1 where the label does not depend on it."""

STAYS = 0
"""The label of what never leaves."""

ELEMENTWISE = UNARY | BINARY | {
    f"relax.{name}"
    for name in (
        "where", "greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "astype",
        "logical_and", "logical_or", "logical_not", "nn.prelu", "nn.dropout", "floor_divide", "mod",
        "isnan", "isinf", "isfinite", "sign", "tan", "sinh", "cosh", "log1p",
    )
}  # fmt: skip
RESHAPES = {"relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims"}
REDUCTIONS = {"relax.mean", "relax.sum", "relax.max", "relax.min"}
WINDOWS = {
    f"relax.nn.{prefix}{name}{axes}d"
    for name in ("max_pool", "avg_pool")
    for prefix in ("", "adaptive_")
    for axes in (1, 2, 3)
} | {"relax.image.resize2d"}
CONVOLUTIONS = {
    f"relax.nn.conv{axes}d{suffix}" for axes in (1, 2, 3) for suffix in ("", "_transpose")
}


class Atoms:
    """Union-find over labels. The smallest label of a set stands for it, so that 0 stays 0."""

    def __init__(self) -> None:
        self._above = [STAYS]
        self._roots: NDArray[np.int64] | None = None

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels, a different one at each place."""
        start, count = len(self._above), int(np.prod(shape))
        self._above.extend(range(start, start + count))
        self._roots = None
        return np.arange(start, start + count).reshape(shape)

    def roots(self, labels: Labels) -> Labels:
        """The labels that stand for `labels`."""
        if self._roots is None:
            table = np.asarray(self._above)
            while not np.array_equal(table, table[table]):
                table = table[table]
            self._roots = table
            self._above = table.tolist()
        return self._roots[labels]

    def join(self, a: Labels, b: Labels | int) -> bool:
        """Make labels at the same place one, broadcast; whether any were two."""
        pairs = np.stack(np.broadcast_arrays(self.roots(a), self.roots(np.asarray(b))))
        pairs = np.unique(pairs.reshape(2, -1), axis=1)
        pairs = pairs[:, pairs[0] != pairs[1]]
        for first, second in pairs.T.tolist():
            low, high = sorted((self._find(first), self._find(second)))
            self._above[high] = low
            self._roots = None
        return bool(pairs.size)

    def _find(self, label: int) -> int:
        while self._above[label] != label:
            label = self._above[label]
        return label

    def __len__(self) -> int:
        return len(self._above)


@dataclass(eq=False)
class LayerChannels:
    """A constant weight, the calls that read it, and the labels of its channels.

    `inputs` are those of the weight's axis I, of one group; `outputs` of its axis O. A depthwise
    convolution has its input's channels as outputs.
    """

    calls: list[relax.Var]
    call: relax.Call
    weight: NDArray
    inputs: Labels
    outputs: Labels
    is_depthwise: bool = False

    @property
    def name(self) -> str:
        """Of the first call."""
        return self.calls[0].name


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Labels that lie in the very same tensors: which of them leave is a free choice."""

    labels: Labels
    producers: tuple[LayerChannels, ...]
    consumers: tuple[LayerChannels, ...]

    @property
    def unit(self) -> int:
        """How many channels of a layer one label stands for: 1, or the width of a head."""
        counts = [int(np.isin(layer.outputs, self.labels).sum()) for layer in self.producers]
        return min(counts) // len(self.labels)


@dataclass(eq=False)
class Channels:
    """Labels of all tensors of a function (several for a tuple), and its layers."""

    graph: Graph
    atoms: Atoms = field(default_factory=Atoms)
    labels: dict[relax.Var, tuple[Labels, ...]] = field(default_factory=dict)
    layers: list[LayerChannels] = field(default_factory=list)

    def groups(self) -> list[ChannelGroup]:
        """All that has a layer which computes it and one that reads it, in order of execution."""
        places: dict[int, list[int]] = {}
        tensors = [labels for found in self.labels.values() for labels in found]
        for number, labels in enumerate(tensors):
            for label in np.unique(labels).tolist():
                places.setdefault(label, []).append(number)
        places.pop(STAYS, None)
        together: dict[tuple[int, ...], list[int]] = {}
        for label, where in places.items():
            together.setdefault(tuple(where), []).append(label)
        found = []
        for members in together.values():
            labels = np.array(sorted(members))
            producers = [x for x in self.layers if np.isin(labels[0], x.outputs)]
            consumers = [x for x in self.layers if np.isin(labels[0], x.inputs)]
            if any(not layer.is_depthwise for layer in producers):
                found.append(ChannelGroup(labels, tuple(producers), tuple(consumers)))
        return sorted(found, key=lambda group: int(group.labels[0]))


def find_channels(function: relax.Function) -> Channels:
    """The labels of everything at the function's top level.

    What no rule is about, branches and calls of other functions among it, keeps all channels of
    what it reads.
    """
    return _Propagation(Graph(function)).run()


def sides(labels: Labels, shape: Sequence[int], keep: NDArray[np.bool_]) -> tuple[int, ...]:
    """The shape that a tensor of `shape` has when only labels in `keep` [label] are left."""
    return tuple(
        side if size == 1 else int(kept_along(labels, axis, keep).sum())
        for axis, (side, size) in enumerate(zip(shape, labels.shape, strict=True))
    )


def kept_along(labels: Labels, axis: int, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which places of an axis stay. [side]"""
    kept = keep[labels]
    others = tuple(other for other in range(labels.ndim) if other != axis)
    return np.asarray(kept.any(axis=others))


@dataclass(eq=False)
class _Propagation:
    graph: Graph
    channels: Channels = field(init=False)
    defined: relax.Var | None = None  # what the call at hand computes
    by_weight: dict[tuple[object, ...], LayerChannels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.channels = Channels(self.graph)
        self.atoms, self.labels = self.channels.atoms, self.channels.labels

    def run(self) -> Channels:
        for parameter in self.graph.function.params:
            self.labels[parameter] = _staying(parameter.ty)
        for variable, value in self.graph.values.items():
            self.defined = variable
            found = self._tensors(variable, value)
            if found is None:
                for read in relax.analysis.free_vars(value):
                    self._fix(read)
                found = _staying(variable.ty)
            self.labels[variable] = found
        for result in relax.analysis.free_vars(self.graph.function.body.body):
            self._fix(result)
        while self._settle():
            pass
        for variable, tensors in self.labels.items():
            self.labels[variable] = tuple(self._compact(labels) for labels in tensors)
        for layer in self.channels.layers:
            layer.inputs = self.atoms.roots(layer.inputs)
            layer.outputs = self.atoms.roots(layer.outputs)
        return self.channels

    def _settle(self) -> bool:
        """What is left of a tensor must be a box: labels depend on one axis, and no tensor has a
        single one, which would leave with all of it. Whether any were joined."""
        joined = False
        for tensors in self.labels.values():
            for labels in tensors:
                compact = self._compact(labels)
                varying = _varying(compact)
                if len(varying) > 1:
                    joined |= self._join_all_but(compact, max(varying))
                elif not varying:
                    joined |= self.atoms.join(compact, STAYS)
        return joined

    # --- rules by operator ----------------------------------------------------------------------

    def _tensors(self, variable: relax.Var, value: tvm.ir.Expr) -> tuple[Labels, ...] | None:
        if isinstance(value, relax.Var):
            return self.labels.get(value)
        if isinstance(value, relax.TupleGetItem):
            found = self.labels.get(value.tuple_value)
            return None if found is None else (found[value.index],)
        if isinstance(value, tvm.ir.GenericConst):
            return _staying(variable.ty)
        name = op_name(value)
        if name is None:
            return None
        if name == "relax.split":
            return self._split(value)
        shape = shape_of(variable)
        labels = None if shape is None else self._tensor(name, value, shape)
        return None if labels is None else (self._compact(labels),)

    def _tensor(self, name: str, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        if name in ELEMENTWISE:
            return self._elementwise(call, shape)
        if name in CONVOLUTIONS:
            return self._convolution(call, shape)
        if name == "relax.matmul":
            return self._matmul(call, shape)
        if name == "relax.concat":
            return self._concat(call, shape)
        labels, before = self._of(call.args[0]), shape_of(call.args[0])
        if labels is None or before is None:
            return None
        if name in RESHAPES:
            return _reshaped(labels, before, shape)
        if name == "relax.permute_dims":
            axes = call.attrs.axes
            return np.transpose(labels, None if axes is None else ints(axes))
        if name == "relax.broadcast_to":
            return labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape)
        if name == "relax.strided_slice":
            return self._slice(call, labels, before)
        if name == "relax.take":
            return self._take(call, labels)
        if name == "relax.nn.pad":
            return self._pad(call, labels, before)
        if name in WINDOWS:
            return self._varying_along(labels, str(call.attrs.layout).index("C"))
        if name in REDUCTIONS:
            return self._reduce(call, labels, shape)
        if name in ("relax.nn.softmax", "relax.nn.log_softmax"):
            return self._staying_along(labels, [int(call.attrs.axis)])
        if name == "relax.nn.layer_norm":
            return self._staying_along(labels, ints(call.attrs.axes))
        return None

    def _elementwise(self, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        total: Labels | None = None
        missing: set[int] = set()  # axes along which what `total` is of has one place
        for argument in call.args:
            labels, sides = self._of(argument), shape_of(argument)
            if labels is None or sides is None:
                continue
            lead = len(shape) - len(sides)
            labels = labels.reshape((1,) * lead + labels.shape)
            full = (1,) * lead + sides
            lacks = {axis for axis, side in enumerate(full) if side == 1 < shape[axis]}
            if total is None:
                total, missing = labels, lacks
            else:
                total = self._meet(total, missing, labels, lacks)
                missing &= lacks
        return total

    def _meet(self, a: Labels, a_lacks: set[int], b: Labels, b_lacks: set[int]) -> Labels:
        """Labels of a result in which numbers of two tensors meet at each place."""
        a, b = self._compact(a), self._compact(b)
        a_varies, b_varies = _varying(a), _varying(b)
        if a_varies & b_lacks or b_varies & a_lacks:
            # A tensor without channels acts on every channel of the other one.
            if not b_varies and not b.any() and a_varies <= b_lacks:
                return a
            if not a_varies and not a.any() and b_varies <= a_lacks:
                return b
            self.atoms.join(a, STAYS)
            self.atoms.join(b, STAYS)
            return np.zeros((1,) * a.ndim, np.int64)
        self.atoms.join(a, b)
        return self.atoms.roots(np.broadcast_arrays(a, b)[0])

    def _convolution(self, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        weight, data, layout = self.graph.constant(call.args[1]), call.args[0], weight_layout(call)
        labels, before = self._of(data), shape_of(data)
        groups, is_transposed = int(call.attrs.groups), str(op_name(call)).endswith("_transpose")
        if weight is None or labels is None or before is None or (is_transposed and groups > 1):
            return None
        axis = str(call.attrs.data_layout).index("C")
        inputs = self._vector(labels, axis, before[axis])
        per_group, outputs = weight.shape[layout.index("I")], weight.shape[layout.index("O")]
        layer = self._layer(call, weight, groups > 1 and per_group == 1)
        if layer.is_depthwise:
            self.atoms.join(layer.outputs, np.repeat(inputs, outputs // groups))
        else:
            # Groups stay of one size: they lose the same places.
            self.atoms.join(layer.inputs, inputs.reshape(groups, per_group))
            of_groups = layer.outputs.reshape(groups, -1)
            self.atoms.join(of_groups, of_groups[:1])
        return _spread(layer.outputs, channel_axis(call), len(shape))

    def _matmul(self, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        labels, before = self._of(call.args[0]), shape_of(call.args[0])
        weight = self.graph.constant(call.args[1])
        if labels is None or before is None or len(before) < 2:
            return None
        if weight is None:
            return self._product(call, shape)
        if weight.ndim != 2:
            return None
        layer = self._layer(call, weight, False)
        self.atoms.join(layer.inputs, self._vector(labels, len(before) - 1, before[-1]))
        return _spread(layer.outputs, len(shape) - 1, len(shape))

    def _layer(self, call: relax.Call, weight: NDArray, is_depthwise: bool) -> LayerChannels:
        """That of the weight, with its call; a loop's steps share one."""
        layout = weight_layout(call)
        key = (op_name(call), layout, weight.shape, is_depthwise, weight.tobytes())
        layer = self.by_weight.get(key)
        if layer is None:
            inputs, outputs = (weight.shape[layout.index(axis)] for axis in "IO")
            layer = LayerChannels(
                [], call, weight, self.atoms.fresh([inputs]), self.atoms.fresh([outputs])
            )
            layer.is_depthwise = is_depthwise
            self.by_weight[key] = layer
            self.channels.layers.append(layer)
            if is_depthwise:
                self.atoms.join(layer.inputs, STAYS)
        assert self.defined is not None
        layer.calls.append(self.defined)
        return layer

    def _product(self, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        """Of two computed tensors: [.., m, k] x [.., k, n]. Heads on a batch axis leave whole."""
        found = [(self._of(x), shape_of(x)) for x in call.args[:2]]
        rank = len(shape)
        operands = []
        for (labels, sides), rows in zip(found, (True, False), strict=True):
            if labels is None or sides is None or len(sides) < 2:
                return None
            lead = rank - len(sides)
            labels = self._compact(labels.reshape((1,) * lead + labels.shape))
            lacks = {axis for axis in range(lead) if shape[axis] > 1}
            lacks |= {lead + i for i, side in enumerate(sides[:-2]) if side == 1 < shape[lead + i]}
            if any(axis < rank - 2 for axis in _varying(labels)):
                self.atoms.join(labels, labels[..., :1, :1])
                labels = self._compact(labels)
            operands.append((labels, lacks, rank - 1 if rows else rank - 2))
        (a, a_lacks, a_summed), (b, b_lacks, b_summed) = operands
        if a_summed in _varying(a) or b_summed in _varying(b):
            side = (shape_of(call.args[0]) or ())[-1]
            summed = self._vector(a, a_summed, side)
            self.atoms.join(summed, self._vector(b, b_summed, side))
            if not any(_is_zero_without_weights(self.graph, item) for item in call.args[:2]):
                self.atoms.join(summed, STAYS)
            return np.zeros((1,) * rank, np.int64)
        return self._meet(a, a_lacks | {rank - 1}, b, b_lacks | {rank - 2})

    def _concat(self, call: relax.Call, shape: tuple[int, ...]) -> Labels | None:
        fields = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else None
        if fields is None:
            return None
        axis = int(call.attrs.axis) % len(shape)
        known, parts = [], []
        for item in fields:
            side = (shape_of(item) or ())[axis]
            labels = self._of(item)
            if labels is None:  # numbers of a constant leave as they please
                if self.graph.constant(item) is None:
                    return None
                labels = self.atoms.fresh([side if i == axis else 1 for i in range(len(shape))])
            else:
                known.append(labels)
            parts.append((labels, side))
        others = set().union(*(_varying(labels) for labels in known)) - {axis}
        if others and not any(axis in _varying(labels) for labels in known):
            for labels in known[1:]:
                self.atoms.join(known[0], labels)
            if len(known) < len(parts):
                self.atoms.join(known[0], STAYS)
            return self.atoms.roots(known[0])
        vectors = [self._vector(labels, axis, side) for labels, side in parts]
        return _spread(np.concatenate(vectors), axis, len(shape))

    def _split(self, call: relax.Call) -> tuple[Labels, ...] | None:
        labels, shape = self._of(call.args[0]), shape_of(call.args[0])
        if labels is None or shape is None:
            return None
        axis = int(call.attrs.axis) % len(shape)
        bounds = split_bounds(call, shape[axis])
        if labels.shape[axis] == 1:
            return (labels,) * (len(bounds) - 1)
        ranges = pairwise(bounds)
        return tuple(np.take(labels, range(start, end), axis) for start, end in ranges)

    def _slice(self, call: relax.Call, labels: Labels, before: tuple[int, ...]) -> Labels | None:
        slices = constant_slices(call, before)
        if slices is None:
            return None
        for axis, (begin, end, step) in slices.items():
            if labels.shape[axis] > 1:
                if step > 1:
                    return None
                labels = np.take(labels, range(begin, end), axis)
        return labels

    def _take(self, call: relax.Call, labels: Labels) -> Labels | None:
        indices = self.graph.constant(call.args[1])
        if indices is None or indices.ndim > 1 or call.attrs.axis is None:
            return None
        axis = int(call.attrs.axis) % labels.ndim
        if labels.shape[axis] > 1:
            return np.take(labels, indices, axis)
        return labels if indices.ndim else np.take(labels, 0, axis)

    def _pad(self, call: relax.Call, labels: Labels, before: tuple[int, ...]) -> Labels | None:
        if str(call.attrs.pad_mode) != "constant":
            return None
        for axis, (low, high) in enumerate(pad_widths(call)):
            if (low or high) and labels.shape[axis] > 1:  # numbers that leave as they please
                ends = [list(labels.shape) for _ in range(2)]
                ends[0][axis], ends[1][axis] = low, high
                fresh = [self.atoms.fresh(shape) for shape in ends]
                labels = np.concatenate([fresh[0], labels, fresh[1]], axis)
        return labels

    def _reduce(self, call: relax.Call, labels: Labels, shape: tuple[int, ...]) -> Labels:
        given = call.attrs.axis
        axes = range(labels.ndim) if given is None else [a % labels.ndim for a in ints(given)]
        labels = self._staying_along(labels, axes)
        if bool(call.attrs.keepdims):
            return labels
        kept = [size for axis, size in enumerate(labels.shape) if axis not in axes]
        return labels.reshape(kept)

    # --- labels ---------------------------------------------------------------------------------

    def _of(self, expr: tvm.ir.Expr) -> Labels | None:
        """Of a computed tensor; None for constants and whatever is no tensor."""
        if not isinstance(expr, relax.Var) or self.graph.constant(expr) is not None:
            return None
        found = self.labels.get(expr)
        return None if found is None or len(found) != 1 else self._compact(found[0])

    def _compact(self, labels: Labels) -> Labels:
        """As they stand now, with side 1 for axes along which they do not change."""
        labels = self.atoms.roots(labels)
        for axis in range(labels.ndim):
            first = np.take(labels, [0], axis)
            if labels.shape[axis] > 1 and (labels == first).all():
                labels = first
        return labels

    def _vector(self, labels: Labels, axis: int, side: int) -> Labels:
        """Of a tensor whose labels are to depend on one axis alone. [side]"""
        along = self._varying_along(labels, axis)
        return np.broadcast_to(along.reshape(-1), (side,))

    def _varying_along(self, labels: Labels, axis: int) -> Labels:
        self._join_all_but(labels, axis)
        return self.atoms.roots(_only(labels, axis))

    def _join_all_but(self, labels: Labels, axis: int) -> bool:
        return self.atoms.join(labels, _only(labels, axis))

    def _staying_along(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """All labels stay when they depend on one of the axes."""
        if {axis % labels.ndim for axis in axes} & _varying(labels):
            self.atoms.join(labels, STAYS)
            return np.zeros((1,) * labels.ndim, np.int64)
        return labels

    def _fix(self, variable: relax.Var) -> None:
        for labels in self.labels.get(variable, ()):
            self.atoms.join(labels, STAYS)


def split_bounds(call: relax.Call, side: int) -> tuple[int, ...]:
    """Where the parts of a `split` begin, and the end of the last one."""
    given = call.attrs.indices_or_sections
    count = immediate(given)
    if count is not None:
        size = -(-side // int(count))
        return (*range(0, side, size), side)
    return (0, *ints(given), side)


def pad_widths(call: relax.Call) -> list[tuple[int, int]]:
    """(before, after) of each axis of a `pad`."""
    widths = ints(call.attrs.pad_width)
    return list(zip(widths[::2], widths[1::2], strict=True))


def _staying(ty: tvm.ir.Type) -> tuple[Labels, ...]:
    """Labels of a tensor that nothing leaves, or of each in a tuple."""
    fields = ty.fields if isinstance(ty, relax.TupleType) else [ty]
    ranks = [max(0, int(getattr(field, "ndim", 0))) for field in fields]
    return tuple(np.zeros((1,) * rank, np.int64) for rank in ranks)


def _varying(labels: Labels) -> set[int]:
    return {axis for axis, size in enumerate(labels.shape) if size > 1}


def _only(labels: Labels, axis: int) -> Labels:
    """The labels at place 0 of all other axes."""
    return labels[tuple(slice(None) if i == axis else slice(0, 1) for i in range(labels.ndim))]


def _spread(vector: Labels, axis: int, rank: int) -> Labels:
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _reshaped(labels: Labels, before: Sequence[int], after: Sequence[int]) -> Labels:
    """Labels of a tensor of shape `before` seen as one of shape `after`.

    Axes are taken in the smallest runs that have as many places in both shapes.
    """
    full: list[int] = []
    seen: list[int] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        old = new = 1
        while old != new or (i == start_i and j == start_j):
            if i < len(before) and (old <= new or j == len(after)):
                old, i = old * before[i], i + 1
            else:
                new, j = new * after[j], j + 1
        run = range(start_i, i)
        varies = any(labels.shape[axis] > 1 for axis in run)
        full += [before[axis] if varies else 1 for axis in run]
        seen += [after[axis] if varies else 1 for axis in range(start_j, j)]
    return np.broadcast_to(labels, full).reshape(seen)


# Between a layer and what it computes these make a zero of zeros.
_KEEP_ZERO = RESHAPES | {
    "relax.permute_dims", "relax.split", "relax.strided_slice", "relax.nn.relu", "relax.multiply",
    "relax.take", "relax.broadcast_to",
}  # fmt: skip


def _is_zero_without_weights(graph: Graph, variable: relax.Var) -> bool:
    """Whether a channel is zero when the weights and the bias that it comes from are."""
    value = graph.values.get(variable)
    if isinstance(value, relax.TupleGetItem):
        return _is_zero_without_weights(graph, value.tuple_value)
    name = op_name(value) if value is not None else None
    if value is None or name is None:
        return False
    if name == "relax.matmul" or name in CONVOLUTIONS:
        return graph.constant(value.args[1]) is not None
    operands = [x for x in value.args if isinstance(x, relax.Var) and graph.constant(x) is None]
    if name == "relax.add" and len(operands) == 1:
        return _is_zero_without_weights(graph, operands[0])
    return name in _KEEP_ZERO and any(_is_zero_without_weights(graph, x) for x in operands)
