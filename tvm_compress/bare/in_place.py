"""How far a kernel's output may lie over its inputs, from what the kernel does, access by access.

Lowered kernels are loops of constant extents around loads and stores, so that the place of every
access in time and its address are functions of the loop variables. For an output that starts `lead`
bytes before an input, no byte may be written before the last load of it:

    lead >= (end of any store) - (start of any load that comes later)

Elementwise kernels come out with 0 where no element is computed twice, and so do convolutions that
copy rows of their input before they write. (Where the last tile of a row repeats elements, that
holds for the rows, which are copies, and not for a residual.) What cannot be evaluated counts as a
load of, or a store to, the whole buffer; the answer is never too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import ir, tirx
from tvm.tirx import stmt as s

MOST_ACCESSES = 2_000_000  # of one buffer; some 64 bytes of memory each

_BINARY: dict[str, Any] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "FloorDiv": np.floor_divide,
    "FloorMod": np.mod, "Min": np.minimum, "Max": np.maximum, "EQ": np.equal, "NE": np.not_equal,
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "And": np.logical_and, "Or": np.logical_or,
}  # fmt: skip
_CALLS: dict[str, Any] = {
    "tirx.shift_left": np.left_shift, "tirx.shift_right": np.right_shift,
    "tirx.bitwise_and": np.bitwise_and, "tirx.bitwise_or": np.bitwise_or,
}  # fmt: skip


_ADDRESSES = ("tirx.address_of", "tirx.tvm_access_ptr", "tirx.buffer_data")


class _UnknownError(Exception):
    """A value that depends on data, or on something not modelled."""


@dataclass(frozen=True)
class _Access:
    """All accesses of one load or store: time and first byte, for each turn of its loops."""

    times: np.ndarray
    starts: np.ndarray
    bytes: int


def leads(
    kernel: tirx.PrimFunc, results: int = 1, least_gain: float = 0.0
) -> dict[tuple[int, int], int]:
    """(output, input), parameters by number => lead in bytes, where it is below the output's size.

    `kernel` is lowered; its last `results` parameters are written. `least_gain`: the part of the
    smaller of both that they must be able to have in common.
    """
    walk = _Walk(kernel)
    try:
        walk.run()
    except _UnknownError:
        return {}
    count = len(kernel.params)
    found = {}
    for output in range(count - results, count):
        for source in range(count - results):
            if walk.stores.get(source):
                continue
            lead, size = walk.lead(output, source), walk.sizes[output]
            common = min(size - lead, walk.sizes[source])
            if lead < size and common >= least_gain * min(size, walk.sizes[source]):
                found[output, source] = lead
    return found


class _Walk:
    def __init__(self, kernel: tirx.PrimFunc) -> None:
        self.kernel = kernel
        self.of_buffer: dict[Any, int] = {p: i for i, p in enumerate(kernel.params)}
        self.sizes = [_bytes(p) for p in kernel.params]
        self.values: dict[Any, Any] = {}
        self.extents: list[int] = []  # of the loops around
        self.loads: dict[int, list[_Access]] = {}
        self.stores: dict[int, list[_Access]] = {}
        self.durations: dict[Any, int] = {}
        self.accesses = [0] * len(kernel.params)
        self.opaque: set[int] = set()  # what an address is taken of may be used for anything

    def run(self) -> None:
        self._statement(self.kernel.body, np.zeros((), np.int64))

    def lead(self, output: int, source: int) -> int:
        """The largest (end of a store) - (start of a later load), not below 0."""
        known = max(self.accesses[source], self.accesses[output]) <= MOST_ACCESSES
        if not known or self.opaque & {source, output}:
            return self.sizes[output]
        loads, stores = self.loads.get(source, []), self.stores.get(output, [])
        if not loads or not stores:
            return 0
        times, starts, _ = _joined(loads)
        latest, _, ends = _joined(stores)
        order = np.argsort(times, kind="stable")
        times, starts = times[order], starts[order]
        # The lowest byte that is loaded from each time on.
        lowest = np.minimum.accumulate(starts[::-1])[::-1]
        after = np.searchsorted(times, latest, side="right")
        follows = after < len(times)
        if not follows.any():
            return 0
        return max(0, int((ends[follows] - lowest[after[follows]]).max()))

    # --- statements -----------------------------------------------------------------------------

    def _statement(self, stmt: Any, time: np.ndarray) -> None:
        """`time` is when it starts, for each turn of the loops around it."""
        if isinstance(stmt, s.SeqStmt):
            for part in stmt.seq:
                self._statement(part, time)
                time = time + self._duration(part)
        elif isinstance(stmt, s.For):
            self._for(stmt, time)
        elif isinstance(stmt, s.IfThenElse):
            # Both branches: more accesses only make the answer larger.
            self._loads(stmt.condition, time)
            time = time + 1
            self._statement(stmt.then_case, time)
            if stmt.else_case is not None:
                self._statement(stmt.else_case, time + self._duration(stmt.then_case))
        elif isinstance(stmt, s.Bind):
            self._loads(stmt.value, time)
            self._bind(stmt.var, stmt.value)
        elif isinstance(stmt, s.BufferStore):
            self._loads(stmt.value, time)
            for index in stmt.indices:
                self._loads(index, time)
            self._access(self.stores, stmt.buffer, stmt.indices, time + 1)
        elif isinstance(stmt, s.Evaluate):
            self._loads(stmt.value, time)
        elif isinstance(stmt, s.AttrStmt):
            self._statement(stmt.body, time)
        elif isinstance(stmt, s.DeclBuffer):
            self._declare(stmt)
        elif not isinstance(stmt, s.AllocBuffer):
            raise _UnknownError

    def _for(self, stmt: Any, time: np.ndarray) -> None:
        extent, start = self._constant(stmt.extent), self._constant(stmt.min)
        if stmt.step is not None and self._constant(stmt.step) != 1:
            raise _UnknownError
        turn = self._duration(stmt.body)
        if not turn or not extent:
            return
        steps = np.arange(extent, dtype=np.int64)
        self.extents.append(extent)
        # One more axis at the end, so that outer values broadcast with a trailing 1.
        outer = self.values
        self.values = {var: np.asarray(v)[..., None] for var, v in outer.items()}
        self.values[stmt.loop_var] = steps + start
        self._statement(stmt.body, time[..., None] + steps * turn)
        self.values = outer
        self.extents.pop()

    def _declare(self, stmt: Any) -> None:
        data = stmt.data
        while isinstance(data, ir.Call) and len(data.args) == 1:
            data = data.args[0]
        if data in self.of_buffer:
            self.of_buffer[stmt.buffer] = self.of_buffer[data]

    def _bind(self, var: Any, value: Any) -> None:
        try:
            self.values[var] = self._value(value)
        except _UnknownError:
            self.values.pop(var, None)

    def _duration(self, stmt: Any) -> int:
        """Ticks: 0 for a statement that touches no parameter."""
        if stmt not in self.durations:
            self.durations[stmt] = self._measure(stmt)
        return self.durations[stmt]

    def _measure(self, stmt: Any) -> int:
        if isinstance(stmt, s.SeqStmt):
            for part in stmt.seq:
                if isinstance(part, s.DeclBuffer):
                    self._declare(part)
            return sum(self._duration(part) for part in stmt.seq)
        if isinstance(stmt, s.For):
            return self._constant(stmt.extent) * self._duration(stmt.body)
        if isinstance(stmt, s.IfThenElse):
            inside = self._duration(stmt.then_case)
            if stmt.else_case is not None:
                inside += self._duration(stmt.else_case)
            return inside + 1 if inside or self._touches(stmt.condition) else 0
        if isinstance(stmt, s.Bind):
            return int(self._touches(stmt.value))
        if isinstance(stmt, s.BufferStore):
            parts = [stmt.value, *stmt.indices]
            touches = stmt.buffer in self.of_buffer or any(map(self._touches, parts))
            return 2 if touches else 0
        if isinstance(stmt, s.Evaluate):
            return int(self._touches(stmt.value))
        if isinstance(stmt, s.AttrStmt):
            return self._duration(stmt.body)
        if isinstance(stmt, (s.DeclBuffer, s.AllocBuffer)):
            return 0
        raise _UnknownError

    # --- expressions ----------------------------------------------------------------------------

    def _touches(self, expr: Any) -> bool:
        return any(node.source in self.of_buffer for node in self._loads_in(expr))

    def _loads(self, expr: Any, time: np.ndarray) -> None:
        for node in self._loads_in(expr):
            self._access(self.loads, node.source, node.indices, time)

    def _loads_in(self, expr: Any) -> list[Any]:
        addressed: list[Any] = []
        found = list(_loads_of(expr, addressed))
        self.opaque |= {self.of_buffer[what] for what in addressed if what in self.of_buffer}
        return found

    def _access(
        self,
        into: dict[int, list[_Access]],
        buffer: Any,
        indices: Sequence[Any],
        time: np.ndarray,
    ) -> None:
        number = self.of_buffer.get(buffer)
        if number is None:
            return
        item, size = _item_bytes(buffer), self.sizes[number]
        shape = tuple(self.extents)
        self.accesses[number] += math.prod(shape)
        if self.accesses[number] > MOST_ACCESSES:
            return  # see `lead`
        try:
            start, length = self._place(buffer, indices, item)
        except _UnknownError:
            start, length = np.zeros((), np.int64), size
        # What a condition guards may be outside, and is not accessed there.
        start = np.clip(np.broadcast_to(start, shape), 0, max(size - length, 0))
        times = np.broadcast_to(time, shape)
        into.setdefault(number, []).append(_Access(times.ravel(), start.ravel(), length))

    def _place(self, buffer: Any, indices: Sequence[Any], item: int) -> tuple[np.ndarray, int]:
        """First byte and number of bytes from there."""
        flat: Any = np.zeros((), np.int64)
        lanes = 1
        for extent, index in zip(buffer.shape, indices, strict=True):
            if isinstance(index, tirx.Ramp):
                step, lanes = self._constant(index.stride), self._constant(index.lanes)
                if step < 1 or not index.same_as(indices[-1]):
                    raise _UnknownError
                lanes = (lanes - 1) * step + 1
                index = index.base
            flat = flat * self._constant(extent) + self._value(index)
        return flat * item, lanes * item

    def _constant(self, expr: Any) -> int:
        if isinstance(expr, int):
            return expr
        if isinstance(expr, tirx.IntImm):
            return int(expr)
        raise _UnknownError

    def _value(self, e: Any) -> Any:
        """An integer for each turn of the loops around."""
        if isinstance(e, tirx.IntImm):
            return np.int64(int(e))
        if isinstance(e, tirx.Var):
            if e not in self.values:
                raise _UnknownError
            return self.values[e]
        name = type(e).__name__
        if name in _BINARY:
            return _BINARY[name](self._value(e.a), self._value(e.b))
        if isinstance(e, tirx.Not):
            return np.logical_not(self._value(e.a))
        if isinstance(e, tirx.Cast) and str(e.ty.dtype) in ("int32", "int64"):
            return self._value(e.value)
        if isinstance(e, tirx.Select):
            parts = (e.condition, e.true_value, e.false_value)
            return np.where(*map(self._value, parts))
        if isinstance(e, ir.Call):
            operator = str(getattr(e.op, "name", ""))
            if operator in _CALLS:
                return _CALLS[operator](*map(self._value, e.args))
            if operator == "tirx.likely":
                return self._value(e.args[0])
            if operator == "tirx.if_then_else":
                return np.where(*map(self._value, e.args))
        raise _UnknownError


def _loads_of(expr: Any, addressed: list[Any]) -> Iterator[Any]:
    """Every load in an expression, those in indices included; what its address is taken of goes to
    `addressed`."""
    if isinstance(expr, ir.TensorLoad):
        yield expr
        parts = list(expr.indices)
    elif isinstance(expr, ir.Call):
        parts = [argument for argument in expr.args if isinstance(argument, ir.Expr)]
        if str(getattr(expr.op, "name", "")) in _ADDRESSES:
            addressed += [getattr(part, "source", part) for part in parts]
    elif isinstance(expr, (tirx.Cast, tirx.Broadcast)):
        parts = [expr.value]
    elif isinstance(expr, tirx.Select):
        parts = [expr.condition, expr.true_value, expr.false_value]
    elif isinstance(expr, tirx.Not):
        parts = [expr.a]
    elif isinstance(expr, tirx.Let):
        parts = [expr.value, expr.body]
    elif isinstance(expr, tirx.Ramp):
        parts = [expr.base, expr.stride]
    elif isinstance(expr, tirx.Shuffle):
        parts = list(expr.vectors)
    elif hasattr(expr, "a") and hasattr(expr, "b"):
        parts = [expr.a, expr.b]
    elif isinstance(expr, (tirx.Var, tirx.IntImm, tirx.FloatImm, ir.StringImm)):
        parts = []
    else:
        raise _UnknownError
    for part in parts:
        yield from _loads_of(part, addressed)


def _joined(accesses: Sequence[_Access]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, first bytes, and bytes behind the last."""
    times = np.concatenate([a.times for a in accesses])
    starts = np.concatenate([a.starts for a in accesses])
    ends = np.concatenate([a.starts + a.bytes for a in accesses])
    return times, starts, ends


def _item_bytes(buffer: Any) -> int:
    dtype = str(buffer.dtype)
    return 1 if dtype == "bool" else np.dtype(dtype).itemsize


def _bytes(buffer: Any) -> int:
    return math.prod(int(extent) for extent in buffer.shape) * _item_bytes(buffer)
