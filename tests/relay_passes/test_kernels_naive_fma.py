"""The numerics contract: integers do not depend on the instruction set.

A back end may contract a float multiplication and a following addition into one rounding. Every
kernel that makes integers is compiled without FMA (nehalem) and with it (haswell), and must give
the same bits; a kernel that holds such an addition shows that the test can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from tvm_compress.relay_passes.numerics import requantize as rules
from tvm_compress.schedules import requantize as kernels
from tvm_compress.schedules.layer_norm import layer_norm
from tvm_compress.schedules.softmax import softmax

SHAPE = (64, 1024)
CHANNELS = (1024,)


def outputs(func: tirx.PrimFunc, arrays: Sequence[np.ndarray], dtype: str) -> list[np.ndarray]:
    """The kernel's result on a CPU without and with FMA."""
    results = []
    for mcpu in ("nehalem", "haswell"):
        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        built = tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": mcpu}))
        result = tvm.runtime.tensor(np.zeros(SHAPE, dtype))
        built["kernel"](*[tvm.runtime.tensor(array) for array in arrays], result)
        results.append(result.numpy())
    return results


def needs_fma() -> None:
    from tvm_compress.targets import get_target

    level = str(get_target("host").tvm_target().attrs.get("mcpu", ""))
    if level in ("", "x86-64", "x86-64-v2", "nehalem") or not get_target("host").is_x86:
        pytest.skip("this machine has no FMA")


def constants(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    bias = rng.integers(-(2**20), 2**20, CHANNELS).astype(np.int32)
    return bias, rng.uniform(1e-5, 1e-4, CHANNELS).astype(np.float32)


def requantize_case(rng: np.random.Generator) -> tuple[tirx.PrimFunc, list[np.ndarray], str]:
    bias, scale = constants(rng)
    sums = rng.integers(-(2**22), 2**22, SHAPE).astype(np.int32)
    func = kernels.requantize(SHAPE, "int32", CHANNELS, 3, (-32768, 32767), "int16", "float32")
    return func, [sums, bias, scale], "int16"


def requantize_sum_case(rng: np.random.Generator) -> tuple[tirx.PrimFunc, list[np.ndarray], str]:
    bits = 12
    arrays = []
    terms = []
    for _ in range(2):
        bias, scale = constants(rng)
        sums = rng.integers(-(2**22), 2**22, SHAPE).astype(np.int32)
        arrays += [sums, bias, (scale * np.float32(2.0**bits)).astype(np.float32)]
        terms.append(kernels.SumTerm("int32", SHAPE, CHANNELS, (-(2**29), 2**29)))
    offset = rng.integers(-(2**16), 2**16, CHANNELS).astype(np.int32)
    func = kernels.requantize_sum(SHAPE, terms, -3, (-32768, 32767), "int16", bits, CHANNELS)
    return func, [*arrays, offset], "int16"


def quantize_case(rng: np.random.Generator) -> tuple[tirx.PrimFunc, list[np.ndarray], str]:
    x = rng.normal(0, 3, SHAPE).astype(np.float32)
    return (
        kernels.quantize(SHAPE, (1,), 7, "int16", "float32"),
        [x, np.array([1e-4], np.float32)],
        "int16",
    )


def layer_norm_case(rng: np.random.Generator) -> tuple[tirx.PrimFunc, list[np.ndarray], str]:
    x = rng.integers(-128, 128, SHAPE).astype(np.int8)
    gamma = rng.uniform(1e6, 3e6, CHANNELS).astype(np.float32)
    beta = rng.integers(-(2**16), 2**16, CHANNELS).astype(np.int32)
    func = layer_norm(SHAPE, "int8", 1234.5, 3, (-32768, 32767), "int16")
    return func, [x, gamma, beta], "int16"


def softmax_case(rng: np.random.Generator) -> tuple[tirx.PrimFunc, list[np.ndarray], str]:
    x = rng.integers(-128, 128, SHAPE).astype(np.int8)
    table = np.rint(np.exp(-0.02 * np.arange(256)) * 2**20).astype(np.int32)
    func = softmax(SHAPE, 1, "int8", 2**16 * 2**20, 0, (-32768, 32767), "int16")
    return func, [x, table], "int16"


CASES: dict[str, Callable[[np.random.Generator], tuple[tirx.PrimFunc, list[np.ndarray], str]]] = {
    "requantize": requantize_case,
    "requantize_sum": requantize_sum_case,
    "quantize": quantize_case,
    "layer_norm": layer_norm_case,
    "softmax": softmax_case,
}


@pytest.mark.parametrize("case", CASES)
def test_integers_do_not_depend_on_fma(case: str) -> None:
    needs_fma()
    func, arrays, dtype = CASES[case](np.random.default_rng(0))
    plain, contracted = outputs(func, arrays, dtype)
    assert np.unique(plain).size > 500, "too few different results to tell anything"
    np.testing.assert_array_equal(plain, contracted)


def test_a_float_addition_behind_a_product_would_show() -> None:
    """The forbidden form differs, so the test above can fail."""
    needs_fma()
    a, b, c = (te.placeholder(SHAPE, "float32", name=name) for name in "abc")
    unit = tirx.const(2.0**30, "float32")
    out = te.compute(
        SHAPE,
        lambda i, j: tirx.nearbyint((a[i, j] * b[i, j] + c[i, j]) * unit).astype("int32"),
        name="out",
    )
    rng = np.random.default_rng(0)
    left, right = (rng.normal(0, 1, SHAPE).astype(np.float32) for _ in range(2))
    # The rounded product cancels; what one rounding leaves over is the product's rounding error.
    arrays = [left, right, -(left * right)]
    plain, contracted = outputs(te.create_prim_func([a, b, c, out]), arrays, "int32")
    assert (plain != contracted).any()


def test_requantize_equals_numpy() -> None:
    func, arrays, dtype = requantize_case(np.random.default_rng(1))
    expected = rules.requantize(arrays[0], arrays[1], arrays[2], 3, (-32768, 32767), dtype)
    np.testing.assert_array_equal(outputs(func, arrays, dtype)[0], expected)


def test_requantize_sum_equals_numpy() -> None:
    func, arrays, dtype = requantize_sum_case(np.random.default_rng(1))
    terms = [
        (arrays[3 * k], arrays[3 * k + 1], arrays[3 * k + 2].astype(np.float64) / 2.0**12)
        for k in range(2)
    ]
    offset = arrays[-1].astype(np.float64) / 2.0**12
    expected = rules.requantize_sum(
        terms, -3, (-32768, 32767), dtype, 12, offset, [(-(2**29), 2**29)] * 2
    )
    np.testing.assert_array_equal(outputs(func, arrays, dtype)[0], expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 13)])
def test_int64_sums_equal_numpy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    sums = rng.integers(-(2**40), 2**40, shape)
    bias = rng.integers(-(2**33), 2**33, shape[1:])
    scale = np.full(shape[1:], 2e-8, np.float32)
    func = kernels.requantize(shape, "int64", shape[1:], 0, (-32768, 32767), "int16", "float32")
    module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    built = tvm.compile(module, target=tvm.target.Target("llvm"))
    result = tvm.runtime.tensor(np.zeros(shape, np.int16))
    built["kernel"](*[tvm.runtime.tensor(array) for array in (sums, bias, scale)], result)
    expected = rules.requantize(sums, bias, scale, 0, (-32768, 32767), "int16")
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize(
    ("limits", "offset", "codes"),
    [((300.0, 300.0), 0.0, 255), ((1e6, 200.0), 3.0, 255), ((7e4, 9e6, 1e5), 10.0, 65535)],
)
def test_plan_of_a_sum_leaves_no_overflow_and_no_wrong_saturation(
    limits: tuple[float, ...], offset: float, codes: int
) -> None:
    plan = rules.plan_sum(limits, offset, codes)
    assert plan is not None
    bits, bounds = plan
    assert (sum(bounds) + offset) * 2**bits <= 2**30
    assert bits == rules.MAX_SUM_FRACTION_BITS or (sum(bounds) + offset) * 2 ** (bits + 1) > 2**30
    for k, (bound, limit) in enumerate(zip(bounds, limits, strict=True)):
        others = sum(bounds) - bound + offset
        assert bound == limit or bound - others > codes, k


def test_plan_of_an_impossible_sum() -> None:
    assert rules.plan_sum((1e12, 1e12), 0.0, 255) is None
