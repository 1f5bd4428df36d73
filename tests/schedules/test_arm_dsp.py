"""Kernels for Cortex-M with DSP instructions: every form compiled, run under QEMU, compared with
NumPy bit for bit; and instructions counted, which are the same in every run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from tvm_compress.bare.kernel_code import BareKernel, object_file, to_bare
from tvm_compress.model import TensorSpec
from tvm_compress.relay_passes.numerics import tflite as numerics
from tvm_compress.runners import Project, build_program, run_program
from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    MatmulSpec,
    WeightedSpec,
    describe,
    pack_parts,
    pack_weight,
    reference,
    schedule,
    search_space,
)
from tvm_compress.schedules.requantize import INTEGER_RULES, rounded_once, scale_float32
from tvm_compress.schedules.weights import pack_int4, unpack_weight
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .kernels import INT8, UINT8

MATRIX, DEPTHWISE, DEFAULT = "arm.matrix", "arm.depthwise", "default.conv2d"


def conv(
    h: int, w: int, c: int, o: int, kernel: tuple[int, int] = (3, 3), pad: int = 1, **more: Any
) -> Conv2dSpec:
    fields = {**INT8, "batch": 1, "padding": (pad,) * 4, "pad_value": 5, **more}
    return Conv2dSpec(
        height=h, width=w, in_channels=c, out_channels=o, kernel=kernel, **fields
    )  # fmt: skip


def depthwise(
    h: int, w: int, c: int, k: int = 3, pad: int = 1, m: int = 1, **more: Any
) -> Conv2dSpec:
    return conv(h, w, c, c * m, (k, k), pad, groups=c, **more)


def linear(rows: int, k: int, n: int) -> MatmulSpec:
    return MatmulSpec(**INT8, rows=rows, in_features=k, out_features=n)


@dataclass(frozen=True)
class Requantisation:
    """sum => code: the rule, its constants by channel, and the clamp."""

    rule: str
    bias: np.ndarray
    factors: tuple[np.ndarray, ...]
    zero_point: int = -3
    bounds: tuple[int, int] = (-128, 127)
    fits: bool = True

    def describe(self, acc: te.Tensor, tensors: list[te.Tensor]) -> te.Tensor:
        bias, *factors = tensors
        low, high = self.bounds
        zero_point = self.zero_point

        def clamp(x: Any, below: Any, above: Any) -> Any:
            return te.max(te.min(x, above), below)

        def compute(*i: Any) -> Any:
            total = acc[i] + bias[i[-1]]
            if self.rule == "rounded_once":
                mantissa, shift = (f[i[-1]] for f in factors)
                code = rounded_once(total, mantissa, shift, zero_point)
            elif self.rule != "float32":
                scale = INTEGER_RULES[self.rule][1]
                code = scale(total, *(f[i[-1]] for f in factors)) + tirx.const(zero_point, "int32")
            else:
                scaled = scale_float32(total, factors[0][i[-1]])
                if not self.fits:
                    below, above = (float(bound - zero_point) for bound in (low, high))
                    scaled = clamp(
                        scaled, tirx.const(below, "float32"), tirx.const(above, "float32")
                    )
                    return (scaled.astype("int32") + zero_point).astype("int8")
                code = scaled.astype("int32") + zero_point
            return clamp(code, tirx.const(low, "int32"), tirx.const(high, "int32")).astype("int8")

        return te.compute(acc.shape, compute, name="requantize")

    def expected(self, acc: np.ndarray) -> np.ndarray:
        total = acc.astype(np.int64) + self.bias
        if self.rule == "float64":
            scaled = total.astype(np.float64) * self.factors[0]
            code = np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)
        elif self.rule == "float32":
            code = np.rint(total.astype(np.float32) * self.factors[0]).astype(np.int64)
        else:
            mantissa, shift = (factor.astype(np.int64) for factor in self.factors)
            product = (total * mantissa + (1 << 30)) >> 31
            right = shift if self.rule == "rounded_once" else -shift
            # Half away from zero.
            code = np.sign(product) * ((np.abs(product) + (1 << (right - 1))) >> right)
        return np.clip(code + self.zero_point, *self.bounds).astype(np.int8)


def requantisation(
    acc: np.ndarray, rule: str, rng: np.random.Generator, **more: Any
) -> Requantisation:
    """Constants that spread the codes over more than their range."""
    channels = acc.shape[-1]
    scale = np.minimum(60 / np.maximum(1, acc.reshape(-1, channels).std(0)), 0.4)
    bias = rng.integers(-3000, 3000, channels, dtype=np.int32)
    if rule == "float32":
        return Requantisation(rule, bias, (scale.astype(np.float32),), **more)
    if rule == "float64":
        return Requantisation(rule, bias, (scale,), **more)
    exponent = np.floor(np.log2(scale)).astype(np.int32) + 1
    mantissa = np.rint(scale / 2.0**exponent * 2**31).clip(2**30, 2**31 - 1).astype(np.int32)
    if rule == "rounded_once":
        more = {"bounds": (-3, 127), "zero_point": -3, **more}
        constants = numerics.rounded_once(mantissa, exponent, more["zero_point"])
        assert constants is not None
        mantissa, shift = constants
        return Requantisation(rule, bias, (mantissa, shift.astype(np.int8)), **more)
    return Requantisation(rule, bias, (mantissa, exponent.astype(np.int8)), **more)


def project(
    kernel: BareKernel, target: Any, arrays: list[np.ndarray], shape: tuple[int, ...], folder: Path
) -> Project:
    """A C project around one kernel: constants behind the data, workspaces in the arena."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.o").write_bytes(object_file(kernel, target))
    pointers, size = [], 0
    for workspace in kernel.workspaces:
        pointers.append(f"(char *)arena + {size}")
        size += -(-workspace.bytes // 16) * 16
    constants, names = [], []
    for i, array in enumerate(arrays[1:]):
        kind = {"float32": "float", "float64": "double"}.get(str(array.dtype), f"{array.dtype}_t")
        values = ",".join(
            float(v).hex() if kind in ("float", "double") else str(int(v)) for v in array.ravel()
        )
        constants.append(f"static const {kind} c{i}[] __attribute__((aligned(8))) = {{{values}}};")
        names.append(f"c{i}")
    call = ", ".join(["inputs[0]", *names, "outputs[0]", *pointers])
    (folder / "one.h").write_text(
        f"#define ONE_ARENA_BYTES {max(size, 16)}\n"
        "int one_run(const void *const *inputs, void *const *outputs, void *arena);\n"
    )
    (folder / "one.c").write_text(
        '#include <stdint.h>\n#include "one.h"\nvoid kernel();\n' + "\n".join(constants) + "\n"
        "int one_run(const void *const *inputs, void *const *outputs, void *arena) {\n"
        f"    (void)arena;\n    kernel({call});\n    return 0;\n}}\n"
    )
    return Project(
        folder, "one.h", "one_run", max(size, 16),
        (TensorSpec("data", arrays[0].shape, str(arrays[0].dtype)),),
        (TensorSpec("out", shape, "int8"),), sources=("one.c",), objects=("kernel.o",),
    )  # fmt: skip


def count(
    spec: WeightedSpec, folder: Path, form: str, rule: str = "float32", name: str = "cortex-m4",
    choice: dict[str, int] | None = None, weights: tuple[int, int] = (-127, 127),
    extremes: bool = False, **more: Any,
) -> float:  # fmt: skip
    """Pack, schedule, run under QEMU, compare; instructions a multiply-add, everything counted."""
    target = get_target(name)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    rng = np.random.default_rng(0)
    info = np.iinfo(spec.data_dtype)
    data = rng.integers(info.min, info.max, spec.data_shape, spec.data_dtype, endpoint=True)
    weight = rng.integers(*weights, spec.plain_weight_shape, "int8", endpoint=True)
    if extremes:
        data[:] = info.min
        weight[:] = np.where(np.arange(weight.shape[-1]) % 4 < 2, weights[1], weights[0])
    parts = [weight]
    if spec.weight_dtype == "int4":
        parts = [pack_int4(weight.reshape(spec.reduction_size, -1))]
    if spec.group_size:
        parts.append(rng.integers(1, 255, spec.scales_shape, "uint8", endpoint=True))
    acc = reference(spec, data, *parts)
    macs = acc.size * spec.reduction_size
    wanted = requantisation(acc, rule, rng, **more)
    packed = pack_parts(spec, parts, target)
    if packed is not None:
        spec, parts = packed
        np.testing.assert_array_equal(reference(spec, data, *parts), acc)
    inputs, sums = describe(spec)
    constants = [
        te.placeholder(array.shape, str(array.dtype), name=f"constant{i}")
        for i, array in enumerate((wanted.bias, *wanted.factors))
    ]
    naive = te.create_prim_func([*inputs, *constants, wanted.describe(sums, constants)])
    scheduled = schedule(naive.without_attr("global_symbol"), target, choice)
    assert scheduled.attrs[SCHEDULE_ATTR] == form
    kernel = to_bare(scheduled, "kernel", target, False)
    arrays = [data, *parts, wanted.bias, *wanted.factors]
    program = build_program(project(kernel, target, arrays, acc.shape, folder), target, folder)
    result = run_program(program, [{"data": data}])
    np.testing.assert_array_equal(result.outputs[0]["out"], wanted.expected(acc))
    assert result.instructions is not None
    return result.instructions[0] / macs


# The shapes that other libraries were measured with.
MEASURED = {
    "32x32x16": conv(32, 32, 16, 16),
    "16x16x32": conv(16, 16, 32, 32),
    "pointwise": conv(25, 6, 64, 64, (1, 1), 0),
}


@pytest.mark.parametrize("rule", ["float32", "tflite_small", "rounded_once"])
@pytest.mark.parametrize("name", list(MEASURED))
def test_instructions_of_a_multiply_add(name: str, rule: str, tmp_path: Path) -> None:
    assert count(MEASURED[name], tmp_path, MATRIX, rule) <= 1.1


def test_instructions_of_depthwise(tmp_path: Path) -> None:
    assert count(depthwise(25, 5, 64), tmp_path, DEPTHWISE) <= 2.4
    as_in_tflite = {"rule": "rounded_once", "zero_point": -128, "bounds": (-128, 127)}
    assert count(depthwise(25, 5, 64), tmp_path, DEPTHWISE, **as_in_tflite) <= 2.05


MATRICES = {
    "one": linear(1, 1, 1),
    "odd": linear(3, 7, 5),
    "long": linear(1, 640, 24),
    "image": conv(9, 11, 3, 4),
    "one_channel": conv(13, 10, 1, 6, (10, 4), 2, strides=(2, 2)),
    "stride": conv(8, 8, 16, 6, strides=(2, 2), padding=(0, 0, 1, 1)),
    "skipping": conv(9, 9, 8, 4, (1, 1), 0, strides=(2, 2)),
    "column": conv(5, 1, 8, 4, (1, 1), padding=(1, 0, 0, 0), strides=(2, 1), batch=2),
    "rows_apart": conv(5, 7, 5, 3, dilation=(2, 1)),
    "batch": conv(4, 4, 6, 7, (2, 3), strides=(3, 2), batch=2),
    "one_row": conv(6, 5, 8, 4, (1, 3)),
    "unsigned": conv(6, 5, 8, 4, **UINT8 | {"weight_dtype": "int8"}),
    "far_columns": conv(3, 3, 256, 3, (1, 1), 0),
    "farther_columns": conv(2, 5, 600, 2),
}


@pytest.mark.parametrize("name", list(MATRICES))
def test_matrix(name: str, tmp_path: Path) -> None:
    count(MATRICES[name], tmp_path, MATRIX)


@pytest.mark.parametrize("name", ["long", "stride", "odd", "one_channel"])
def test_weights_that_cannot_be_joined(name: str, tmp_path: Path) -> None:
    """Beside -128, which has no byte one less."""
    count(MATRICES[name], tmp_path, MATRIX, weights=(-128, 127))


@pytest.mark.parametrize(("least", "joined"), [(-127, True), (-128, False)])
def test_layout_of_weights(least: int, joined: bool) -> None:
    spec = linear(1, 64, 6)
    weight = np.full(spec.plain_weight_shape, least, np.int8)
    packed = pack_weight(spec, weight, get_target("cortex-m4"))
    assert packed is not None
    assert packed[0].packed_layout is not None and packed[0].packed_layout.joined is joined
    assert np.array_equal(unpack_weight(*packed).reshape(weight.shape), weight)


def test_sums_of_joined_weights_fit(tmp_path: Path) -> None:
    """24 bits, whatever the data are."""
    target = get_target("cortex-m4")
    for rows, joined in ((515, True), (517, False)):
        spec = linear(1, rows, 2)
        packed = pack_weight(spec, np.full(spec.plain_weight_shape, 127, np.int8), target)
        assert packed is not None and packed[0].packed_layout is not None
        assert packed[0].packed_layout.joined is joined
    extremes = linear(1, 515, 4)
    count(extremes, tmp_path, MATRIX, extremes=True)


FOUR_BITS = (-8, 7)
NIBBLES = {
    "long": linear(1, 64, 6),
    "odd": linear(3, 7, 5),
    "two_rows": linear(2, 36, 4),
    "tiles": linear(5, 148, 3),
    "pixels": conv(5, 5, 8, 4, (1, 1), 0),
    "image": conv(6, 7, 4, 6),
    "stride": conv(8, 9, 8, 3, strides=(2, 2)),
    "odd_pitch": conv(5, 6, 3, 4, (2, 4)),
    "unsigned": conv(6, 5, 8, 4, **UINT8 | {"weight_dtype": "int8"}),
}


@pytest.mark.parametrize("name", list(NIBBLES))
def test_codes_of_four_bits(name: str, tmp_path: Path) -> None:
    spec = NIBBLES[name]
    packed = pack_weight(
        spec, np.full(spec.plain_weight_shape, -8, np.int8), get_target("cortex-m4")
    )
    assert packed is not None and packed[0].weight_dtype == "int4"
    count(spec, tmp_path, MATRIX, weights=FOUR_BITS)


def in_groups(spec: Conv2dSpec | MatmulSpec) -> Conv2dSpec | MatmulSpec:
    return spec.replace(weight_dtype="int4", group_size=32)


GROUPS = {
    "linear": in_groups(linear(2, 64, 5)),
    "one_group": in_groups(linear(3, 32, 4)),
    "image": in_groups(conv(4, 6, 32, 4)),
    "group_a_row": in_groups(conv(5, 9, 8, 3, (2, 4))),
}


@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m55"])
def test_groups_of_four_bits(core: str, name: str, tmp_path: Path) -> None:
    count(GROUPS[name], tmp_path, MATRIX, weights=FOUR_BITS, name=core)


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (MEASURED["pointwise"], 1.3),
        (MEASURED["16x16x32"], 1.15),
        (linear(1, 640, 128), 1.4),
        (in_groups(MEASURED["pointwise"]), 1.6),
    ],
    ids=["pointwise", "16x16x32", "linear", "groups"],
)
def test_instructions_of_four_bits(spec: WeightedSpec, most: float, tmp_path: Path) -> None:
    assert count(spec, tmp_path, MATRIX, weights=FOUR_BITS) <= most


def test_sums_of_four_bits_fit(tmp_path: Path) -> None:
    """Longest sums that are proven to fit, at their extremes."""
    target = get_target("cortex-m4")
    for length, fits in ((508, True), (516, False)):
        spec = linear(1, length, 2)
        packed = pack_weight(spec, np.full(spec.plain_weight_shape, -8, np.int8), target)
        assert packed is not None and (packed[0].weight_dtype == "int4") is fits
    count(linear(1, 508, 4), tmp_path, MATRIX, weights=FOUR_BITS, extremes=True)


WITHOUT_FORM = {
    "columns_apart": conv(5, 7, 4, 3, pad=0, dilation=(1, 2)),
    "border": conv(6, 7, 5, 3, pad=2, dilation=(1, 2)),
    "uneven_border": conv(5, 6, 6, 4, padding=(1, 0, 2, 3), groups=2, strides=(2, 1)),
    "zeros": conv(4, 4, 8, 3, pad=2, dilation=(1, 2), pad_value=0, batch=2),
}


@pytest.mark.parametrize("name", list(WITHOUT_FORM))
def test_generic_schedule(name: str, tmp_path: Path) -> None:
    """Correct, and without a padded copy."""
    spec = WITHOUT_FORM[name]
    count(spec, tmp_path, DEFAULT)
    target = get_target("cortex-m4")
    inputs, sums = describe(spec)
    naive = te.create_prim_func([*inputs, sums]).without_attr("global_symbol")
    assert not to_bare(schedule(naive, target), "kernel", target, False).workspaces


@pytest.mark.parametrize(
    "spec",
    [
        depthwise(7, 6, 6, 5, 2),
        depthwise(7, 6, 3, 1, 0),
        depthwise(3, 3, 5),
        depthwise(1, 4, 3, strides=(2, 2)),
        depthwise(5, 9, 3, padding=(0, 2, 1, 0), strides=(1, 2)),
        depthwise(9, 8, 2, 2, 0, 2),
        depthwise(11, 9, 4, strides=(2, 2)),
        depthwise(48, 50, 2),  # bands
        depthwise(8, 5, 4, dilation=(2, 1), **UINT8 | {"weight_dtype": "int8"}),
    ],
    ids=[
        "5x5",
        "1x1",
        "three_rows",
        "one_row",
        "strides",
        "2x2_multiplier",
        "stride",
        "bands",
        "rows_apart",
    ],
)
@pytest.mark.parametrize("rule", ["float32", "rounded_once"])
def test_depthwise(spec: Conv2dSpec, rule: str, tmp_path: Path) -> None:
    count(spec, tmp_path, DEPTHWISE, rule)


@pytest.mark.parametrize(
    "more",
    [
        {"bounds": (-100, 100)},
        {"bounds": (-3, 127)},
        {"bounds": (-128, 20), "fits": False},
        {"bounds": (-128, 127), "fits": False},
    ],
    ids=["both", "relu", "above", "saturating"],
)
def test_clamps(more: dict[str, Any], tmp_path: Path) -> None:
    count(conv(5, 5, 4, 4), tmp_path, MATRIX, **more)


@pytest.mark.parametrize("rule", ["float32", "float64", "tflite"])
@pytest.mark.parametrize("name", ["cortex-m4", "cortex-m7"])
def test_rules_without_a_short_form(rule: str, name: str, tmp_path: Path) -> None:
    count(conv(5, 5, 4, 4), tmp_path, MATRIX, rule, name=name)


def test_choices(tmp_path: Path) -> None:
    target = get_target("cortex-m4")
    bytes_, nibbles = (-127, 127), FOUR_BITS
    for spec, form, least, weights in (
        (conv(4, 7, 8, 4), MATRIX, 5, bytes_),
        (conv(4, 3, 8, 2), MATRIX, 4, nibbles),
        (depthwise(4, 7, 2), DEPTHWISE, 4, bytes_),
    ):
        codes = np.full(spec.plain_weight_shape, weights[1], np.int8)
        packed = pack_weight(spec, codes, target)
        inputs, sums = describe(spec if packed is None else packed[0])
        naive = te.create_prim_func([*inputs, sums]).without_attr("global_symbol")
        space = search_space(naive, target)
        assert space is not None
        choices = list(space)
        assert len(choices) >= least and choices[0] == dict(space.default)
        # Each takes a second; the first and the last are among them.
        for number in sorted({round(i * (len(choices) - 1) / 5) for i in range(6)}):
            choice, folder = choices[number], tmp_path / f"{form}{weights[1]}{number}"
            count(spec, folder, form, choice=choice, weights=weights)


def test_no_library_is_asked_for(tmp_path: Path) -> None:
    """Nothing but the loops' own symbol: no runtime, no mathematics, no unwinder."""
    target = get_target("cortex-m4")
    spec = conv(4, 7, 8, 4)
    packed = pack_weight(spec, np.zeros(spec.plain_weight_shape, np.int8), target)
    assert packed is not None
    inputs, sums = describe(packed[0])
    naive = te.create_prim_func([*inputs, sums]).without_attr("global_symbol")
    kernel = to_bare(schedule(naive, target), "kernel", target, False)
    content = object_file(kernel, target)
    assert b"kernel" in content
    for name in (b"__aeabi_unwind", b"TVMBackend", b"lrint", b"smmulr"):
        assert name not in content
