"""Packing 4-bit weights with tables or whole-number scales for the kernel in `nibbles.py`."""

from __future__ import annotations

import numpy as np

from ...targets import Target
from ..saturation import longest_chain, run_of
from ..spec import Conv2dSpec, MatmulSpec, WeightedSpec, ceil_div
from ..weights import look_up, pack_codes, weight_codes
from . import nibbles
from .dot import ByteDot, ChainDot, select_dot
from .nibbles import LANE_CHANNELS
from .pack import choose_layout, pack_weight

Parts = list[np.ndarray]


def pack_parts(
    spec: WeightedSpec, parts: Parts, target: Target
) -> tuple[WeightedSpec, Parts] | None:
    """The spec and parts (codes, [tables], [scales]) of the same layer as the target's kernel reads
    them; None: keep both.

    Where no kernel reads 4-bit codes, they become the int8 values that they stand for.
    """
    if spec.weight_layout != spec.plain_layout:
        return None
    packed = _packed(spec, parts, target)
    if packed is not None or spec.group_size:
        return packed
    values = _values(spec, parts)  # [G, K, N]
    plain = spec.replace(weight_dtype="int8", table_channels=0)
    weight = np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(plain.weight_shape)
    narrow = pack_weight(plain, weight, target)
    return (plain, [weight]) if narrow is None else (narrow[0], [narrow[1]])


def _packed(spec: WeightedSpec, parts: Parts, target: Target) -> tuple[WeightedSpec, Parts] | None:
    if not isinstance(spec, (Conv2dSpec, MatmulSpec)) or spec.groups_of_channels > 1:
        return None
    if spec.weight_dtype != "int4" or spec.data_dtype != "uint8" or spec.acc_dtype != "int32":
        return None
    if spec.table_channels and not spec.has_one_table:
        if spec.table_channels % LANE_CHANNELS:
            return None
        parts = [parts[0], np.repeat(parts[1], spec.table_channels // LANE_CHANNELS, 0), *parts[2:]]
        spec = spec.replace(table_channels=LANE_CHANNELS)
    codes = weight_codes(spec, parts[0])
    layout = choose_layout(spec.replace(chain=1), target)
    if layout is None:
        return None
    packed = spec.replace(weight_layout=layout.name)
    values = _values(spec, parts)
    dot = select_dot(packed.replace(chain=1), target, layout.width)
    if isinstance(dot, ChainDot):
        packed = packed.replace(chain=_chain(packed, values))
        if not packed.chain:
            return None
    if not isinstance(dot, ByteDot) or not nibbles.takes_weight(packed, dot, target):
        return None
    padding = None
    if spec.table_channels:
        tables = parts[1][np.arange(spec.columns) // spec.table_channels]  # [N, 16]
        is_zero = tables == 0
        if layout.steps(spec.reduction) * layout.group != spec.reduction_size and not np.all(
            is_zero.any(axis=1)
        ):
            return None  # nothing to fill up with
        padding = is_zero.argmax(axis=1)
    arrays = [pack_codes(spec, codes, layout.name, padding)]
    rest = parts[1:]
    if spec.table_channels:
        arrays.append(_extended(rest[0], packed.tables_shape[0]))
        rest = rest[1:]
    if spec.group_size:
        blocks = ceil_div(spec.columns, layout.width)
        full = _extended(rest[0].T, blocks * layout.width)  # [N, G] -> [O*w, G]
        arrays.append(full.reshape(blocks, layout.width, -1).transpose(0, 2, 1))
    return packed, [np.ascontiguousarray(array) for array in arrays]


def _values(spec: WeightedSpec, parts: Parts) -> np.ndarray:
    """What the codes stand for without scales, int8 [G, K, N]."""
    codes = weight_codes(spec, parts[0])
    return look_up(spec, codes, parts[1]) if spec.table_channels else codes


def _chain(packed: WeightedSpec, values: np.ndarray) -> int:
    """The longest exact chain inside a group for values [1, K, N]."""
    layout = packed.packed_layout
    assert layout is not None
    plain = packed.replace(weight_dtype="int8", table_channels=0, weight_layout="")
    array = pack_codes(plain, values.astype(np.int8), layout.name)
    run = run_of(packed, layout)
    group = packed.group_size // layout.group
    return longest_chain(packed, array, min(run, group) if group else run)


def _extended(array: np.ndarray, length: int) -> np.ndarray:
    """`length` rows: zeros behind, or what belongs to no channel cut off."""
    missing = max(0, length - len(array))
    zeros = np.zeros((missing, *array.shape[1:]), array.dtype)
    return np.concatenate([array[:length], zeros])
