"""dL/d operand of one operator, from dL/d result: our rules, then those that TVM registers.

A rule is a function `(at, gradient) -> expression`. Add one: write it, name its operator in
`_RULES`, and give it a case in `tests/relay_passes/test_gradients.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, te, topi
from tvm.relax import op

from ..errors import RecipeError
from .graph import Graph
from .ir import array_const, constant_slices, dtype_of, immediate, ints, op_name, shape_of


@dataclass(frozen=True)
class _At:
    """Operand number `index` (tuples opened) of the call that defines `result`."""

    graph: Graph
    result: relax.Var
    index: int
    builder: relax.BlockBuilder

    @property
    def call(self) -> relax.Call:
        return self.graph.values[self.result]

    @property
    def operand(self) -> relax.Expr:
        return self.graph.operands(self.result)[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the operand."""
        shape = shape_of(self.operand)
        assert shape is not None
        return shape

    def number(self, value: float) -> relax.Constant:
        return relax.const(value, dtype_of(self.operand))

    def refuse(self, why: str = "") -> RecipeError:
        name = op_name(self.call) or "a value that is no operator's"
        return RecipeError(
            f"layer {self.result.name!r}: no gradient is known of {name}{why}; choose a criterion "
            "that needs no labels"
        )


Rule = Callable[[_At, relax.Expr], relax.Expr]


def operand_gradient(
    graph: Graph, result: relax.Var, index: int, gradient: relax.Expr, builder: relax.BlockBuilder
) -> relax.Expr:
    """dL/d operand number `index` of the call that defines `result`.

    Raises `RecipeError` naming the operator when there is no rule, or when it is of a function that
    is no operator.
    """
    at = _At(graph, result, index, builder)
    name = op_name(graph.values[result])
    if name is None:
        raise at.refuse()
    if name in _RULES:
        return _RULES[name](at, gradient)
    registered = tvm.ir.Op.get(name).get_attr("FPrimalGradient")
    if registered is None or name in _NOT_TVMS:
        raise at.refuse()
    return registered(result, at.call, gradient, builder)[index]


# --- convolutions -------------------------------------------------------------------------------


def _weight(at: _At) -> np.ndarray:
    """[O, I / groups, *kernel], of a transposed convolution [I, O / groups, *kernel]."""
    if at.index != 0:
        raise at.refuse(" by its weight")
    weight = at.graph.constant(at.call.args[1])
    if weight is None:
        raise at.refuse(" with a computed weight")
    layout = str(at.call.attrs.kernel_layout)
    first = "IO" if "transpose" in (op_name(at.call) or "") else "OI"
    order = first + "".join(axis for axis in layout if axis not in "OI")
    return np.ascontiguousarray(weight.transpose([layout.index(axis) for axis in order]))


def _convolve(
    x: relax.Expr,
    weight: np.ndarray,
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> relax.Expr:
    """[N, C, *spatial]"""
    convolution = op.nn.conv1d if weight.ndim == 3 else op.nn.conv2d
    return convolution(
        x, array_const(weight), strides=strides, padding=padding, dilation=dilation, groups=groups
    )


def _channels_first(layout: str) -> tuple[list[int], list[int]]:
    """Permutations from `layout` to [N, C, *spatial] and back."""
    order = "NC" + "".join(axis for axis in layout if axis not in "NC")
    return [layout.index(axis) for axis in order], [order.index(axis) for axis in layout]


def _convolution(at: _At, gradient: relax.Expr) -> relax.Expr:
    """Convolution of the gradient, zeros between its entries where strides skip, with the kernel
    turned round and channels exchanged."""
    attributes, weight = at.call.attrs, _weight(at)
    groups, axes = int(attributes.groups), weight.ndim - 2
    strides, dilation = ints(attributes.strides), ints(attributes.dilation)
    padding = ints(attributes.padding)
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    turned = np.flip(weight, tuple(range(2, weight.ndim)))
    turned = turned.reshape(groups, outputs, inputs, *weight.shape[2:]).swapaxes(1, 2)
    turned = np.ascontiguousarray(turned.reshape(groups * inputs, outputs, *weight.shape[2:]))
    there, back = _channels_first(str(attributes.data_layout))
    gradient = at.builder.emit(op.permute_dims(gradient, there))
    if any(stride > 1 for stride in strides):
        gradient = at.builder.emit(
            at.builder.call_te(topi.nn.dilate, gradient, [1, 1, *strides], 0.0)
        )
    shape = [at.shape[i] for i in there]
    before, after, begins = [], [], []
    for axis in range(axes):
        extent = (weight.shape[2 + axis] - 1) * dilation[axis]
        first, last = extent - padding[axis], extent - padding[axes + axis]
        covered = shape[2 + axis] + padding[axis] + padding[axes + axis] - extent - 1
        last += covered % strides[axis]
        # Windows that lie in the padding alone are no part of the operand: cut off behind.
        begins.append(max(0, -first))
        before.append(max(0, first))
        after.append(max(0, last))
    ones = (1,) * axes
    result = _convolve(gradient, turned, ones, (*before, *after), dilation, groups)
    if shape_of(at.builder.normalize(result)) != tuple(shape):
        ends = [begin + size for begin, size in zip(begins, shape[2:], strict=True)]
        result = op.strided_slice(result, list(range(2, 2 + axes)), begins, ends)
    return op.permute_dims(result, back)


def _transposed_convolution(at: _At, gradient: relax.Expr) -> relax.Expr:
    """The convolution that it is the transpose of."""
    attributes, weight = at.call.attrs, _weight(at)
    there, back = _channels_first(str(attributes.data_layout))
    result = _convolve(
        op.permute_dims(gradient, there),
        weight,
        ints(attributes.strides),
        ints(attributes.padding),
        ints(attributes.dilation),
        int(attributes.groups),
    )
    return op.permute_dims(result, back)


# --- pools --------------------------------------------------------------------------------------


def _pool(at: _At, gradient: relax.Expr) -> relax.Expr:
    """TVM's gradient of the 2-D pool; a 1-D pool is one whose height is 1."""
    attributes = at.call.attrs
    name = op_name(at.call) or ""
    backward = op.grad.max_pool2d_backward if "max" in name else op.grad.avg_pool2d_backward
    layout, axes = str(attributes.layout), len(ints(attributes.strides))
    if any(item != 1 for item in ints(attributes.dilation)):
        raise at.refuse(" with dilation")
    data, shape = at.operand, at.shape
    size, strides = ints(attributes.pool_size), ints(attributes.strides)
    padding = ints(attributes.padding)
    if axes == 1:
        place = layout.index("W")
        layout = layout.replace("W", "HW")
        wide = shape_of(at.result) or ()
        data = op.reshape(data, (*shape[:place], 1, *shape[place:]))
        gradient = op.reshape(gradient, (*wide[:place], 1, *wide[place:]))
        size, strides = (1, *size), (1, *strides)
        padding = (0, padding[0], 0, padding[1])
    result = backward(
        gradient,
        data,
        pool_size=size,
        strides=strides,
        padding=padding,
        dilation=(1, 1),
        ceil_mode=bool(attributes.ceil_mode),
        count_include_pad=bool(attributes.count_include_pad),
        layout=layout,
        out_layout=layout,
    )
    return op.reshape(result, shape) if axes == 1 else result


def _adaptive_pool(at: _At, gradient: relax.Expr) -> relax.Expr:
    """Each output is the mean of as many inputs, or of all."""
    layout = str(at.call.attrs.layout)
    spatial = [layout.index(axis) for axis in layout if axis not in "NC"]
    sizes = shape_of(at.result) or ()
    if any(at.shape[axis] % sizes[axis] for axis in spatial):
        raise at.refuse(" whose windows differ in size")
    result = gradient
    for axis in spatial:
        result = op.repeat(result, at.shape[axis] // sizes[axis], axis)
    share = math.prod(sizes[axis] / at.shape[axis] for axis in spatial)
    return op.multiply(result, at.number(share))


# --- movement -----------------------------------------------------------------------------------


def _reshape(at: _At, gradient: relax.Expr) -> relax.Expr:
    return op.reshape(gradient, at.shape)


def _concat(at: _At, gradient: relax.Expr) -> relax.Expr:
    axis = int(at.call.attrs.axis) % len(at.shape)
    sizes = [(shape_of(item) or ())[axis] for item in at.graph.operands(at.result)]
    begin = sum(sizes[: at.index])
    return op.strided_slice(gradient, [axis], [begin], [begin + sizes[at.index]])


def _split(at: _At, gradient: relax.Expr) -> relax.Expr:
    """`gradients.py` has put the parts together."""
    return gradient


def _slice(at: _At, gradient: relax.Expr) -> relax.Expr:
    """Back to where it was taken from, zeros elsewhere."""
    slices = constant_slices(at.call, at.shape)
    if at.index != 0 or slices is None:
        raise at.refuse(" with computed or backward bounds")
    sizes = shape_of(at.result) or ()

    def place(values: te.Tensor) -> te.Tensor:
        def entry(*position: tvm.tirx.Var) -> tvm.ir.Expr:
            source, inside = list(position), tvm.tirx.const(True, "bool")
            for axis, (begin, _, step) in slices.items():
                offset = position[axis] - begin
                index = tvm.tirx.floordiv(offset, step)
                inside = tvm.tirx.all(
                    inside, offset >= 0, tvm.tirx.floormod(offset, step) == 0, index < sizes[axis]
                )
                source[axis] = tvm.te.max(tvm.te.min(index, sizes[axis] - 1), 0)
            return tvm.tirx.if_then_else(inside, values(*source), 0.0)

        return te.compute(at.shape, entry, name="unslice")

    return at.builder.call_te(place, gradient)


def _pad(at: _At, gradient: relax.Expr) -> relax.Expr:
    if str(at.call.attrs.pad_mode) != "constant":
        raise at.refuse(f" with pad_mode {at.call.attrs.pad_mode}")
    begins = list(ints(at.call.attrs.pad_width))[::2]
    ends = [begin + size for begin, size in zip(begins, at.shape, strict=True)]
    return op.strided_slice(gradient, list(range(len(begins))), begins, ends)


# --- functions of one number --------------------------------------------------------------------


def _where_inside(at: _At, gradient: relax.Expr, low: float, high: float) -> relax.Expr:
    inside = op.logical_and(
        op.greater(at.operand, at.number(low)), op.less(at.operand, at.number(high))
    )
    return op.where(inside, gradient, at.number(0.0))


def _clip(at: _At, gradient: relax.Expr) -> relax.Expr:
    low, high = (immediate(bound) for bound in at.call.args[1:3])
    if low is None or high is None:
        raise at.refuse(" with computed bounds")
    return _where_inside(at, gradient, low, high)


def _relu6(at: _At, gradient: relax.Expr) -> relax.Expr:
    return _where_inside(at, gradient, 0.0, 6.0)


def _leaky_relu(at: _At, gradient: relax.Expr) -> relax.Expr:
    slope = at.number(float(at.call.attrs.alpha))
    positive = op.greater(at.operand, at.number(0.0))
    return op.where(positive, gradient, op.multiply(gradient, slope))


def _gelu(at: _At, gradient: relax.Expr) -> relax.Expr:
    """Φ(x) + x φ(x)"""
    x = at.operand
    normal = op.multiply(
        op.add(op.erf(op.multiply(x, at.number(math.sqrt(0.5)))), at.number(1.0)), at.number(0.5)
    )
    density = op.exp(op.multiply(op.multiply(x, x), at.number(-0.5)))
    density = op.multiply(density, at.number(1 / math.sqrt(2 * math.pi)))
    return op.multiply(gradient, op.add(normal, op.multiply(x, density)))


def _gelu_tanh(at: _At, gradient: relax.Expr) -> relax.Expr:
    """t = tanh(u), u = c (x + b x³): (1 + t) / 2 + x (1 - t²) c (1 + 3 b x²) / 2"""
    x, c, b = at.operand, math.sqrt(2 / math.pi), 0.044715
    square = op.multiply(x, x)
    inner = op.multiply(x, op.add(op.multiply(square, at.number(c * b)), at.number(c)))
    t = op.tanh(inner)
    slope = op.add(op.multiply(square, at.number(3 * b * c)), at.number(c))
    slope = op.multiply(op.multiply(x, slope), op.subtract(at.number(1.0), op.multiply(t, t)))
    total = op.add(op.add(t, at.number(1.0)), slope)
    return op.multiply(gradient, op.multiply(total, at.number(0.5)))


def _softplus(at: _At, gradient: relax.Expr) -> relax.Expr:
    beta = at.number(float(at.call.attrs.beta))
    return op.multiply(gradient, op.sigmoid(op.multiply(at.operand, beta)))


def _erf(at: _At, gradient: relax.Expr) -> relax.Expr:
    density = op.exp(op.negative(op.multiply(at.operand, at.operand)))
    return op.multiply(gradient, op.multiply(density, at.number(2 / math.sqrt(math.pi))))


def _square(at: _At, gradient: relax.Expr) -> relax.Expr:
    return op.multiply(gradient, op.multiply(at.operand, at.number(2.0)))


def _rsqrt(at: _At, gradient: relax.Expr) -> relax.Expr:
    cube = op.multiply(at.result, op.multiply(at.result, at.result))
    return op.multiply(gradient, op.multiply(cube, at.number(-0.5)))


# --- normalisation ------------------------------------------------------------------------------


def _layer_norm(at: _At, gradient: relax.Expr) -> relax.Expr:
    """x̂ = (x - mean) / σ, h = gradient · γ: (h - mean(h) - x̂ mean(h x̂)) / σ"""
    if at.index != 0:
        raise at.refuse(" by its scale or shift")
    axes = list(ints(at.call.attrs.axes))
    x = at.operand
    centred = op.subtract(x, op.mean(x, axes, keepdims=True))
    variance = op.mean(op.multiply(centred, centred), axes, keepdims=True)
    spread = op.sqrt(op.add(variance, at.number(float(at.call.attrs.epsilon))))
    normal = op.divide(centred, spread)
    rank = len(at.shape)
    shape = [at.shape[i] if i in {axis % rank for axis in axes} else 1 for i in range(rank)]
    scaled = op.multiply(gradient, op.reshape(at.call.args[1], shape))
    along = op.mean(op.multiply(scaled, normal), axes, keepdims=True)
    rest = op.subtract(scaled, op.mean(scaled, axes, keepdims=True))
    return op.divide(op.subtract(rest, op.multiply(normal, along)), spread)


_RULES: dict[str, Rule] = {
    "relax.nn.conv1d": _convolution,
    "relax.nn.conv2d": _convolution,
    "relax.nn.conv1d_transpose": _transposed_convolution,
    "relax.nn.conv2d_transpose": _transposed_convolution,
    "relax.nn.max_pool1d": _pool,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool1d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.nn.adaptive_avg_pool1d": _adaptive_pool,
    "relax.nn.adaptive_avg_pool2d": _adaptive_pool,
    "relax.reshape": _reshape,
    "relax.flatten": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.concat": _concat,
    "relax.split": _split,
    "relax.strided_slice": _slice,
    "relax.nn.pad": _pad,
    "relax.clip": _clip,
    "relax.nn.relu6": _relu6,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.softplus": _softplus,
    "relax.erf": _erf,
    "relax.square": _square,
    "relax.rsqrt": _rsqrt,
    "relax.nn.layer_norm": _layer_norm,
}

# TVM registers a gradient of these that is not a number's: they are steps.
_NOT_TVMS = frozenset(
    f"relax.{name}"
    for name in ("equal", "greater", "greater_equal", "less", "less_equal", "not_equal")
)
