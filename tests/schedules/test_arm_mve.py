"""Kernels for Helium (Cortex-M55): every form compiled into one program, run under QEMU, compared
with NumPy bit for bit; and instructions counted, which are the same in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

from tvm_compress.bare.kernel_code import BareKernel, object_file, to_bare
from tvm_compress.model import TensorSpec
from tvm_compress.relay_passes.numerics import requantize as numerics
from tvm_compress.relay_passes.numerics import tflite as tflite_numerics
from tvm_compress.runners import Project, build_program, run_program
from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    WeightedSpec,
    describe,
    pack_weight,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.choice import Choice
from tvm_compress.schedules.tflite_add import tflite_add
from tvm_compress.schedules.weights import kernel_attrs, weight_value
from tvm_compress.targets import Target, get_target
from tvm_compress.targets.toolchains import missing_tools

from .test_arm_dsp import Requantisation, conv, depthwise, linear, requantisation

MATRIX, DEPTHWISE = "arm.mve_matrix", "arm.mve_depthwise"
TARGET = get_target("cortex-m55")


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments, and what comes out."""

    form: str
    func: tvm.tirx.PrimFunc
    arrays: Sequence[np.ndarray]
    wanted: np.ndarray
    macs: int
    choice: Choice | None = None


class High(Requantisation):
    """The rule of linear layers: 31 bits of mantissa, one rounding."""

    def expected(self, acc: np.ndarray) -> np.ndarray:
        code = tflite_numerics.scale_high(acc + self.bias, *self.factors) + self.zero_point
        return np.clip(code, *self.bounds).astype(np.int8)


class Doubly(Requantisation):
    """TFLite's double rounding with shifts to both sides."""

    def expected(self, acc: np.ndarray) -> np.ndarray:
        total = (acc + self.bias).astype(np.int32)
        code = numerics.multiply_by_quantized_multiplier(total, *self.factors) + self.zero_point
        return np.clip(code, *self.bounds).astype(np.int8)


def constants(acc: np.ndarray, rule: str, rng: np.random.Generator, **more: Any) -> Requantisation:
    if rule not in ("high", "tflite"):
        return requantisation(acc, rule, rng, **more)
    channels = acc.shape[-1]
    bias = rng.integers(-3000, 3000, channels, dtype=np.int32)
    mantissa = rng.integers(1 << 30, (1 << 31) - 1, channels, dtype=np.int32)
    if rule == "high":
        shift = rng.integers(7, 12, channels, dtype=np.int8)
        return High(rule, bias, (mantissa, shift), **more)
    exponent = np.resize(np.array([-9, 1, 0, -12], np.int8), channels)
    return Doubly(rule, bias, (mantissa, exponent), **more)


def layer(
    spec: WeightedSpec, rule: str = "float32", choice: Choice | None = None, **more: Any
) -> Case:
    """A layer and its requantisation."""
    form = DEPTHWISE if isinstance(spec, Conv2dSpec) and spec.is_depthwise else MATRIX
    rng = np.random.default_rng(0)
    info = np.iinfo(spec.data_dtype)
    data = rng.integers(info.min, info.max, spec.data_shape, spec.data_dtype, endpoint=True)
    weight = rng.integers(-128, 127, spec.plain_weight_shape, "int8", endpoint=True)
    acc = reference(spec, data, weight)
    macs = acc.size * spec.reduction_size
    wanted = constants(acc, rule, rng, **more)
    packed = pack_weight(spec, weight, TARGET)
    if packed is not None:
        spec, weight = packed
        np.testing.assert_array_equal(reference(spec, data, weight), acc)
    inputs, sums = describe(spec)
    tensors = [
        te.placeholder(array.shape, str(array.dtype), name=f"constant{i}")
        for i, array in enumerate((wanted.bias, *wanted.factors))
    ]
    arrays = [data, weight, wanted.bias, *wanted.factors]
    naive = te.create_prim_func([*inputs, *tensors, wanted.describe(sums, tensors)])
    func = naive.without_attr("global_symbol")
    return Case(form, func, arrays, wanted.expected(acc), macs, choice)


MULTIPLIERS = ((1812345678, -1), (1234567890, 0), (1500000000, -18))
ZERO_POINTS = (3, -4, 5)


def produced(kernel: tuple[int, int]) -> Case:
    """A convolution whose data are computed by the same function, clamped."""
    rng = np.random.default_rng(2)
    plain = conv(4, 6, 10, 7, kernel, 0)
    weight = rng.integers(-128, 127, plain.plain_weight_shape, "int8", endpoint=True)
    raw = rng.integers(-128, 127, plain.data_shape, "int8", endpoint=True)
    packed = pack_weight(plain, weight, TARGET)
    assert packed is not None
    spec, weight = packed
    assert isinstance(spec, Conv2dSpec)
    acc = reference(spec, np.clip(raw, -100, 90), weight)
    wanted = constants(acc, "float32", rng)
    x = te.placeholder(spec.data_shape, "int8", name="x")
    low, high = (tirx.const(bound, "int8") for bound in (-100, 90))
    data = te.compute(x.shape, lambda *i: te.max(te.min(x[i], high), low), name="data")
    (_, weights), _ = describe(spec)
    ky, kx, c = (te.reduce_axis((0, extent)) for extent in spec.reduction)
    sums = te.compute(
        spec.output_shape,
        lambda b, y, z, o: te.sum(
            data[b, y + ky, z + kx, c].astype("int32")
            * weight_value(spec, [weights], (ky, kx), c, o),
            axis=[ky, kx, c],
        ),
        name="conv2d",
        attrs=kernel_attrs(spec),
    )
    tensors = [
        te.placeholder(array.shape, str(array.dtype), name=f"constant{i}")
        for i, array in enumerate((wanted.bias, *wanted.factors))
    ]
    naive = te.create_prim_func([x, weights, *tensors, wanted.describe(sums, tensors)])
    arrays = [raw, weight, wanted.bias, *wanted.factors]
    func = naive.without_attr("global_symbol")
    return Case(MATRIX, func, arrays, wanted.expected(acc), acc.size * spec.reduction_size)


def residual(shape: tuple[int, ...]) -> Case:
    """TFLite's ADD on its own."""
    rng = np.random.default_rng(1)
    arrays = [rng.integers(-128, 127, shape, "int8", endpoint=True) for _ in range(2)]
    arrays[0].flat[:2], arrays[1].flat[:2] = (-128, 127), (-128, 127)
    func = tflite_add(
        (shape, shape), "int8", ZERO_POINTS, MULTIPLIERS, 20, 1, (-128, 127), shape, "int8"
    )
    left, right = (
        numerics.multiply_by_quantized_multiplier(
            (array.astype(np.int32) - zero_point) << 20, np.int32(m), np.int32(e)
        )
        for array, zero_point, (m, e) in zip(arrays, ZERO_POINTS, MULTIPLIERS, strict=False)
    )
    mantissa, exponent = MULTIPLIERS[2]
    total = numerics.multiply_by_quantized_multiplier(
        left + right, np.int32(mantissa), np.int32(exponent)
    )
    wanted = np.clip(total + ZERO_POINTS[2], -128, 127).astype(np.int8)
    return Case("default.elementwise", func, arrays, wanted, wanted.size)


def largest(size: int, stride: int, pad: int, channels: int) -> Case:
    """A maximum over windows."""
    data = np.random.default_rng(3).integers(-128, 127, (1, 9, 8, channels), "int8", endpoint=True)
    x = te.placeholder(data.shape, "int8", name="x")
    pads = [pad] * 4
    out = topi.nn.pool2d(
        x, [size] * 2, [stride] * 2, [1, 1], pads, "max", layout="NHWC"
    )  # fmt: skip
    padded = np.pad(data, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-128)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    wanted = windows[:, ::stride, ::stride].max((-1, -2))
    func = te.create_prim_func([x, out]).without_attr("global_symbol")
    return Case("default.reduction", func, [data], wanted, wanted.size)


class Board:
    """One program with all cases, each a sample of it."""

    def __init__(self, cases: dict[str, Case], folder: Path, target: Target = TARGET) -> None:
        missing = missing_tools(target)
        if missing:
            pytest.skip(f"{target.name}: {', '.join(missing)} not installed")
        self.cases = cases
        text: list[str] = []
        calls, objects, arena = [], [], 16
        for number, case in enumerate(cases.values()):
            scheduled = schedule(case.func, target, case.choice)
            assert scheduled.attrs[SCHEDULE_ATTR] == case.form
            kernel = to_bare(scheduled, f"kernel{number}", target, False)
            objects.append(f"kernel{number}.o")
            (folder / objects[-1]).write_bytes(object_file(kernel, target))
            call, size = _call(number, kernel, case.arrays, text)
            calls.append(call)
            arena = max(arena, size)
        most = max(case.wanted.size for case in cases.values())
        (folder / "all.h").write_text(
            f"#define ALL_ARENA_BYTES {arena}\n"
            "int all_run(const void *const *inputs, void *const *outputs, void *arena);\n"
        )
        (folder / "all.c").write_text(
            '#include <stdint.h>\n#include "all.h"\n' + "\n".join(text) + "\n"
            "int all_run(const void *const *inputs, void *const *outputs, void *arena) {\n"
            f"    (void)arena;\n    switch (*(const int32_t *)inputs[0]) {{\n{''.join(calls)}"
            "    }\n    return 0;\n}\n"
        )
        project = Project(
            folder, "all.h", "all_run", arena, (TensorSpec("which", (1,), "int32"),),
            (TensorSpec("out", (most,), "int8"),), sources=("all.c",), objects=tuple(objects),
        )  # fmt: skip
        program = build_program(project, target, folder)
        samples = [{"which": np.array([number], np.int32)} for number in range(len(cases))]
        self.result = run_program(program, samples)

    def check(self, name: str) -> float:
        """Compare; instructions a multiply-add, everything counted."""
        case, number = self.cases[name], list(self.cases).index(name)
        found = self.result.outputs[number]["out"][: case.wanted.size]
        np.testing.assert_array_equal(found.reshape(case.wanted.shape), case.wanted)
        assert self.result.instructions is not None
        return self.result.instructions[number] / case.macs


def _call(
    number: int, kernel: BareKernel, arrays: Sequence[np.ndarray], text: list[str]
) -> tuple[str, int]:
    """The case of a `switch` that calls a kernel, and the bytes of its workspaces; its arguments go
    to `text`."""
    names, size = [], 0
    text.append(f"void kernel{number}();")
    for i, array in enumerate(arrays):
        kind = {"float32": "float", "float64": "double"}.get(str(array.dtype), f"{array.dtype}_t")
        is_float = kind in ("float", "double")
        values = ",".join(float(v).hex() if is_float else str(int(v)) for v in array.ravel())
        names.append(f"c{number}_{i}")
        text.append(
            f"static const {kind} {names[-1]}[] __attribute__((aligned(8))) = {{{values}}};"
        )
    names.append("outputs[0]")
    for workspace in kernel.workspaces:
        names.append(f"(char *)arena + {size}")
        size += -(-workspace.bytes // 16) * 16
    return f"    case {number}: kernel{number}({', '.join(names)}); break;\n", size


# The shapes that other libraries were measured with, and layers of MLPerf Tiny's networks.
LIMITS = {
    "32x32x16": 0.15,
    "32x32x16 float32": 0.15,
    "16x16x32": 0.14,
    "pointwise": 0.18,
    "pointwise float32": 0.17,
    "depthwise": 0.9,
    "linear": 0.17,
    # An element.
    "residual": 7.5,
    "largest": 1.0,
}

SMALL = conv(5, 5, 4, 4)
SHORTS = conv(6, 5, 20, 7, data_dtype="int16", pad_value=-300)


def all_cases() -> dict[str, Case]:
    small = "tflite_small"
    return {
        "32x32x16": layer(conv(32, 32, 16, 16), small),
        "32x32x16 float32": layer(conv(32, 32, 16, 16)),
        "16x16x32": layer(conv(16, 16, 32, 32), small),
        "pointwise": layer(conv(25, 6, 64, 64, (1, 1), 0), small),
        "pointwise float32": layer(conv(25, 6, 64, 64, (1, 1), 0)),
        "depthwise": layer(depthwise(25, 5, 64), small),
        "linear": layer(linear(1, 640, 24)),
        # matrix
        "one": layer(linear(1, 1, 1)),
        "odd": layer(linear(3, 7, 5), small),
        "long": layer(linear(1, 333, 9)),
        "one of many blocks": layer(linear(5, 100, 30)),
        "window together": layer(conv(9, 11, 3, 4)),
        "one channel": layer(conv(13, 10, 1, 6, (10, 4), 2, strides=(2, 2)), small),
        "stride": layer(conv(8, 8, 16, 6, strides=(2, 2), padding=(0, 0, 1, 1))),
        "skipping": layer(conv(9, 9, 24, 4, (1, 1), 0, strides=(2, 2))),
        "column": layer(conv(5, 1, 8, 4, (1, 1), padding=(1, 0, 0, 0), strides=(2, 1), batch=2)),
        "rows apart": layer(conv(5, 7, 5, 3, dilation=(2, 1))),
        "batch": layer(conv(4, 4, 6, 7, (2, 3), strides=(3, 2), batch=2)),
        "no border": layer(conv(6, 5, 20, 4, (2, 3), 0)),
        "loops": layer(conv(3, 5, 200, 10)),
        "far columns": layer(conv(2, 5, 600, 2, (1, 1), 0), small),
        "last segment moved": layer(conv(2, 13, 16, 4), choice={"pixels": 5, "unroll": 4}),
        "16 bits": layer(SHORTS),
        "16 bits, one channel": layer(
            SHORTS.replace(
                height=13,
                width=10,
                in_channels=1,
                out_channels=6,
                kernel=(10, 4),
                padding=(2,) * 4,
                strides=(2, 2),
            )
        ),
        "16 bits, odd": layer(linear(3, 13, 6).replace(data_dtype="int16")),
        "16 bits, long": layer(linear(1, 333, 9).replace(data_dtype="int16")),
        "16 bits, far columns": layer(SHORTS.replace(in_channels=70)),
        "computed data": produced((3, 3)),
        "computed data, flat": produced((1, 1)),
        # depthwise
        "ragged": layer(depthwise(7, 9, 19), small),
        "few channels": layer(depthwise(2, 3, 3)),
        "one pixel": layer(depthwise(1, 1, 5)),
        "2x2": layer(depthwise(6, 7, 18, 2, 0)),
        "4x4": layer(depthwise(6, 7, 18, 4, 2), small),
        "1x1": layer(depthwise(5, 6, 20, 1, 0)),
        "wide": layer(depthwise(3, 21, 130)),
        "images": layer(depthwise(5, 5, 16, batch=2)),
        "depthwise stride": layer(depthwise(11, 13, 33, strides=(2, 2))),
        "2x2 stride": layer(depthwise(11, 13, 4, 2, 0, strides=(3, 2))),
        "one tall": layer(conv(9, 8, 16, 16, (3, 1), 0, groups=16)),
        "asymmetric border": layer(depthwise(10, 18, 16, strides=(2, 2), padding=(0, 0, 1, 1))),
        # rules
        "rule tflite": layer(SMALL, "tflite"),
        "rule high": layer(SMALL, "high"),
        "rule once": layer(SMALL, "rounded_once"),
        "rule float64": layer(SMALL, "float64"),
        "clamp": layer(SMALL, bounds=(-100, 20)),
        "clamp before": layer(SMALL, bounds=(-3, 127), fits=False),
        "residual": residual((1, 8, 8, 16)),
        "largest": largest(2, 2, 0, 32),
        "largest, border": largest(3, 2, 1, 19),
        "ragged residual": residual((1, 3, 5, 7)),
    }


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(all_cases(), tmp_path_factory.mktemp("board"))


def test_the_same_as_numpy(board: Board) -> None:
    for name in board.cases:
        board.check(name)


def test_instructions_of_a_multiply_add(board: Board) -> None:
    counts = {name: board.check(name) for name in LIMITS}
    assert {name: n for name, n in counts.items() if n > LIMITS[name]} == {}


@pytest.mark.parametrize(
    "spec", [conv(4, 7, 8, 6), depthwise(4, 9, 5)], ids=["matrix", "depthwise"]
)
def test_choices(spec: Conv2dSpec, tmp_path: Path) -> None:
    case = layer(spec)
    space = search_space(case.func, TARGET)
    assert space is not None
    choices = list(space)
    assert len(choices) > 4 and choices[0] == dict(space.default)
    # The default and a few of the others.
    few = {str(choice): layer(spec, choice=choice) for choice in choices[:: len(choices) // 4]}
    board = Board(few, tmp_path)
    for name in few:
        board.check(name)


def test_what_has_no_form_gets_the_generic_schedule() -> None:
    far = linear(1, 1 << 20, 2).replace(weight_layout="O4R16")
    for spec in (conv(5, 7, 4, 3, pad=0, dilation=(1, 2)), depthwise(9, 9, 4, 5), far):
        inputs, sums = describe(spec)
        func = te.create_prim_func([*inputs, sums]).without_attr("global_symbol")
        assert schedule(func, TARGET).attrs[SCHEDULE_ATTR].startswith("default.")
