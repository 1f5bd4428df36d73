"""The layers that a layer becomes: their shapes, their weights and their calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..schedules import MatmulSpec
from ..schedules.spec import ceil_div
from .encodings import kernel_order
from .ir import ints, op_name
from .layer_spec import LayerSpec
from .low_rank_config import LowRankConfig
from .numerics.low_rank import canonical_polyadic, split_matrix, split_rows_and_columns, tucker2
from .quantize_weights import weight_layout
from .weight_layers import WeightLayer

Layer = WeightLayer[LowRankConfig]
Form = Literal["channels", "rows_and_columns", "tucker", "canonical"]
Array = NDArray[np.float64]
Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """One of the layers: sides [H, W, I / groups, O] of its kernel, and which of the layer's axes
    its window moves along."""

    sides: Sides
    rows: bool = False
    columns: bool = False
    groups: int = 1


def kernels_of(layer: Layer) -> list[Array]:
    """The weight of each group as [H, W, I, O]; sides that it does not have are 1."""
    layout = weight_layout(layer.call)
    order = kernel_order(layout)
    array = layer.weight.astype(np.float64).transpose([layout.index(x) for x in order])
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return np.split(array, layer.patches.groups, axis=3)


def form_of(layer: Layer) -> Form:
    """The form asked for, or `channels` where the kernel is too small for it."""
    wide = op_name(layer.call) == "relax.nn.conv2d" and max(layer.patches.kernel) > 1
    return layer.config.form if wide else "channels"


def largest_rank(form: Form, sides: Sides) -> int:
    """Beyond which there is nothing to hold."""
    rows, columns, inputs, outputs = sides
    if form == "rows_and_columns":
        return min(rows * inputs, columns * outputs)
    return min(rows * columns * inputs, outputs)


def parts_of(form: Form, sides: Sides, rank: int, multiple: int, groups: int) -> list[Part]:
    """Shapes of the parts; `sides` are those of one group, and each has the rank."""
    rows, columns, inputs, outputs = sides
    if form == "rows_and_columns":
        parts = [
            Part((rows, 1, inputs, rank), rows=True),
            Part((1, columns, rank, outputs), columns=True),
        ]
    elif form == "tucker":
        inner = rank / outputs * inputs
        inner = round(inner / multiple) * multiple if inner >= multiple else max(1, round(inner))
        # The core makes no more channels than its window holds values.
        inner = min(max(inner, ceil_div(rank, rows * columns)), inputs)
        parts = [
            Part((1, 1, inputs, inner)), Part((rows, columns, inner, rank), True, True),
            Part((1, 1, rank, outputs)),
        ]  # fmt: skip
    elif form == "canonical":
        parts = [
            Part((1, 1, inputs, rank)), Part((rows, 1, 1, rank), rows=True, groups=rank),
            Part((1, columns, 1, rank), columns=True, groups=rank), Part((1, 1, rank, outputs)),
        ]  # fmt: skip
    else:
        parts = [Part((rows, columns, inputs, rank), True, True), Part((1, 1, rank, outputs))]
    if groups == 1:
        return parts
    return [
        replace(part, sides=(*part.sides[:3], part.sides[3] * groups), groups=part.groups * groups)
        for part in parts
    ]


def fit(
    form: Form, kernel: Array, rank: int, multiple: int, hessian: Array | None
) -> tuple[list[Array], Array]:
    """The parts' kernels [H, W, I, O] for one group, and their product."""
    kernels = _fit(form, kernel, rank, multiple, hessian)
    return kernels, product_of(form, kernels)


def _fit(form: Form, kernel: Array, rank: int, multiple: int, hessian: Array | None) -> list[Array]:
    if form == "rows_and_columns":
        return list(split_rows_and_columns(kernel, rank, hessian))
    if form == "tucker":
        inner = parts_of(form, _sides(kernel), rank, multiple, 1)[0].sides[3]
        tucker = tucker2(kernel, inner, rank, hessian)
        return [tucker.first[None, None], tucker.core, tucker.last[None, None]]
    if form == "canonical":
        cp = canonical_polyadic(kernel, rank, hessian)
        return [
            cp.first[None, None], cp.rows[:, None, None], cp.columns[None, :, None],
            cp.last[None, None],
        ]  # fmt: skip
    u, v = split_matrix(kernel.reshape(-1, kernel.shape[3]), rank, hessian)
    return [u.reshape(*kernel.shape[:3], rank), v[None, None]]


# h, w: the window; i, o: inputs and outputs; x: sides of 1; others: between the parts.
_PRODUCTS: dict[Form, str] = {
    "channels": "hwir,xxro->hwio",
    "rows_and_columns": "hxir,xwro->hwio",
    "tucker": "xxia,hwab,xxbo->hwio",
    "canonical": "xxir,hxxr,xwxr,xxro->hwio",
}


def product_of(form: Form, kernels: Sequence[Array]) -> Array:
    """What the parts [H, W, I, O] of one group are together."""
    return np.asarray(np.einsum(_PRODUCTS[form], *kernels, optimize=True))


def _sides(kernel: Array) -> Sides:
    rows, columns, inputs, outputs = kernel.shape
    return rows, columns, inputs, outputs


def specs_of(whole: LayerSpec, parts: Sequence[Part]) -> list[LayerSpec]:
    """Kernels of the parts, one behind the other."""
    if isinstance(whole, MatmulSpec):
        return [
            whole.replace(in_features=part.sides[2], out_features=part.sides[3]) for part in parts
        ]
    specs: list[LayerSpec] = []
    size = (whole.height, whole.width, whole.in_channels)
    for part in parts:
        moves = (part.rows, part.columns)
        fields: dict[str, Any] = {
            "height": size[0], "width": size[1], "in_channels": size[2],
            "out_channels": part.sides[3], "kernel": part.sides[:2], "groups": part.groups,
            "strides": _where(moves, whole.strides, 1),
            "padding": _where((*moves, *moves), whole.padding, 0),
            "dilation": _where(moves, whole.dilation, 1),
        }  # fmt: skip
        spec = whole.replace(**fields)
        specs.append(spec)
        size = (spec.out_height, spec.out_width, spec.out_channels)
    return specs


def weight_of(call: relax.Call, kernel: Array) -> relax.Constant:
    """A part's kernel [H, W, I, O] in the layout of the layer `call`."""
    layout = weight_layout(call)
    order = kernel_order(layout)
    kernel = kernel.reshape(kernel.shape[4 - len(order) :])
    turned = kernel.transpose([order.index(x) for x in layout])
    return relax.const(np.ascontiguousarray(turned).astype(np.float32))


def call_of(
    call: relax.Call, part: Part, weight: relax.Constant, source: tvm.ir.Expr
) -> relax.Call:
    """A part as a layer of the same operator and layouts."""
    layout = weight_layout(call)
    if op_name(call) == "relax.matmul":
        return relax.op.matmul(source, weight)
    attrs = call.attrs
    moves = [part.rows, part.columns][-(len(layout) - 2) :]
    conv = relax.op.nn.conv1d if len(layout) == 3 else relax.op.nn.conv2d
    return conv(
        source, weight, strides=_where(moves, ints(attrs.strides), 1),
        padding=_where([*moves, *moves], ints(attrs.padding), 0),
        dilation=_where(moves, ints(attrs.dilation), 1),
        groups=part.groups, data_layout=str(attrs.data_layout), kernel_layout=layout,
        out_layout=str(attrs.out_layout),
    )  # fmt: skip


def _where(moves: Sequence[bool], values: Sequence[int], other: int) -> tuple[int, ...]:
    """The values of axes that a window moves along, `other` for those it does not."""
    return tuple(value if move else other for value, move in zip(values, moves, strict=True))
