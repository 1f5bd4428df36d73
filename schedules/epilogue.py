"""What follows the anchor in a fused function, computed while the accumulators are still at hand.

Stages whose elements line up with the accumulators (bias, requantisation, activation, residual) are
written per row of `lanes` channels by `Epilogue.emit`. Whatever does not line up (a reshape behind
the layer) is computed in `emit_rest`, as loops over buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter
from .fused import FusedFunction, Index, Stage, count_nodes, rewrite


class Epilogue:
    """Splits the stages after `anchor` into those that line up with it and the rest."""

    def __init__(self, fused: FusedFunction, anchor: Stage, target: Target) -> None:
        self.fused, self.anchor, self.target = fused, anchor, target
        self.shape = tuple(int(n) for n in anchor.buffer.shape)
        after = [
            s for s in fused.stages if s is not anchor and fused.depends_on(s.buffer, anchor.buffer)
        ]
        self.aligned = [anchor, *(s for s in self._aligned(after))]
        aligned_buffers = [s.buffer for s in self.aligned]
        self.rest = [s for s in after if not any(s.buffer.same_as(b) for b in aligned_buffers)]
        wanted = [*fused.outputs, *(b for s in self.rest for b in s.reads)]
        self.stored = [s for s in self.aligned if any(s.buffer.same_as(b) for b in wanted)]
        # A value used more than once is kept, or substitution would compute it that often.
        uses = [b for s in self.aligned for b in s.reads]
        self.kept = [
            s
            for s in self.aligned
            if s is not anchor and sum(b.same_as(s.buffer) for b in uses) > 1
        ]
        self._views: dict[tirx.Buffer, tirx.Buffer] = {}
        self._allocated: dict[tirx.Buffer, tirx.Buffer] = {}

    @property
    def size(self) -> int:
        """Operations of one position, roughly."""
        return sum(count_nodes(stage.value) for stage in self.aligned if stage is not self.anchor)

    def _aligned(self, after: Sequence[Stage]) -> list[Stage]:
        """Stages that read the accumulators, or other aligned stages, only at their own
        position."""
        found = [self.anchor]
        for stage in after:
            if not stage.is_map or stage.extents != self.shape:
                continue
            if not all(
                any(read.same_as(s.buffer) for s in found)
                for read in stage.reads
                if self.fused.depends_on(read, self.anchor.buffer)
            ):
                continue
            if self._reads_in_place(stage, [s.buffer for s in found]):
                found.append(stage)
        return found[1:]

    def _reads_in_place(self, stage: Stage, buffers: Sequence[tirx.Buffer]) -> bool:
        in_place = True

        def load(buffer: tirx.Buffer, indices: Index) -> ir.Expr:
            nonlocal in_place
            if any(buffer.same_as(b) for b in buffers):
                for extent, index, variable in zip(
                    self.shape, indices, stage.variables, strict=True
                ):
                    # An axis of extent 1 may be indexed by the constant 0.
                    same = tvm_ffi.structural_equal(index, variable)
                    in_place &= same or (extent == 1 and isinstance(index, tirx.IntImm))
            return buffer[indices]

        rewrite(stage.value, {}, load)
        return in_place

    def finish(self, value: ir.Expr) -> ir.Expr:
        """What a target makes of an element's expression: by default nothing else."""
        return value

    def declare(self, e: Emitter) -> None:
        """Buffers and flat views needed by `emit`; call once, outside all loops."""
        params = list(self.fused.func.params)
        for stage in self.stored:
            if not any(stage.buffer.same_as(p) for p in params):
                size = 1
                for extent in self.shape:
                    size *= extent
                self._allocated[stage.buffer] = e.alloc(
                    size, str(stage.buffer.dtype), stage.buffer.name
                )
        for buffer in params:
            if tuple(int(n) for n in buffer.shape) == self.shape:
                self._views[buffer] = e.flat(buffer)

    def emit(
        self,
        e: Emitter,
        indices: Callable[[Any], Index],
        position: Any,
        channel: Any,
        lanes: int,
        accumulator: Callable[[Any], ir.Expr],
    ) -> None:
        """Compute and store `lanes` channels from `channel` on at one position.

        `position` numbers the positions of the result in memory order; `indices(c)` is the full
        index of channel c there; `accumulator(lane)` the anchor's value.
        """
        channels = self.shape[-1]
        temporaries: dict[tirx.Buffer, tirx.Buffer] = {}
        for stage in self.kept:
            temporaries[stage.buffer] = e.alloc(
                lanes, str(stage.buffer.dtype), stage.name, registers=True
            )
        targets = [s for s in self.aligned if s in self.kept or s in self.stored]
        for stage in targets:
            with e.loop("lane", lanes, "vectorized") as lane:
                here = indices(channel + lane)

                def leaf(
                    buffer: tirx.Buffer,
                    where: Index,
                    skip: Stage = stage,
                    lane: Any = lane,
                    here: Index = here,
                ) -> ir.Expr | None:
                    if buffer.same_as(skip.buffer):
                        return None
                    if buffer.same_as(self.anchor.buffer):
                        return accumulator(lane)
                    if buffer in temporaries:
                        return temporaries[buffer][lane]
                    in_place = len(where) == len(here) and all(
                        a is b or a.same_as(b) for a, b in zip(where, here, strict=True)
                    )
                    if buffer in self._views and in_place:
                        return self._views[buffer][position * channels + channel + lane]
                    return None

                if stage is self.anchor:
                    value = accumulator(lane)
                else:
                    value = self.finish(self.fused.inline(stage.buffer, here, leaf))
                if stage in self.kept:
                    e.store(temporaries[stage.buffer], value, lane)
                    value = temporaries[stage.buffer][lane]
                if stage in self.stored:
                    flat = self._allocated.get(stage.buffer)
                    flat = self._views[stage.buffer] if flat is None else flat
                    e.store(flat, value, position * channels + channel + lane)

    def emit_rest(self, e: Emitter, lanes: int) -> None:
        """The stages that do not line up with the accumulators, each as its own loops."""
        flat_shape = self.shape

        def leaf(buffer: tirx.Buffer, where: Index) -> ir.Expr | None:
            for stage in self.aligned:
                if buffer.same_as(stage.buffer):
                    flat = self._allocated.get(buffer)
                    if flat is None:
                        return buffer[where] if stage in self.stored else None
                    offset: Any = 0
                    for extent, index in zip(flat_shape, where, strict=True):
                        offset = offset * extent + index
                    return flat[offset]
            return None

        for stage in self.rest:
            if not any(stage.buffer.same_as(b) for b in self.fused.outputs):
                continue
            self._loops(e, stage, lanes, leaf)

    def _loops(
        self,
        e: Emitter,
        stage: Stage,
        lanes: int,
        leaf: Callable[[tirx.Buffer, Index], ir.Expr | None],
    ) -> None:
        def nest(done: tuple[Any, ...], extents: tuple[int, ...]) -> None:
            if len(extents) > 1:
                with e.loop("i", extents[0]) as i:
                    nest((*done, i), extents[1:])
                return

            def body(i: Any) -> None:
                where = (*done, i)
                e.store(stage.buffer, self.fused.inline(stage.buffer, where, leaf), *where)

            e.elementwise(extents[0] if extents else 1, lanes, body)

        nest((), stage.extents)
