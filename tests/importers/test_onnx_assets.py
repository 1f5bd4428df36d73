"""Every real ONNX model imports to graph form and computes what ONNX Runtime computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tvm_compress.importers import load_model
from tvm_compress.model import Model

# Convolutions and products of matrices. A recurrent network's first step has none with its state:
# that state is zero, and the product folds.
MODELS = {
    "arm_kws_CRNN_S": 159,
    "arm_kws_DNN_S": 4,
    "arm_kws_DS_CNN_S": 10,
    "arm_kws_GRU_S": 99,
    "cifar10_bnn_cnv_w1a1": 9,
    "cifar10_resnet20": 20,
    "cifar10_resnet56": 56,
    "imagenet_efficientnet_lite0": 50,
    "imagenet_mobilenetv1_025_224": 28,
    "imagenet_squeezenet1_1": 26,
    "mlperf_ad_autoencoder": 10,
    "mlperf_ic_resnet8": 10,
    "mlperf_kws_dscnn": 10,
    "mlperf_vww_mobilenetv1_025": 28,
    "silero_vad_16k_op15": 8,
    "yunet_n_320": 59,
}
SHAPES = {"silero_vad_16k_op15": {"input": (1, 512)}}


@pytest.mark.parametrize("name", MODELS)
def test_model(
    name: str,
    asset: Callable[[str], Path],
    agrees: Callable[..., Model],
    count: Callable[[Model], Counter[str]],
) -> None:
    path = asset(f"onnx/{name}.onnx")
    model = agrees(path, shapes=SHAPES.get(name))

    operators = count(model)
    anchors = sum(n for op, n in operators.items() if "conv" in op or op == "relax.matmul")
    assert anchors == MODELS[name]
    assert not [op for op in operators if op.startswith("relax.call_tir")]
    assert "relax.nn.batch_norm" not in operators
    names = [b.var.name for block in model.module["main"].body.blocks for b in block.bindings]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[A-Za-z]\w*", name) for name in names)
    assert not [name for name in names if re.fullmatch(r"(lv|gv)\d*", name)]


def test_layer_names(asset: Callable[[str], Path], count: Callable[..., Counter[str]]) -> None:
    model = load_model(asset("onnx/cifar10_resnet20.onnx"))
    names = [b.var.name for block in model.module["main"].body.blocks for b in block.bindings]
    assert names[:5] == ["conv1", "conv1_bias", "relu", "layer1_0_conv1", "layer1_0_conv1_bias"]
    again = load_model(asset("onnx/cifar10_resnet20.onnx"))
    assert names == [b.var.name for bl in again.module["main"].body.blocks for b in bl.bindings]
    assert model.name == "cifar10_resnet20"
    assert model.inputs[0].name == "input"
    assert model.inputs[0].shape == (1, 3, 32, 32)
    assert model.outputs[0].name == "logits"


def test_same_padding_becomes_convolution_padding(
    asset: Callable[[str], Path], count: Callable[[Model], Counter[str]]
) -> None:
    """17 explicit pads of TensorFlow's kind."""
    assert "relax.nn.pad" not in count(load_model(asset("onnx/imagenet_efficientnet_lite0.onnx")))


def test_input_value_folds_away(asset: Callable[[str], Path], agrees: Callable[..., Model]) -> None:
    model = agrees(
        asset("onnx/silero_vad_16k_op15.onnx"),
        shapes={"input": (1, 512)},
        input_values={"sr": 16000},
    )
    assert [spec.name for spec in model.inputs] == ["input", "state"]
