"""The arguments of an anchor inside a fused function, found from what its block reads."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .fused import FusedFunction, Stage
from .spec import Conv2dSpec, WeightedSpec


@dataclass(frozen=True)
class Operands:
    """Buffers of a weighted anchor; `window` is what the block reads, `data` what lies behind the
    padding."""

    window: tirx.Buffer
    data: tirx.Buffer
    weight: tirx.Buffer
    scales: tirx.Buffer | None = None
    zero_points: tirx.Buffer | None = None
    tables: tirx.Buffer | None = None


def find_operands(fused: FusedFunction, anchor: Stage, spec: WeightedSpec) -> Operands | None:
    """None when the block does not read what `spec` says: somebody rewrote it."""
    reads: list[tirx.Buffer] = []
    for buffer in anchor.reads:
        if not buffer.same_as(anchor.buffer) and not any(buffer.same_as(r) for r in reads):
            reads.append(buffer)
    expected = 2 + bool(spec.table_channels) + bool(spec.group_size) + spec.group_zero_points
    if len(reads) != expected:
        return None
    window, weight, extra = reads[0], reads[1], reads[2:]
    if tuple(int(n) for n in weight.shape) != spec.weight_shape or fused.producers.get(weight):
        return None
    data = window
    if isinstance(spec, Conv2dSpec) and any(spec.padding):
        stage = fused.producers.get(window)
        if stage is None or len(stage.reads) != 1:
            return None
        data = stage.reads[0]
        if tuple(int(n) for n in data.shape) != spec.data_shape:
            return None
    scales = next((b for b in extra if str(b.dtype) == spec.scales_dtype), None)
    bytes_ = next((b for b in extra if str(b.dtype) == "int8"), None)  # a spec has not both kinds
    tables = bytes_ if spec.table_channels else None
    zero_points = bytes_ if spec.group_zero_points else None
    return Operands(window, data, weight, scales, zero_points, tables)
