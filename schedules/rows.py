"""Kernels that work row by row: softmax, layer normalisation and whatever else looks like them.

Every stage is either one number for each row (a sum, a maximum, something computed from such) or
one for each of its elements. All stages of a row are computed while it is in the nearest cache,
sums and maxima along it in several registers that are put together at its end. Float sums are added
in another order than the naive kernel's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter, dtype_bits, vector
from .fast_math import vectorised
from .fused import FusedFunction, Index, Stage, is_lookup, loads, operands_of, rewrite
from .softmax import RECIPROCAL_BITS
from .spec import KERNEL_ATTR, ceil_div

# Elements below which starting threads costs more than it saves.
_PARALLEL_ELEMENTS = 16_000
# Registers that a reduction adds to in turn, so that no addition waits for the one before.
_ACCUMULATORS = 4


def schedule_rows(fused: FusedFunction, target: Target) -> tirx.PrimFunc | None:
    """The scheduled function; None: its stages are not all of rows."""
    plan = _plan(fused)
    return None if plan is None else _RowsKernel(fused, plan, target).build()


@dataclass(frozen=True)
class _Plan:
    """What is common to all stages: shape of the rows' numbers, and elements of a row."""

    outer: tuple[int, ...]
    length: int


def _plan(fused: FusedFunction) -> _Plan | None:
    reductions = [stage for stage in fused.stages if stage.reduces]
    outputs = fused.outputs
    if not reductions or len(outputs) != 1 or fused.stages[-1].buffer not in outputs:
        return None
    *outer, length = (int(n) for n in outputs[0].shape)
    plan = _Plan(tuple(outer), length)
    exact = not any("float" in str(stage.buffer.dtype) for stage in reductions)
    if not exact and not _is_float(outputs[0]):
        return None  # codes of a sum in another order could differ
    return plan if all(_fits(stage, plan, fused) for stage in fused.stages) else None


def _fits(stage: Stage, plan: _Plan, fused: FusedFunction) -> bool:
    """Whether a stage reads other stages in its own row only, and how it reduces is understood."""
    shape = tuple(int(n) for n in stage.buffer.shape)
    rank = len(plan.outer)
    if stage.reduces:
        spatial = [v for i, v in enumerate(stage.variables) if i not in stage.reduction]
        if shape != plan.outer or len(stage.reduction) != 1 or _combination(stage) is None:
            return False
        (axis,) = stage.reduction
        if stage.extents[axis] != plan.length or len(spatial) != rank:
            return False
        if not all(i.same_as(v) for i, v in zip(stage.indices, spatial, strict=True)):
            return False
        row = tuple(spatial)
    else:
        if not stage.is_map or shape not in (plan.outer, (*plan.outer, plan.length)):
            return False
        row = tuple(stage.variables[:rank])
    in_row = True

    def load(buffer: tirx.Buffer, where: Index) -> ir.Expr:
        nonlocal in_row
        if buffer in fused.producers and not buffer.same_as(stage.buffer):
            in_row &= all(
                tvm_ffi.structural_equal(a, b) or (extent == 1 and isinstance(a, tirx.IntImm))
                for a, b, extent in zip(where, row, plan.outer, strict=False)
            )
        return buffer[where]

    try:
        rewrite(stage.value, {}, load)
    except NotImplementedError:
        return False
    return in_row


def _combination(stage: Stage) -> type | None:
    """Add, Max or Min of the element so far and a term that does not read it."""
    value = stage.value
    if not isinstance(value, (tirx.Add, tirx.Max, tirx.Min)):
        return None
    if not isinstance(value.a, ir.TensorLoad) or not value.a.source.same_as(stage.buffer):
        return None
    if any(b.same_as(stage.buffer) for b in loads(value.b)):
        return None
    if isinstance(value, tirx.Add):
        start = stage.init
        zero = isinstance(start, (tirx.IntImm, tirx.FloatImm)) and float(start.value) == 0
        return tirx.Add if zero else None
    return type(value)


class _RowsKernel:
    """One function being written."""

    def __init__(self, fused: FusedFunction, plan: _Plan, target: Target) -> None:
        self.fused, self.plan, self.target = fused, plan, target
        self.rows = 1
        for extent in plan.outer:
            self.rows *= extent
        self.output = fused.outputs[0]
        self.is_float = _is_float(self.output)
        self.softmax = _softmax_parameters(fused)
        self.e = Emitter()

    def build(self) -> tirx.PrimFunc:
        e, plan, threads = self.e, self.plan, self.target.threads
        parallel = threads > 1 and self.rows * plan.length >= _PARALLEL_ELEMENTS
        per_task = ceil_div(self.rows, min(self.rows, threads)) if parallel else self.rows
        tasks = ceil_div(self.rows, per_task)
        with e.loop("task", tasks, "parallel" if parallel else "serial") as task:
            first = e.bind("first", tirx.min(task * per_task, self.rows - per_task))
            kept = [stage for stage in self.fused.stages if self._is_kept(stage)]
            self.buffers = {
                stage.buffer: e.alloc(plan.length, str(stage.buffer.dtype), stage.name)
                for stage in kept
                if not self._is_number(stage) and not stage.buffer.same_as(self.output)
            }
            with e.loop("row", per_task) as row:
                self._row(first + row, kept)
        return e.function(list(self.fused.func.params), {})

    def _is_number(self, stage: Stage) -> bool:
        return len(stage.buffer.shape) == len(self.plan.outer)

    def _is_kept(self, stage: Stage) -> bool:
        """Numbers of a row always; elements that are read twice, or cost more than a load."""
        if self._is_number(stage) or stage.buffer.same_as(self.output):
            return True
        uses = sum(b.same_as(stage.buffer) for s in self.fused.stages for b in s.reads)
        return uses > 1 or is_lookup(stage) or any(is_lookup(s) for s in self.fused.stages)

    def _row(self, row: Any, kept: list[Stage]) -> None:
        e = self.e
        indices: list[Any] = []
        for extent in reversed(self.plan.outer):
            indices.append(row % extent if extent > 1 else tirx.const(0, "int32"))
            row = row // extent
        self.prefix = tuple(e.bind(f"i{n}", i) for n, i in enumerate(reversed(indices)))
        self.numbers: dict[tirx.Buffer, Any] = {}
        for stage in kept:
            if stage.reduces:
                self.numbers[stage.buffer] = self._reduce(stage)
            elif self._is_number(stage):
                value = self._value(stage, self.prefix)
                self.numbers[stage.buffer] = e.bind(stage.name, value)
            elif self.softmax is not None and stage.buffer.same_as(self.output):
                self._write_quotients(stage, *self.softmax)
            else:
                self._write(stage)

    def _leaf(self, buffer: tirx.Buffer, where: Index) -> ir.Expr | None:
        if buffer in self.numbers:
            return self.numbers[buffer]
        if buffer in self.buffers:
            return self.buffers[buffer][where[-1]]
        return None

    def _value(self, stage: Stage, where: Index) -> ir.Expr:

        def leaf(buffer: tirx.Buffer, indices: Index) -> ir.Expr | None:
            return None if buffer.same_as(stage.buffer) else self._leaf(buffer, indices)

        value = self.fused.inline(stage.buffer, where, leaf)
        return vectorised(value) if self.is_float else value

    def _write(self, stage: Stage) -> None:
        e, lanes = self.e, self._lanes(stage)
        buffer = self.buffers.get(stage.buffer)

        def body(c: Any) -> None:
            value = self._value(stage, (*self.prefix, c))
            if buffer is None:
                e.store(stage.buffer, value, *self.prefix, c)
            else:
                e.store(buffer, value, c)

        e.elementwise(self.plan.length, lanes, body)

    def _lanes(self, stage: Stage) -> int:
        """One for a look-up: a gather is no faster than that many loads."""
        if is_lookup(stage):
            return 1
        bits = max(32, dtype_bits(str(stage.buffer.dtype)), _widest_cast(stage.value))
        return max(1, self.target.vector_bits // bits)

    def _reduce(self, stage: Stage) -> Any:
        """Sum or extreme of a row."""
        e, dtype = self.e, str(stage.buffer.dtype)
        combine = _combination(stage)
        assert combine is not None and stage.init is not None
        lanes = max(1, self.target.vector_bits // dtype_bits(dtype))
        if is_lookup(stage):
            lanes = 1
        count = _ACCUMULATORS
        while count > 1 and count * lanes > self.plan.length:
            count //= 2
        while lanes > self.plan.length:
            lanes //= 2
        acc = e.alloc(count * lanes, dtype, stage.name, registers=True)
        for k in range(count):
            start = stage.init if lanes == 1 else tirx.Broadcast(stage.init, lanes)
            e.store_vector(acc, start, k * lanes, lanes)
        (axis,) = stage.reduction
        spatial = [v for i, v in enumerate(stage.variables) if i not in stage.reduction]
        term = stage.value.b

        def add(column: Any, place: Any) -> None:
            binding = dict(zip(spatial, self.prefix, strict=True))
            binding[stage.variables[axis]] = column
            value = rewrite(term, binding, lambda b, i: self.fused.inline(b, i, self._leaf))
            value = vectorised(value) if self.is_float else value
            e.store(acc, combine(acc[place], value), place)

        full = self.plan.length // (count * lanes)
        with e.loop("k", full) as k:
            for part in range(count):
                with e.loop("lane", lanes, "vectorized") as lane:
                    add((k * count + part) * lanes + lane, part * lanes + lane)
        done = full * count * lanes
        left = self.plan.length - done
        for start, width in e.chunks(left, lanes):
            with e.loop("lane", width, "vectorized") as lane:
                add(done + start + lane, lane)
        size = count * lanes
        while size > 1:  # a power of two
            size //= 2
            e.store_vector(acc, combine(vector(acc, 0, size), vector(acc, size, size)), 0, size)
        return e.bind(stage.name, acc[0])

    def _write_quotients(
        self, stage: Stage, reciprocal: int, zero_point: int, bounds: tuple[int, int]
    ) -> None:
        """Integer softmax's last stage, round(e * R / D) for every element e of a row.

        In float32 first. With x = float(e) * float(R / D), relative error below 2^-21, the rounded
        x is right unless x lies closer to half a step than that; the few rows where an x does are
        computed once more, by integer division.
        """
        e, length = self.e, self.plan.length
        lanes = self.target.lanes(32)
        exps, total = (self._buffer_named(name) for name in ("exponentials", "total"))
        divisor = self.numbers[total].astype("float64")
        scale = tirx.const(reciprocal / (1 << RECIPROCAL_BITS), "float64") / divisor
        scale = e.bind("scale", scale.astype("float32"))
        while lanes > length:
            lanes //= 2
        worst = e.alloc(lanes, "float32", "worst", registers=True)
        zero = tirx.const(0, "float32")
        e.store_vector(worst, zero if lanes == 1 else tirx.Broadcast(zero, lanes), 0, lanes)
        low, high = (tirx.const(float(bound - zero_point), "float32") for bound in bounds)
        for start, width in e.chunks(length, lanes):
            scaled = e.alloc(width, "float32", "scaled", registers=True)
            with e.loop("lane", width, "vectorized") as lane:
                x = self.buffers[exps][start + lane].astype("float32") * scale
                e.store(scaled, x, lane)
            with e.loop("lane", width, "vectorized") as lane:
                rounded = tirx.round(scaled[lane])
                e.store(worst, tirx.max(worst[lane], tirx.abs(scaled[lane] - rounded)), lane)
            with e.loop("lane", width, "vectorized") as lane:
                clamped = tirx.max(tirx.min(scaled[lane], high), low)
                code = tirx.call_llvm_pure_intrin("int32", "llvm.lrint", clamped)
                code = code + tirx.const(zero_point, "int32")
                code = code.astype(str(stage.buffer.dtype))
                e.store(stage.buffer, code, *self.prefix, start + lane)
        size = lanes
        while size > 1:
            size //= 2
            larger = tirx.max(vector(worst, 0, size), vector(worst, size, size))
            e.store_vector(worst, larger, 0, size)
        margin = _margin(reciprocal)
        with e.when(worst[0] > tirx.const(0.5 - margin, "float32")):
            with e.loop("column", length) as column:
                where = (*self.prefix, column)
                e.store(stage.buffer, self._value(stage, where), *where)

    def _buffer_named(self, name: str) -> tirx.Buffer:
        return next(s.buffer for s in self.fused.stages if s.name == name)


def _softmax_parameters(fused: FusedFunction) -> tuple[int, int, tuple[int, int]] | None:
    """Reciprocal scale, zero point and bounds of an integer softmax whose codes float32 can tell
    apart."""
    text = (fused.func.attrs or {}).get(KERNEL_ATTR)
    fields = json.loads(str(text)) if text is not None else {}
    if fields.get("family") != "softmax" or [s.name for s in fused.stages][-1] != "softmax":
        return None
    reciprocal, bounds = int(fields["reciprocal"]), fields["bounds"]
    if _margin(reciprocal) > 0.01:
        return None
    return reciprocal, int(fields["zero_point"]), (int(bounds[0]), int(bounds[1]))


def _margin(reciprocal: int) -> float:
    """Error of the largest quotient in float32: its relative error is below 2^-21."""
    return max(1.0, reciprocal / (1 << RECIPROCAL_BITS)) * 2.0**-21


def _is_float(buffer: tirx.Buffer) -> bool:
    return str(buffer.dtype).startswith("float")


def _widest_cast(expr: ir.Expr) -> int:
    """Bits of the widest number that is computed with."""
    widest = 8

    def visit(e: ir.Expr) -> None:
        nonlocal widest
        dtype = str(getattr(getattr(e, "ty", None), "dtype", ""))
        if dtype.startswith(("int", "uint", "float")):
            widest = max(widest, dtype_bits(dtype.partition("x")[0]))
        for child in operands_of(e):
            visit(child)

    visit(expr)
    return widest
