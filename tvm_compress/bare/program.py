"""The planned Relax module as a list of C calls: tensors, kernel calls, where everything lies."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TargetError

if TYPE_CHECKING:
    import tvm

    from ..kernels import Call
    from .compile import CompiledKernel
    from .order import GraphPlan

COPY = "memcpy"  # the one symbol that is no kernel: an input or a constant that is an output


@dataclass(frozen=True)
class Tensor:
    """A piece of memory that kernels read or write. `role`: input, output, constant, activation."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    content: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        item = 1 if self.dtype == "bool" else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * item


@dataclass(frozen=True)
class KernelCall:
    """`symbol(arguments..., workspaces...)`; the last `results` arguments are written."""

    symbol: str
    arguments: tuple[str, ...]
    results: int = 1
    layers: tuple[str, ...] = ()
    output: str = ""
    """What the graph calls the result, which passes may rename."""
    workspaces: tuple[tuple[str, int], ...] = ()
    """Name of the kernel's parameter, and its offset in the workspace of the call."""
    workspace_bytes: int = 0
    in_place: tuple[tuple[str, str, int], ...] = ()
    """(output, input, bytes): the output may start so many bytes before the input, or more."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.arguments[: len(self.arguments) - self.results]

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.arguments[len(self.arguments) - self.results :]


@dataclass(frozen=True)
class Program:
    """Calls in execution order over tensors by name. `outputs` may name one tensor only once."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    calls: tuple[KernelCall, ...]

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors.values() if t.role == "constant")


def program_of(module: tvm.IRModule, calls: tuple[Call, ...]) -> Program:
    """Walk `main` behind `pipeline.destination_pipeline`.

    Raises `TargetError` for what a list of calls cannot hold: branches, dynamic shapes.
    """
    return _Walk(module, calls).program()


class _Walk:
    def __init__(self, module: tvm.IRModule, calls: tuple[Call, ...]) -> None:
        self.module = module
        self.noted: dict[str, deque[Call]] = {}  # by symbol, in order of execution
        for call in calls:
            self.noted.setdefault(call.symbol, deque()).append(call)
        self.tensors: dict[str, Tensor] = {}
        self.of_var: dict[Any, Any] = {}  # Relax variable => tensor's name, or names of a tuple
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.calls: list[KernelCall] = []

    def program(self) -> Program:
        from ..relay_passes import ir

        main = self.module["main"]
        inputs = tuple(self._add(str(p.name), p, "input") for p in main.params)
        self._name_results(main)
        for param, name in zip(main.params, inputs, strict=True):
            self.of_var[param] = name
        for binding in ir.bindings(main):
            self._bind(binding.var, binding.value)
        result = self._value(main.body.body)
        outputs = [result] if isinstance(result, str) else list(result)
        outputs = [self._own(index, name, outputs) for index, name in enumerate(outputs)]
        return Program(inputs, tuple(outputs), self.tensors, tuple(self.calls))

    def _name_results(self, main: Any) -> None:
        """Allocated memory gets the name of what is bound to it, as the graph calls it."""
        import tvm

        from ..relay_passes import ir

        self.names: dict[Any, str] = {}
        for binding in ir.bindings(main):
            if isinstance(binding.value, tvm.relax.Var) and binding.value not in self.names:
                self.names[binding.value] = str(binding.var.name)

    def _add(self, wanted: str, expr: Any, role: str, content: np.ndarray | None = None) -> str:
        from ..relay_passes import ir

        shape = ir.shape_of(expr)
        if shape is None:
            raise TargetError(
                f"tensor {wanted!r} has no constant shape, and a C project has all its memory "
                "planned: give --shape for every dynamic input"
            )
        name, number = wanted, 1
        while name in self.tensors:
            number += 1
            name = f"{wanted}_{number}"
        self.tensors[name] = Tensor(name, shape, ir.dtype_of(expr), role, content)
        return name

    def _bind(self, var: Any, value: Any) -> None:
        import tvm
        from tvm import relax

        from ..relay_passes import ir

        operator = ir.op_name(value)
        if operator == "relax.builtin.alloc_tensor":
            wanted = self.names.get(var, str(var.name))
            self.of_var[var] = self._add(wanted, var, "activation")
        elif operator == "relax.reshape":
            self.of_var[var] = self._value(value.args[0])  # a view
        elif isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self._call(value)
        elif operator in ("relax.memory.kill_tensor", "relax.memory.kill_storage"):
            pass
        elif isinstance(value, relax.If):
            raise TargetError(
                f"{var.name} is chosen by a branch at run time, which a C project's list of calls "
                "does not have; compile for host, or export the model without the branch"
            )
        else:
            self.of_var[var] = self._value(value)

    def _call(self, call: Any) -> None:
        symbol = str(call.op.name_hint)
        arguments = [self._value(argument) for argument in call.args]
        if any(not isinstance(argument, str) for argument in arguments):
            raise TargetError(f"kernel {symbol} takes something that is no tensor")
        function = self.module[call.op]
        results = int((function.attrs or {}).get("num_outputs", 1))
        noted = self.noted.get(symbol)
        found = noted.popleft() if noted else None
        layers, output = (found.layers, found.output) if found is not None else ((), "")
        self.calls.append(KernelCall(symbol, tuple(arguments), results, tuple(layers), output))

    def _value(self, expr: Any) -> Any:
        """Name of a tensor; a tuple of such."""
        import tvm
        from tvm import relax

        from ..relay_passes import ir

        if expr in self.of_var:
            return self.of_var[expr]
        array = ir.constant(expr)
        if array is not None:
            return self._constant(expr, array)
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[int(expr.index)]
        what = ir.op_name(expr) if isinstance(expr, tvm.ir.Call) else type(expr).__name__
        if what == "relax.call_packed":
            what = f"a call of {getattr(expr.args[0], 'global_symbol', 'the runtime')}"
        raise TargetError(
            f"{what} is done by TVM's runtime, which a C project does not have; compile for host"
        )

    def _constant(self, expr: Any, array: np.ndarray) -> str:
        """Equal constants are one."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self._add(
                f"constant{len(self.constants)}", expr, "constant", array
            )
        return self.constants[key]

    def _own(self, index: int, name: str, outputs: list[str]) -> str:
        """An output that the caller can own: what a kernel writes, else a copy."""
        tensor = self.tensors[name]
        if tensor.role == "activation" and name not in outputs[:index]:
            self.tensors[name] = replace(tensor, role="output")
            return name
        copy = f"output{index}"
        self.tensors[copy] = replace(tensor, name=copy, role="output", content=None)
        self.calls.append(KernelCall(COPY, (name, copy)))
        return copy


def with_kernels(program: Program, kernels: Mapping[str, CompiledKernel]) -> Program:
    """The same with the compiled kernels' symbols and workspaces; equal kernels have one symbol."""
    calls = []
    for call in program.calls:
        if call.symbol != COPY:
            kernel = kernels[call.symbol]
            offsets, end = [], 0
            for workspace in kernel.workspaces:
                offsets.append((workspace.name, end))
                end += -(-workspace.bytes // kernel.alignment) * kernel.alignment
            call = replace(
                call,
                symbol=kernel.symbol,
                workspaces=tuple(offsets),
                workspace_bytes=end,
                in_place=_in_place(call, kernel),
            )
        calls.append(call)
    return replace(program, calls=tuple(calls))


def _in_place(call: KernelCall, kernel: CompiledKernel) -> tuple[tuple[str, str, int], ...]:
    """What the kernel allows for its parameters, of the tensors of a call."""
    found = []
    lead_of = {(output, source): lead for output, source, lead in kernel.leads}
    for output in dict.fromkeys(output for output, _, _ in kernel.leads):
        for name in dict.fromkeys(call.inputs):
            # One tensor may be several arguments.
            pairs = [(output, i) for i, argument in enumerate(call.inputs) if argument == name]
            if all(pair in lead_of for pair in pairs):
                lead = max(lead_of[pair] for pair in pairs)
                found.append((call.arguments[output], name, lead))
    return tuple(found)


def plan_memory(program: Program, alignment: int) -> tuple[Program, GraphPlan]:
    """The program in the order that needs the least memory, and the arena."""
    from .order import Graph, InPlace, Operator, plan_graph

    # An output lies elsewhere, but who reads it must come after who writes it.
    held = {
        t.name: t.bytes if t.role == "activation" else 0
        for t in program.tensors.values()
        if t.role in ("activation", "output")
    }
    operators = tuple(
        Operator(
            f"call{i}",
            call.inputs,
            call.outputs,
            call.workspace_bytes,
            tuple(InPlace(*names) for names in call.in_place),
        )
        for i, call in enumerate(program.calls)
    )
    found = plan_graph(Graph(held, operators), alignment)
    calls = tuple(program.calls[index] for index in found.order.indices)
    return replace(program, calls=calls), found
