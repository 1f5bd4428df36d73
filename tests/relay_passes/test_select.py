"""Layers of a module and the selectors that name them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.errors import RecipeError
from tvm_compress.relay_passes.quantize_config import QuantizeConfig
from tvm_compress.relay_passes.select import Layer, list_layers, resolve

from .floats import Net, build, quantize


def several(net: Net, x: relax.Var) -> relax.Var:
    y = net.conv_relu("stem", x, 8, strides=2)
    y = net.conv_relu("block1_dw", y, 8, groups=8)
    y = net.conv_relu("block1_pw", y, 12, kernel=1)
    y = net.conv_relu("block2_grouped", y, 12, groups=3)
    up = net("up", op.nn.conv2d_transpose(y, net.array(12, 6, 2, 2), strides=2))
    pooled = net("pool", op.mean(up, [2, 3]))
    return net("logits", op.add(net.linear("fc", pooled, 5), net.array(5)))


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return list_layers(build(several))


def test_layers_come_in_order_with_kinds_and_sizes(layers: list[Layer]) -> None:
    rows = [(item.name, item.kinds, item.macs, item.params) for item in layers]
    assert rows == [
        ("stem", ("conv2d",), 16 * 8 * 4 * 9, 8 * 4 * 9 + 8),
        ("block1_dw", ("conv2d", "depthwise"), 16 * 8 * 9, 8 * 9 + 8),
        ("block1_pw", ("conv2d", "pointwise"), 16 * 12 * 8, 12 * 8 + 12),
        ("block2_grouped", ("conv2d", "grouped"), 16 * 12 * 4 * 9, 12 * 4 * 9 + 12),
        ("up", ("conv2d_transpose",), 16 * 12 * 6 * 4, 12 * 6 * 4),
        ("fc", ("matmul", "linear"), 6 * 5, 6 * 5 + 5),
    ]


def test_sizes_do_not_depend_on_layout() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        layout = {"data_layout": "NHWC", "kernel_layout": "HWIO"}
        return net("a", op.nn.conv2d(x, net.array(3, 3, 4, 6), padding=1, **layout))

    (layer,) = list_layers(build(body, (1, 8, 8, 4)))
    assert layer.macs == 64 * 6 * 4 * 9


def test_product_of_two_activations_has_no_weight() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        return net("a", op.matmul(x, net("turned", op.permute_dims(x, [0, 2, 1]))))

    (layer,) = list_layers(build(body, (2, 5, 3)))
    assert (layer.kinds, layer.weight_shape, layer.params) == (("matmul",), None, 0)
    assert layer.macs == 2 * 5 * 5 * 3


@pytest.mark.parametrize("activations", ["int8", None])
def test_quantised_layers_are_still_listed(activations: str | None) -> None:
    config = QuantizeConfig(activations=activations)  # type: ignore[arg-type]
    before = list_layers(build(several))
    after = list_layers(quantize(build(several), config))
    assert [item.name for item in after] == [item.name for item in before]
    assert all(item.is_quantized for item in after)
    assert [item.weight_shape for item in after] == [item.weight_shape for item in before]


def test_most_specific_selector_wins(layers: list[Layer]) -> None:
    chosen = resolve(
        layers,
        [
            (["stem"], "name"),
            (["block1_*"], "glob"),
            (["re:block.*"], "pattern"),
            (["depthwise"], "kind"),
            (["conv2d"], "operator"),
            (["all"], "all"),
        ],
    )
    assert chosen == {
        "stem": "name",
        "block1_dw": "glob",
        "block1_pw": "glob",
        "block2_grouped": "pattern",
        "up": "all",
        "fc": "all",
    }


def test_kinds_beat_operators_and_the_last_of_equals_wins(layers: list[Layer]) -> None:
    rules = [(["depthwise"], 1), (["conv2d"], 2), (["stem"], 3), (["stem"], 4)]
    assert resolve(layers, rules) == {
        "stem": 4,
        "block1_dw": 1,
        "block1_pw": 2,
        "block2_grouped": 2,
    }


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [("stam", "stem"), ("re:blok1_pw", "block1_pw"), ("linaer", "linear"), ("f?", "fc")],
)
def test_selector_that_matches_nothing_names_the_nearest(
    layers: list[Layer], selector: str, nearest: str
) -> None:
    if selector == "f?":  # a glob that matches is no error
        assert resolve(layers, [([selector], 1)]) == {"fc": 1}
        return
    with pytest.raises(RecipeError, match=f"matches no layer; the nearest is '{nearest}'"):
        resolve(layers, [([selector], 1)])


def test_bad_regular_expression_is_an_error(layers: list[Layer]) -> None:
    with pytest.raises(RecipeError, match=r"layer selector 're:\('"):
        resolve(layers, [(["re:("], 1)])


def test_layers_in_branches_are_marked() -> None:
    net = Net(relax.BlockBuilder(), 0)
    x = relax.Var("x", relax.TensorType([1, 4, 8, 8], "float32"))
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    inner = relax.Var("inside", x.ty)
    weight = net.array(4, 4, 1, 1)
    binding = relax.VarBinding(inner, op.nn.conv2d(x, weight))
    branch = relax.SeqExpr([relax.BindingBlock([binding])], inner)
    chosen = relax.Var("chosen", x.ty)
    block = relax.BindingBlock([relax.VarBinding(chosen, relax.If(flag, branch, x))])
    main = relax.Function([x, flag], relax.SeqExpr([block], chosen), x.ty)
    module = relax.transform.Normalize()(tvm.IRModule({"main": main}))
    (layer,) = list_layers(module)
    assert layer.name == "inside"
    assert layer.is_in_branch
    assert layer.macs == 64 * 16
    assert np.prod(layer.weight_shape or ()) == 16
