"""Small float graphs for the tests of the compression passes, and what is asked of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr
from tvm.relax import op
from tvm_ffi import StructuralKey

from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.numerics.observers import TensorObserver
from tvm_compress.relay_passes.numerics.ranges import MinMax
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.quantize import Quantize, observe
from tvm_compress.relay_passes.quantize_config import QuantizeConfig
from tvm_compress.relay_passes.select import list_layers


class Net:
    """Emits a float graph; every method returns the variable that it is named after."""

    def __init__(self, builder: relax.BlockBuilder, seed: int) -> None:
        self.builder = builder
        self.rng = np.random.default_rng(seed)

    def __call__(self, name: str, expr: Expr) -> relax.Var:
        return self.builder.emit(expr, name_hint=name)

    def array(self, *shape: int, spread: float = 1.0) -> Expr:
        return relax.const(self.rng.normal(0, spread, shape).astype(np.float32))

    def conv(
        self, name: str, x: relax.Var, outputs: int, kernel: int = 3, groups: int = 1, **attrs: Any
    ) -> relax.Var:
        """NCHW convolution with "same" padding, without bias."""
        inputs = (ir.shape_of(x) or ())[1] // groups
        weight = self.array(outputs, inputs, kernel, kernel, spread=1 / np.sqrt(inputs * kernel**2))
        attrs = {"padding": kernel // 2, **attrs}
        return self(name, op.nn.conv2d(x, weight, groups=groups, **attrs))

    def bias(self, name: str, x: relax.Var) -> relax.Var:
        channels = (ir.shape_of(x) or ())[1]
        return self(name, op.add(x, self.array(1, channels, 1, 1, spread=0.2)))

    def conv_bias(self, name: str, x: relax.Var, outputs: int, **options: Any) -> relax.Var:
        return self.bias(f"{name}_bias", self.conv(name, x, outputs, **options))

    def conv_relu(self, name: str, x: relax.Var, outputs: int, **options: Any) -> relax.Var:
        return self(f"{name}_relu", op.nn.relu(self.conv_bias(name, x, outputs, **options)))

    def linear(self, name: str, x: relax.Var, outputs: int) -> relax.Var:
        inputs = (ir.shape_of(x) or ())[-1]
        return self(name, op.matmul(x, self.array(inputs, outputs, spread=1 / np.sqrt(inputs))))


def build(
    body: Callable[..., Any], shape: Sequence[int] = (1, 4, 8, 8), seed: int = 0
) -> tvm.IRModule:
    """`body(net, x)` as `main`; the result is called `out`."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(list(shape), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = body(Net(builder, seed), x)
            output = builder.emit_output(result, name_hint="out")
        builder.emit_func_output(output)
    return builder.finalize()


@lru_cache(maxsize=8)
def _machine(content: StructuralKey, level: int) -> relax.VirtualMachine:
    """A module compiled once for all the arrays that a test runs."""
    target = tvm.target.Target({"kind": "llvm", "opt-level": level})
    return relax.VirtualMachine(tvm.compile(content.key, target=target), tvm.cpu())


def run(module: tvm.IRModule, *arrays: np.ndarray, level: int = 3) -> Any:
    """The module's result as an array, or a list of arrays. What runs a few times is there sooner
    when `level` 0 compiles it."""
    machine = _machine(StructuralKey(module), level)
    result = machine["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays])
    return result.numpy() if hasattr(result, "numpy") else [item.numpy() for item in result]


def samples(module: tvm.IRModule, count: int = 4, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = ir.shape_of(module["main"].params[0]) or ()
    return [rng.normal(0, 1, shape).astype(np.float32) for _ in range(count)]


def statistics_of(ranges: Mapping[str, tuple[float, float]]) -> Statistics:
    """Statistics with the given extremes."""
    tensors = {}
    for name, (low, high) in ranges.items():
        observer = TensorObserver()
        observer.update(np.asarray([low, high], np.float32))
        tensors[name] = observer.result()
    return Statistics(tensors, samples=1)


def all_layers(module: tvm.IRModule, config: Any) -> dict[str, Any]:
    return {layer.name: config for layer in list_layers(module)}


def quantize(
    module: tvm.IRModule,
    config: QuantizeConfig | None = None,
    schemes: Mapping[str, QuantizeConfig] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tvm.IRModule:
    """Quantised with the range [-4, 4] for every tensor that `ranges` does not name."""
    schemes = schemes or all_layers(module, config or QuantizeConfig())
    schemes = {name: replace(item, calibrate=MinMax()) for name, item in schemes.items()}
    wanted = observe(module, schemes).tensors
    given = dict.fromkeys(wanted, (-4.0, 4.0)) | dict(ranges or {})
    return Quantize(schemes, statistics_of(given))(module)


def describe(module: tvm.IRModule) -> dict[str, str]:
    """Variable => `operator(variables it reads)`; constants are left out."""
    graph = Graph(module["main"])
    text = {}
    for variable in graph.values:
        operands = ", ".join(item.name for item in graph.tensor_operands(variable))
        text[variable.name] = f"{(graph.op(variable) or '').removeprefix('relax.')}({operands})"
    return text


def quantized_values(module: tvm.IRModule) -> list[str]:
    """Names of the values that quantisers stand behind, in order."""
    return [
        binding.value.args[0].name
        for binding in ir.bindings(module["main"])
        if ir.op_name(binding.value) == "relax.quantize"
    ]


def parameters_of(module: tvm.IRModule, name: str) -> tuple[float, int, str]:
    """(scale, zero point, dtype) of the quantiser behind the value `name`."""
    for binding in ir.bindings(module["main"]):
        value = binding.value
        if ir.op_name(value) == "relax.quantize" and value.args[0].name == name:
            scale, zero_point = ir.constant(value.args[1]), ir.constant(value.args[2])
            assert scale is not None
            assert zero_point is not None
            return float(scale), int(zero_point), ir.dtype_of(binding.var)
    raise AssertionError(f"no quantiser behind {name}")


def stored(module: tvm.IRModule, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(integers, scale, axis) of the `dequantize(constant)` called `name`."""
    for binding in ir.bindings(module["main"]):
        if binding.var.name == name:
            assert ir.op_name(binding.value) == "relax.dequantize"
            integers, scale, _ = (ir.constant(item) for item in binding.value.args)
            assert integers is not None
            assert scale is not None
            return integers, scale, int(binding.value.attrs.axis)
    raise AssertionError(f"no binding {name}")
