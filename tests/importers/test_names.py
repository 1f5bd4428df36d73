"""Layer names: short, readable, unique."""

from __future__ import annotations

import pytest

from tvm_compress.importers.names import UniqueNames, layer_name, sanitise, value_name


@pytest.mark.parametrize(
    ("node", "operator", "weight", "expected"),
    [
        ("/layer1/layer1.0/conv1/Conv", "Conv", "onnx::Conv_12", "layer1_0_conv1"),
        ("/stem/stem.0/Conv", "Conv", "", "stem_0"),
        ("/_blocks.0/_depthwise_conv/Conv", "Conv", "", "blocks_0_depthwise_conv"),
        ("/Conv_1", "Conv", "", "conv_1"),
        ("/stage4/depthwise/Conv", "Conv", "", "stage4_depthwise"),
        ("model/depthwise_conv2d_1/depthwise", "Conv", "", "model_depthwise_conv2d_1"),
        ("Conv_0", "Conv", "backbone.model0.conv1.weight", "backbone_model0_conv1"),
        ("MobilenetV1/MobilenetV1/Conv2d_0/Relu6", "Conv", "", "MobilenetV1_Conv2d_0"),
        ("fc1/MatMul_Gemm__7", "Gemm", "", "fc1"),
        (
            "MobileNet/conv_ds_1/pointwise_conv/BiasAdd",
            "Conv",
            "",
            "MobileNet_conv_ds_1_pointwise_conv",
        ),
        ("Conv__61", "Conv", "", "conv_61"),
        ("", "Conv", "", "conv"),
        ("123/456", "Conv", "", "n123_456"),
        ("日本", "Conv", "", "conv"),
    ],
)
def test_layer_name(node: str, operator: str, weight: str, expected: str) -> None:
    assert layer_name(node, operator, weight) == expected


@pytest.mark.parametrize(
    ("node", "node_operator", "operator", "expected"),
    [
        ("/layer1/layer1.0/Add", "Add", "add", "layer1_0_add"),
        ("/layer1/layer1.0/relu/Relu", "Relu", "relu", "layer1_0_relu"),
        ("/layer1/layer1.0/relu/Relu_1", "Relu", "relu", "layer1_0_relu_1"),
        ("/layer2/Slice_1", "Slice", "strided_slice", "layer2_strided_slice_1"),
        ("", "Softmax", "softmax", "softmax"),
    ],
)
def test_value_name(node: str, node_operator: str, operator: str, expected: str) -> None:
    assert value_name(node, node_operator, operator) == expected


def test_long_names_keep_their_end() -> None:
    name = layer_name("/".join(f"block{i}" for i in range(40)) + "/last", "Conv")
    assert len(name) <= 64
    assert name.endswith("block39_last")
    assert name[0].isalpha()


def test_unique_names_count_up() -> None:
    unique = UniqueNames()
    assert [unique(n) for n in ("conv", "conv", "conv_2", "conv")] == [
        "conv",
        "conv_2",
        "conv_2_2",
        "conv_3",
    ]


def test_sanitise() -> None:
    assert sanitise("Mfcc:0") == "Mfcc_0"
    assert sanitise("a..b//c") == "a_b_c"
    assert sanitise("0x") == "n0x"
    assert sanitise("::") == ""
