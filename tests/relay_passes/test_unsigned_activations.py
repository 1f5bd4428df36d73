"""Activations stored unsigned: the same reals, and nothing that the outside sees changes."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.relax import op

from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.lower import REQUANTIZE_ATTR
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
