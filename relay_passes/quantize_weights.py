"""w => dequantize(w8, scale) or decode(codes, scales); b => dequantize(b32, input scale * scale)"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from ..schedules.weights import pack_int4
from .encodings import FourBit, GroupWise, flatten
from .ir import op_name
from .numerics.affine import QuantizationParameters, choose_parameters, quantize_affine
from .numerics.codebook import quantize_codebook
from .numerics.granularity import PerChannel, PerGroup, PerTensor
from .numerics.group_wise import quantize_group_wise, quantize_group_wise_asymmetric
from .numerics.two_level import quantize_two_level
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


@dataclass(frozen=True)
class EncodedLayer:
    """`weight` in an encoding; `bias` int32 [output channels] at `bias_scale` (float32)."""

    weight: FourBit
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
    smallest = smallest_scale(bias, input_scale, repeats)
    scale = np.maximum(
        parameters.scale, smallest.max(initial=0.0) if parameters.axis is None else smallest
    )
    if config.scales == "power_of_two":
        scale = 2.0 ** np.ceil(np.log2(scale))
    parameters = replace(parameters, scale=scale.astype(np.float32))
    integers, bias_scale = _quantize_bias(bias, input_scale, parameters.scale, repeats)
    return IntegerLayer(quantize_affine(weight, parameters), parameters, integers, bias_scale)


def encode_layer(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    input_scale: float,
    call: relax.Call,
    config: QuantizeConfig,
) -> EncodedLayer | None:
    """The layer with 4-bit codes that have tables or groups; `None` where the config asks for
    neither, or the weight has no such form (`choose_weight_parameters` then takes int8)."""
    layout = weight_layout(call)
    if not _wants_encoding(config) or not _has_four_bit_form(weight.shape, call):
        return None
    size = integer_group_size(weight.shape, call, config)
    matrix = flatten(weight, layout)  # [K, N]
    repeats = repeats_of_output_channels(call)
    smallest = np.zeros(matrix.shape[1])
    if bias is not None:
        smallest = smallest_scale(bias, input_scale, repeats)
    if config.has_tables:
        channels = config.table_channels or matrix.shape[1]
        is_normal = config.weights == "normal4"
        book = quantize_codebook(matrix, channels, size, is_normal, smallest)
        encoding = FourBit(
            layout, weight.shape, pack_int4(book.codes), book.scales,
            book.multiples, book.tables, size, book.table_channels,
        )  # fmt: skip
    else:
        codes, multiples, scales = quantize_two_level(matrix, size or len(matrix), "int4", smallest)
        # One group: its multiple belongs to the scale.
        scales, kept = (scales, multiples) if size else (scales * multiples[0], None)
        encoding = FourBit(layout, weight.shape, pack_int4(codes), scales, kept, group_size=size)
    if bias is None:
        return EncodedLayer(encoding, None, None)
    return EncodedLayer(encoding, *_quantize_bias(bias, input_scale, encoding.scales, repeats))


def _wants_encoding(config: QuantizeConfig) -> bool:
    """Whether integer sums are asked for whose weights have tables or groups."""
    return config.has_tables or (
        config.activations is not None and isinstance(config.granularity, PerGroup)
    )


def _has_four_bit_form(shape: tuple[int, ...], call: relax.Call) -> bool:
    """Whether kernels read two of the weight's codes in a byte: those of dense layers whose kernel
    rows are whole bytes of four inputs each. Others would be stored as bytes: int8 is no larger."""
    layout = weight_layout(call)
    if len(shape) != len(layout):
        return False
    if op_name(call) == "relax.matmul":
        return True
    is_transposed = (op_name(call) or "").endswith("_transpose")
    if int(call.attrs.groups) > 1 or is_transposed:
        return False
    rows, row = _kernel_rows(shape, layout)
    return rows == 1 or -(-row // 4) % 2 == 0


def _kernel_rows(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """How many kernel rows there are, and the inputs of one."""
    reduction = int(np.prod(shape)) // shape[layout.index("O")]
    rows = shape[layout.index("H")] if "H" in layout else 1
    return rows, reduction // rows


def integer_group_size(shape: tuple[int, ...], call: relax.Call, config: QuantizeConfig) -> int:
    """Weights in a row that share a multiple of their channel's scale; 0: all of the channel.

    Groups do not cross kernel rows, whose inputs lie apart: the size is the largest multiple of 8
    up to the one asked for that divides a row.
    """
    if not isinstance(config.granularity, PerGroup):
        return 0
    rows, row = _kernel_rows(shape, weight_layout(call))
    asked = config.granularity.size
    if asked >= rows * row:
        return 0
    if rows == 1:
        return asked
    return next((size for size in range(asked, 0, -8) if row % size == 0), 0)


def smallest_scale(
    bias: NDArray[np.float32], input_scale: float, repeats: int
) -> NDArray[np.float64]:
    """Weight scales [O] below which a bias would leave int32."""
    largest = np.abs(bias.astype(np.float64)).reshape(repeats, -1).max(axis=0)
    return np.asarray(largest / (LARGEST_BIAS * np.float64(input_scale)))


def _quantize_bias(
    bias: NDArray[np.float32], input_scale: float, scale: NDArray[np.float32], repeats: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """int32 [groups * O] and its scale, from the weights' scale [] or [O]."""
    bias_scale = np.float32(input_scale) * scale
    if bias_scale.ndim:
        bias_scale = np.tile(bias_scale, repeats)  # [O] -> [groups * O]
    return np.rint(bias.astype(np.float64) / bias_scale).astype(np.int32), bias_scale


def choose_weight_parameters(
    weight: NDArray[np.float32], axis: int, config: QuantizeConfig
) -> QuantizationParameters:
    """One scale for the tensor or for each slice along `axis`, covering every weight."""
    per_tensor = isinstance(config.granularity, PerTensor)
    others = tuple(index for index in range(weight.ndim) if per_tensor or index != axis)
    return choose_parameters(
        weight.min(axis=others),
        weight.max(axis=others),
        "int8" if _wants_encoding(config) else config.weights or "int8",
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
    is_grouped = isinstance(config.granularity, PerGroup)
    return config.weights == "int4" or is_grouped or config.zero_points


def weight_only_config(
    shape: tuple[int, ...], call: relax.Call, config: QuantizeConfig
) -> QuantizeConfig:
    """int8 by channel for layers whose sum is shorter than a group of 4-bit weights (a stem, say):
    they have few weights, each of which matters."""
    layout = weight_layout(call)
    is_grouped = config.weights == "int4" and isinstance(config.granularity, PerGroup)
    if not is_grouped or len(shape) != len(layout):
        return config
    assert isinstance(config.granularity, PerGroup)
    if int(np.prod(shape)) // shape[layout.index("O")] >= config.granularity.size:
        return config
    return replace(config, weights="int8", granularity=PerChannel(), zero_points=False)


def encode_weight(
    weight: NDArray[np.float32], call: relax.Call, config: QuantizeConfig
) -> GroupWise | None:
    """The weight in groups along the layer's sum; `None` for weights with a batch axis."""
    layout = weight_layout(call)
    if weight.ndim != len(layout):
        return None
    matrix = flatten(weight, layout)  # [K, N]
    reduction = matrix.shape[0]
    size = config.granularity.size if isinstance(config.granularity, PerGroup) else reduction
    size = min(size, reduction)
    assert config.weights is not None
    if config.zero_points:
        codes, scales, zero_points = quantize_group_wise_asymmetric(matrix, size, config.weights)
        return GroupWise.from_codes(
            codes, scales, layout, weight.shape, config.weights, size, zero_points
        )
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
