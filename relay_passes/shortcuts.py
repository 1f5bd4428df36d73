"""Tensors that are added to a layer's output: what the layer can make up for, besides its own."""

from __future__ import annotations

from collections.abc import Iterable

from tvm import relax

from .graph import Graph
from .ir import shape_of


def shortcuts(graph: Graph, layers: Iterable[relax.Var]) -> dict[relax.Var, list[relax.Var]]:
    """Layer => what is added to its output before anything else reads it, bias apart.

    Not among them: what another one of `layers` has a part in, because both would make up for the
    same loss, and what has another shape.
    """
    members = set(layers)
    return {layer: _added(graph, layer, members) for layer in members}


def _added(graph: Graph, layer: relax.Var, members: set[relax.Var]) -> list[relax.Var]:
    found: list[relax.Var] = []
    value = layer
    while True:
        readers = graph.readers[value]
        reader = readers[0] if len(readers) == 1 else None
        if reader is None or graph.op(reader) != "relax.add":
            return found
        others = [item for item in graph.tensor_operands(reader) if not item.same_as(value)]
        if any(shape_of(item) != shape_of(layer) for item in others):
            return found
        found += [item for item in others if not _depends(graph, item, members)]
        value = reader


def _depends(graph: Graph, variable: relax.Var, members: set[relax.Var]) -> bool:
    """Whether any of `members` has a part in `variable`."""
    seen: set[relax.Var] = set()
    pending = [variable]
    while pending:
        item = pending.pop()
        if item in members:
            return True
        if item not in seen and item in graph.values:
            seen.add(item)
            pending.extend(relax.analysis.free_vars(graph.values[item]))
    return False
