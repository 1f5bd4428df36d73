"""w => dequantize(w8, scale) or decode(codes, scales); b => dequantize(b32, input scale * scale)"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .encodings import GroupWise
from .ir import op_name
from .numerics.affine import QuantizationParameters, choose_parameters, quantize_affine
from .numerics.granularity import PerGroup, PerTensor
from .numerics.group_wise import quantize_group_wise
from .quantize_config import QuantizeConfig

# Leaves one bit of an int32 accumulator for the products that are added to the bias.
LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class IntegerLayer:
    """`weight` with its parameters; `bias` int32 [output channels] at `bias_scale` (float32)."""

    weight: NDArray[np.int8]
    parameters: QuantizationParameters
    bias: NDArray[np.int32] | None
    bias_scale: NDArray[np.float32] | None


def quantize_layer(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    input_scale: float,
    call: relax.Call,
    config: QuantizeConfig,
) -> IntegerLayer:
    """Symmetric narrow weights ([-127, 127] for int8); bias int32 at input scale * weight scale.

    `bias` has one number for each output channel. A channel whose weights are so small that its
    bias would leave int32 gets a larger weight scale (Jacob et al. 2018, section 2.4, on biases).
    """
    axis = output_channel_axis(call, weight.ndim)
    parameters = choose_weight_parameters(weight, axis, config)
    if bias is None:
        return IntegerLayer(quantize_affine(weight, parameters), parameters, None, None)
    repeats = repeats_of_output_channels(call)
    largest = np.abs(bias.astype(np.float64))
    if parameters.axis is None:
        largest = largest.max(initial=0.0)
    else:
        largest = largest.reshape(repeats, -1).max(axis=0)  # [groups * O] -> [O]
    smallest_scale = largest / (LARGEST_BIAS * np.float64(input_scale))
    scale = np.maximum(parameters.scale, smallest_scale)
    if config.scales == "power_of_two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    parameters = replace(parameters, scale=scale.astype(np.float32))
    bias_scale = np.float32(input_scale) * parameters.scale
    if parameters.axis is not None:
        bias_scale = np.tile(bias_scale, repeats)  # [O] -> [groups * O]
    integers = np.rint(bias.astype(np.float64) / bias_scale).astype(np.int32)
    return IntegerLayer(quantize_affine(weight, parameters), parameters, integers, bias_scale)


def choose_weight_parameters(
    weight: NDArray[np.float32], axis: int, config: QuantizeConfig
) -> QuantizationParameters:
    """One scale for the tensor or for each slice along `axis`, covering every weight."""
    per_tensor = isinstance(config.granularity, PerTensor)
    others = tuple(index for index in range(weight.ndim) if per_tensor or index != axis)
    return choose_parameters(
        weight.min(axis=others),
        weight.max(axis=others),
        config.weights or "int8",
        symmetric=True,
        narrow=True,
        power_of_two=config.scales == "power_of_two",
        axis=None if per_tensor else axis,
    )


def output_channel_axis(call: relax.Call, rank: int) -> int:
    """Index of the output-channel axis in an anchor's weight of `rank` axes."""
    if op_name(call) == "relax.matmul":
        return rank - 1
    return str(call.attrs.kernel_layout).index("O")


def repeats_of_output_channels(call: relax.Call) -> int:
    """How often the weight's output-channel axis repeats in the result.

    A grouped transposed convolution stores output channels for one group: [I, O/groups, ..].
    """
    name = op_name(call) or ""
    return int(call.attrs.groups) if name.endswith("_transpose") else 1


def needs_encoding(config: QuantizeConfig) -> bool:
    """Whether the weight-only form is more than int8 with a scale for each output channel."""
    return config.weights == "int4" or isinstance(config.granularity, PerGroup)


def encode_weight(
    weight: NDArray[np.float32], call: relax.Call, config: QuantizeConfig
) -> GroupWise | None:
    """The weight in groups along the layer's sum; `None` for weights with a batch axis."""
    layout = weight_layout(call)
    if weight.ndim != len(layout):
        return None
    matrix = GroupWise.flatten(weight, layout)  # [K, N]
    reduction = matrix.shape[0]
    size = config.granularity.size if isinstance(config.granularity, PerGroup) else reduction
    size = min(size, reduction)
    assert config.weights is not None
    is_power = config.scales == "power_of_two"
    if isinstance(config.granularity, PerTensor):
        flat = matrix.reshape(-1, 1)
        codes, scale = quantize_group_wise(flat, flat.shape[0], config.weights, is_power)
        codes, scales = codes.reshape(matrix.shape), np.tile(scale, (1, matrix.shape[1]))
    else:
        codes, scales = quantize_group_wise(matrix, size, config.weights, is_power)
    return GroupWise.from_codes(codes, scales, layout, weight.shape, config.weights, size)


def weight_layout(call: relax.Call) -> str:
    """The axes of an anchor's weight: I is summed over, O are the outputs."""
    return "IO" if op_name(call) == "relax.matmul" else str(call.attrs.kernel_layout)
