"""2-D convolution by the weights that are not zero, NHWC:

acc[b, y, x, o] = sum over e in starts[o / n] .. starts[o / n + 1] of
                  padded[b, y*s, x*s, offsets[e] elements further] * values[e, o % n]

or, `by_channel`, padded[b, y*s + ky*d, x*s + kx*d, c] with c, ky and kx from offsets[e].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .conv2d import pad
from .conv2d import reference as dense_reference
from .spec import SparseConv2dSpec
from .weights import kernel_attrs

if TYPE_CHECKING:
    from tvm import te


# Data, weights and sums of the byte instructions of x86.
BYTES = ("uint8", "int8", "int32")


def describe(spec: SparseConv2dSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (data, values, offsets, starts) and the accumulators."""
    from tvm import te, tirx

    data = te.placeholder(spec.data_shape, spec.data_dtype, name="data")
    values = te.placeholder(spec.values_shape, spec.weight_dtype, name="values")
    offsets = te.placeholder((spec.entries,), spec.offsets_dtype, name="offsets")
    starts = te.placeholder((spec.blocks + 1,), "int32", name="starts")
    padded = data if spec.is_flat else pad(data, spec.padding, spec.pad_value)
    row, column = spec.pitches
    e = te.reduce_axis((0, spec.longest), name="e")

    def source(place: tuple[tirx.Var, ...], offset: tirx.PrimExpr) -> tirx.PrimExpr:
        if spec.is_flat:
            return padded[place[0], offset]
        b, y, x = place
        if spec.by_channel:
            tap = offset % 2**spec.tap_bits
            return padded[
                b,
                y * spec.strides[0] + tap // spec.kernel[1] * spec.dilation[0],
                x * spec.strides[1] + tap % spec.kernel[1] * spec.dilation[1],
                offset // 2**spec.tap_bits,
            ]
        return padded[
            b,
            y * spec.strides[0] + offset // row,
            x * spec.strides[1] + offset % row // column,
            offset % column,
        ]

    def term(*index: tirx.Var) -> tirx.PrimExpr:
        block, channel = index[-1] // spec.block, index[-1] % spec.block
        entry = starts[block] + e
        place: tuple[tirx.PrimExpr, ...] = (entry, channel)
        if spec.group > 1:
            place = (entry // spec.group, channel, entry % spec.group)
        data_value = source(index[:-1], offsets[entry].astype("int32"))
        product = data_value.astype(spec.acc_dtype) * values[place].astype(spec.acc_dtype)
        return tirx.if_then_else(entry < starts[block + 1], product, tirx.const(0, spec.acc_dtype))

    acc = te.compute(
        spec.output_shape,
        lambda *index: te.sum(term(*index), axis=e),
        name="sparse_conv2d",
        attrs=kernel_attrs(spec),
    )
    return [data, values, offsets, starts], acc


def encode(
    weight: np.ndarray, block: int, kept: np.ndarray | None = None, taps: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[K, N] => values [entries, block], positions in K [entries] int32, starts [blocks + 1] int32.

    An entry is an input that any channel of a block reads: of `kept` [K, N], or with a weight other
    than zero. The entries of a block follow K, or its channels first and then the `taps`.
    """
    if taps > 1:
        turned = None if kept is None else _channels_first(kept, taps)
        values, positions, starts = encode(_channels_first(weight, taps), block, turned)
        channel, tap = np.divmod(positions, taps)
        return values, tap * (weight.shape[0] // taps) + channel, starts
    reduction, outputs = weight.shape
    blocks = -(-outputs // block)
    padded = np.zeros((reduction, blocks * block), weight.dtype)
    padded[:, :outputs] = weight
    by_block = padded.reshape(reduction, blocks, block).transpose(1, 0, 2)  # [B, K, n]
    if kept is None:
        used = (by_block != 0).any(axis=2)
    else:
        full = np.zeros(padded.shape, bool)
        full[:, :outputs] = kept
        used = full.reshape(reduction, blocks, block).any(axis=2).T
    owners, positions = np.nonzero(used)
    counts = np.bincount(owners, minlength=blocks)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return np.ascontiguousarray(by_block[used]), positions.astype(np.int32), starts


def _channels_first(weight: np.ndarray, taps: int) -> np.ndarray:
    """[taps * C, N] => [C * taps, N]."""
    reduction, outputs = weight.shape
    return weight.reshape(taps, -1, outputs).transpose(1, 0, 2).reshape(reduction, outputs)


def group_entries(
    values: np.ndarray, positions: np.ndarray, starts: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of `encode` with entries in groups: values [entries / group, block, group].

    What a block lacks to a whole group are zeros at its last position.
    """
    counts = np.diff(starts)
    padded = -(-counts // group) * group
    ends = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    new_values = np.zeros((ends[-1], values.shape[1]), values.dtype)
    new_positions = np.zeros(ends[-1], positions.dtype)
    for block, count in enumerate(counts):
        old = slice(starts[block], starts[block + 1])
        new_values[ends[block] : ends[block] + count] = values[old]
        if count:
            new_positions[ends[block] : ends[block + 1]] = positions[old][-1]
            new_positions[ends[block] : ends[block] + count] = positions[old]
    grouped = new_values.reshape(-1, group, values.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(grouped), new_positions, ends


def decode(
    values: np.ndarray, positions: np.ndarray, starts: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Inverse of `encode`, and of `group_entries`: the weight [K, N] of `shape`."""
    blocks, block = len(starts) - 1, values.shape[1]
    if values.ndim == 3:
        values = values.transpose(0, 2, 1).reshape(-1, block)
    full = np.zeros((blocks, shape[0], block), values.dtype)
    # Added, since the last position of a block may be there again with zeros.
    np.add.at(full, (np.repeat(np.arange(blocks), np.diff(starts)), positions), values)
    return np.ascontiguousarray(full.transpose(1, 0, 2).reshape(shape[0], -1)[:, : shape[1]])


def offsets_of(spec: SparseConv2dSpec, positions: np.ndarray) -> np.ndarray:
    """Positions in K, in kernel order (row, column, channel), as the spec's offsets."""
    if spec.by_channel:
        tap, channel = np.divmod(positions, spec.in_channels)
        return np.asarray((channel * 2**spec.tap_bits + tap).astype(spec.offsets_dtype))
    ky, rest = np.divmod(positions, spec.kernel[1] * spec.in_channels)
    kx, channel = np.divmod(rest, spec.in_channels)
    row, column = spec.pitches
    offsets = ky * (spec.dilation[0] * row) + kx * (spec.dilation[1] * column) + channel
    return np.asarray(offsets.astype(spec.offsets_dtype))


def positions_of(spec: SparseConv2dSpec, offsets: np.ndarray) -> np.ndarray:
    """Inverse of `offsets_of`."""
    offsets = offsets.astype(np.int64)
    if spec.by_channel:
        channel, tap = np.divmod(offsets, 2**spec.tap_bits)
        return np.asarray(tap * spec.in_channels + channel)
    row, column = spec.pitches
    ky, rest = np.divmod(offsets, spec.dilation[0] * row)
    kx, channel = np.divmod(rest, spec.dilation[1] * column)
    return np.asarray((ky * spec.kernel[1] + kx) * spec.in_channels + channel)


def reference(
    spec: SparseConv2dSpec,
    data: np.ndarray,
    values: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:
    """The same in NumPy: the dense layer with the weight that the parts stand for."""
    positions = positions_of(spec, offsets)
    reduction = spec.dense.reduction_size
    weight = decode(values, positions, starts, (reduction, spec.out_channels))
    result = dense_reference(
        spec.dense, data.reshape(spec.dense.data_shape), weight.reshape(spec.dense.weight_shape)
    )
    return result.reshape(spec.output_shape)
