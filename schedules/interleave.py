"""Elementwise stages whose last axis is short and lies far apart in what they read: NCHW images to
NHWC.

Neighbouring columns are computed as vectors, one for each of the few channels, and stored
interleaved by one permutation. Element by element, such a layout change takes as long as a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter, vector
from .fused import FusedFunction, Index, Stage, rewrite
from .spec import ceil_div

_CHANNELS = range(2, 5)
_LANES = 16
_DTYPES = ("int8", "uint8", "int16", "int32", "float32")


def write_interleaved(
    e: Emitter,
    fused: FusedFunction,
    stage: Stage,
    destination: tirx.Buffer,
    value: Callable[[Index], ir.Expr],
    parallel: bool,
    target: Target,
) -> bool:
    """Write the loops of `stage` into the flat `destination`; False: another form is better.

    `value(indices)` is the stage's element with everything substituted.
    """
    shape = tuple(int(n) for n in stage.buffer.shape)
    if len(shape) < 2 or shape[-1] not in _CHANNELS or shape[-2] < _LANES:
        return False
    if str(stage.buffer.dtype) not in _DTYPES or not _reads_columns(fused, stage):
        return False
    channels, width = shape[-1], shape[-2]
    rows = 1
    for extent in shape[:-2]:
        rows *= extent
    per_task = ceil_div(rows, min(rows, target.threads)) if parallel else rows
    tasks = ceil_div(rows, per_task)
    dtype = str(stage.buffer.dtype)
    with e.loop("task", tasks, "parallel" if parallel else "serial") as task:
        first = e.bind("first", tirx.min(task * per_task, rows - per_task))
        with e.loop("row", per_task) as offset:
            row = e.bind("row", first + offset)
            indices: list[Any] = []
            rest: Any = row
            for extent in reversed(shape[:-2]):
                indices.append(rest % extent if extent > 1 else tirx.const(0, "int32"))
                rest = rest // extent
            prefix = [e.bind(f"i{axis}", index) for axis, index in enumerate(reversed(indices))]
            # The last vector is moved back inside: what it computes twice is the same.
            with e.loop("columns", ceil_div(width, _LANES)) as block:
                start = e.bind("start", tirx.min(block * _LANES, width - _LANES))
                parts = [
                    e.alloc(_LANES, dtype, f"channel{c}", registers=True) for c in range(channels)
                ]
                for c, part in enumerate(parts):
                    with e.loop("lane", _LANES, "vectorized") as lane:
                        where = (*prefix, start + lane, tirx.const(c, "int32"))
                        e.store(part, value(where), lane)
                order = [c * _LANES + lane for lane in range(_LANES) for c in range(channels)]
                woven = tirx.Shuffle([vector(part, 0, _LANES) for part in parts], order)
                at = (row * width + start) * channels
                e.store_vector(destination, woven, at, _LANES * channels)
    return True


def _reads_columns(fused: FusedFunction, stage: Stage) -> bool:
    """Whether some parameter is contiguous along the last axis but one."""
    column = stage.variables[-2]
    along = False

    def load(buffer: tirx.Buffer, where: Index) -> ir.Expr:
        nonlocal along
        if where and isinstance(where[-1], tirx.Var):
            along |= where[-1].same_as(column)
        return buffer[where]

    value = fused.inline(stage.buffer, stage.variables, lambda _buffer, _indices: None)
    rewrite(value, {}, load)
    return along
