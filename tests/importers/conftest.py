"""What the importer tests share: run with plain TVM, compare with the source's own runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from tvm_compress.importers import load_model
from tvm_compress.model import Model
from tvm_compress.relay_passes.ir import op_name

Arrays = dict[str, np.ndarray]


def run_model(model: Model, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Compile with TVM's default pipeline for the host and run once."""
    relax.analysis.well_formed(model.module)
    # Compiling dominates these tests, and TVM's plain loops are slow at any level.
    executable = tvm.compile(model.module, tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    result = vm["main"](*[tvm.runtime.tensor(arrays[spec.name]) for spec in model.inputs])
    values = [result] if hasattr(result, "numpy") else list(result)
    return {spec.name: v.numpy() for spec, v in zip(model.outputs, values, strict=True)}


def random_inputs(model: Model, seed: int = 0) -> Arrays:
    """Standard normal floats, small integers."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in model.inputs:
        if spec.dtype.startswith("float"):
            arrays[spec.name] = rng.normal(size=spec.shape).astype(spec.dtype)
        elif spec.dtype == "bool":
            arrays[spec.name] = rng.integers(0, 2, spec.shape).astype(bool)
        else:
            low = 0 if spec.dtype.startswith("u") else -100
            arrays[spec.name] = rng.integers(low, 100, spec.shape).astype(spec.dtype)
    return arrays


def onnx_model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[Any, ...]],
    outputs: list[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    dtypes: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model of the given nodes; inputs are float32 unless `dtypes` says otherwise."""
    dtypes = dtypes or {}
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(name, dtypes.get(name, TensorProto.FLOAT), shape)
            for name, shape in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, dtypes.get(name, TensorProto.FLOAT), None)
            for name in outputs
        ],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def onnxruntime_outputs(proto: onnx.ModelProto | str, arrays: Arrays) -> Arrays:
    """The same through ONNX Runtime without its graph optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def operators(model: Model) -> Counter[str]:
    """How often each Relax operator occurs in `main`."""
    return Counter(
        op_name(binding.value) or type(binding.value).__name__
        for block in model.module["main"].body.blocks
        for binding in block.bindings
    )


@pytest.fixture(scope="session")
def build() -> Callable[..., onnx.ModelProto]:
    return onnx_model


@pytest.fixture(scope="session")
def run() -> Callable[..., Arrays]:
    return run_model


@pytest.fixture(scope="session")
def count() -> Callable[[Model], Counter[str]]:
    return operators


@pytest.fixture(scope="session")
def draw() -> Callable[..., Arrays]:
    return random_inputs


@pytest.fixture(scope="session")
def reference() -> Callable[..., Arrays]:
    return onnxruntime_outputs


@pytest.fixture(scope="session")
def agrees() -> Callable[..., Model]:
    """Import, run, compare with ONNX Runtime; `steps` allows a difference in integer outputs."""

    def check(
        proto: onnx.ModelProto | Any,
        arrays: Arrays | None = None,
        steps: int = 0,
        **options: Any,
    ) -> Model:
        model = load_model(proto, **options)
        arrays = arrays or random_inputs(model)
        frozen = {
            name: np.asarray(value, "int64") if isinstance(value, int) else np.asarray(value)
            for name, value in (options.get("input_values") or {}).items()
        }
        source = proto if isinstance(proto, onnx.ModelProto) else str(proto)
        expected = onnxruntime_outputs(source, {**arrays, **frozen})
        actual = run_model(model, arrays)
        assert list(actual) == list(expected)
        for name, reference in expected.items():
            value = actual[name]
            assert value.shape == reference.shape
            assert value.dtype == reference.dtype
            if value.dtype.kind in "iu":
                assert np.abs(value.astype("int64") - reference.astype("int64")).max() <= steps
            elif value.dtype.kind == "b":
                np.testing.assert_array_equal(value, reference)
            else:
                bound = 1e-4 * max(float(np.abs(reference).max()), 1e-2)
                np.testing.assert_allclose(value, reference, rtol=1e-4, atol=bound)
        return model

    return check
