"""Compile a kernel for a target, run it where the host can, compare with its NumPy reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import te

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    KernelSpec,
    WeightedSpec,
    describe,
    pack_weight,
    prim_func,
    reference,
    schedule,
)
from tvm_compress.targets import Target, get_target

INT8: dict[str, Any] = {"data_dtype": "int8", "weight_dtype": "int8", "acc_dtype": "int32"}
UINT8: dict[str, Any] = {"data_dtype": "uint8", "weight_dtype": "uint8", "acc_dtype": "int32"}
INT16: dict[str, Any] = {"data_dtype": "int16", "weight_dtype": "int8", "acc_dtype": "int64"}
FLOAT: dict[str, Any] = {}
FLOAT_TOLERANCE = 1e-5
_VNNI = get_target("x86-64-v4-vnni")
ICE_LAKE = dataclasses.replace(
    _VNNI,
    name="ice-lake",
    capabilities=_VNNI.capabilities | {"avx512vbmi2"},
    tvm_options={**_VNNI.tvm_options, "mattr": ["+avx512vnni", "+avx512vbmi2"]},
)


def random_array(
    rng: np.random.Generator, shape: Sequence[int], dtype: str, extreme: bool = False
) -> np.ndarray:
    """Values over the whole range of an integer dtype, or only its two ends; floats are normal."""
    if dtype == "float32":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    if extreme:
        return rng.choice([info.min, info.max], size=shape).astype(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def arguments(spec: KernelSpec, seed: int = 0, extreme: bool = False) -> list[np.ndarray]:
    """Random arguments of a kernel in the plain layout."""
    rng = np.random.default_rng(seed)
    inputs, _ = describe(spec)
    return [
        random_array(
            rng, [int(n) for n in t.shape], str(t.dtype), extreme and str(t.dtype) != "float32"
        )
        for t in inputs
    ]


def run(
    func: tvm.tirx.PrimFunc,
    target: Target,
    inputs: Sequence[np.ndarray],
    *shapes: tuple[tuple[int, ...], str],
) -> list[np.ndarray]:
    """Compile for the target and run; the results are filled with a telling value before."""
    library = tvm.compile(func.with_attr("global_symbol", "main"), target.tvm_target())
    results = [tvm.runtime.tensor(np.full(shape, 77, dtype)) for shape, dtype in shapes]
    if target.runs_here():
        library(*(tvm.runtime.tensor(a) for a in inputs), *results)
    return [r.numpy() for r in results]


def check(
    spec: KernelSpec,
    target: Target,
    form: str,
    seed: int = 0,
    extreme: bool = False,
    plain: list[np.ndarray] | None = None,
) -> KernelSpec:
    """Pack, schedule, compile, run, compare; `form` is the schedule that must have been chosen.

    Returns the packed spec."""
    plain = arguments(spec, seed, extreme) if plain is None else plain
    expected = reference(spec, *plain)
    inputs, packed_spec = list(plain), spec
    if isinstance(spec, WeightedSpec):
        packed = pack_weight(spec, plain[1], target)
        if packed is not None:
            packed_spec, inputs[1] = packed
            again = reference(packed_spec, *inputs)
            np.testing.assert_array_equal(again, expected)
    func = schedule(prim_func(packed_spec), target)
    assert func.attrs[SCHEDULE_ATTR] == form
    assert func.attrs["tirx.is_scheduled"]
    (result,) = run(func, target, inputs, (expected.shape, str(expected.dtype)))
    if target.runs_here():
        assert_same(result, expected)
    return packed_spec


def assert_same(result: np.ndarray, expected: np.ndarray) -> None:
    """Integers bit for bit, floats relative to the largest value."""
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(result, expected)
    else:
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(result / scale, expected / scale, atol=FLOAT_TOLERANCE, rtol=0)


def naive(inputs: list[te.Tensor], outputs: list[te.Tensor]) -> tvm.tirx.PrimFunc:
    """A naive function of several stages, as fusion leaves it."""
    return te.create_prim_func([*inputs, *outputs]).without_attr("global_symbol")
