"""Imported TFLite models give the bytes of TensorFlow Lite's reference interpreter.

A file per dtype and family holds every operator as a branch of its own, so that one build tests
them all; real models are compared on a few inputs here, on many by the script
tests/benchmarks/tflite_fidelity.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .tflite_builder import Operator, Reference, Tensor, build
from .tflite_fidelity import MODELS, compare

pytest.importorskip("ai_edge_litert")

SAME, VALID = 0, 1
NONE, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3
# Input zero point, another one, and by how much finer the scales are.
DTYPES = {"int8": (-7, 11, 1.0), "uint8": (119, 140, 1.0), "int16": (0, 0, 1 / 256)}


class Branches:
    """A model that grows operator by operator; every result is an output."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.zero, self.other_zero, self.unit = DTYPES[dtype]
        self.rng = np.random.default_rng(3)
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []

    def input(self, shape: tuple[int, ...], scale: float = 0.05) -> str:
        name = f"x{len(self.inputs)}"
        self.tensors[name] = Tensor(name, shape, self.dtype, scale * self.unit, self.zero)
        self.inputs.append(name)
        return name

    def constant(self, name: str, values: Any, dtype: str = "int32", **quantisation: Any) -> str:
        array = np.asarray(values)
        self.tensors[name] = Tensor(name, array.shape, dtype, data=array, **quantisation)
        return name

    def branch(
        self, kind: str, inputs: list[str], shape: tuple[int, ...], *, label: str = "",
        scale: float = 0.11, zero: int | None = None, dtype: str | None = None, version: int = 2,
        **options: Any,
    ) -> str:  # fmt: skip
        """`options`: fields of the operator's table; `table` names it."""
        name = f"{kind.lower()}{label}"
        assert name not in self.tensors, name
        table = options.pop("table", None)
        zero = self.other_zero if zero is None else zero
        self.tensors[name] = Tensor(name, shape, dtype or self.dtype, scale * self.unit, zero)
        self.operators.append(Operator(kind, inputs, [name], options, table, version))
        self.outputs.append(name)
        return name

    def weights(
        self, name: str, shape: tuple[int, ...], axis: int | None, scale_in: float
    ) -> list[str]:
        """Names of a random weight, per channel when `axis` is given, and of its bias."""
        unsigned = self.dtype == "uint8"
        channels = shape[axis if axis is not None else (3 if shape[0] == 1 else 0)]
        count = channels if axis is not None else 1
        scales = self.rng.uniform(0.002, 0.02, count).astype(np.float32)
        codes = self.rng.integers(-127, 128, shape) + (127 if unsigned else 0)
        self.constant(
            f"{name}.w", codes, "uint8" if unsigned else "int8", scale=list(map(float, scales)),
            zero_point=127 if unsigned else 0, axis=axis or 0,
        )  # fmt: skip
        bias = self.rng.integers(-3000, 3000, channels)
        self.constant(
            f"{name}.b", bias, "int64" if self.dtype == "int16" else "int32",
            scale=list(map(float, np.float32(scale_in * self.unit) * scales)), zero_point=0, axis=0,
        )  # fmt: skip
        return [f"{name}.w", f"{name}.b"]

    def content(self) -> bytes:
        return build(list(self.tensors.values()), self.operators, self.inputs, self.outputs)

    def samples(self, count: int) -> list[dict[str, np.ndarray]]:
        """Random codes; whole range, then every code and the extremes, then the middle."""
        info = np.iinfo(self.dtype)
        found = []
        for index in range(count):
            arrays = {}
            for name in self.inputs:
                shape = self.tensors[name].shape
                array = self.rng.integers(info.min, info.max + 1, shape)
                if index % 4 == 1:
                    array = np.resize(np.arange(info.min, info.max + 1), shape)
                elif index % 4 == 2:
                    array = np.where(array > (info.max + info.min) // 2, info.max, info.min)
                elif index % 4 == 3:
                    array = self.zero + array // 16
                arrays[name] = np.clip(array, info.min, info.max).astype(self.dtype)
            found.append(arrays)
        return found


def _add_layers(b: Branches, x: str) -> None:
    conv = dict(table="Conv2DOptions", version=5, dilationHFactor=1, dilationWFactor=1)
    depthwise = dict(table="DepthwiseConv2DOptions", version=5)
    for axes in [False] if b.dtype == "uint8" else [False, True]:
        tag = "_channels" if axes else "_tensor"

        def weights(name: str, shape: tuple[int, ...], axis: int, per: bool = axes) -> list[str]:
            return b.weights(name, shape, axis if per else None, 0.05)

        b.branch(
            "CONV_2D", [x, *weights(f"c1{tag}", (6, 3, 3, 5), 0)], (1, 5, 5, 6), label=tag,
            scale=0.31, strideH=2, strideW=2, padding=SAME, fusedActivationFunction=RELU, **conv,
        )  # fmt: skip
        dilated = conv | dict(dilationHFactor=2, dilationWFactor=2)
        b.branch(
            "CONV_2D", [x, *weights(f"c2{tag}", (6, 3, 3, 5), 0)], (1, 9, 10, 6),
            label=f"_dilated{tag}", scale=0.16, strideH=1, strideW=1, padding=SAME,
            fusedActivationFunction=RELU6, **dilated,
        )  # fmt: skip
        b.branch(
            "DEPTHWISE_CONV_2D", [x, *weights(f"d1{tag}", (1, 3, 3, 10), 3)], (1, 7, 8, 10),
            label=tag, scale=0.21, strideH=1, strideW=1, padding=VALID, depthMultiplier=2,
            dilationHFactor=1, dilationWFactor=1, **depthwise,
        )  # fmt: skip
        b.branch(
            "DEPTHWISE_CONV_2D", [x, *weights(f"d2{tag}", (1, 3, 3, 5), 3)], (1, 9, 10, 5),
            label=f"_dilated{tag}", scale=0.21, strideH=1, strideW=1, padding=SAME,
            depthMultiplier=1, dilationHFactor=2, dilationWFactor=2,
            fusedActivationFunction=RELU_N1_TO_1, **depthwise,
        )  # fmt: skip
        b.constant(f"size{tag}", [1, 18, 20, 4])
        weight, bias = weights(f"t{tag}", (4, 3, 3, 5), 0)
        b.branch(
            "TRANSPOSE_CONV", [f"size{tag}", weight, x, bias], (1, 18, 20, 4), label=tag, scale=0.3,
            table="TransposeConvOptions", strideH=2, strideW=2, padding=SAME, version=3,
        )  # fmt: skip
        b.branch(
            "FULLY_CONNECTED", [x, *weights(f"f{tag}", (7, 450), 0)], (1, 7), label=tag, scale=0.4,
            table="FullyConnectedOptions", version=8 if b.dtype == "int16" else 4,
            fusedActivationFunction=RELU,
        )  # fmt: skip


def _add_products(b: Branches, flat: str) -> None:
    """BATCH_MATMUL, which the interpreter has not for uint8, with constants of any rank."""
    b.constant("rows", [2, 5, 90])
    b.branch(
        "RESHAPE", [flat, "rows"], (2, 5, 90), label="_rows", scale=0.05, zero=b.zero, version=1,
        table="ReshapeOptions", newShape=[2, 5, 90],
    )  # fmt: skip

    def operand(name: str, shape: tuple[int, ...]) -> str:
        span = 127 if b.dtype == "int8" else 32767
        values = b.rng.integers(-span, span + 1, shape)
        return b.constant(name, values, b.dtype, scale=0.013 * b.unit, zero_point=0)

    own = dict(table="BatchMatMulOptions", version=3, scale=0.93 * b.unit)
    rows, adjoint = "reshape_rows", dict(adjX=False, adjY=True)
    for label, source, shape, out in (
        ("_matrix", flat, (300, 7), (3, 7)),
        ("_shared", rows, (90, 7), (2, 5, 7)),
        ("_one", rows, (1, 90, 7), (2, 5, 7)),
        ("_each", rows, (2, 90, 7), (2, 5, 7)),
    ):
        constant = operand(f"m{label}", shape)
        b.branch("BATCH_MATMUL", [source, constant], out, label=label, **own)
    b.branch(
        "BATCH_MATMUL", [rows, operand("turned", (2, 7, 90))], (2, 5, 7), label="_turned",
        **own, **adjoint,
    )  # fmt: skip
    b.branch("BATCH_MATMUL", [rows, rows], (2, 5, 5), label="_self", **own, **adjoint)
    b.branch("BATCH_MATMUL", [operand("left", (2, 6, 5)), rows], (2, 6, 90), label="_left", **own)


def _add_binary(b: Branches, x: str, y: str, row: str) -> None:
    span = 100 if b.dtype != "int16" else 30000
    middle = 128 if b.dtype == "uint8" else 0
    for kind, table, version, scale in (
        ("ADD", "AddOptions", 4, 0.11),
        ("SUB", "SubOptions", 5, 0.13),
        ("MUL", "MulOptions", 4, 0.31 / b.unit),
    ):
        scale = scale * b.unit if kind == "MUL" else scale
        own: dict[str, Any] = dict(table=table, version=version, scale=scale)
        own |= {} if kind == "MUL" else {"potScaleInt16": False}
        shape = (1, 9, 10, 5)
        b.branch(kind, [x, y], shape, label="_two", fusedActivationFunction=RELU6, **own)
        b.branch(kind, [x, x], shape, label="_same", **own)
        b.branch(kind, [x, row], shape, label="_row", **own)
        b.branch(kind, [row, x], shape, label="_row_first", fusedActivationFunction=RELU, **own)
        for label, size in (("_vector", (5,)), ("_scalar", ())):
            values = b.rng.integers(-span, span, size) + middle
            name = b.constant(
                f"{kind}{label}.c", values, b.dtype, scale=0.083 * b.unit, zero_point=b.other_zero
            )
            b.branch(kind, [x, name], shape, label=label, **own)


def _add_pools(b: Branches, x: str) -> None:
    pool = dict(table="Pool2DOptions", version=3, scale=0.05, zero=b.zero)
    window = dict(strideH=2, strideW=2, filterHeight=3, filterWidth=3, padding=SAME)
    whole = dict(strideH=1, strideW=1, filterHeight=9, filterWidth=10, padding=VALID)
    b.branch("AVERAGE_POOL_2D", [x], (1, 5, 5, 5), **pool, **window)
    b.branch(
        "AVERAGE_POOL_2D", [x], (1, 1, 1, 5), label="_whole", fusedActivationFunction=RELU, **pool,
        **whole,
    )  # fmt: skip
    b.branch("MAX_POOL_2D", [x], (1, 5, 5, 5), fusedActivationFunction=RELU, **pool, **window)
    b.constant("hw", [1, 2])
    b.constant("channel", [3])
    mean = dict(table="ReducerOptions", version=3)
    b.branch("MEAN", [x, "hw"], (1, 5), scale=0.021, keepDims=False, **mean)
    b.branch(
        "MEAN",
        [x, "hw"],
        (1, 1, 1, 5),
        label="_kept",
        scale=0.05,
        zero=b.zero,
        keepDims=True,
        **mean,
    )
    b.branch(
        "MEAN", [x, "channel"], (1, 9, 10), label="_channels", scale=0.03, keepDims=False, **mean
    )
    if b.dtype == "uint8":  # the interpreter reads any other dtype as unsigned
        b.branch("SUM", [x, "hw"], (1, 5), keepDims=False, **(mean | dict(version=2)))


def _add_unary(b: Branches, x: str, flat: str) -> None:
    shape, rows = (1, 9, 10, 5), (3, 300)
    for label, scale, zero in (("", 0.031, None), ("_same", 0.05, b.zero)):
        b.branch("RELU", [x], shape, label=label, scale=scale, zero=zero)
        b.branch("RELU6", [x], shape, label=label, scale=scale, zero=zero)
        if b.dtype != "int16":
            b.branch("RELU_N1_TO_1", [x], shape, label=label, scale=scale, zero=zero, version=1)
    for alpha in (0.1, 0.3, 1.5):
        b.branch(
            "LEAKY_RELU",
            [x],
            shape,
            label=f"_{alpha}",
            scale=0.031,
            table="LeakyReluOptions",
            alpha=alpha,
        )
    if b.dtype != "int16":
        slopes = b.rng.integers(-100, 100, (1, 1, 5)) + (128 if b.dtype == "uint8" else 0)
        for label, codes in (("_channels", slopes), ("_one", slopes[..., :1])):
            name = b.constant(f"slope{label}", codes, b.dtype, scale=0.011, zero_point=b.other_zero)
            b.branch("PRELU", [x, name], shape, label=label, scale=0.047, version=1)
        for k, source in enumerate((flat, "wide", "fine")):
            for approximate in (False, True):
                b.branch(
                    "GELU", [source], rows, label=f"_{k}{'_tanh' if approximate else ''}",
                    scale=(0.03, 0.13, 0.003)[k], table="GeluOptions", approximate=approximate,
                )  # fmt: skip
    bits = 16 if b.dtype == "int16" else 8
    low = {"int8": -128, "uint8": 0, "int16": 0}[b.dtype]
    fraction = 2.0**-15 if bits == 16 else 2.0**-8
    half = {"int8": 0, "uint8": 128, "int16": 0}[b.dtype]
    for k, source in enumerate((flat, "wide", "fine")):
        b.branch(
            "LOGISTIC", [source], rows, label=f"_{k}", scale=fraction / b.unit, zero=low, version=3
        )
        b.branch(
            "TANH",
            [source],
            rows,
            label=f"_{k}",
            scale=(fraction if bits == 16 else 2 * fraction) / b.unit,
            zero=half,
            version=3,
        )
        b.branch(
            "SOFTMAX",
            [source],
            rows,
            label=f"_{k}",
            scale=fraction / b.unit,
            zero=low,
            table="SoftmaxOptions",
            beta=1.0,
            version=3,
        )
        if bits == 8:
            b.branch(
                "HARD_SWISH", [source], rows, label=f"_{k}", scale=(0.06, 0.33, 0.005)[k], version=1
            )
    b.branch(
        "SOFTMAX",
        [x],
        shape,
        label="_image",
        scale=fraction / b.unit,
        zero=low,
        table="SoftmaxOptions",
        beta=1.0,
        version=3,
    )
    b.branch(
        "QUANTIZE",
        [x],
        shape,
        scale=0.031,
        dtype="int16" if bits == 16 else "int8",
        zero=0 if bits == 16 else 3,
        table="QuantizeOptions",
    )
    b.branch(
        "QUANTIZE",
        [x],
        shape,
        label="_coarse",
        scale=0.4,
        dtype="int16" if bits == 16 else "int8",
        zero=0 if bits == 16 else -9,
        table="QuantizeOptions",
    )


def _add_movement(b: Branches, x: str, y: str) -> None:
    same = dict(scale=0.05, zero=b.zero)
    b.branch(
        "CONCATENATION",
        [x, "x_again"],
        (1, 9, 10, 10),
        table="ConcatenationOptions",
        axis=3,
        **same,
    )
    if b.dtype == "uint8":  # others have one scale
        b.branch(
            "CONCATENATION",
            [x, y],
            (1, 9, 10, 10),
            label="_rescaled",
            table="ConcatenationOptions",
            axis=3,
            scale=0.09,
            version=1,
        )
    b.constant("widths", [[0, 0], [1, 2], [2, 1], [0, 0]])
    b.constant("value", b.zero + 21, b.dtype, scale=0.05 * b.unit, zero_point=b.zero)
    b.branch("PAD", [x, "widths"], (1, 12, 13, 5), table="PadOptions", **same)
    b.branch("PADV2", [x, "widths", "value"], (1, 12, 13, 5), table="PadV2Options", **same)
    b.constant("shape", [3, 150])
    b.branch(
        "RESHAPE",
        [x, "shape"],
        (3, 150),
        table="ReshapeOptions",
        newShape=[3, 150],
        version=1,
        **same,
    )
    b.constant("order", [0, 2, 3, 1])
    b.branch("TRANSPOSE", [x, "order"], (1, 10, 5, 9), table="TransposeOptions", **same)
    for name, values in (("begin", [0, 1, 0, 1]), ("end", [1, 8, 10, 5]), ("step", [1, 2, 3, 1])):
        b.constant(name, values)
    b.branch(
        "STRIDED_SLICE",
        [x, "begin", "end", "step"],
        (1, 4, 4, 4),
        table="StridedSliceOptions",
        **same,
    )
    b.constant("size", [18, 20])
    b.branch(
        "RESIZE_NEAREST_NEIGHBOR",
        [x, "size"],
        (1, 18, 20, 5),
        table="ResizeNearestNeighborOptions",
        **same,
    )
    b.branch(
        "PACK", [x, "x_again"], (2, 1, 9, 10, 5), table="PackOptions", valuesCount=2, axis=0, **same
    )
    b.branch("MAXIMUM", [x, "x_again"], (1, 9, 10, 5), table="MaximumMinimumOptions", **same)


def _inputs(b: Branches) -> tuple[str, str, str, str]:
    x, y = b.input((1, 9, 10, 5)), b.input((1, 9, 10, 5), scale=0.083)
    row, flat = b.input((1, 1, 1, 5), scale=0.083), b.input((3, 300))
    for name, source, scale in (
        ("wide", "wide", 0.3), ("fine", "fine", 0.0041), ("x_again", "x_again", 0.05)
    ):  # fmt: skip
        shape = (1, 9, 10, 5) if name == "x_again" else (3, 300)
        b.tensors[name] = Tensor(source, shape, b.dtype, scale * b.unit, b.zero)
        b.inputs.append(name)
    return x, y, row, flat


FAMILIES: dict[str, Callable[[Branches, tuple[str, str, str, str]], None]] = {
    "layers": lambda b, names: _add_layers(b, names[0]),
    "products": lambda b, names: _add_products(b, names[3]),
    "binary": lambda b, names: _add_binary(b, *names[:3]),
    "pools": lambda b, names: _add_pools(b, names[0]),
    "unary": lambda b, names: _add_unary(b, names[0], names[3]),
    "movement": lambda b, names: _add_movement(b, *names[:2]),
}


@pytest.mark.parametrize(
    ("dtype", "family"),
    [pair for pair in itertools.product(DTYPES, FAMILIES) if pair != ("uint8", "products")],
)
def test_operators_give_the_interpreters_bytes(dtype: str, family: str, tmp_path: Path) -> None:
    from tvm_compress.build import build as compile_model
    from tvm_compress.importers import load_model
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    branches = Branches(dtype)
    FAMILIES[family](branches, _inputs(branches))
    content = branches.content()
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    reference = Reference(content)
    model = load_model(path)
    built = compile_model(model.module, get_target("host"))
    assert not built.left_float
    session = Session(built.executable, model.inputs, model.outputs)
    wrong: dict[str, int] = {}
    for arrays in branches.samples(16):
        expected = reference.run(arrays)
        for name, result in session.run(arrays).items():
            assert result.dtype == expected[name].dtype
            wrong[name] = wrong.get(name, 0) + int(np.count_nonzero(result != expected[name]))
    assert set(wrong) == set(branches.outputs)
    assert not {name: count for name, count in wrong.items() if count}


def test_float_ends_round_as_the_interpreter(tmp_path: Path) -> None:
    """QUANTIZE rounds half away from zero; DEQUANTIZE is one float32 product."""
    scale = 0.25
    tensors = [
        Tensor("x", (1, 64), "float32"),
        Tensor("q", (1, 64), "int8", scale, 5),
        Tensor("y", (1, 64), "float32"),
    ]
    operators = [
        Operator("QUANTIZE", ["x"], ["q"], {}, "QuantizeOptions", 2),
        Operator("DEQUANTIZE", ["q"], ["y"], {}, "DequantizeOptions", 3),
    ]
    path = tmp_path / "ends.tflite"
    path.write_bytes(build(tensors, operators, ["x"], ["y"]))
    ties = (np.arange(64) - 32.5) * scale
    found = compare(path, [ties.astype(np.float32)], tmp_path, every=True)
    assert (found.tensors, found.differing) == (2, 0)


@pytest.mark.parametrize("model", ["kws_ref_model", "ad01_int8"])
def test_small_models_give_the_interpreters_bytes(
    model: str, asset: Callable[[str], Path], assets: Path, tmp_path: Path
) -> None:
    path = asset(f"tflite/{model}.tflite")
    inputs = list(itertools.islice(MODELS[model](assets), 5))
    found = compare(path, inputs, tmp_path, every=True)
    assert found.tensors > 5
    assert found.differing == 0, found.worst


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["pretrainedResnet_quant", "vww_96_int8", "mobilenet_v1_0.25_224_quant"]
)
def test_models_give_the_interpreters_bytes(
    model: str, asset: Callable[[str], Path], assets: Path, tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    path = asset(f"tflite/{model}.tflite")
    inputs = list(itertools.islice(MODELS[model](assets), 3))
    found = compare(path, inputs, tmp_path, every=True)
    assert found.tensors > 10
    assert found.differing == 0, found.worst
