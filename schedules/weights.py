"""Reading one weight value inside a naive kernel, and the same in NumPy: every layout and code
width."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .layout import PackedLayout, Reduction
from .spec import KERNEL_ATTR, Conv2dSpec, KernelSpec, MatmulSpec, WeightedSpec

if TYPE_CHECKING:
    from tvm import te, tirx


def weight_placeholders(spec: WeightedSpec) -> list[te.Tensor]:
    """The weight argument, its tables and, group-wise, the scales [K/g, N] and zero points."""
    from tvm import te

    tensors = [te.placeholder(spec.weight_shape, spec.weight_storage_dtype, name="weight")]
    if spec.table_channels:
        tensors.append(te.placeholder(spec.tables_shape, "int8", name="tables"))
    if spec.group_size:
        tensors.append(te.placeholder(spec.scales_shape, spec.scales_dtype, name="scales"))
    if spec.group_zero_points:
        tensors.append(te.placeholder(spec.scales_shape, "int8", name="zero_points"))
    return tensors


def weight_value(
    spec: WeightedSpec,
    tensors: list[te.Tensor],
    tap: tuple[tirx.PrimExpr, ...],
    channel: tirx.PrimExpr,
    column: tirx.PrimExpr,
) -> tirx.PrimExpr:
    """Decoded weight in the accumulator's dtype; `tap` is () or (ky, kx), `column` counts all
    groups."""
    from tvm import tirx

    nibble = _index if spec.table_channels else _nibble
    weight = tensors[0]
    _, columns, channels = spec.reduction
    ky, kx = tap or (0, 0)
    position = (ky * columns + kx) * channels + channel
    packed = spec.packed_layout
    if packed is not None:
        row_pitch, column_pitch = packed.pitches(spec.reduction)
        step_position = ky * row_pitch + kx * column_pitch + channel
        step, lane = step_position // packed.group, step_position % packed.group
        group, local = column // spec.columns, column % spec.columns
        outer, inner = local // packed.width, local % packed.width
        if packed.turned:
            inner, lane = lane, inner
        if spec.weight_dtype == "int4":
            code = nibble(weight[group, outer, step // 2, inner, lane], step % 2)
        else:
            code = weight[group, outer, step, inner, lane]
            if packed.joined:
                first = weight[group, outer, step, inner, lane // 2 * 2]
                carried = tirx.all(lane % 2 == 1, first < tirx.const(0, "int8"))
                code = code + carried.astype("int8")
    elif spec.weight_dtype == "int4":
        code = nibble(weight[position // 2, column], position % 2)
    else:
        code = weight[(*tap, channel, column)]
    if spec.table_channels:
        code = tensors[1][column // spec.table_channels, code]
    value = code.astype(spec.acc_dtype)
    if spec.weight_zero_point:
        value = value - tirx.const(spec.weight_zero_point, spec.acc_dtype)
    if spec.group_size:
        group_of_k = position // spec.group_size
        if spec.group_zero_points:
            value = value - tensors[2][group_of_k, column].astype("float32")
        scales = tensors[2] if spec.table_channels else tensors[1]
        if packed is not None and spec.is_integer:
            scale = scales[column // packed.width, group_of_k, column % packed.width]
        else:
            scale = scales[group_of_k, column]
        value = value * scale.astype(spec.acc_dtype)
    return value


def _index(byte: tirx.PrimExpr, which: tirx.PrimExpr) -> tirx.PrimExpr:
    """Low (0) or high (1) nibble of a uint8, unsigned."""
    from tvm import tirx

    wide = byte.astype("int32")
    return tirx.bitwise_and(tirx.shift_right(wide, which * 4), tirx.const(15, "int32"))


def _nibble(byte: tirx.PrimExpr, which: tirx.PrimExpr) -> tirx.PrimExpr:
    """Low (0) or high (1) nibble of a uint8, sign-extended: shift it to the top of a byte and
    back."""
    from tvm import tirx

    signed = byte.astype("int8")
    low = tirx.shift_right(tirx.shift_left(signed, tirx.const(4, "int8")), tirx.const(4, "int8"))
    high = tirx.shift_right(signed, tirx.const(4, "int8"))
    return tirx.Select(which == 0, low, high)


def kernel_attrs(spec: KernelSpec) -> dict[str, str]:
    """Annotation of the compute block by which the kernel is found after fusion."""
    return {KERNEL_ATTR: spec.to_json()}


def unpack_int4(codes: np.ndarray, count: int) -> np.ndarray:
    """uint8 [ceil(K/2), N] => int8 [K, N], row 2j from the low nibble."""
    both = np.stack([codes & 0xF, codes >> 4], axis=1).reshape(-1, codes.shape[1])[:count]
    return ((both.astype(np.int8) ^ 8) - 8).astype(np.int8)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 [K, N] in -8..7 => uint8 [ceil(K/2), N], inverse of `unpack_int4`."""
    nibbles = codes.astype(np.uint8) & 0xF
    if nibbles.shape[0] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[:1])])
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def in_nibbles(spec: WeightedSpec, codes: np.ndarray) -> tuple[WeightedSpec, np.ndarray] | None:
    """A layer's int8 codes [1, K, N] two in a byte, in the plain layout, where all of them fit four
    bits: flash is what a board has least of. None: they do not."""
    fits = spec.weight_dtype == "int8" and codes.min() >= -8 and codes.max() <= 7
    if not fits or spec.weight_zero_point or spec.groups_of_channels > 1 or not spec.is_integer:
        return None
    return spec.replace(weight_dtype="int4"), pack_int4(codes[0])


def weight_codes(spec: WeightedSpec, weight: np.ndarray) -> np.ndarray:
    """Stored array in the plain layout => codes [groups, K, N], storage integers (int4 opened)."""
    if spec.weight_dtype == "int4":
        flat = unpack_int4(weight, spec.reduction_size)
    else:
        flat = weight.reshape(spec.reduction_size, -1)
    return flat.reshape(spec.reduction_size, spec.groups_of_channels, spec.columns).transpose(
        1, 0, 2
    )


def unpack_weight(spec: WeightedSpec, weight: np.ndarray) -> np.ndarray:
    """Stored array in any layout => codes [groups, K, N]."""
    packed = spec.packed_layout
    if packed is None:
        return weight_codes(spec, weight)
    if spec.weight_dtype == "int4":
        both = np.stack([weight & 0xF, weight >> 4], axis=3)  # [G, O, S/2, 2, w, g]
        both = both.reshape(*weight.shape[:2], -1, *weight.shape[3:])
        weight = ((both.astype(np.int8) ^ 8) - 8).astype(np.int8)[
            :, :, : packed.steps(spec.reduction)
        ]
    if packed.joined:
        weight = weight.copy()
        weight[..., 1::2] += weight[..., 0::2] < 0
    if packed.turned:
        weight = weight.swapaxes(3, 4)
    # [G, O, S, w, g] -> [G, S, g, O, w] -> [G, S*g, O*w]
    g, o, s, w, k = weight.shape
    flat = weight.transpose(0, 2, 4, 1, 3).reshape(g, s * k, o * w)
    return flat[:, packed_positions(spec.reduction, packed), : spec.columns]


def packed_positions(reduction: Reduction, packed: PackedLayout) -> np.ndarray:
    """Where on the packed reduction axis each of the K plain positions lies."""
    row_pitch, column_pitch = packed.pitches(reduction)
    ky, kx, c = np.indices(reduction)
    return (ky * row_pitch + kx * column_pitch + c).ravel()


def decode_weight(spec: WeightedSpec, weight: np.ndarray, *factors: np.ndarray) -> np.ndarray:
    """Stored weight of any layout => float64 values [groups, K, N].

    `factors` are the tables, the scales and the zero points, those that the spec names."""
    values = unpack_weight(spec, weight).astype(np.float64) - spec.weight_zero_point
    if spec.table_channels:
        values = look_up(spec, unpack_weight(spec, weight), factors[0]).astype(np.float64)
        factors = factors[1:]
    if spec.group_size:
        scales, zero_points = factors[0], factors[1] if spec.group_zero_points else None
        if scales.ndim == 3:  # [O, G, w] -> [G, N]
            flat = scales.transpose(1, 0, 2).reshape(scales.shape[1], -1)
            scales = flat[:, : spec.columns]
        index = np.arange(spec.reduction_size) // spec.group_size
        shape = (spec.reduction_size, spec.groups_of_channels, spec.columns)
        if zero_points is not None:
            values -= zero_points[index].reshape(shape).transpose(1, 0, 2)
        values *= scales[index].astype(np.float64).reshape(shape).transpose(1, 0, 2)
    return values


def look_up(spec: WeightedSpec, codes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """4-bit codes [groups, K, N] => the int8 values that their tables hold for them."""
    channels = np.arange(spec.columns * spec.groups_of_channels) // spec.table_channels
    owners = channels.reshape(spec.groups_of_channels, 1, spec.columns)
    return np.asarray(tables[owners, codes.astype(np.uint8) & 0xF])


def without_zero_point(spec: WeightedSpec, codes: np.ndarray) -> tuple[WeightedSpec, np.ndarray]:
    """Codes minus their zero point as int8, where they fit; else unchanged."""
    if not spec.weight_zero_point and spec.weight_dtype != "uint8":
        return spec, codes
    centred = codes.astype(np.int32) - spec.weight_zero_point
    if centred.min() < -128 or centred.max() > 127:
        return spec, codes
    return spec.replace(weight_dtype="int8", weight_zero_point=0), centred.astype(np.int8)


def plain_depthwise(spec: Conv2dSpec, codes: np.ndarray) -> tuple[WeightedSpec, np.ndarray] | None:
    """A depthwise weight for kernels that read the plain layout, whose channels lie side by side;
    None: it is so already. `codes` [G, K, m]."""
    changed, codes = without_zero_point(spec, codes)
    if changed == spec:
        return None
    plain = codes.transpose(1, 0, 2).reshape(changed.weight_shape)
    return changed, np.ascontiguousarray(plain)


def padded_axis(spec: WeightedSpec) -> str:
    """What a packed layout pads: R, whole kernel rows, where their inputs lie in one piece in NHWC
    data, else I, the input channels of every tap."""
    is_dilated = isinstance(spec, Conv2dSpec) and spec.dilation[1] != 1 and spec.kernel[1] != 1
    is_flat = isinstance(spec, (Conv2dSpec, MatmulSpec))
    return "R" if spec.groups_of_channels == 1 and not is_dilated and is_flat else "I"


def pack_codes(
    spec: WeightedSpec, codes: np.ndarray, layout: str, padding: np.ndarray | None = None
) -> np.ndarray:
    """Codes [groups, K, N] => the array `spec.replace(weight_layout=layout)` reads.

    `padding` are the codes [N] between and behind the positions; by default what decodes to 0. A
    joined layout has no second output of -128 beside a first one below 0."""
    packed = spec.replace(weight_layout=layout).packed_layout
    assert packed is not None
    groups, _, columns = codes.shape
    steps = packed.steps(spec.reduction)
    blocks = -(-columns // packed.width)
    # Padding must decode to zero: the kernel multiplies it with whatever lies beside the data.
    full = np.full(
        (groups, steps * packed.group, blocks * packed.width), spec.weight_zero_point, codes.dtype
    )
    if padding is not None:
        full[:, :, :columns] = padding.astype(codes.dtype)
    full[:, packed_positions(spec.reduction, packed), :columns] = codes
    # [G, S*g, O*w] -> [G, S, g, O, w] -> [G, O, S, w, g]
    array = full.reshape(groups, steps, packed.group, blocks, packed.width).transpose(0, 3, 1, 4, 2)
    if packed.turned:
        array = array.swapaxes(3, 4)
    if packed.joined:
        array = array.copy()
        array[..., 1::2] -= array[..., 0::2] < 0
    if spec.weight_dtype == "int4":
        nibbles = array.astype(np.uint8) & 0xF
        if steps % 2:
            nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[:, :, :1])], axis=2)
        return np.ascontiguousarray(nibbles[:, :, 0::2] | (nibbles[:, :, 1::2] << 4))
    return np.ascontiguousarray(array)


def pack_whole(
    spec: WeightedSpec,
    weight: np.ndarray,
    layout_of: Callable[[WeightedSpec], PackedLayout | None],
) -> tuple[WeightedSpec, np.ndarray] | None:
    """The layer in the layout that its kernel reads, which `layout_of` knows for bytes; depthwise
    layers stay as they are, 4-bit codes lie two in a byte. None: keep spec and weight."""
    if spec.weight_layout != spec.plain_layout or spec.weight_dtype == "int4":
        return None
    codes = weight_codes(spec, weight)
    if isinstance(spec, Conv2dSpec) and spec.is_depthwise:
        return plain_depthwise(spec, codes)
    spec, codes = without_zero_point(spec, codes)
    halved = in_nibbles(spec, codes)
    if halved is not None:
        return halved
    layout = layout_of(spec)
    if layout is None:
        return None
    return spec.replace(weight_layout=layout.name), pack_codes(spec, codes, layout.name)
