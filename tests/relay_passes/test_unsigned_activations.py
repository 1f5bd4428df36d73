"""Activations stored unsigned: the same reals, and nothing that the outside sees changes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.lower import REQUANTIZE_ATTR, LowerToKernels
from tvm_compress.relay_passes.unsigned_activations import UnsignedActivations

from .floats import Net, build, describe, parameters_of, quantize, run, samples


def network(net: Net, x: relax.Var) -> relax.Var:
    y = net.conv_relu("a", x, 8)
    pooled = net("pool", op.nn.max_pool2d(net("sig", op.sigmoid(y)), (2, 2), (2, 2)))
    z = net.conv_bias("b", pooled, 8)
    total = net("sum", op.add(z, net.conv_bias("c", pooled, 8)))
    return net.conv("head", total, 4)


def test_same_numbers_from_unsigned_codes() -> None:
    module = quantize(build(network), ranges={"a_relu": (0.0, 3.0), "sum": (-2.0, 5.0)})
    after = UnsignedActivations()(module)
    for name in ("x", "a_relu", "sig", "pool", "sum"):
        scale, zero_point, dtype = parameters_of(module, name)
        assert dtype == "int8"
        assert parameters_of(after, name) == (scale, zero_point + 128, "uint8")
    assert (
        describe(module).items() >= describe(after).items()
    )  # less the copy that names the result
    for x in samples(module):
        np.testing.assert_array_equal(run(after, x), run(module, x))


def test_weights_and_codes_that_leave_the_function_stay() -> None:
    def body(net: Net, x: relax.Var) -> relax.Tuple:
        scale, zero = relax.const(np.float32(0.1)), relax.const(np.int8(3))
        codes = net("codes", op.quantize(x, scale, zero, out_dtype="int8"))
        reals = net("reals", op.dequantize(codes, scale, zero))
        return relax.Tuple([codes, net("out_reals", op.nn.relu(reals))])

    module = build(body)
    after = UnsignedActivations()(module)
    assert describe(module).items() >= describe(after).items()
    assert "uint8" not in str(after)
    weights = UnsignedActivations()(quantize(build(lambda net, x: net.conv("a", x, 4))))
    graph = Graph(weights["main"])
    stored = [
        ir.dtype_of(call.args[0])
        for variable, call in graph.values.items()
        if variable.name == "a_weight"
    ]
    assert stored == ["int8"]


def test_models_that_came_as_integers_keep_their_own() -> None:
    module = quantize(build(network))
    module["main"] = module["main"].with_attr(REQUANTIZE_ATTR, "float32")
    assert UnsignedActivations()(module).same_as(module)


def sums(net: Net, x: relax.Var) -> relax.Var:
    """Residual additions of sums and codes, averages and rescaled copies."""
    a = net.conv_relu("a", x, 8)
    b = net("join", op.nn.relu(op.add(net.conv_bias("b", a, 8), a)))
    c = net("both", op.add(net.conv_bias("c", b, 8), net.conv_bias("d", a, 8, kernel=1)))
    pooled = net("pool", op.nn.avg_pool2d(c, (2, 2), (2, 2)))
    total = net("total", op.add(pooled, net.conv_bias("e", b, 8, strides=2)))
    twice = net("twice", op.add(total, pooled))
    return net.conv("head", net("mean", op.mean(twice, [2, 3], keepdims=True)), 4, kernel=1)


@pytest.mark.parametrize("seed", range(6))
def test_integers_do_not_depend_on_where_codes_are_counted_from(seed: int) -> None:
    """What x86 computes in unsigned codes is what the other targets compute in signed ones: the
    fixed-point constants of sums must not look at the zero points."""
    rng = np.random.default_rng(seed)
    names = ("x", "a_relu", "join", "both", "pool", "total", "twice", "mean")
    ranges = {name: (-float(rng.uniform(0, 3)), float(rng.uniform(0.5, 4))) for name in names}
    module = quantize(build(sums, seed=seed), ranges=ranges)
    signed, unsigned = (LowerToKernels()(form) for form in (module, UnsignedActivations()(module)))
    shifts = [re.findall(r">> (\d+)", form.script()) for form in (signed, unsigned)]
    assert shifts[0] and shifts[0] == shifts[1]
    for x in samples(module, count=8, seed=seed):
        np.testing.assert_array_equal(run(signed, x), run(unsigned, x))
