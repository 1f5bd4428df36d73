"""main(x) => main(x, one_hot) = (tensors..., dL/d tensors...): reverse mode on the graph form

L is the cross-entropy of softmax(logits) with the labels, summed over the batch. `relax.transform.
Gradient` differentiates by parameters alone, convolutions in NCHW alone, and knows no 1-D
convolution or pool, clip, slice or pad; so the walk back through the graph is made here, with the
rules of `gradient_rules.py` and TVM's own where an operator has one. Only operators between the
tensors asked for and the logits need a rule.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from ..errors import RecipeError
from .gradient_rules import operand_gradient
from .graph import Graph
from .ir import array_const, bindings, dtype_of, op_name, shape_of

# What an output may be of the logits.
_SOFTMAX = ("relax.nn.softmax", "relax.nn.log_softmax")
_SAME_VALUES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")


def with_gradients(module: tvm.IRModule, names: Sequence[str], output: int = 0) -> tvm.IRModule:
    """The module whose `main` takes one_hot [batch, classes] behind its inputs and returns the
    tensors of `names`, then dL/d of each, as one tuple.

    Result number `output` holds one score for each class: logits, or their softmax. Raises
    `RecipeError` for a tensor that is not in `main` or does not reach that result, for a result of
    integers, and naming the operator that has no gradient.
    """
    graph = Graph(module["main"])
    variables = {variable.name: variable for variable in graph.readers}
    for name in names:
        if name not in variables:
            raise RecipeError(f"the model has no tensor {name!r} to take the gradient of")
    wanted = [variables[name] for name in names]
    logits = _logits(graph, output)
    others = {var: func for var, func in module.functions.items() if var.name_hint != "main"}
    builder = relax.BlockBuilder(tvm.IRModule(others, attrs=module.attrs))
    shape = shape_of(logits) or (1,)
    ty = relax.TensorType((shape[0], math.prod(shape[1:])), dtype_of(logits))
    one_hot = relax.Var("one_hot", ty)
    function = graph.function
    refusal: RecipeError | None = None
    with builder.function("main", [*function.params, one_hot]):
        with builder.dataflow():
            for binding in bindings(function):
                builder.emit_normalized(binding)
            scores = builder.emit(op.reshape(logits, (shape[0], -1)))
            seed = op.reshape(op.subtract(op.nn.softmax(scores, axis=-1), one_hot), shape)
            try:
                adjoints = _adjoints(graph, wanted, logits, seed, builder)
            except RecipeError as error:  # a builder that is left half-way complains on stderr
                refusal, adjoints = error, dict.fromkeys(wanted, scores)
            results = [builder.emit_output(item) for item in wanted]
            results += [builder.emit_output(adjoints[item]) for item in wanted]
        builder.emit_func_output(relax.Tuple(results))
    if refusal is not None:
        raise refusal
    result = builder.get()
    result["main"] = relax.analysis.remove_all_unused(
        result["main"].with_attr("global_symbol", "main")
    )
    return result


def _logits(graph: Graph, output: int) -> relax.Var:
    """What the scores of a result are the softmax of, or the result itself."""
    body = graph.function.body.body
    while isinstance(body, relax.Var) and not isinstance(graph.values.get(body), tvm.ir.Call):
        body = graph.values[body]
    variable = body.fields[output] if isinstance(body, relax.Tuple) else body
    if dtype_of(variable) not in ("float32", "float64"):
        raise RecipeError(
            f"output {variable.name!r} is {dtype_of(variable)}: the loss has no gradient there; "
            "begin with the float model, or choose a criterion that needs no labels"
        )
    result = variable
    while graph.op(variable) in _SAME_VALUES or isinstance(graph.values.get(variable), relax.Var):
        value = graph.values[variable]
        variable = value if isinstance(value, relax.Var) else value.args[0]
    if graph.op(variable) in _SOFTMAX:
        call = graph.values[variable]
        shape = shape_of(variable) or ()
        axis = int(call.attrs.axis) % len(shape)
        if math.prod(shape[1:]) == shape[axis]:  # over the classes, and nothing else is left
            return call.args[0]
    return result


def _downstream(graph: Graph, start: Sequence[relax.Var]) -> frozenset[relax.Var]:
    """All variables that depend on `start`, with these."""
    reached = set(start)
    for variable in graph.values:
        if any(item in reached for item in graph.operands(variable)):
            reached.add(variable)
    return frozenset(reached)


def _adjoints(
    graph: Graph,
    wanted: Sequence[relax.Var],
    logits: relax.Var,
    seed: relax.Expr,
    builder: relax.BlockBuilder,
) -> dict[relax.Var, relax.Var]:
    """dL/d of `wanted` and of all that lies between them and the logits."""
    reached = _downstream(graph, wanted)
    terms: dict[relax.Var, list[relax.Expr]] = defaultdict(list)
    elements: dict[relax.Var, dict[int, list[relax.Expr]]] = defaultdict(lambda: defaultdict(list))
    terms[logits] = [seed]
    found: dict[relax.Var, relax.Var] = {}

    def total(parts: list[relax.Expr]) -> relax.Var:
        result = builder.emit(parts[0])
        for part in parts[1:]:
            result = builder.emit(op.add(result, part))
        return result

    for variable in reversed([*graph.function.params, *graph.values]):
        value = graph.values.get(variable)
        if variable not in reached:
            continue
        if variable in elements and op_name(value) == "relax.split":
            terms[variable] = [_joined(variable, value, elements[variable], total)]
        if variable not in terms:
            continue
        gradient = found[variable] = total(terms[variable])
        if value is None:
            continue
        if isinstance(value, relax.TupleGetItem):
            elements[value.tuple_value][int(value.index)].append(gradient)
        elif isinstance(value, relax.Var):
            terms[value].append(gradient)
        else:
            for index, operand in enumerate(graph.operands(variable)):
                if isinstance(operand, relax.Var) and operand in reached:
                    part = operand_gradient(graph, variable, index, gradient, builder)
                    terms[operand].append(part)
    for variable in wanted:
        if variable not in found:
            raise RecipeError(
                f"tensor {variable.name!r} does not reach the output that the labels are of: it "
                "has no gradient"
            )
    return found


def _joined(
    variable: relax.Var,
    call: relax.Call,
    parts: dict[int, list[relax.Expr]],
    total: object,
) -> relax.Expr:
    """What `split` gave out, together again; zeros where nobody read."""
    assert callable(total)
    pieces = [
        total(parts[index])
        if index in parts
        else array_const(np.zeros(shape_of_type(item), str(item.dtype)))
        for index, item in enumerate(variable.ty.fields)
    ]
    return op.concat(pieces, axis=int(call.attrs.axis))


def shape_of_type(item: tvm.ir.Type) -> tuple[int, ...]:
    """Static shape of a tensor type."""
    return tuple(int(value) for value in item.shape.values)
