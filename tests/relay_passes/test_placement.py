"""Where quantisers stand: one test for each kind of region, and for what ends one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.relay_passes.op_kinds import MOVEMENT
from tvm_compress.relay_passes.quantize import read_left_float
from tvm_compress.relay_passes.quantize_config import QuantizeConfig

from .floats import Net, build, describe, parameters_of, quantize, quantized_values


def const(value: float) -> tvm.ir.Expr:
    return relax.const(np.float32(value))


def test_conv_bias_relu_is_one_region() -> None:
    module = quantize(build(lambda net, x: net.conv("b", net.conv_relu("a", x, 8), 4)))
    assert quantized_values(module) == ["x", "a_relu"]
    graph = describe(module)
    assert graph["a_bias"] == "add(a, a_bias_bias)"
    assert graph["a_relu"] == "nn.relu(a_bias)"
    assert graph["b"] == "nn.conv2d(a_relu_dq, b_weight)"


@pytest.mark.parametrize(
    "clamp",
    [
        op.nn.relu,
        op.nn.relu6,
        lambda x: op.clip(x, 0, 6),
        lambda x: op.minimum(op.nn.relu(x), const(6.0)),
        lambda x: op.maximum(x, const(0.0)),
    ],
)
def test_every_clamp_joins_the_region(clamp: Any) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("b", net("clamped", clamp(net.conv_bias("a", x, 8))), 4)

    assert quantized_values(quantize(build(body))) == ["x", "clamped"]


def test_residual_joins_the_last_conv_and_the_first_is_quantised_once() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        stem = net.conv_relu("stem", x, 8)
        main = net.conv_bias("b", net.conv_relu("a", stem, 8), 8)
        return net.conv("head", net("sum_relu", op.nn.relu(net("sum", op.add(main, stem)))), 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "stem_relu", "a_relu", "sum_relu"]
    graph = describe(module)
    assert graph["sum"] == "add(b_bias, stem_relu_dq)"
    assert graph["a"] == "nn.conv2d(stem_relu_dq, a_weight)"


def test_of_two_convs_in_a_residual_the_later_one_takes_the_sum() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        shortcut = net.conv_bias("shortcut", x, 8, kernel=1)
        main = net.conv_bias("main", x, 8)
        return net.conv("head", net("sum", op.add(shortcut, main)), 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "shortcut_bias", "sum"]
    assert describe(module)["sum"] == "add(shortcut_bias_dq, main_bias)"


def test_hard_swish_is_one_table() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net.conv_bias("a", x, 8)
        gate = net("clipped", op.clip(net("plus3", op.add(y, const(3.0))), 0, 6))
        swish = net("swish", op.multiply(y, net("gate", op.divide(gate, const(6.0)))))
        return net.conv("b", swish, 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "a_bias", "swish"]
    graph = describe(module)
    assert graph["plus3"] == "add(a_bias_dq)"
    assert graph["swish"] == "multiply(a_bias_dq, gate)"


@pytest.mark.parametrize(
    "function", [op.sigmoid, op.tanh, op.nn.silu, op.nn.gelu, op.nn.leakyrelu, op.exp]
)
def test_table_functions_are_quantised_before_and_after(function: Any) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("b", net("f", function(net.conv_bias("a", x, 8))), 4)

    assert quantized_values(quantize(build(body))) == ["x", "a_bias", "f"]


def test_gating_by_another_tensor_is_a_binary_region() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net.conv_relu("a", x, 8)
        squeezed = net("pool", op.mean(y, [2, 3], keepdims=True))
        gate = net("gate", op.sigmoid(net.conv_bias("fc", squeezed, 8, kernel=1)))
        return net.conv("b", net("scaled", op.multiply(y, gate)), 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "a_relu", "pool", "fc_bias", "gate", "scaled"]
    assert describe(module)["scaled"] == "multiply(a_relu_dq, gate_dq)"


def test_movement_keeps_the_parameters_of_its_input() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        pooled = net("pool", op.nn.max_pool2d(net.conv_relu("a", x, 8), (2, 2), (2, 2)))
        flat = net("flat", op.reshape(net("moved", op.permute_dims(pooled, [0, 2, 3, 1])), (16, 8)))
        return net.linear("fc", flat, 5)

    module = quantize(build(body), ranges={"a_relu": (0.0, 3.0)})
    assert quantized_values(module) == ["x", "a_relu", "pool", "moved", "flat"]
    expected = parameters_of(module, "a_relu")
    assert expected == (pytest.approx(3 / 255), -128, "int8")
    assert [parameters_of(module, name) for name in ("pool", "moved", "flat")] == [expected] * 3


def test_inputs_of_a_concat_get_one_range() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        joined = net("joined", op.concat([net.conv_relu("a", x, 4), net.conv_bias("b", x, 4)], 1))
        return net.conv("head", joined, 4)

    module = quantize(build(body), ranges={"a_relu": (0.0, 3.0), "b_bias": (-1.0, 2.0)})
    expected = (pytest.approx(4 / 255), -64, "int8")
    for name in ("a_relu", "b_bias", "joined"):
        assert parameters_of(module, name) == expected


def test_split_hands_on_its_parameters() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        parts = net("parts", op.split(net.conv_relu("a", x, 8), 2, axis=1))
        first, second = net("first", parts[0]), net("second", parts[1])
        return net.conv("b", net("sum", op.add(first, second)), 4)

    module = quantize(build(body), ranges={"a_relu": (0.0, 2.0)})
    assert quantized_values(module) == ["x", "a_relu", "first", "second", "sum"]
    assert parameters_of(module, "second") == parameters_of(module, "a_relu")


def test_input_is_quantised_in_front_of_movement() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("a", net("nchw", op.permute_dims(x, [0, 3, 1, 2])), 8)

    assert quantized_values(quantize(build(body, (1, 8, 8, 4)))) == ["x", "nchw"]


def test_elementwise_operators_in_front_of_the_first_layer_stay_float() -> None:
    module = quantize(
        build(lambda net, x: net.conv("a", net("scaled", op.multiply(x, const(2.0))), 8))
    )
    assert quantized_values(module) == ["scaled"]
    assert read_left_float(module) == []


def test_tail_behind_the_last_layer_stays_float_and_keeps_an_integer_bias() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        pooled = net("pool", op.mean(net.conv_relu("a", x, 8), [2, 3]))
        logits = net("logits", op.add(net.linear("fc", pooled, 5), net.array(5)))
        return net("probability", op.nn.softmax(logits))

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "a_relu", "pool"]
    graph = describe(module)
    assert graph["logits"] == "add(fc, logits_bias)"
    assert graph["probability"] == "nn.softmax(logits)"


def test_attention_is_integer_throughout() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        query, key, value = (net.linear(name, x, 8) for name in ("q", "k", "v"))
        turned = net("turned", op.permute_dims(key, [0, 2, 1]))
        scaled = net("scaled", op.multiply(net("scores", op.matmul(query, turned)), const(0.35)))
        weights = net("weights", op.nn.softmax(scaled))
        mixed = net("mixed", op.matmul(weights, value))
        normal = net(
            "normal", op.nn.layer_norm(mixed, net.array(8), net.array(8), axes=[-1], epsilon=1e-5)
        )
        return net.linear("fc", normal, 4)

    module = quantize(build(body, (1, 6, 8)))
    assert quantized_values(module) == [
        *("x", "q", "k", "v", "turned", "scores", "scaled", "weights", "mixed", "normal")
    ]
    assert describe(module)["scores"] == "matmul(q_dq, turned_dq)"
    assert parameters_of(module, "weights") == (1 / 256, -128, "int8")


def test_value_with_two_readers_ends_its_region_before_the_relu() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net.conv_bias("a", x, 8)
        return net.conv("c", net("sum", op.add(net.conv("b", net("r", op.nn.relu(y)), 8), y)), 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "a_bias", "r", "sum"]
    assert describe(module)["r"] == "nn.relu(a_bias_dq)"
    assert describe(module)["sum"] == "add(b, a_bias_dq)"


def test_what_other_outputs_read_is_the_quantised_value() -> None:
    def body(net: Net, x: relax.Var) -> relax.Tuple:
        y = net.conv_relu("a", x, 8)
        return relax.Tuple([y, net.conv("b", y, 4)])

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "a_relu"]
    assert describe(module)["out"].startswith("(")
    result = module["main"].body.blocks[0].bindings[-1].value
    assert result.fields[0].name == "a_relu_dq"


def test_operator_without_integer_form_stays_float_with_its_reason() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net("sorted", op.cumsum(net.conv_relu("a", x, 8), axis=1))
        return net.conv("b", y, 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "sorted"]
    (gap,) = read_left_float(module)
    assert (gap.name, gap.op) == ("sorted", "cumsum")
    assert gap.reason == "the operator has no integer form"


def test_constant_by_channel_has_no_table() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = net.conv_relu("a", x, 8)
        return net.conv("b", net("scaled", op.multiply(y, net.array(1, 8, 1, 1))), 4)

    module = quantize(build(body))
    assert quantized_values(module) == ["x", "scaled"]
    (gap,) = read_left_float(module)
    assert gap.name == "scaled"
    assert "constant operand" in gap.reason


@pytest.mark.parametrize(
    ("pad_value", "quantised"), [(0.0, ["x", "a_relu", "padded"]), (1.0, ["x", "padded"])]
)
def test_only_padding_with_zero_moves_integers(pad_value: float, quantised: list[str]) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        widths = [0, 0, 0, 0, 1, 1, 1, 1]
        y = net("padded", op.nn.pad(net.conv_relu("a", x, 8), widths, pad_value=pad_value))
        return net.conv("b", y, 4)

    assert quantized_values(quantize(build(body))) == quantised


@pytest.mark.parametrize("method", ["nearest_neighbor", "linear"])
def test_only_nearest_resizing_moves_integers(method: str) -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        y = op.image.resize2d(net.conv_relu("a", x, 8), (16, 16), method=method, layout="NCHW")
        return net.conv("b", net("larger", y), 4)

    module = quantize(build(body))
    moved, gaps = (["a_relu"], []) if method == "nearest_neighbor" else ([], ["image.resize2d"])
    assert quantized_values(module) == ["x", *moved, "larger"]
    assert [gap.op for gap in read_left_float(module)] == gaps


def test_layers_that_are_not_selected_split_the_domain() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net.conv("c", net.conv_relu("b", net.conv_relu("a", x, 8), 8), 4)

    module = build(body)
    quantised = quantize(module, schemes={"a": QuantizeConfig(), "c": QuantizeConfig()})
    assert quantized_values(quantised) == ["x", "b_relu"]
    assert describe(quantised)["b"] == "nn.conv2d(a_relu)"
    assert [gap.name for gap in read_left_float(quantised)] == ["b"]


def test_16_bit_readers_decide_for_a_shared_value() -> None:
    def body(net: Net, x: relax.Var) -> relax.Tuple:
        y = net.conv_relu("a", x, 8)
        return relax.Tuple([net.conv("b", y, 4), net.conv("c", y, 4)])

    wide, narrow = QuantizeConfig(activations="int16"), QuantizeConfig()
    module = quantize(build(body), schemes={"a": narrow, "b": wide, "c": narrow})
    assert parameters_of(module, "x")[2] == "int8"
    assert parameters_of(module, "a_relu")[1:] == (0, "int16")


def test_branches_stay_float_and_read_the_quantised_value() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 4, 8, 8], "float32"))
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    net = Net(builder, 0)
    with builder.function("main", [x, flag]):
        y = net.conv_relu("a", x, 4)
        builder.emit_func_output(y)
    straight = builder.finalize()["main"]
    bindings = list(straight.body.blocks[0].bindings)
    weight = net.array(4, 4, 1, 1)
    inner = relax.Var("inside", y.ty)
    branch = relax.SeqExpr(
        [relax.BindingBlock([relax.VarBinding(inner, op.nn.conv2d(y, weight))])], inner
    )
    chosen, tail = relax.Var("chosen", y.ty), relax.Var("b", y.ty)
    bindings.append(relax.VarBinding(chosen, relax.If(flag, branch, y)))
    bindings.append(relax.VarBinding(tail, op.nn.conv2d(chosen, weight)))
    body = relax.SeqExpr([relax.BindingBlock(bindings)], tail)
    main = relax.Function([x, flag], body, y.ty)
    module = relax.transform.Normalize()(tvm.IRModule({"main": main}))

    quantised = quantize(module)
    assert quantized_values(quantised) == ["x", "chosen"]
    reasons = {item.name: item.reason for item in read_left_float(quantised)}
    assert reasons["inside"] == "inside the branch of an If"
    assert "chosen" in reasons


def test_every_movement_operator_exists() -> None:
    for name in MOVEMENT:
        tvm.ir.Op.get(name)


def gru_cell(net: Net, x: relax.Var, state: relax.Var, weights: list[Any], step: int) -> relax.Var:
    """h' = (1 - z) h + z tanh(W x + U (z h) + b), the gate standing for both of a GRU's."""

    def named(name: str, expr: Any) -> relax.Var:
        return net(f"{name}{step}", expr)

    own = named("own", op.add(named("wx", op.matmul(x, weights[0])), weights[2]))
    gate = named(
        "gate", op.sigmoid(named("sum", op.add(own, named("uh", op.matmul(state, weights[1])))))
    )
    held = named("held", op.multiply(gate, state))
    inner = named("inner", op.matmul(held, weights[3]))
    fresh = named("fresh", op.tanh(inner))
    keep = named("keep", op.multiply(named("rest", op.subtract(const(1.0), gate)), state))
    return named("state", op.add(keep, named("new", op.multiply(gate, fresh))))


def gru(net: Net, x: relax.Var, steps: int = 3) -> relax.Var:
    """[1, steps * 8] => [1, 4]"""
    weights = [net.array(8, 6), net.array(6, 6), net.array(6), net.array(6, 6)]
    state = net.linear("first", net("part", op.strided_slice(x, (1,), (0,), (8,))), 6)
    for step in range(steps):
        part = net(f"x{step}", op.strided_slice(x, (1,), (8 * step,), (8 * step + 8,)))
        state = gru_cell(net, part, state, weights, step)
    return net.linear("head", state, 4)


def test_gates_and_states_of_a_recurrent_cell_are_sums_of_products() -> None:
    module = quantize(build(gru, (1, 24)))
    assert read_left_float(module) == []
    quantized = quantized_values(module)
    # Neither product of a sum has a quantiser of its own.
    assert not {"own0", "uh0", "keep0", "new0", "wx0"} & set(quantized)
    assert {"sum0", "gate0", "state0", "rest0", "fresh0", "inner0", "held0"} <= set(quantized)
    graph = describe(module)
    assert graph["sum1"] == "add(own1, uh1)"
    assert graph["state1"] == "add(keep1, new1)"


def test_steps_of_a_loop_share_their_parameters() -> None:
    ranges = {"sum0": (-1.0, 1.0), "sum1": (-3.0, 2.0), "state1": (-1.0, 0.5), "state2": (0.0, 2.0)}
    module = quantize(build(gru, (1, 24)), ranges=ranges)
    for name in ("sum", "gate", "state", "rest", "fresh", "inner", "held"):
        found = {parameters_of(module, f"{name}{step}") for step in range(3)}
        assert len(found) == 1, name
    scale, zero_point, _ = parameters_of(module, "sum0")
    # The range of sum2 is [-4, 4], the widest of the steps.
    assert scale * 255 == pytest.approx(8.0, rel=1e-3)
    assert zero_point in (-1, 0)


def test_layers_with_one_weight_outside_a_loop_keep_their_own_parameters() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        weight = net.array(8, 8)
        left = net("left", op.matmul(net("a", op.strided_slice(x, (1,), (0,), (8,))), weight))
        right = net("right", op.matmul(net("b", op.strided_slice(x, (1,), (8,), (16,))), weight))
        gates = net("product", op.multiply(op.sigmoid(left), op.tanh(right)))
        return net.linear("head", gates, 4)

    module = quantize(build(body, (1, 16)), ranges={"left": (-1.0, 1.0), "right": (-2.0, 2.0)})
    assert parameters_of(module, "left") != parameters_of(module, "right")
