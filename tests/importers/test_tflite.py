"""TFLite import: integers, scales, names survive; the graph agrees with the reference kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tvm import relax

from tvm_compress.errors import ModelError
from tvm_compress.importers import load_model
from tvm_compress.importers.tflite import layer_name
from tvm_compress.model import REQUANTIZE_ATTR, Model
from tvm_compress.relay_passes.ir import constant, dtype_of, op_name

from ..relay_passes.tflite_builder import Operator, Reference, Tensor, build

Run = Callable[..., dict[str, np.ndarray]]
Count = Callable[[Model], Counter[str]]
pytest.importorskip("ai_edge_litert", reason="the TFLite reference interpreter is not installed")
rng = np.random.default_rng(11)

NO_ACTIVATION, RELU, RELU6 = 0, 1, 3
SAME, VALID = 0, 1


def integers(*shape: int, dtype: str = "int8") -> np.ndarray:
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def weight(name: str, *shape: int, axis: int) -> Tensor:
    scales = np.linspace(0.01, 0.02, shape[axis]).tolist()
    zeros = [0] * shape[axis]
    return Tensor(name, shape, "int8", scales, zeros, axis, np.clip(integers(*shape), -127, 127))


def bias(name: str, size: int) -> Tensor:
    scales = (0.05 * np.linspace(0.01, 0.02, size)).tolist()
    values = rng.integers(-400, 400, size)
    return Tensor(name, (size,), "int32", scales, [0] * size, 0, values)


def conv_options(activation: int, padding: int = SAME, stride: int = 1) -> dict[str, int]:
    return {
        "padding": padding,
        "strideH": stride,
        "strideW": stride,
        "fusedActivationFunction": activation,
    }


def network(activation: int = RELU6) -> bytes:
    """Convolution, pad, depthwise convolution, residual add, average pool, dense, softmax."""
    tensors = [
        Tensor("x", (1, 8, 8, 3), "int8", 0.05, 3),
        weight("net/conv/Conv2D", 4, 3, 3, 3, axis=0),
        bias("conv_bias", 4),
        Tensor("net/act/Relu6;net/conv/BiasAdd;net/conv/Conv2D1", (1, 8, 8, 4), "int8", 0.04, -10),
        Tensor("widths", (4, 2), "int32", data=np.array([[0, 0], [0, 1], [0, 1], [0, 0]])),
        Tensor("padded", (1, 9, 9, 4), "int8", 0.04, -10),
        weight("net/dw/depthwise", 1, 3, 3, 4, axis=3),
        bias("dw_bias", 4),
        Tensor("net/dw/BiasAdd", (1, 4, 4, 4), "int8", 0.06, 5),
        Tensor("sum", (1, 4, 4, 4), "int8", 0.07, -3),
        Tensor("pooled", (1, 1, 1, 4), "int8", 0.07, -3),
        Tensor("shape", (2,), "int32", data=np.array([1, 4])),
        Tensor("flat", (1, 4), "int8", 0.07, -3),
        weight("net/fc/MatMul", 5, 4, axis=0),
        bias("fc_bias", 5),
        Tensor("net/fc/BiasAdd", (1, 5), "int8", 0.03, 1),
        Tensor("Identity", (1, 5), "int8", 1 / 256, -128),
    ]
    conv, depthwise = "net/act/Relu6;net/conv/BiasAdd;net/conv/Conv2D1", "net/dw/BiasAdd"
    pool = {"filterHeight": 4, "filterWidth": 4, **conv_options(NO_ACTIVATION, VALID, 4)}
    operators = [
        Operator(
            "CONV_2D",
            ["x", "net/conv/Conv2D", "conv_bias"],
            [conv],
            conv_options(activation),
            "Conv2DOptions",
        ),
        Operator("PAD", [conv, "widths"], ["padded"], {}, "PadOptions"),
        Operator(
            "DEPTHWISE_CONV_2D",
            ["padded", "net/dw/depthwise", "dw_bias"],
            [depthwise],
            conv_options(NO_ACTIVATION, VALID, 2) | {"depthMultiplier": 1},
            "DepthwiseConv2DOptions",
        ),
        Operator(
            "ADD",
            [depthwise, depthwise],
            ["sum"],
            {"fusedActivationFunction": RELU},
            "AddOptions",
        ),
        Operator("AVERAGE_POOL_2D", ["sum"], ["pooled"], pool, "Pool2DOptions"),
        Operator("RESHAPE", ["pooled", "shape"], ["flat"], {}, "ReshapeOptions"),
        Operator(
            "FULLY_CONNECTED",
            ["flat", "net/fc/MatMul", "fc_bias"],
            ["net/fc/BiasAdd"],
            {"fusedActivationFunction": NO_ACTIVATION},
            "FullyConnectedOptions",
        ),
        Operator("SOFTMAX", ["net/fc/BiasAdd"], ["Identity"], {"beta": 1.0}, "SoftmaxOptions"),
    ]
    # A per-channel dense layer is newer than this test needs.
    tensors[13] = Tensor("net/fc/MatMul", (5, 4), "int8", 0.02, 0, 0, integers(5, 4))
    tensors[14] = Tensor("fc_bias", (5,), "int32", 0.07 * 0.02, 0, 0, rng.integers(-400, 400, 5))
    return build(tensors, operators, ["x"], ["Identity"])


def load(content: bytes, folder: Path, **options: object) -> Model:
    path = folder / "model.tflite"
    path.write_bytes(content)
    return load_model(path, **options)  # type: ignore[arg-type]


def difference(content: bytes, model: Model, run: Run, seeds: int = 5) -> int:
    """Largest difference to the reference kernels in integer steps."""
    reference = Reference(content)
    worst = 0
    for _ in range(seeds):
        arrays = {s.name: integers(*s.shape, dtype=s.dtype) for s in model.inputs}
        expected, actual = reference.run(arrays), run(model, arrays)
        assert list(actual) == list(expected)
        for name, value in expected.items():
            worst = max(worst, int(np.abs(value.astype("int32") - actual[name]).max()))
    return worst


def test_network(tmp_path: Path, run: Run, count: Count) -> None:
    content = network()
    model = load(content, tmp_path)
    assert difference(content, model, run, 3) <= 1
    operators = count(model)
    assert operators["relax.nn.conv2d"] == 2
    assert operators["relax.clip"] == 1  # ReLU6 does not cover the integers' whole range
    assert "relax.nn.pad" not in operators  # moved into the depthwise convolution
    assert operators["relax.nn.avg_pool2d"] == 1
    assert "relax.permute_dims" not in operators
    assert "relax.astype" not in operators
    bindings = {b.var.name: b.value for b in model.module["main"].body.blocks[0].bindings}
    assert {"net_conv", "net_dw", "net_fc"} <= set(bindings)
    for layer in ("net_conv", "net_dw", "net_fc"):
        decoded = bindings[bindings[layer].args[1].name]
        assert op_name(decoded) == "relax.dequantize"
        assert dtype_of(decoded.args[0]) == "int8"
        assert constant(decoded.args[0]) is not None
    assert model.module["main"].attrs[REQUANTIZE_ATTR] == "tflite"
    assert model.inputs[0].name == "x"
    assert model.outputs[0].name == "Identity"
    assert model.source_format == "tflite"


@pytest.mark.parametrize("activation", [NO_ACTIVATION, RELU])
def test_activations(activation: int, tmp_path: Path, run: Run) -> None:
    content = network(activation)
    assert difference(content, load(content, tmp_path), run, 2) <= 1


def one_operator(
    operator: Operator, inputs: list[Tensor], output: Tensor, constants: list[Tensor] | None = None
) -> bytes:
    names = [tensor.name for tensor in inputs]
    return build([*inputs, *(constants or []), output], [operator], names, [output.name])


def q(name: str, *shape: int, scale: float = 0.05, zero: int = 0, dtype: str = "int8") -> Tensor:
    return Tensor(name, shape, dtype, scale, zero)


CASES = {
    "mul": one_operator(
        Operator("MUL", ["a", "b"], ["y"], {"fusedActivationFunction": 0}, "MulOptions"),
        [q("a", 2, 5), q("b", 2, 5, scale=0.02, zero=4)],
        q("y", 2, 5, scale=0.08, zero=-7),
    ),
    "sub": one_operator(
        Operator("SUB", ["a", "b"], ["y"], {"fusedActivationFunction": 0}, "SubOptions"),
        [q("a", 2, 5), q("b", 2, 5, scale=0.02, zero=4)],
        q("y", 2, 5, scale=0.08, zero=-7),
    ),
    "concat": one_operator(
        Operator(
            "CONCATENATION",
            ["a", "b"],
            ["y"],
            {"axis": 1, "fusedActivationFunction": 0},
            "ConcatenationOptions",
        ),
        [q("a", 2, 3), q("b", 2, 4)],
        q("y", 2, 7),
    ),
    "logistic": one_operator(
        Operator("LOGISTIC", ["a"], ["y"]), [q("a", 2, 5)], q("y", 2, 5, scale=1 / 256, zero=-128)
    ),
    "max_pool": one_operator(
        Operator(
            "MAX_POOL_2D",
            ["a"],
            ["y"],
            {"filterHeight": 2, "filterWidth": 2, **conv_options(NO_ACTIVATION, SAME, 2)},
            "Pool2DOptions",
        ),
        [q("a", 1, 5, 5, 3)],
        q("y", 1, 3, 3, 3),
    ),
    "average_pool_same": one_operator(
        Operator(
            "AVERAGE_POOL_2D",
            ["a"],
            ["y"],
            {"filterHeight": 3, "filterWidth": 3, **conv_options(RELU, SAME, 2)},
            "Pool2DOptions",
        ),
        [q("a", 1, 5, 5, 3, zero=9)],
        q("y", 1, 3, 3, 3, zero=9),
    ),
    "mean": one_operator(
        Operator("MEAN", ["a", "axes"], ["y"], {"keepDims": False}, "ReducerOptions"),
        [q("a", 1, 4, 4, 3)],
        q("y", 1, 3, scale=0.03, zero=2),
        [Tensor("axes", (2,), "int32", data=np.array([1, 2]))],
    ),
    "resize_nearest": one_operator(
        Operator(
            "RESIZE_NEAREST_NEIGHBOR",
            ["a", "size"],
            ["y"],
            {"halfPixelCenters": False, "alignCorners": False},
            "ResizeNearestNeighborOptions",
        ),
        [q("a", 1, 2, 3, 3)],
        q("y", 1, 4, 6, 3),
        [Tensor("size", (2,), "int32", data=np.array([4, 6]))],
    ),
    "transpose": one_operator(
        Operator("TRANSPOSE", ["a", "order"], ["y"], {}, "TransposeOptions"),
        [q("a", 2, 3, 4)],
        q("y", 4, 2, 3),
        [Tensor("order", (3,), "int32", data=np.array([2, 0, 1]))],
    ),
    "batch_matmul": one_operator(
        Operator(
            "BATCH_MATMUL", ["a", "b"], ["y"], {"adjX": False, "adjY": True}, "BatchMatMulOptions"
        ),
        [q("a", 2, 3, 4), q("b", 2, 5, 4, scale=0.02)],
        q("y", 2, 3, 5, scale=0.3, zero=6),
    ),
    "uint8_add": one_operator(
        Operator("ADD", ["a", "b"], ["y"], {"fusedActivationFunction": 0}, "AddOptions"),
        [q("a", 2, 5, zero=128, dtype="uint8"), q("b", 2, 5, zero=100, dtype="uint8")],
        q("y", 2, 5, scale=0.1, zero=110, dtype="uint8"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str, tmp_path: Path, run: Run) -> None:
    assert difference(CASES[name], load(CASES[name], tmp_path), run, 2) <= 1


TRANSPOSE_CONV = one_operator(
    Operator(
        "TRANSPOSE_CONV",
        ["shape", "w", "a"],
        ["y"],
        {"padding": SAME, "strideH": 2, "strideW": 2},
        "TransposeConvOptions",
    ),
    [q("a", 1, 3, 3, 4)],
    q("y", 1, 6, 6, 2, scale=0.5, zero=-4),
    [
        Tensor("shape", (4,), "int32", data=np.array([1, 6, 6, 2])),
        Tensor("w", (2, 3, 3, 4), "int8", [0.01, 0.02], [0, 0], 0, integers(2, 3, 3, 4)),
    ],
)


def test_transposed_convolution(tmp_path: Path, run: Run) -> None:
    """TVM has no NHWC form of this operator to run: the test turns it to NCHW."""
    model = load(TRANSPOSE_CONV, tmp_path)
    layouts = {"relax.nn.conv2d_transpose": ["NCHW", "IOHW"]}
    module = relax.transform.ConvertLayout(layouts)(model.module)
    assert difference(TRANSPOSE_CONV, replace(model, module=module), run, 2) <= 1


def test_float_model(tmp_path: Path, run: Run) -> None:
    w = rng.normal(size=(3, 4)).astype("float32")
    content = build(
        [
            Tensor("x", (2, 4), "float32"),
            Tensor("model/dense/MatMul", (3, 4), "float32", data=w),
            Tensor("model/dense/Relu;model/dense/BiasAdd", (2, 3), "float32"),
        ],
        [
            Operator(
                "FULLY_CONNECTED",
                ["x", "model/dense/MatMul", ""],
                ["model/dense/Relu;model/dense/BiasAdd"],
                {"fusedActivationFunction": RELU},
                "FullyConnectedOptions",
            )
        ],
        ["x"],
        ["model/dense/Relu;model/dense/BiasAdd"],
    )
    model = load(content, tmp_path)
    x = rng.normal(size=(2, 4)).astype("float32")
    (output,) = run(model, {"x": x}).values()
    np.testing.assert_allclose(output, np.maximum(x @ w.T, 0), rtol=1e-5, atol=1e-6)
    assert REQUANTIZE_ATTR not in model.module["main"].attrs
    names = [b.var.name for b in model.module["main"].body.blocks[0].bindings]
    assert "dense" in names


@pytest.mark.parametrize("approximate", [False, True])
def test_float_gelu(approximate: bool, tmp_path: Path, run: Run) -> None:
    tensors = [Tensor("x", (1, 64), "float32"), Tensor("y", (1, 64), "float32")]
    operator = Operator("GELU", ["x"], ["y"], {"approximate": approximate}, "GeluOptions")
    content = build(tensors, [operator], ["x"], ["y"])
    x = np.linspace(-4, 4, 64, dtype=np.float32)[None]
    (found,) = run(load(content, tmp_path), {"x": x}).values()
    expected = Reference(content).run({"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---- real models ---------------------------------------------------------------------------------

ASSETS = {
    "ad01_int8": 10,
    "kws_ref_model": 10,
    "mobilenet_v1_0.25_224_quant": 28,
    "pretrainedResnet_quant": 10,
    "vww_96_int8": 28,
}


@pytest.mark.parametrize("name", ASSETS)
def test_asset(name: str, asset: Callable[[str], Path], run: Run, count: Count) -> None:
    path = asset(f"tflite/{name}.tflite")
    model = load_model(path)
    operators = count(model)
    assert operators["relax.nn.conv2d"] + operators["relax.matmul"] == ASSETS[name]
    assert not {"relax.permute_dims", "relax.clip", "relax.astype", "relax.nn.pad"} & set(operators)
    bindings = [b for block in model.module["main"].body.blocks for b in block.bindings]
    names = [b.var.name for b in bindings]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[A-Za-z]\w*", name) for name in names)
    # The plain graph computes in float, where a rare tie rounds the other way and spreads; that the
    # integers are the interpreter's is a matter of the lowering and tested there.
    assert difference(path.read_bytes(), model, run, 1) <= 12


def test_asset_layer_names(asset: Callable[[str], Path]) -> None:
    model = load_model(asset("tflite/kws_ref_model.tflite"))
    values = {b.var.name: b.value for b in model.module["main"].body.blocks[0].bindings}
    layers = [n for n, v in values.items() if op_name(v) in ("relax.nn.conv2d", "relax.matmul")]
    assert layers[:4] == ["conv2d", "depthwise_conv2d", "conv2d_1", "depthwise_conv2d_1"]
    assert layers[-1] == "dense"


@pytest.mark.parametrize(
    ("outputs", "weights", "expected"),
    [
        (
            (
                "f/act/Relu;f/bn/FusedBatchNormV3;f/conv2d_1/BiasAdd/ReadVariableOp/resource;"
                "f/conv2d_1/BiasAdd;f/conv2d_4/Conv2D;f/conv2d_1/Conv2D1"
            ),
            "f/conv2d_1/Conv2D",
            "f_conv2d_1",
        ),
        ("Identity", "functional_1/dense_9/MatMul", "dense_9"),
        ("Identity", "", "Identity"),
        ("", "", "conv_2d"),
    ],
)
def test_layer_name(outputs: str, weights: str, expected: str) -> None:
    assert layer_name([outputs], [weights], "CONV_2D") == expected


# ---- shapes and bad files ------------------------------------------------------------------------


def test_unknown_shape_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no input 'X'"):
        load(network(), tmp_path, shapes={"X": (1, 8, 8, 3)})
    with pytest.raises(ModelError, match="declared 1x8x8x3, which 1x9x9x3 does not fit"):
        load(network(), tmp_path, shapes={"x": (1, 9, 9, 3)})


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\0\0\0TFL3", bytes(range(200))])
def test_garbage(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tflite: .*(not a TFLite file|damaged)"):
        load(content, tmp_path)


def test_damaged_files_never_crash(tmp_path: Path) -> None:
    content = network()
    messages = []
    for seed in range(100):
        mutation = np.random.default_rng(seed)
        damaged = bytearray(content)
        for _ in range(int(mutation.integers(1, 8))):
            damaged[int(mutation.integers(8, len(damaged)))] = int(mutation.integers(256))
        if seed % 4 == 0:
            damaged = damaged[: int(mutation.integers(8, len(damaged)))]
        try:
            load(bytes(damaged), tmp_path)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not [message for message in messages if "\n" in message]


def test_unsupported_operator(tmp_path: Path) -> None:
    content = one_operator(
        Operator("LSH_PROJECTION", ["a", "a"], ["y"]), [q("a", 2, 5)], q("y", 2, 5)
    )
    with pytest.raises(ModelError, match="operator LSH_PROJECTION of 'y' is not supported"):
        load(content, tmp_path)


def test_quantised_slopes_by_position_are_refused(tmp_path: Path) -> None:
    slopes = Tensor("w", (3, 3, 4), "int8", 0.01, 0, 0, integers(3, 3, 4))
    content = one_operator(
        Operator("PRELU", ["a", "w"], ["y"]), [q("a", 1, 3, 3, 4)], q("y", 1, 3, 3, 4), [slopes]
    )
    with pytest.raises(ModelError, match=r"PRELU of 'y' .*\[3, 3, 4\]; allowed: constant slopes"):
        load(content, tmp_path)


def test_dynamic_range_quantisation_is_refused(tmp_path: Path) -> None:
    content = one_operator(
        Operator(
            "FULLY_CONNECTED",
            ["a", "w"],
            ["y"],
            {"fusedActivationFunction": NO_ACTIVATION},
            "FullyConnectedOptions",
        ),
        [Tensor("a", (1, 4), "float32")],
        Tensor("y", (1, 3), "float32"),
        [Tensor("w", (3, 4), "int8", 0.02, 0, 0, integers(3, 4))],
    )
    with pytest.raises(ModelError, match="'y' is quantised dynamically"):
        load(content, tmp_path)


def test_movement_that_rescales_is_refused(tmp_path: Path) -> None:
    content = one_operator(
        Operator("TRANSPOSE", ["a", "order"], ["y"], {}, "TransposeOptions"),
        [q("a", 2, 3)],
        q("y", 3, 2, scale=0.06),
        [Tensor("order", (2,), "int32", data=np.array([1, 0]))],
    )
    with pytest.raises(ModelError, match="TRANSPOSE of 'y' changes the scale"):
        load(content, tmp_path)


def test_nan_weight(tmp_path: Path) -> None:
    w = np.full((3, 4), np.nan, "float32")
    content = one_operator(
        Operator("ADD", ["a", "w"], ["y"], {"fusedActivationFunction": 0}, "AddOptions"),
        [Tensor("a", (3, 4), "float32")],
        Tensor("y", (3, 4), "float32"),
        [Tensor("w", (3, 4), "float32", data=w)],
    )
    with pytest.raises(ModelError, match="tensor 'w' contains NaN"):
        load(content, tmp_path)
