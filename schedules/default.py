"""The generic schedule: what no template takes still gets vectors, threads and no needless passes
over memory.

Elementwise stages are substituted into their readers where that computes nothing twice. Every
remaining stage becomes one loop nest: vectors along its last axis (channels lie last), its outer
axes in parallel when it is large, a reduction in registers inside. A stage whose elements line up
one to one with those of all it reads runs over flat memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tvm import ir, tirx

from ..targets import Target
from .emit import Emitter, dtype_bits, vector
from .emitters import emitter_for
from .fast_math import vectorised
from .fused import FusedFunction, Index, Stage, is_lookup, operands_of, rewrite
from .interleave import write_interleaved
from .rows import schedule_rows
from .spec import ceil_div
from .vector_table import LANES, byte_lookup, look_up, table_registers

# Elements (times terms of a reduction) below which starting threads costs more than it saves.
_PARALLEL_WORK = 60_000
# A reduction of at most this many terms (a pooling window) is written out.
_UNROLLED_TERMS = 25
# Operations that are worth storing rather than computing again for every reader.
_EXPENSIVE = frozenset(
    {"exp", "tanh", "sigmoid", "erf", "log", "sqrt", "rsqrt", "pow", "sin", "cos"}
)


def schedule_default(
    func: tirx.PrimFunc, fused: FusedFunction | None, target: Target
) -> tuple[tirx.PrimFunc, str]:
    """The scheduled function and the name of the form. A function we cannot take apart stays as it
    is."""
    if fused is None or not _supported(fused):
        return func, "default.naive"
    if fused.anchor is None:
        by_rows = schedule_rows(fused, target)
        if by_rows is not None:
            return by_rows, "default.rows"
    e = emitter_for(target)
    buffers: dict[tirx.Buffer, tirx.Buffer] = {}
    kept = _kept_stages(fused, in_place=not target.is_x86)
    tail = [] if target.is_x86 else _tail(fused, kept)
    # Computed with the reduction before it, and its results never stored.
    kept = kept[: len(kept) - len(tail)]
    params = list(fused.func.params)
    for stage in kept:
        is_ended = bool(tail) and stage is kept[-1]
        if not is_ended and not any(stage.buffer.same_as(p) for p in params):
            size = 1
            for extent in stage.buffer.shape:
                size *= int(extent)
            buffers[stage.buffer] = e.alloc(size, str(stage.buffer.dtype), stage.buffer.name)
    views: dict[tirx.Buffer, tirx.Buffer] = dict(buffers)
    for param in params:
        views[param] = e.flat(param)
    for stage in kept:
        ends = tail if stage is kept[-1] else []
        _Nest(e, fused, stage, kept, buffers, views, target, ends).write()
    return e.function(params, {}), _form(fused)


def _form(fused: FusedFunction) -> str:
    if fused.anchor is not None:
        return f"default.{fused.anchor.spec.family}" if fused.anchor.spec else "default.anchor"
    if any(stage.reduces for stage in fused.stages):
        return "default.reduction"
    return "default.elementwise"


def _supported(fused: FusedFunction) -> bool:
    """Every stage an equation over constant extents, every parameter of constant shape, written
    once."""
    for param in fused.func.params:
        if not hasattr(param, "shape"):
            return False
        if not all(isinstance(extent, tirx.IntImm) for extent in param.shape):
            return False
    for stage in fused.stages:
        if not stage.is_map and not _plain_reduction(stage):
            return False
        if len(stage.buffer.shape) == 0 or not all(
            isinstance(extent, tirx.IntImm) for extent in stage.buffer.shape
        ):
            return False
        try:
            rewrite(stage.value, {}, lambda buffer, indices: buffer[indices])
        except NotImplementedError:
            return False
    return True


def _plain_reduction(stage: Stage) -> bool:
    """Stored at its spatial variables, in order; constants only for axes of extent 1."""
    spatial = [v for i, v in enumerate(stage.variables) if i not in stage.reduction]
    used = [i for i in stage.indices if not isinstance(i, tirx.IntImm)]
    return (
        stage.reduces
        and len(used) <= len(spatial)
        and len(used) == len(spatial)
        and all(i.same_as(v) for i, v in zip(used, spatial, strict=True))
    )


def _kept_stages(fused: FusedFunction, in_place: bool = False) -> list[Stage]:
    """Stages that get a loop nest and a buffer; the others are substituted into their readers.

    `in_place`: borders belong to the loops of the reduction that reads them, which costs a test for
    each of its windows' positions, but no memory.
    """
    outputs = fused.outputs
    kept = []
    for stage in fused.stages:
        readers = [s for s in fused.stages if any(b.same_as(stage.buffer) for b in s.reads)]
        uses = sum(b.same_as(stage.buffer) for s in readers for b in s.reads)
        costly = _is_costly(stage)
        if in_place and _is_border(stage) and len(readers) == 1 and readers[0].reduces:
            continue
        if (
            stage.reduces
            or any(stage.buffer.same_as(b) for b in outputs)
            or (uses > 1 and costly)
            or (costly and any(_rereads(reader) for reader in readers))
        ):
            kept.append(stage)
    return kept


def _is_border(stage: Stage) -> bool:
    """if_then_else(inside, data[...], constant), without arithmetic on the data."""
    value = stage.value
    name = str(getattr(getattr(value, "op", None), "name", ""))
    if not stage.is_map or not isinstance(value, ir.Call) or not name.endswith("if_then_else"):
        return False
    _, inside, outside = value.args
    return isinstance(inside, ir.TensorLoad) and isinstance(outside, (tirx.IntImm, tirx.FloatImm))


def _tail(fused: FusedFunction, kept: list[Stage]) -> list[Stage]:
    """The elementwise stages at the end, where each of their elements needs one result of the
    reduction before them, its own: then no sum is stored. All sums take four times the memory of an
    output of bytes, and on a small machine that is the most that a network needs."""
    count = 0
    while count < len(kept) and kept[-1 - count].is_map:
        count += 1
    if count == 0 or count == len(kept):
        return []
    reduction, *tail = kept[-1 - count :]
    chain = [reduction, *tail]
    shape = [int(n) for n in reduction.buffer.shape]
    if any([int(n) for n in stage.buffer.shape] != shape for stage in tail):
        return []
    if any(output.same_as(s.buffer) for output in fused.outputs for s in chain[:-1]):
        return []
    in_place = True
    for stage in tail:

        def leaf(buffer: tirx.Buffer, where: Index, stage: Stage = stage) -> ir.Expr | None:
            nonlocal in_place
            if buffer.same_as(stage.buffer):
                return None
            if any(buffer.same_as(s.buffer) for s in chain):
                # On an axis of extent 1, whatever is written there is 0.
                in_place &= all(
                    index.same_as(variable) or extent == 1
                    for index, variable, extent in zip(where, stage.variables, shape, strict=True)
                )
            return buffer[where] if any(buffer.same_as(s.buffer) for s in kept) else None

        fused.inline(stage.buffer, stage.variables, leaf)
    return tail if in_place else []


def _terms(stage: Stage) -> int:
    """Terms of one element's reduction."""
    count = 1
    for axis in stage.reduction:
        count *= stage.extents[axis]
    return count


def _rereads(stage: Stage) -> bool:
    """Whether a reduction reads an element often; a pooling window does not."""
    return _terms(stage) > _UNROLLED_TERMS


def _is_costly(stage: Stage) -> bool:
    """Whether computing an element again is dearer than a store and a load; a border's test
    counts."""
    count = 0
    costly = False

    def visit(e: ir.Expr) -> None:
        nonlocal count, costly
        count += 1
        if isinstance(e, ir.Call):
            name = str(getattr(e.op, "name", "")).rpartition(".")[2]
            costly |= name in _EXPENSIVE or name == "if_then_else"
        for child in operands_of(e):
            visit(child)

    visit(stage.value)
    return costly or count > 8


class _Nest:
    """The loops of one kept stage."""

    def __init__(
        self,
        e: Emitter,
        fused: FusedFunction,
        stage: Stage,
        kept: list[Stage],
        buffers: dict[tirx.Buffer, tirx.Buffer],
        views: dict[tirx.Buffer, tirx.Buffer],
        target: Target,
        ends: Sequence[Stage] = (),
    ) -> None:
        """`ends`: elementwise stages to be computed from each result of this one, which is not
        stored then."""
        self.e, self.fused, self.stage, self.kept = e, fused, stage, kept
        self.ends = ends
        self.buffers, self.views, self.target = buffers, views, target
        self.shape = tuple(int(n) for n in stage.buffer.shape)
        bits = max(
            dtype_bits(str(b.dtype)) if str(b.dtype) != "bool" else 8
            for b in (stage.buffer, *stage.reads)
        )
        # A maximum of bytes stays bytes where vectors are short.
        is_narrow = target.vector_bits == 128 and not target.is_x86
        widest = 32 if stage.reduces and not is_narrow else max(bits, 8)
        self.lanes = max(1, target.vector_bits // max(widest, 8))
        if "int64" in (str(b.dtype) for b in stage.reads) or bits > 32:
            self.lanes = max(1, target.vector_bits // 64)
        elif self.lanes > 16:
            # Narrow data is computed in 32 bits in between: a few registers of those at once.
            self.lanes = min(self.lanes, 2 * target.lanes(32))
        if any(is_lookup(s) for s in fused.stages):
            # A gather is no faster than that many loads.
            self.lanes = 1
        self.work = 1
        for extent in stage.extents:
            self.work *= extent
        self.border = self._find_border()
        self.is_inside: bool | None = None
        """Which side of the border's test is being written; None: neither."""

    def _find_border(self) -> Stage | None:
        """The border around what this reduction reads, tested in its loops."""
        if not self.stage.reduces:
            return None
        for buffer in self.stage.reads:
            stage = self.fused.producers.get(buffer)
            if stage is not None and _is_border(stage) and not any(s is stage for s in self.kept):
                return stage
        return None

    def write(self) -> None:
        """Emit the loop nest."""
        if not self.stage.reduces and (self._write_flat() or self._write_interleaved()):
            return
        stage, e = self.stage, self.e
        # The vectors' axis: elements that lie side by side, in front of axes of extent 1 (a packed
        # weight ends in one).
        last = len(self.shape) - 1
        while last and self.shape[last] == 1 and not stage.reduces:
            last -= 1
        tail = (tirx.const(0, "int32"),) * (len(self.shape) - 1 - last)
        length = self.shape[last]
        outer = self.shape[:last]
        count = 1
        for extent in outer:
            count *= extent
        # Few rows, long ones: cut the last axis as well so that there is something to share out.
        pieces = 1
        parallel = self._parallel
        if parallel and count < self.target.threads and length >= 2 * self.lanes:
            pieces = min(self.target.threads, length // self.lanes)
        per_piece = ceil_div(length, pieces)
        # The innermost of the outer axes as a loop of its own: no divisions for every vector.
        rows = outer[-1] if outer else 1
        if parallel and count < 4 * self.target.threads * rows:
            rows = 1
        tasks = count * pieces // rows
        with (
            e.loop("task", tasks, "parallel" if parallel else "serial") as task,
            e.loop("row", rows) as row,
        ):
            rest = task // pieces if pieces > 1 else task
            if rows > 1:
                rest = rest * rows + row
            indices: list[Any] = []
            for extent in reversed(outer):
                indices.append(rest % extent if extent > 1 else tirx.const(0, "int32"))
                rest = rest // extent
            prefix = [e.bind(f"i{axis}", index) for axis, index in enumerate(reversed(indices))]
            first: Any = tirx.const(0, "int32")
            if pieces > 1:
                first = e.bind(
                    "first",
                    tirx.min(task % pieces * per_piece, length - per_piece),
                )
            for start, width in e.chunks(per_piece, self.lanes):
                if stage.reduces:
                    self._reduce((*prefix,), first + start, width)
                else:
                    with e.loop("lane", width, "vectorized") as lane:
                        where = (*prefix, first + start + lane, *tail)
                        self._store(where, self._value(where))

    def _write_interleaved(self) -> bool:
        """False where that form does not fit."""
        if self.lanes == 1:  # a look-up
            return False
        destination = self.views[self.stage.buffer]
        return write_interleaved(
            self.e, self.fused, self.stage, destination, self._value, self._parallel, self.target
        )

    @property
    def _parallel(self) -> bool:
        return self.target.threads > 1 and self.work >= _PARALLEL_WORK

    def _leaf(self, buffer: tirx.Buffer, where: Index) -> ir.Expr | None:
        for stage in self.kept:
            if buffer.same_as(stage.buffer) and stage is not self.stage:
                if buffer in self.buffers:
                    return self.buffers[buffer][_offset(buffer, where)]
                return buffer[where]
        return None

    def _value(self, where: Index) -> ir.Expr:
        return self._written_out(self.fused.inline(self.stage.buffer, where, self._leaf))

    def _written_out(self, value: ir.Expr) -> ir.Expr:
        """Functions of the mathematical library as vectors, unless codes are made of them."""
        is_float = all(str(b.dtype) == "float32" for b in self.fused.outputs)
        return vectorised(value) if is_float else value

    def _store(self, where: Index, value: ir.Expr) -> None:
        buffer = self.stage.buffer
        if buffer in self.buffers:
            self.e.store(self.buffers[buffer], value, _offset(buffer, where))
        else:
            self.e.store(buffer, value, *where)

    def _reduce(self, prefix: tuple[Any, ...], start: Any, width: int) -> None:
        """`width` neighbouring results, each in its own lane of an accumulator."""
        e, stage = self.e, self.stage
        axes = sorted(stage.reduction)
        spatial = [v for i, v in enumerate(stage.variables) if i not in stage.reduction]
        init = stage.init
        assert init is not None

        def bind(lane: Any) -> dict[tirx.Var, Any]:
            where = (*prefix, start + lane)
            used = [w for w, i in zip(where, stage.indices, strict=True) if not _const(i)]
            return dict(zip(spatial, used, strict=True))

        def initial(lane: Any) -> ir.Expr:
            return rewrite(init, bind(lane), lambda b, i: b[i])

        if _terms(stage) <= _UNROLLED_TERMS and not self.ends:
            with e.loop("lane", width, "vectorized") as lane:
                value = initial(lane)
                for term in itertools.product(*(range(stage.extents[a]) for a in axes)):
                    reduced = {
                        stage.variables[a]: tirx.const(k, "int32")
                        for a, k in zip(axes, term, strict=True)
                    }
                    value = self._term({**bind(lane), **reduced}, value)
                self._store((*prefix, start + lane), value)
            return

        acc = e.alloc(width, str(stage.buffer.dtype), "acc", registers=True)
        with e.loop("lane", width, "vectorized") as lane:
            e.store(acc, initial(lane), lane)

        def walk(level: int, reduced: dict[tirx.Var, Any]) -> None:
            unbound = [stage.variables[axis] for axis in axes[level:]]
            test = None
            if self.border is not None and self.is_inside is None:
                test = self._test({**bind(tirx.const(0, "int32")), **reduced}, unbound)
            if test is not None:
                # As far out as its variables are known, so that the inner loops test nothing.
                def side(is_inside: bool) -> None:
                    self.is_inside = is_inside
                    walk(level, reduced)
                    self.is_inside = None

                e.branch(test, lambda: side(True), lambda: side(False))
                return
            if level < len(axes):
                with e.loop("k", stage.extents[axes[level]]) as k:
                    walk(level + 1, {**reduced, stage.variables[axes[level]]: k})
                return
            with e.loop("lane", width, "vectorized") as lane:
                e.store(acc, self._term({**bind(lane), **reduced}, acc[lane]), lane)

        walk(0, {})
        self._finish(prefix, start, width, acc)

    def _finish(self, prefix: Index, start: Any, width: int, acc: tirx.Buffer) -> None:
        """Store the results in `acc`, or what the stages at the end make of them."""
        e = self.e
        results = [(self.stage.buffer, acc)]
        for end in self.ends[:-1]:
            values = e.alloc(width, str(end.buffer.dtype), end.name, registers=True)
            with e.loop("lane", width, "vectorized") as lane:
                e.store(values, self._ended(end, (*prefix, start + lane), lane, results), lane)
            results.append((end.buffer, values))
        with e.loop("lane", width, "vectorized") as lane:
            where = (*prefix, start + lane)
            if not self.ends:
                self._store(where, acc[lane])
            else:
                last = self.ends[-1]
                e.store(last.buffer, self._ended(last, where, lane, results), *where)

    def _ended(
        self, end: Stage, where: Index, lane: Any, results: list[tuple[tirx.Buffer, tirx.Buffer]]
    ) -> ir.Expr:
        """An element of a stage at the end; `results` holds what the ones before it gave."""

        def leaf(buffer: tirx.Buffer, indices: Index) -> ir.Expr | None:
            for computed, values in results:
                if buffer.same_as(computed):
                    return values[lane]
            return self._leaf(buffer, indices)

        return self._written_out(self.fused.inline(end.buffer, where, leaf))

    def _test(self, binding: dict[tirx.Var, Any], unbound: list[tirx.Var]) -> ir.Expr | None:
        """Whether what is read lies inside the border; None: not known yet, or by channel."""
        border = self.border
        assert border is not None
        found: list[ir.Expr] = []
        spatial = [v for i, v in enumerate(self.stage.variables) if i not in self.stage.reduction]
        probe = {**binding, spatial[-1]: spatial[-1]}

        def load(buffer: tirx.Buffer, where: Index) -> ir.Expr:
            if buffer.same_as(border.buffer):
                at = dict(zip(border.variables, where, strict=True))
                found.append(rewrite(border.value.args[0], at, lambda b, i: b[i]))
            return buffer[where]

        rewrite(self.stage.value, probe, load)
        assert found
        return None if _uses(found[0], [*unbound, spatial[-1]]) else found[0]

    def _term(self, binding: dict[tirx.Var, Any], acc: ir.Expr) -> ir.Expr:
        def load(buffer: tirx.Buffer, where: Index) -> ir.Expr:
            if buffer.same_as(self.stage.buffer):
                return acc
            border = self.border
            if self.is_inside is not None and border and buffer.same_as(border.buffer):
                if not self.is_inside:
                    return border.value.args[2]
                data = border.value.args[1]
                at = dict(zip(border.variables, where, strict=True))
                return rewrite(data, at, lambda b, i: self.fused.inline(b, i, self._leaf))
            return self.fused.inline(buffer, where, self._leaf)

        return rewrite(self.stage.value, binding, load)

    def _write_flat(self) -> bool:
        """One loop over flat memory when every element depends on its own position only; else
        False."""
        variables = [tirx.Var(f"v{i}", "int32") for i in range(len(self.shape))]
        flat = tirx.Var("flat", "int32")

        def leaf(buffer: tirx.Buffer, where: Index) -> ir.Expr | None:
            if buffer.same_as(self.stage.buffer):
                return None
            shape = tuple(int(n) for n in buffer.shape)
            known = buffer in self.views
            in_place = len(where) == len(variables) and all(
                a.same_as(v) for a, v in zip(where, variables, strict=True)
            )
            if known and shape == self.shape and in_place:
                return self.views[buffer][flat]
            if known and buffer in self.buffers:
                return self.buffers[buffer][_offset(buffer, where)]
            return buffer[where] if known else None

        value = self.fused.inline(self.stage.buffer, tuple(variables), leaf)
        if _uses(value, variables):
            return False
        size = 1
        for extent in self.shape:
            size *= extent
        destination = self.views[self.stage.buffer]
        lookup = byte_lookup(value, self.target)
        lanes = self.lanes if lookup is None else min(LANES, size)
        tasks = 1
        if self._parallel:
            tasks = min(self.target.threads, max(1, size // (16 * lanes)))
        per_task = ceil_div(ceil_div(size, tasks), lanes) * lanes
        tasks, per_task = ceil_div(size, per_task), min(per_task, size)
        with self.e.loop("task", tasks, "parallel") as task:
            first = self.e.bind("first", tirx.min(task * per_task, size - per_task))
            if lookup is not None:
                self._write_lookups(destination, flat, first, per_task, *lookup)
                return True

            def body(i: Any) -> None:
                element = rewrite(value, {flat: first + i}, lambda b, where: b[where])
                self.e.store(destination, self._written_out(element), first + i)

            self.e.elementwise(per_task, self.lanes, body)
        return True

    def _write_lookups(
        self,
        destination: tirx.Buffer,
        flat: tirx.Var,
        first: Any,
        count: int,
        table: tirx.Buffer,
        code: ir.Expr,
        dtype: str,
    ) -> None:
        """`count` bytes of a table that stays in registers; the last vector is moved back."""
        e = self.e

        def element(at: Any) -> ir.Expr:
            return rewrite(code, {flat: at}, lambda b, where: b[where])

        if count < LANES:
            with e.loop("i", count) as i:
                offset = tirx.const(128 if dtype == "int8" else 0, "int32")
                entry = table[element(first + i).astype("int32") + offset]
                e.store(destination, entry, first + i)
            return
        quarters = table_registers(e, self.views[table])
        with e.loop("i", ceil_div(count, LANES)) as i:
            start = e.bind("start", first + tirx.min(i * LANES, count - LANES))
            codes = e.alloc(LANES, dtype, "codes", registers=True)
            with e.loop("lane", LANES, "vectorized") as lane:
                e.store(codes, element(start + lane), lane)
            found = look_up(quarters, vector(codes, 0, LANES), dtype, str(table.dtype))
            e.store_vector(destination, found, start, LANES)


def _const(index: Any) -> bool:
    return isinstance(index, tirx.IntImm)


def _offset(buffer: tirx.Buffer, where: Index) -> Any:
    offset: Any = tirx.const(0, "int32")
    for extent, index in zip(buffer.shape, where, strict=True):
        offset = offset * int(extent) + index
    return offset


def _uses(value: ir.Expr, variables: list[tirx.Var]) -> bool:
    """Whether any of `variables` occurs in `value`."""
    from tvm.tirx.analysis import undefined_vars

    found = undefined_vars(value, [])
    return any(v.same_as(f) for v in variables for f in found)
