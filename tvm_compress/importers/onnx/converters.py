"""The ONNX operators that we convert ourselves, ahead of TVM's converters. One table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import integer, recurrent, standard

# (block builder, inputs, attributes, opset) -> expression, or one per output
Converter = Callable[[Any, list[Any], dict[str, Any], int], Any]

CONVERTERS: dict[str, Converter] = {
    # TVM turns these into raw TIR functions, which no pass can read, or into unchecked reads
    "Clip": standard.clip,
    "Gather": standard.gather,
    "Pad": standard.pad,
    "Tile": standard.tile,
    # quantised operators, kept in integers
    "QLinearConv": integer.qlinear_conv,
    "QLinearMatMul": integer.qlinear_matmul,
    "QGemm": integer.qgemm,
    "QLinearAdd": integer.qlinear_add,
    "QLinearMul": integer.qlinear_mul,
    "QLinearConcat": integer.qlinear_concat,
    "QLinearGlobalAveragePool": integer.qlinear_global_average_pool,
    "QLinearAveragePool": integer.qlinear_average_pool,
    "QLinearSigmoid": integer.qlinear_sigmoid,
    "QLinearLeakyRelu": integer.qlinear_leaky_relu,
    "QLinearSoftmax": integer.qlinear_softmax,
    "ConvInteger": integer.conv_integer,
    "MatMulInteger": integer.matmul_integer,
    "DequantizeLinear": integer.dequantize_linear,
    "QuantizeLinear": integer.quantize_linear,
    # recurrent layers, unrolled
    "LSTM": recurrent.lstm,
    "GRU": recurrent.gru,
    "RNN": recurrent.rnn,
}
