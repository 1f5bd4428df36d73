"""LSTM, GRU and RNN => matmuls and gates, unrolled over the (static) sequence.

The input projection of all steps is one matmul (`<layer>_input`), the recurrent one is a matmul a
step (`<layer>_recurrent_t0`, ...) on one shared constant. Equations: ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Expr

from ...relay_passes.ir import array_const, constant, dtype_of, shape_of
from .. import names

Cell = Callable[[Expr, list[Expr], str], list[Expr]]  # projected x_t, state, step name => new state

_ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "sigmoid": relax.op.sigmoid,
    "tanh": relax.op.tanh,
    "relu": relax.op.nn.relu,
}


class _Layer:
    """One node: its inputs split by direction, and `emit` under the layer's name."""

    def __init__(
        self, bb: Any, inputs: list[Any], attributes: dict[str, Any], gates: int, defaults: str
    ) -> None:
        self.bb = bb
        self.attributes = attributes
        self.name = names.layer_name(attributes["tvm_custom"]["name"], "rnn")
        self.x, self.w, self.r, self.b = (inputs[i] for i in range(4))
        self.state = [inputs[5], inputs[6]]
        self.peephole = inputs[7]
        direction = attributes.get("direction", b"forward").decode()
        self.backwards = {
            "forward": [False],
            "reverse": [True],
            "bidirectional": [False, True],
        }[direction]
        if inputs[4] is not None:
            raise ValueError("sequence_lens is not supported; use full sequences")
        if attributes.get("clip") or attributes.get("input_forget"):
            raise ValueError("attributes clip and input_forget are not supported")
        self.batch_first = bool(attributes.get("layout", 0))
        if self.batch_first:
            self.x = bb.emit(relax.op.permute_dims(self.x, [1, 0, 2]))
        shape = shape_of(self.x)
        hidden = (shape_of(self.r) or (0, 0, 0))[2]
        if shape is None or not hidden:
            raise ValueError("the sequence's shape is not known")
        self.steps, self.batch, self.features = shape
        self.hidden, self.gates = hidden, gates
        self.dtype = dtype_of(self.x)
        given = [a.decode().lower() for a in attributes.get("activations", [])]
        self.activations = given or defaults.split() * len(self.backwards)
        unknown = [a for a in self.activations if a not in _ACTIVATIONS]
        if unknown:
            raise ValueError(f"activation {unknown[0]!r} is not one of {', '.join(_ACTIVATIONS)}")

    def emit(self, expr: Expr, suffix: str = "") -> Expr:
        return self.bb.emit(expr, f"{self.name}_{suffix}" if suffix else "")

    def pick(self, expr: Expr, direction: int) -> Expr:
        """`expr[direction]`."""
        array = constant(expr)
        if array is not None:
            return array_const(np.array(array[direction]))
        piece = self.emit(relax.op.strided_slice(expr, [0], [direction], [direction + 1]))
        return self.emit(relax.op.squeeze(piece, [0]))

    def transposed(self, expr: Expr) -> Expr:
        array = constant(expr)
        if array is not None:
            return array_const(np.array(array.T))
        return self.emit(relax.op.permute_dims(expr, [1, 0]))

    def rows(self, expr: Expr, begin: int, end: int) -> Expr:
        """`expr[begin:end]` of a weight or bias (units of the hidden size)."""
        begin, end = begin * self.hidden, end * self.hidden
        array = constant(expr)
        if array is not None:
            return array_const(np.array(array[begin:end]))
        return self.emit(relax.op.strided_slice(expr, [0], [begin], [end]))

    def bias(self, direction: int) -> tuple[Expr | None, Expr | None]:
        """Input and recurrent bias, each [gates * hidden]."""
        if self.b is None:
            return None, None
        both = self.pick(self.b, direction)
        return self.rows(both, 0, self.gates), self.rows(both, self.gates, 2 * self.gates)

    def add(self, x: Expr, y: Expr | None) -> Expr:
        return x if y is None else self.emit(relax.op.add(x, y))

    def split(self, x: Expr, parts: int) -> list[Expr]:
        pieces = self.emit(relax.op.split(x, parts, axis=-1))
        return [self.emit(relax.TupleGetItem(pieces, i)) for i in range(parts)]

    def activation(self, direction: int, index: int, x: Expr) -> Expr:
        per_direction = len(self.activations) // len(self.backwards)
        return self.emit(_ACTIVATIONS[self.activations[direction * per_direction + index]](x))

    def initial(self, index: int, direction: int) -> Expr:
        given = self.state[index]
        if given is None:
            return array_const(np.zeros((self.batch, self.hidden), self.dtype))
        if self.batch_first:
            given = self.emit(relax.op.permute_dims(given, [1, 0, 2]))
        return self.pick(given, direction)

    def run(self, states: int, cell: Callable[[int], tuple[Expr, Expr | None, Cell]]) -> list[Expr]:
        """All directions and steps. `cell(direction)` gives W [I, G*H], its bias, and the step."""
        sequences: list[list[Expr]] = []
        finals: list[list[Expr]] = []
        for direction, backwards in enumerate(self.backwards):
            tag = "_reverse" if backwards else ""
            weight, bias, step_function = cell(direction)
            projected = self.emit(relax.op.matmul(self.x, weight), f"input{tag}")
            projected = self.add(projected, bias)
            state = [self.initial(i, direction) for i in range(states)]
            outputs = []
            for step in range(self.steps):
                time = self.steps - 1 - step if backwards else step
                x_t = self.emit(relax.op.strided_slice(projected, [0], [time], [time + 1]))
                x_t = self.emit(relax.op.squeeze(x_t, [0]))
                state = step_function(x_t, state, f"{tag}_t{step}")
                outputs.append(self.emit(relax.op.expand_dims(state[0], 0)))
            sequences.append(outputs[::-1] if backwards else outputs)
            finals.append(state)
        # [T, B, H] a direction => [T, D, B, H]
        stacked = [
            self.emit(relax.op.expand_dims(self.emit(relax.op.concat(s, 0)), 1)) for s in sequences
        ]
        y = self.emit(relax.op.concat(stacked, 1))
        last = [
            self.emit(
                relax.op.concat([self.emit(relax.op.expand_dims(f[i], 0)) for f in finals], 0)
            )
            for i in range(states)
        ]
        if self.batch_first:
            y = self.emit(relax.op.permute_dims(y, [2, 0, 1, 3]))
            last = [self.emit(relax.op.permute_dims(value, [1, 0, 2])) for value in last]
        return [y, *last]


def _joined(layer: _Layer, a: Expr | None, b: Expr | None) -> Expr | None:
    """`a + b` of two biases."""
    if a is None or b is None:
        return a or b
    x, y = constant(a), constant(b)
    if x is not None and y is not None:
        return array_const(x + y)
    return layer.emit(relax.op.add(a, b))


def lstm(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> list[Expr]:
    """i, o, f, c gates; `c = f*c + i*g`, `h = o * tanh(c)`; peepholes as in the specification."""
    layer = _Layer(bb, inputs, attributes, gates=4, defaults="sigmoid tanh tanh")

    def cell(direction: int) -> tuple[Expr, Expr | None, Cell]:
        recurrent = layer.transposed(layer.pick(layer.r, direction))
        bias = _joined(layer, *layer.bias(direction))
        peepholes: list[Expr] | None = None
        if layer.peephole is not None:
            flat = layer.pick(layer.peephole, direction)
            peepholes = [layer.rows(flat, i, i + 1) for i in range(3)]  # i, o, f

        def peep(gate: Expr, index: int, c: Expr) -> Expr:
            if peepholes is None:
                return gate
            return layer.add(gate, layer.emit(relax.op.multiply(peepholes[index], c)))

        def step(x: Expr, state: list[Expr], tag: str) -> list[Expr]:
            h, c = state
            projected = layer.emit(relax.op.matmul(h, recurrent), f"recurrent{tag}")
            i, o, f, g = layer.split(layer.add(x, projected), 4)
            i = layer.activation(direction, 0, peep(i, 0, c))
            f = layer.activation(direction, 0, peep(f, 2, c))
            g = layer.activation(direction, 1, g)
            kept = layer.emit(relax.op.multiply(f, c))
            c = layer.emit(relax.op.add(kept, layer.emit(relax.op.multiply(i, g))))
            o = layer.activation(direction, 0, peep(o, 1, c))
            h = layer.emit(relax.op.multiply(o, layer.activation(direction, 2, c)))
            return [h, c]

        return layer.transposed(layer.pick(layer.w, direction)), bias, step

    return layer.run(2, cell)


def gru(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> list[Expr]:
    """z, r, h gates; `h = (1 - z) * n + z * h`, with `linear_before_reset` both ways."""
    layer = _Layer(bb, inputs, attributes, gates=3, defaults="sigmoid tanh")
    linear_first = bool(attributes.get("linear_before_reset", 0))
    one = array_const(np.ones((), layer.dtype))

    def cell(direction: int) -> tuple[Expr, Expr | None, Cell]:
        recurrent = layer.pick(layer.r, direction)
        w_bias, r_bias = layer.bias(direction)
        if linear_first:
            r_all = layer.transposed(recurrent)
        else:
            w_bias = _joined(layer, w_bias, r_bias)
            r_gates = layer.transposed(layer.rows(recurrent, 0, 2))
            r_candidate = layer.transposed(layer.rows(recurrent, 2, 3))

        def step(x: Expr, state: list[Expr], tag: str) -> list[Expr]:
            (h,) = state
            x_z, x_r, x_h = layer.split(x, 3)
            if linear_first:
                projected = layer.emit(relax.op.matmul(h, r_all), f"recurrent{tag}")
                h_z, h_r, h_h = layer.split(layer.add(projected, r_bias), 3)
            else:
                projected = layer.emit(relax.op.matmul(h, r_gates), f"recurrent{tag}")
                h_z, h_r = layer.split(projected, 2)
            z = layer.activation(direction, 0, layer.add(x_z, h_z))
            r = layer.activation(direction, 0, layer.add(x_r, h_r))
            if linear_first:
                candidate = layer.emit(relax.op.multiply(r, h_h))
            else:
                reset = layer.emit(relax.op.multiply(r, h))
                candidate = layer.emit(relax.op.matmul(reset, r_candidate), f"candidate{tag}")
            n = layer.activation(direction, 1, layer.add(x_h, candidate))
            new = layer.emit(relax.op.multiply(layer.emit(relax.op.subtract(one, z)), n))
            return [layer.emit(relax.op.add(new, layer.emit(relax.op.multiply(z, h))))]

        return layer.transposed(layer.pick(layer.w, direction)), w_bias, step

    return layer.run(1, cell)


def rnn(bb: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> list[Expr]:
    """`h = f(x W + h R + b)`."""
    layer = _Layer(bb, inputs, attributes, gates=1, defaults="tanh")

    def cell(direction: int) -> tuple[Expr, Expr | None, Cell]:
        recurrent = layer.transposed(layer.pick(layer.r, direction))
        bias = _joined(layer, *layer.bias(direction))

        def step(x: Expr, state: list[Expr], tag: str) -> list[Expr]:
            projected = layer.emit(relax.op.matmul(state[0], recurrent), f"recurrent{tag}")
            return [layer.activation(direction, 0, layer.add(x, projected))]

        return layer.transposed(layer.pick(layer.w, direction)), bias, step

    return layer.run(1, cell)
