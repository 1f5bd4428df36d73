"""Quantised ONNX operators keep their integers and agree with ONNX Runtime within one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tvm_compress.importers import load_model
from tvm_compress.model import REQUANTIZE_ATTR, Model
from tvm_compress.relay_passes.ir import constant, op_name, shape_of

Build = Callable[..., onnx.ModelProto]
Agrees = Callable[..., Model]
Count = Callable[[Model], Counter[str]]
node = helper.make_node
rng = np.random.default_rng(3)

SCALES = {"s1": np.float32(0.05), "s2": np.float32(0.02), "s3": np.float32(0.09)}


def zero_points(dtype: str) -> dict[str, np.ndarray]:
    middle = 128 if dtype == "uint8" else 0
    return {f"z{i}": np.array(middle + 3 * i, dtype) for i in (1, 2, 3)}


def integers(dtype: str, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def onnx_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def quantised(
    build: Build,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    constants: Mapping[str, Any],
    dtype: str = "uint8",
    output: str | None = None,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    dtypes = {name: onnx_type(dtype) for name in inputs} | {"y": onnx_type(output or dtype)}
    proto = build(nodes, inputs, ["y"], constants, dtypes=dtypes)
    return proto, {name: integers(dtype, *shape) for name, shape in inputs.items()}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_qlinear_conv(
    dtype: str, per_channel: bool, build: Build, agrees: Agrees, count: Count
) -> None:
    scale = np.linspace(0.01, 0.03, 6).astype("float32") if per_channel else np.float32(0.02)
    zero = np.zeros(6, "int8") if per_channel else np.array(0, "int8")
    conv = node(
        "QLinearConv",
        ["x", "s1", "z1", "w", "ws", "wz", "s3", "z3", "b"],
        ["y"],
        "block/conv/QLinearConv",
        pads=[1, 1, 1, 1],
        strides=[2, 2],
        group=2,
    )
    constants = {
        **SCALES,
        **zero_points(dtype),
        "w": integers("int8", 6, 2, 3, 3),
        "ws": scale,
        "wz": zero,
        "b": rng.integers(-500, 500, 6).astype("int32"),
        "s3": np.float32(0.4),
    }
    proto, arrays = quantised(build, [conv], {"x": (1, 4, 7, 7)}, constants, dtype)
    model = agrees(proto, arrays, steps=1)
    assert count(model) == {
        "relax.dequantize": 3,
        "relax.nn.conv2d": 1,
        "relax.add": 1,
        "relax.quantize": 1,
    }
    bindings = {b.var.name: b.value for b in model.module["main"].body.blocks[0].bindings}
    weight = bindings[bindings["block_conv"].args[1].name]
    assert op_name(weight) == "relax.dequantize"
    np.testing.assert_array_equal(constant(weight.args[0]), constants["w"])
    assert int(weight.attrs.axis) == (0 if per_channel else -1)
    bias = bindings[bindings["block_conv_bias"].args[1].name]
    assert str(bias.args[0].ty.dtype) == "int32"
    assert shape_of(bias) == (1, 6, 1, 1)
    assert model.module["main"].attrs[REQUANTIZE_ATTR] == "float32"


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_qlinear_matmul(dtype: str, build: Build, agrees: Agrees) -> None:
    matmul = node("QLinearMatMul", ["x", "s1", "z1", "w", "s2", "z2", "s3", "z3"], ["y"])
    constants = {
        **SCALES,
        **zero_points(dtype),
        "w": integers(dtype, 9, 5),
        "s3": np.float32(0.7),
    }
    proto, arrays = quantised(build, [matmul], {"x": (2, 4, 9)}, constants, dtype)
    agrees(proto, arrays, steps=1)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("quantised_output", [True, False])
def test_qgemm(transposed: int, quantised_output: bool, build: Build, agrees: Agrees) -> None:
    ends = ["s3", "z3"] if quantised_output else []
    gemm = node(
        "QGemm",
        ["x", "s1", "z1", "w", "ws", "wz", "c", *ends],
        ["y"],
        domain="com.microsoft",
        transB=transposed,
        alpha=1.0,
    )
    constants = {
        **SCALES,
        **zero_points("uint8"),
        "w": integers("int8", *((5, 9) if transposed else (9, 5))),
        "ws": np.linspace(0.01, 0.02, 5).astype("float32"),
        "wz": np.zeros(5, "int8"),
        "c": rng.integers(-500, 500, 5).astype("int32"),
        "s3": np.float32(0.3),
    }
    output = None if quantised_output else "float32"
    proto, arrays = quantised(build, [gemm], {"x": (3, 9)}, constants, output=output)
    agrees(proto, arrays, steps=1)


@pytest.mark.parametrize("kind", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_qlinear_binary(kind: str, dtype: str, build: Build, agrees: Agrees) -> None:
    inputs = ["a", "s1", "z1", "b", "s2", "z2", "s3", "z3"]
    binary = node(kind, inputs, ["y"], domain="com.microsoft")
    constants = {**SCALES, **zero_points(dtype)}
    proto, arrays = quantised(build, [binary], {"a": (2, 3, 4), "b": (3, 4)}, constants, dtype)
    agrees(proto, arrays, steps=1)


def test_qlinear_concat(build: Build, agrees: Agrees) -> None:
    inputs = ["s3", "z3", "a", "s1", "z1", "b", "s2", "z2"]
    concat = node("QLinearConcat", inputs, ["y"], domain="com.microsoft", axis=1)
    constants = {**SCALES, **zero_points("uint8")}
    proto, arrays = quantised(build, [concat], {"a": (2, 3), "b": (2, 5)}, constants)
    agrees(proto, arrays, steps=1)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("QLinearGlobalAveragePool", {"channels_last": 0}),
        ("QLinearGlobalAveragePool", {"channels_last": 1}),
        ("QLinearAveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("QLinearSigmoid", {}),
        ("QLinearLeakyRelu", {"alpha": 0.1}),
    ],
)
def test_qlinear_unary(kind: str, attributes: dict[str, Any], build: Build, agrees: Agrees) -> None:
    inputs = ["x", "s1", "z1", "s2", "z2"]
    unary = node(kind, inputs, ["y"], domain="com.microsoft", **attributes)
    constants = {**SCALES, **zero_points("uint8")}
    proto, arrays = quantised(build, [unary], {"x": (1, 4, 6, 4)}, constants)
    agrees(proto, arrays, steps=1)


def test_qlinear_softmax(build: Build, agrees: Agrees) -> None:
    softmax = node(
        "QLinearSoftmax",
        ["x", "s1", "z1", "sy", "zy"],
        ["y"],
        domain="com.microsoft",
        axis=-1,
        opset=13,
    )
    constants = {
        **SCALES,
        **zero_points("uint8"),
        "sy": np.float32(1 / 256),
        "zy": np.array(0, "uint8"),
    }
    proto, arrays = quantised(build, [softmax], {"x": (2, 7)}, constants)
    agrees(proto, arrays, steps=1)


def test_conv_integer(build: Build, agrees: Agrees, count: Count) -> None:
    conv = node("ConvInteger", ["x", "w", "z1", "wz"], ["y"], pads=[1, 1, 1, 1])
    constants = {
        "z1": np.array(117, "uint8"),
        "w": integers("uint8", 3, 2, 3, 3),
        "wz": np.array(9, "uint8"),
    }
    proto, arrays = quantised(build, [conv], {"x": (1, 2, 5, 5)}, constants, output="int32")
    operators = count(agrees(proto, arrays))
    assert operators == {"relax.dequantize": 2, "relax.nn.conv2d": 1, "relax.astype": 1}


@pytest.mark.parametrize("zero_point", ["constant", "per column", "none"])
def test_matmul_integer(zero_point: str, build: Build, agrees: Agrees) -> None:
    names = ["x", "w"] + ([] if zero_point == "none" else ["z1", "wz"])
    matmul = node("MatMulInteger", names, ["y"])
    wide = np.array([1, -2, 3, 0, 7], "int8") if zero_point == "per column" else np.array(4, "int8")
    constants = {"w": integers("int8", 9, 5)}
    if zero_point != "none":
        constants |= {"z1": np.array(117, "uint8"), "wz": wide}
    proto, arrays = quantised(build, [matmul], {"x": (3, 9)}, constants, output="int32")
    agrees(proto, arrays)


def test_dynamic_quantisation(build: Build, agrees: Agrees, count: Count) -> None:
    """Zero points known only at run time: integer arithmetic, no fold."""
    proto = build(
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("MatMulInteger", ["q", "w", "z", "wz"], ["acc"], "dense/MatMulInteger"),
            node("Cast", ["acc"], ["wide"], to=TensorProto.FLOAT),
            node("Mul", ["s", "ws"], ["scale"]),
            node("Mul", ["wide", "scale"], ["y"]),
        ],
        {"x": (4, 9)},
        ["y"],
        {"w": integers("int8", 9, 5), "wz": np.array(0, "int8"), "ws": np.float32(0.01)},
    )
    model = agrees(proto)
    names = [b.var.name for b in model.module["main"].body.blocks[0].bindings]
    assert "dense" in names


def qdq_conv(build: Build, axis: int) -> onnx.ModelProto:
    """Convolution with per-channel int8 weights behind DequantizeLinear, and a transposed dense."""
    return build(
        [
            node("QuantizeLinear", ["x", "s1", "z1"], ["xq"]),
            node("DequantizeLinear", ["xq", "s1", "z1"], ["xd"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
            node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
            node("Conv", ["xd", "wd", "bd"], ["c"], "conv"),
            node("QuantizeLinear", ["c", "s3", "z3"], ["cq"]),
            node("DequantizeLinear", ["cq", "s3", "z3"], ["cd"]),
            node("Flatten", ["cd"], ["f"]),
            node("DequantizeLinear", ["v", "vs", "vz"], ["vd"], axis=0),
            node("Transpose", ["vd"], ["vt"], perm=[1, 0]),
            node("MatMul", ["f", "vt"], ["m"], "dense"),
            node("QuantizeLinear", ["m", "s3", "z3"], ["y"]),
        ],
        {"x": (1, 3, 6, 6)},
        ["y"],
        {
            **SCALES,
            **zero_points("int8"),
            "s3": np.float32(0.2),
            "w": integers("int8", 4, 3, 3, 3),
            "ws": np.linspace(0.01, 0.02, 4).astype("float32"),
            "wz": np.zeros(4, "int8"),
            "b": rng.integers(-300, 300, 4).astype("int32"),
            "bs": (0.05 * np.linspace(0.01, 0.02, 4)).astype("float32"),
            "v": integers("int8", 5, 64),
            "vs": np.linspace(0.001, 0.002, 5).astype("float32"),
            "vz": np.zeros(5, "int8"),
        },
        dtypes={"y": TensorProto.INT8},
    )


def test_qdq_keeps_integers(build: Build, agrees: Agrees) -> None:
    proto = qdq_conv(build, 0)
    model = agrees(proto, steps=1)
    bindings = {b.var.name: b.value for b in model.module["main"].body.blocks[0].bindings}
    weight = bindings[bindings["conv"].args[1].name]
    assert op_name(weight) == "relax.dequantize"
    assert str(weight.args[0].ty.dtype) == "int8"
    dense = bindings[bindings["dense"].args[1].name]
    assert op_name(dense) == "relax.dequantize"
    assert str(dense.args[0].ty.dtype) == "int8"
    assert shape_of(dense) == (64, 5)
    assert int(dense.attrs.axis) == 1  # the channels moved with the transpose
    arrays = [constant(a) for v in bindings.values() for a in getattr(v, "args", [])]
    floats = [array for array in arrays if array is not None and array.dtype.kind == "f"]
    assert floats
    assert all(array.size <= 5 for array in floats)  # scales only


def test_float_model_has_no_rounding_rule(build: Build) -> None:
    model = load_model(build([node("Relu", ["x"], ["y"])], {"x": (1, 2)}, ["y"]))
    assert REQUANTIZE_ATTR not in model.module["main"].attrs


def test_blocked_weights(build: Build, run: Callable[..., dict[str, np.ndarray]]) -> None:
    """Opset 21: one scale for every two rows."""
    proto = build(
        [
            node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0, block_size=2),
            node("MatMul", ["x", "wd"], ["y"]),
        ],
        {"x": (2, 5)},
        ["y"],
        {
            "w": integers("int8", 5, 3),
            "ws": rng.uniform(0.1, 0.2, (3, 3)).astype("float32"),
            "wz": rng.integers(-3, 3, (3, 3)).astype("int8"),
        },
        opset=21,
    )
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    scale, zero = (np.repeat(constants[n], 2, 0)[:5] for n in ("ws", "wz"))
    weight = (constants["w"].astype("float32") - zero) * scale
    x = rng.normal(size=(2, 5)).astype("float32")
    np.testing.assert_allclose(run(load_model(proto), {"x": x})["y"], x @ weight, rtol=1e-5)
