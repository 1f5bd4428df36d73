"""Which values of an unrolled loop are the same value at another step.

The steps of a recurrent layer share their weights. When the values that play one part in all steps
also share scale and zero point, every step is the same kernel with the same constants: the loop
costs the code and the tables of one step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import structural_hash

from .graph import Graph
from .op_kinds import MOVEMENT

_SMALL_CONSTANT = 16  # elements; larger ones are told apart by identity


def tied_values(graph: Graph, layers: Mapping[relax.Var, object]) -> list[list[relax.Var]]:
    """Groups of values that play the same part in different steps of a loop.

    A loop shows in two layers with one weight, of which the later depends on the earlier: their
    inputs, and their outputs, play the same part. So does whatever the same operator makes of
    such values. Without a loop there are no groups.
    """
    looping = _looping_layers(graph, layers)
    if not looping:
        return []
    classes = _Classes()
    for members in looping:
        for member in members[1:]:
            classes.join(members[0], member)
            classes.join(graph.values[members[0]].args[0], graph.values[member].args[0])
    first: dict[Hashable, relax.Var] = {}
    for variable in graph.values:
        operands = graph.tensor_operands(variable)
        value = graph.values[variable]
        if graph.op(variable) in MOVEMENT or isinstance(value, relax.TupleGetItem):
            for operand in operands:
                classes.join(operand, variable)
        elif isinstance(value, tvm.ir.Call):
            classes.join(first.setdefault(_part(graph, variable, classes), variable), variable)
    return classes.groups(graph)


def _looping_layers(graph: Graph, layers: Mapping[relax.Var, object]) -> list[list[relax.Var]]:
    """Layers with one weight, in groups in which the later ones depend on the earlier."""
    by_weight: dict[tvm.ir.Expr, list[relax.Var]] = {}
    above: dict[relax.Var, set[tvm.ir.Expr]] = {}  # the weights that a value depends on
    looping: set[tvm.ir.Expr] = set()
    for variable, value in graph.values.items():
        seen: set[tvm.ir.Expr] = set()
        for operand in graph.tensor_operands(variable):
            seen |= above.get(operand, set())
        if variable in layers:
            weight = value.args[1]
            by_weight.setdefault(weight, []).append(variable)
            if weight in seen:
                looping.add(weight)
            seen = seen | {weight}
        above[variable] = seen
    return [by_weight[weight] for weight in by_weight if weight in looping]


def _part(graph: Graph, variable: relax.Var, classes: _Classes) -> Hashable:
    """What identifies a value: its operator and what that is applied to."""
    call = graph.values[variable]
    operands: list[Hashable] = []
    for operand in graph.operands(variable):
        array = graph.constant(operand)
        if array is None:
            known = isinstance(operand, relax.Var)
            operands.append(classes.find(operand) if known else structural_hash(operand))
        elif array.size <= _SMALL_CONSTANT:
            operands.append((array.shape, np.asarray(array).tobytes()))
        else:
            operands.append(operand)
    attributes = structural_hash(call.attrs) if call.attrs is not None else None
    return (graph.op(variable), attributes, tuple(operands))


class _Classes:
    """Union-find over values; the earliest member stands for its class."""

    def __init__(self) -> None:
        self._above: dict[relax.Var, relax.Var] = {}

    def find(self, variable: relax.Var) -> relax.Var:
        while variable in self._above:
            variable = self._above[variable]
        return variable

    def join(self, first: relax.Var, second: relax.Var) -> None:
        first, second = self.find(first), self.find(second)
        if not first.same_as(second):
            self._above[second] = first

    def groups(self, graph: Graph) -> list[list[relax.Var]]:
        found: dict[relax.Var, list[relax.Var]] = {}
        for variable in graph.values:
            found.setdefault(self.find(variable), []).append(variable)
        return [members for members in found.values() if len(members) > 1]
