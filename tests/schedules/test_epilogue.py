"""Fused functions: the scheduled whole equals the naive whole, and its consumers stay in the
kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    Conv2dSpec,
    MatmulSpec,
    WeightedSpec,
    describe,
    pack_weight,
    schedule,
)
from tvm_compress.schedules.fused import FusedFunction, analyse
from tvm_compress.schedules.weights import kernel_attrs, weight_value
from tvm_compress.targets import Target

from .kernels import INT8, arguments, assert_same, naive, random_array, run

CONV = Conv2dSpec(
    batch=2,
    height=9,
    width=7,
    in_channels=16,
    out_channels=40,
    kernel=(3, 3),
    padding=(1, 1, 1, 1),
    **INT8,
)
POINTWISE = Conv2dSpec(
    batch=2, height=9, width=7, in_channels=16, out_channels=33, kernel=(1, 1), **INT8
)
DEPTHWISE = Conv2dSpec(
    batch=1, height=9, width=7, in_channels=33, out_channels=33, groups=33, kernel=(3, 3), **INT8
)
LINEAR = MatmulSpec(rows=3, in_features=70, out_features=10, **INT8)
SPECS = [CONV, POINTWISE, DEPTHWISE, LINEAR]


def fused(spec: WeightedSpec, kind: str) -> tvm.tirx.PrimFunc:
    """The anchor with a tail: requantise, with residual, reshaped after, hard-swish, after a
    producer."""
    inputs, acc = describe(spec)
    shape = tuple(int(n) for n in acc.shape)
    bias = te.placeholder(shape[-1:], "int32", name="bias")
    scale = te.placeholder(shape[-1:], "float32", name="scale")
    extra = [bias, scale]

    def requantise(value: te.Tensor) -> te.Tensor:
        rounded = te.compute(
            shape,
            lambda *i: tirx.nearbyint((value[i] + bias[i[-1]]).astype("float32") * scale[i[-1]]),
            name="rounded",
        )
        return te.compute(
            shape,
            lambda *i: (te.max(te.min(rounded[i], 100.0), -120.0).astype("int32") + 3).astype(
                "int8"
            ),
            name="requantised",
        )

    if kind == "hard_swish":
        x = te.compute(shape, lambda *i: acc[i].astype("float32") * scale[i[-1]], name="x")
        gate = te.compute(shape, lambda *i: te.max(te.min(x[i] + 3.0, 6.0), 0.0), name="gate")
        out = te.compute(shape, lambda *i: x[i] * gate[i] * gate[i], name="out")
        return naive([*inputs, *extra], [out])
    result = requantise(acc)
    if kind == "accumulators_too":
        return naive([*inputs, *extra], [acc, result])
    if kind in ("residual", "reshaped"):
        other = te.placeholder(shape, "int8", name="other")
        extra.append(other)
        added = te.compute(
            shape,
            lambda *i: te.max(
                te.min(result[i].astype("int32") + other[i].astype("int32"), 127), -128
            ).astype("int8"),
            name="added",
        )
        result = added
    if kind == "reshaped":
        result = topi.reshape(result, (shape[0], int(np.prod(shape[1:]))))
    return naive([*inputs, *extra], [result])


@pytest.mark.parametrize(
    "kind", ["requantised", "residual", "reshaped", "hard_swish", "accumulators_too"]
)
@pytest.mark.parametrize("spec", SPECS, ids=["conv", "pointwise", "depthwise", "linear"])
def test_fused_kernel_equals_naive(main_target: Target, spec: WeightedSpec, kind: str) -> None:
    rng = np.random.default_rng(1)
    packed_spec, weight = spec, arguments(spec)[1]
    packed = pack_weight(spec, weight, main_target)
    packed_weight = weight
    if packed is not None:
        packed_spec, packed_weight = packed
    before, after = fused(spec, kind), schedule(fused(packed_spec, kind), main_target)
    assert str(after.attrs[SCHEDULE_ATTR]).startswith("x86.")
    inputs, results = [], []
    for param in before.params:
        shape, dtype = tuple(int(n) for n in param.shape), str(param.dtype)
        if param.name == "weight":
            inputs.append(weight)
        elif param.name == "scale":
            inputs.append((rng.random(shape) * 0.01).astype(dtype))
        elif param.name == "bias":
            inputs.append(rng.integers(-1000, 1000, shape, dtype=dtype))
        elif param.name in ("data", "other"):
            inputs.append(random_array(rng, shape, dtype))
        else:
            results.append((shape, dtype))
    expected = run(before, main_target, inputs, *results)
    inputs[1] = packed_weight
    for ours, theirs in zip(run(after, main_target, inputs, *results), expected, strict=True):
        assert_same(ours, theirs)


def test_producer_is_computed_in_the_copy(main_target: Target) -> None:
    """elementwise -> conv in one function: the input is computed while it is copied."""
    packed = pack_weight(CONV.replace(padding=(0, 0, 0, 0)), arguments(CONV)[1], main_target)
    assert packed is not None

    def build(spec: WeightedSpec) -> tvm.tirx.PrimFunc:
        x = te.placeholder((2, 9, 7, 16), "float32", name="x")
        data = te.compute(
            x.shape,
            lambda *i: tirx.nearbyint(te.max(te.min(x[i] * 20.0, 127.0), -128.0)).astype("int8"),
            name="q",
        )
        (_, weight), _ = describe(spec)
        axes = [te.reduce_axis((0, n)) for n in (3, 3, 16)]
        result = te.compute(
            CONV.replace(padding=(0, 0, 0, 0)).output_shape,
            lambda b, y, z, o: te.sum(
                data[b, y + axes[0], z + axes[1], axes[2]].astype("int32")
                * weight_value(spec, [weight], (axes[0], axes[1]), axes[2], o),
                axis=axes,
            ),
            name="conv2d",
            attrs=kernel_attrs(spec),
        )
        return naive([x, weight], [result])

    plain = CONV.replace(padding=(0, 0, 0, 0))
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 16)).astype("float32") * 4
    result = (plain.output_shape, "int32")
    expected = run(build(plain), main_target, [x, arguments(CONV)[1]], result)
    after = schedule(build(packed[0]), main_target)
    assert after.attrs[SCHEDULE_ATTR] == "x86.matrix"
    np.testing.assert_array_equal(run(after, main_target, [x, packed[1]], result)[0], expected[0])


def test_what_depends_on_what() -> None:
    """Also where a stage reads what it writes."""
    x, y = (te.placeholder((4,), "float32", name=name) for name in "xy")
    double = te.compute((4,), lambda i: x[i] * 2.0, name="double")
    total = te.compute((4,), lambda i: double[i] + 1.0, name="total")
    other = te.compute((4,), lambda i: y[i] + 1.0, name="other")
    found = analyse(naive([x, y], [total, other]))
    assert found is not None
    stages = tuple(replace(s, reads=(s.buffer, *s.reads)) for s in found.stages)
    looping = FusedFunction(found.func, stages, {s.buffer: s for s in stages})
    data, unread = found.func.params[:2]
    result = next(s.buffer for s in stages if s.name == "total")
    assert looping.depends_on(result, data)
    assert not looping.depends_on(result, unread)
