"""Small quantised graphs for the tests of the lowering, and what is checked on each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Expr

from tvm_compress.pipeline import fusion_pipeline, packing_pipeline
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.fuse_epilogues import CALLS_ATTR
from tvm_compress.relay_passes.lower import LEFT_FLOAT_ATTR, LowerToKernels
from tvm_compress.schedules.spec import KERNEL_ATTR
from tvm_compress.targets import get_target

# Without optimisation: compiling is most of a test's time.
PLAIN = tvm.target.Target({"kind": "llvm", "opt-level": 0})


class Graph:
    """Emits one graph; every method returns a variable."""

    def __init__(self, builder: relax.BlockBuilder, seed: int) -> None:
        self.builder = builder
        self.rng = np.random.default_rng(seed)
        self.weight_scales = np.ones(1, np.float32)

    def emit(self, expr: Expr, name: str) -> relax.Var:
        return self.builder.emit(expr, name_hint=name)

    def quantize(
        self, x: Expr, scale: float, zero_point: int = 0, dtype: str = "int8", name: str = "y"
    ) -> relax.Var:
        expr = relax.op.quantize(
            x, relax.const(np.float32(scale)), relax.const(zero_point, dtype), -1, dtype
        )
        return self.emit(expr, name)

    def dequantize(self, q: Expr, scale: float, zero_point: int = 0, name: str = "d") -> relax.Var:
        zero = relax.const(zero_point, ir.dtype_of(q))
        expr = relax.op.dequantize(q, relax.const(np.float32(scale)), zero, -1, "float32")
        return self.emit(expr, name)

    def qdq(
        self, x: Expr, scale: float, zero_point: int = 0, dtype: str = "int8", name: str = "x"
    ) -> relax.Var:
        codes = self.quantize(x, scale, zero_point, dtype, f"{name}_q")
        return self.dequantize(codes, scale, zero_point, f"{name}_dq")

    def weight(
        self,
        shape: Sequence[int],
        axis: int | None = 0,
        dtype: str = "int8",
        zero_point: int | np.ndarray = 0,
        scale: float = 0.01,
    ) -> relax.Var:
        """Random codes; `axis` has a scale per channel, None one scale in all."""
        info = np.iinfo(dtype)
        codes = self.rng.integers(info.min, info.max + 1, shape).astype(dtype)
        count = 1 if axis is None else shape[axis]
        scales = (scale * self.rng.uniform(0.5, 1.5, count)).astype(np.float32)
        zeros = np.broadcast_to(np.asarray(zero_point, dtype), count).copy()
        self.weight_scales = scales
        if axis is None:
            scales, zeros = scales.reshape(()), zeros.reshape(())
        expr = relax.op.dequantize(
            ir.array_const(codes),
            ir.array_const(scales),
            ir.array_const(zeros),
            axis or 0,
            "float32",
        )
        return self.emit(expr, "weight")

    def bias(self, shape: Sequence[int], x_scale: float, spread: float = 1.0) -> relax.Var:
        """int32 codes at the scale of the last weight times `x_scale`, within +-`spread`."""
        size = int(np.prod(shape))
        scale = np.float32(x_scale) * self.weight_scales
        if scale.size > 1:
            scale = np.resize(scale, size)  # a grouped transposed convolution repeats its scales
        values = self.rng.uniform(-spread, spread, size)
        codes = np.rint(values / np.broadcast_to(scale, size)).astype(np.int32).reshape(shape)
        axis = int(np.argmax(shape)) if scale.size > 1 else 0
        scales = scale if scale.size > 1 else scale.reshape(())
        zeros = np.zeros(scales.shape, np.int32)
        expr = relax.op.dequantize(
            ir.array_const(codes), ir.array_const(scales), ir.array_const(zeros), axis, "float32"
        )
        return self.emit(expr, "bias")

    def const(self, array: np.ndarray | float) -> Expr:
        return ir.array_const(np.asarray(array, np.float32))


def graph(
    inputs: Mapping[str, Sequence[int] | tuple[Sequence[int], str]],
    body: Callable[..., Expr | tuple[Expr, ...]],
    seed: int = 0,
    attrs: Mapping[str, Any] | None = None,
) -> tvm.IRModule:
    """`body(g, *inputs)` as the function `main` of a module in graph form."""
    builder = relax.BlockBuilder()
    params = []
    for name, given in inputs.items():
        shape, dtype = given if isinstance(given[-1], str) else (given, "float32")
        params.append(relax.Var(name, relax.TensorType(list(shape), dtype)))  # type: ignore[arg-type]
    with builder.function("main", params):
        with builder.dataflow():
            result = body(Graph(builder, seed), *params)
            result = relax.Tuple(list(result)) if isinstance(result, tuple) else result
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    module = builder.finalize()
    if attrs:
        module["main"] = module["main"].with_attrs(dict(attrs))
    return module


def compile_module(module: tvm.IRModule, target: tvm.target.Target = PLAIN) -> Callable[..., Any]:
    """The module as a function of NumPy arrays; the result is an array or a list of arrays."""
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())

    def run(*arrays: np.ndarray) -> Any:
        result = machine["main"](*[tvm.runtime.tensor(np.array(a, order="C")) for a in arrays])
        return result.numpy() if hasattr(result, "numpy") else [t.numpy() for t in result]

    return run


def random_inputs(module: tvm.IRModule, seed: int, spread: float = 2.0) -> list[np.ndarray]:
    """One array for each parameter; float ones reach beyond the range of the usual test scales."""
    rng = np.random.default_rng(seed)
    arrays = []
    for param in module["main"].params:
        shape, dtype = ir.shape_of(param), ir.dtype_of(param)
        assert shape is not None
        if dtype.startswith("float"):
            arrays.append(rng.normal(0, spread, shape).astype(dtype))
        else:
            info = np.iinfo(dtype)
            arrays.append(rng.integers(info.min, info.max + 1, shape).astype(dtype))
    return arrays


@dataclass(frozen=True)
class Lowered:
    """A lowered graph and what its `main` holds."""

    source: tvm.IRModule
    module: tvm.IRModule

    @property
    def kernels(self) -> list[str]:
        """Families of our kernels in the order of their calls; other operators by name."""
        found = []
        for binding in ir.bindings(self.module["main"]):
            name = ir.op_name(binding.value)
            if name == "relax.call_tir":
                spec = json.loads(str(self.module[binding.value.args[0]].attrs[KERNEL_ATTR]))
                found.append(spec["family"])
            elif name is not None:
                found.append(name.removeprefix("relax."))
        return found

    @property
    def names(self) -> list[str]:
        return [binding.var.name for binding in ir.bindings(self.module["main"])]

    @property
    def left_float(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(str(self.module["main"].attrs[LEFT_FLOAT_ATTR]))
        return found

    @property
    def float_tensors(self) -> list[str]:
        """Variables that hold real floats, the results of `main` excepted."""
        main = self.module["main"]
        body = main.body.body
        results: list[Expr] = [body]
        bindings = list(ir.bindings(main))
        for binding in reversed(bindings):
            if any(binding.var.same_as(result) for result in results):
                value = binding.value
                if isinstance(value, relax.Tuple):
                    results += list(value.fields)
                elif ir.op_name(value) in ("relax.permute_dims", "relax.reshape", "relax.clip"):
                    results.append(value.args[0])
                elif isinstance(value, relax.Var):
                    results.append(value)
        return [
            binding.var.name
            for binding in bindings
            if not any(binding.var.same_as(result) for result in results)
            and "float" in str(getattr(binding.var.ty, "dtype", ""))
        ]


def lower(module: tvm.IRModule) -> Lowered:
    return Lowered(module, LowerToKernels()(module))


def fuse(lowered: tvm.IRModule) -> tvm.IRModule:
    """The module as it ships for this machine."""
    target = get_target("host")
    with target.tvm_target():
        return fusion_pipeline()(packing_pipeline(target)(lowered))


def calls(fused: tvm.IRModule) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(str(fused["main"].attrs[CALLS_ATTR]))
    return found


def check(
    module: tvm.IRModule,
    kernels: Sequence[str] | None = None,
    *,
    steps: Sequence[float] | float | None = None,
    equal: float = 0.99,
    inputs: Sequence[Sequence[np.ndarray]] = (),
    integer: bool = True,
    spread: float = 2.0,
) -> Lowered:
    """Lower a graph and prove it: structure, the same numbers as its float simulation, fused or
    not.

    Results differ from the simulation by at most one quantisation step, and on at most `1 - equal`
    of all elements. A float result needs its step in `steps`; a step of 0 means sums without a
    quantiser behind them (relative tolerance 1e-5).
    """
    lowered = lower(module)
    if integer:
        assert lowered.left_float == []
        assert lowered.float_tensors == []
    if kernels is not None:
        assert lowered.kernels == list(kernels)
    simulate, run = compile_module(module), compile_module(lowered.module)
    shipped = compile_module(fuse(lowered.module), get_target("host").tvm_target())
    feeds = list(inputs) or [random_inputs(module, seed, spread) for seed in range(3)]
    for feed in feeds:
        expected, got, fused = (_listed(f(*feed)) for f in (simulate, run, shipped))
        wanted = [steps] * len(expected) if isinstance(steps, (int, float)) else steps
        for k, (e, g, f) in enumerate(zip(expected, got, fused, strict=True)):
            step = wanted[k] if wanted is not None else None
            assert_close(g, e, step, equal)
            if g.dtype.kind == "f" and not step:
                np.testing.assert_allclose(f, g, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(f, g, err_msg=f"fused differs, output {k}")
    return lowered


def _listed(result: Any) -> list[np.ndarray]:
    return result if isinstance(result, list) else [result]


def assert_close(got: np.ndarray, expected: np.ndarray, step: float | None, equal: float) -> None:
    """One step at most, and equal on the stated share of the elements."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if got.dtype.kind == "f":
        assert step is not None, "a float result needs its step"
        if step == 0:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
            return
        difference = np.abs(got.astype(np.float64) - expected) / step
    else:
        difference = np.abs(got.astype(np.int64) - expected.astype(np.int64)).astype(np.float64)
    assert difference.max(initial=0) < 1.001, f"{difference.max()} steps"
    share = (difference < 0.5).mean() if difference.size else 1.0
    assert share >= equal, f"only {share:.4f} of the elements are equal"
