"""The compressible layers of a module, and which scheme each one gets."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import tvm
from tvm import relax

from ..errors import RecipeError
from .branches import branch_call
from .graph import Graph
from .ir import op_name, shape_of
from .op_kinds import ANCHORS

Scheme = TypeVar("Scheme")


@dataclass(frozen=True)
class Layer:
    """One operator with its weight. `weight_shape` is `None` for a product of two activations.

    `kinds` are the operator types that a selector may name, the most general first.
    """

    name: str
    op: str
    kinds: tuple[str, ...]
    weight_shape: tuple[int, ...] | None
    bias_size: int
    macs: int
    is_in_branch: bool
    is_quantized: bool

    @property
    def params(self) -> int:
        """Number of weights and biases."""
        count = self.bias_size
        if self.weight_shape is not None:
            size = 1
            for side in self.weight_shape:
                size *= side
            count += size
        return count


def list_layers(module: tvm.IRModule) -> list[Layer]:
    """The layers of `main`, those inside the branches of an `If` included, in execution order."""
    return list(_layers_of(module, module["main"], is_in_branch=False))


def _layers_of(
    module: tvm.IRModule, function: relax.Function, is_in_branch: bool
) -> Iterable[Layer]:
    graph = Graph(function)
    for variable, value in graph.values.items():
        if isinstance(value, relax.If):
            for branch in (value.true_branch, value.false_branch):
                call = branch_call(module, branch)
                if call is not None:
                    yield from _layers_of(module, module[call.op], is_in_branch=True)
                    continue
                body = branch if isinstance(branch, relax.SeqExpr) else relax.SeqExpr([], branch)
                captured = relax.analysis.free_vars(body)
                inner = relax.Function(captured, body, body.ty, True)
                yield from _layers_of(module, inner, is_in_branch=True)
        elif graph.op(variable) in ANCHORS:
            layer = describe_layer(graph, variable, is_in_branch)
            if layer is not None:
                yield layer


def describe_layer(graph: Graph, variable: relax.Var, is_in_branch: bool = False) -> Layer | None:
    """The layer whose call defines `variable`; `None` where shapes are not known."""
    call = graph.values[variable]
    op = ANCHORS[op_name(call) or ""]
    data, weight = call.args[0], call.args[1]
    data_shape, kernel_shape, out_shape = shape_of(data), shape_of(weight), shape_of(variable)
    if data_shape is None or kernel_shape is None or out_shape is None:
        return None
    stored = graph.constant(weight) is not None
    is_quantized = not stored and is_stored_weight(graph, weight)
    kinds: tuple[str, ...]
    if op == "matmul":
        kinds = ("matmul", "linear") if stored or is_quantized else ("matmul",)
        macs = _product(out_shape) * data_shape[-1]
    else:
        kinds = (op, *_conv_kinds(call, data_shape, kernel_shape))
        # Each output position (input position, when transposed) meets every weight once.
        is_transposed = op.endswith("transpose")
        shape = data_shape if is_transposed else out_shape
        layout = str(call.attrs.data_layout if is_transposed else call.attrs.out_layout)
        macs = _product(shape) // shape[layout.index("C")] * _product(kernel_shape)
    return Layer(
        name=variable.name,
        op=op,
        kinds=kinds,
        weight_shape=kernel_shape if stored or is_quantized else None,
        bias_size=_bias_size(graph, variable),
        macs=macs,
        is_in_branch=is_in_branch,
        is_quantized=is_quantized,
    )


def is_stored_weight(graph: Graph, weight: tvm.ir.Expr) -> bool:
    """Whether `weight` is an expression of constants alone: a decoded, compressed weight."""
    if not isinstance(weight, relax.Var):
        return graph.constant(weight) is not None or not relax.analysis.free_vars(weight)
    value = graph.values.get(weight)
    if value is None:
        return False
    return all(is_stored_weight(graph, item) for item in relax.analysis.free_vars(value))


def _conv_kinds(
    call: relax.Call, data_shape: tuple[int, ...], kernel_shape: tuple[int, ...]
) -> tuple[str, ...]:
    groups = int(call.attrs.groups)
    channels = data_shape[str(call.attrs.data_layout).index("C")]
    if groups == channels and groups > 1:
        return ("depthwise",)
    if groups > 1:
        return ("grouped",)
    layout = str(call.attrs.kernel_layout)
    window = [side for side, axis in zip(kernel_shape, layout, strict=True) if axis not in "OI"]
    return ("pointwise",) if all(side == 1 for side in window) else ()


def _bias_size(graph: Graph, variable: relax.Var) -> int:
    readers = graph.readers[variable]
    if len(readers) != 1 or readers[0] is None or graph.op(readers[0]) != "relax.add":
        return 0
    arrays = [graph.constant(item) for item in graph.operands(readers[0])]
    return next((int(array.size) for array in arrays if array is not None), 0)


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def resolve(
    layers: Sequence[Layer], rules: Sequence[tuple[Sequence[str], Scheme]]
) -> dict[str, Scheme]:
    """Layer name => the scheme of the most specific selector that matches it.

    A selector is, the most specific first: a layer's exact name; a glob such as `stage?.*`; `re:`
    and a regular expression for the whole name; an operator type (`conv2d`, `depthwise`, `linear`,
    ...); `all`. Among equally specific selectors the last one wins. Raises `RecipeError` for a
    selector that matches nothing.
    """
    chosen: dict[str, tuple[int, Scheme]] = {}
    for selectors, scheme in rules:
        for selector in selectors:
            matched = _matches(layers, selector)
            if not matched:
                raise RecipeError(_nothing_matches(layers, selector))
            for name, specificity in matched:
                if name not in chosen or specificity >= chosen[name][0]:
                    chosen[name] = (specificity, scheme)
    return {layer.name: chosen[layer.name][1] for layer in layers if layer.name in chosen}


def _matches(layers: Sequence[Layer], selector: str) -> list[tuple[str, int]]:
    """(layer name, how specific the match is) for each layer that `selector` means."""
    exact = [layer.name for layer in layers if layer.name == selector]
    if exact:
        return [(name, 100) for name in exact]
    if selector == "all":
        return [(layer.name, 0) for layer in layers]
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise RecipeError(f"layer selector {selector!r}: {error}") from None
        return [(layer.name, 80) for layer in layers if pattern.fullmatch(layer.name)]
    if any(character in selector for character in "*?["):
        return [(layer.name, 90) for layer in layers if fnmatch.fnmatchcase(layer.name, selector)]
    return [
        (layer.name, 10 + layer.kinds.index(selector))
        for layer in layers
        if selector in layer.kinds
    ]


def _nothing_matches(layers: Sequence[Layer], selector: str) -> str:
    if not layers:
        return f"layer selector {selector!r}: the model has no compressible layers"
    names = [layer.name for layer in layers]
    kinds = sorted({kind for layer in layers for kind in layer.kinds})
    close = difflib.get_close_matches(selector.removeprefix("re:"), names + kinds, 1, 0.0)
    return (
        f"layer selector {selector!r} matches no layer; the nearest is {close[0]!r} "
        f"(types: {', '.join(kinds)}; `tvm-compress profile` lists the layers)"
    )
