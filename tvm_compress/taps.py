"""Hand integer tensors out of the reference graph, to compare the shipped library's with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm
    from tvm import relax

    from .relay_passes.graph import Graph


def tap(module: tvm.IRModule, names: Iterable[str]) -> tuple[tvm.IRModule, list[dict[str, Any]]]:
    """`main` returning, after its own results, the integer tensors among `names`.

    Also returns name, shape and dtype of each added result, in order, and `from_floats`: whether it
    was rounded from floats that were computed since the last integers.
    """
    from tvm import relax

    from .relay_passes.graph import Graph, rebuild
    from .relay_passes.ir import dtype_of, shape_of

    graph = Graph(module["main"])
    wanted = set(names)
    taps: dict[str, relax.Var] = {}
    handed_out: dict[relax.Var, list[relax.VarBinding]] = {}
    specs = []
    for variable in graph.values:
        shape = shape_of(variable)
        if variable.name not in wanted or shape is None:
            continue
        dtype = dtype_of(variable)
        if not dtype.startswith(("int", "uint")) or variable.name in taps:
            continue
        outside = relax.Var(f"{variable.name}_tap", variable.ty)
        handed_out[variable] = [relax.VarBinding(outside, variable)]
        taps[variable.name] = outside
        from_floats = _rounds_floats(graph, variable)
        specs.append(
            {
                "name": variable.name,
                "shape": list(shape),
                "dtype": dtype,
                "from_floats": from_floats,
            }
        )
    body = graph.function.body.body
    results = list(_results(graph, body))
    function = rebuild(graph.function, after=handed_out, result=[*results, *taps.values()])
    module = module.clone()
    module["main"] = function
    return relax.transform.Normalize()(module), specs


def _rounds_floats(graph: Graph, variable: relax.Var) -> bool:
    """Whether a computed float lies between `variable` and the integers or inputs it comes from."""
    from .relay_passes.ir import dtype_of

    operands = [o for o in graph.tensor_operands(variable) if o in graph.values]
    return any(dtype_of(operand).startswith(("float", "bfloat")) for operand in operands)


def _results(graph: Any, body: Any) -> Iterator[Any]:
    """The fields of the function's result, looked up through the variable that names the tuple."""
    from tvm import relax

    value = graph.values.get(body) if isinstance(body, relax.Var) else body
    while isinstance(value, relax.Var) and value in graph.values:
        value = graph.values[value]
    if isinstance(value, relax.Tuple):
        yield from value.fields
    else:
        yield body
