"""Weights stored without their zeros: encoding, and every decoding kernel, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from tvm_compress.compile_kernels import kernel_text
from tvm_compress.object_code import compile_object
from tvm_compress.schedules import SCHEDULE_ATTR, Conv2dSpec, schedule
from tvm_compress.schedules.stored_weight import (
    CODE_BYTES,
    NAME,
    RUN,
    WORD,
    decode,
    encode,
    expected_share,
    stored_weight,
)
from tvm_compress.sections import sections_of
from tvm_compress.targets import get_target

from .kernels import ICE_LAKE, run

TARGETS = {
    "ice-lake": ICE_LAKE,
    **{name: get_target(name) for name in ("x86-64-v4", "x86-64-v3", "x86-64-v2")},
}
# Less than a word, whole words, a ragged end, several runs with and without a ragged end.
SHAPES = [(1, 3, 5), (2, 32, 4), (7, 29), (RUN, WORD), (2 * RUN + 3, WORD + 1)]
# Threads share it.
LARGE = (513, 512)
INT8: dict[str, Any] = {"data_dtype": "int8", "weight_dtype": "int8", "acc_dtype": "int32"}
LAYER = Conv2dSpec(
    batch=1, height=16, width=16, in_channels=16, out_channels=32, kernel=(3, 3),
    padding=(1, 1, 1, 1),
)  # fmt: skip


def pruned(shape: tuple[int, ...], dtype: str, sparsity: float = 0.6) -> np.ndarray:
    rng = np.random.default_rng(len(shape))
    values = rng.normal(0, 40, shape).astype(dtype)
    values[rng.random(shape) < sparsity] = 0
    return values


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape: tuple[int, ...], dtype: str) -> None:
    weight = pruned(shape, dtype)
    stored, parts = encode(weight)
    assert [str(part.dtype) for part in parts] == [dtype, "uint64", "int32"]
    assert decode(stored, *parts).tobytes() == weight.tobytes()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything_is_stored(sparsity: float) -> None:
    weight = pruned((9, 31), "float32", sparsity)
    weight[0, 0] = -0.0  # as masks leave them
    stored, parts = encode(weight)
    assert np.array_equal(decode(stored, *parts), weight)
    assert stored.stored == np.count_nonzero(weight) + 16


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float32"])
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_decode_bit_for_bit(name: str, dtype: str) -> None:
    target = TARGETS[name]
    for shape in (SHAPES[2], SHAPES[-1], LARGE):
        weight = pruned(shape, dtype)
        stored, parts = encode(weight)
        scheduled = schedule(stored.prim_func(), target)
        assert scheduled.attrs[SCHEDULE_ATTR] == NAME
        if not target.runs_here():
            continue
        (found,) = run(scheduled, target, parts, (shape, dtype))
        assert found.tobytes() == weight.tobytes()


def test_one_function_decodes_all_weights_that_are_alike() -> None:
    def text(shape: tuple[int, ...], dtype: str = "int8", sparsity: float = 0.6) -> str:
        stored, _ = encode(pruned(shape, dtype, sparsity))
        return kernel_text(schedule(stored.prim_func(), ICE_LAKE))

    alike = text((4, WORD))
    assert text((4, WORD), sparsity=0.3) == text((RUN, 3 * WORD)) == alike
    # Another dtype, a ragged end, threads, another rank.
    others = [text((4, WORD), "float32"), text((3, 5)), text((512, 512)), text((2, 2, WORD))]
    assert len({alike, *others}) == 5


def test_the_description_computes_the_same() -> None:
    target = TARGETS["x86-64-v2"]
    for shape in SHAPES[:3]:
        weight = pruned(shape, "int8")
        stored, parts = encode(weight)
        (found,) = run(stored.prim_func(), target, parts, (shape, "int8"))
        assert found.tobytes() == weight.tobytes()


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("float32", 32)])
def test_bytes_fall_with_the_sparsity(dtype: str, bits: int) -> None:
    spec = LAYER.replace(**INT8) if dtype == "int8" else LAYER
    shares = []
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        weight = pruned((1, 2, 288, 16, 4), dtype, sparsity)
        found = stored_weight(spec, weight, ICE_LAKE)
        assert found is not None
        shares.append(sum(part.nbytes for part in found[1]) / weight.nbytes)
        zeros = 1 - np.count_nonzero(weight) / weight.size
        assert shares[-1] == pytest.approx(1 - zeros + 1 / bits, abs=0.01)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_code_of_a_decoding_function(name: str, dtype: str) -> None:
    target = get_target(name)
    for shape in ((64, 64), (1, 2, 9, 16, 3)):
        stored, _ = encode(np.ones(shape, dtype))
        func = schedule(stored.prim_func(), target)
        code = compile_object({tvm.ir.GlobalVar("decode"): func}, target.tvm_target())
        sections = sections_of(code, "decode.o")
        # Strings of checks are in `.rodata`, some of which other kernels have as well.
        instructions = sections[".text"]
        assert 0.5 * CODE_BYTES < instructions < 1.3 * CODE_BYTES, sections


def test_alike_weights_share_a_function() -> None:
    def kind(*shape: int, dtype: str = "int8") -> str:
        return encode(np.ones(shape, dtype))[0].decoding.kind

    assert kind(64, 64) == kind(32, 2) == "int8, 2 axes"
    others = {kind(64, 64, dtype="float32"), kind(63, 33), kind(1, 64, 64), kind(1024, 1024)}
    assert len(others | {kind(64, 64)}) == 5


def test_what_is_not_stored_so() -> None:
    weight = pruned((1, 2, 288, 16, 1), "float32", 0.05)
    assert stored_weight(LAYER, weight, ICE_LAKE) is None  # hardly smaller
    weight = pruned((1, 2, 288, 16, 1), "float32")
    assert stored_weight(LAYER, weight, get_target("cortex-m4")) is None
    depthwise = LAYER.replace(out_channels=16, groups=16)
    assert stored_weight(depthwise, weight, ICE_LAKE) is None


def test_few_positions_do_not_pay_for_decoding() -> None:
    shares = [
        expected_share(LAYER.replace(height=side, width=side), ICE_LAKE) for side in (2, 8, 32)
    ]
    assert shares[0] > 0.5 > shares[1] > 0.02 > shares[2]
