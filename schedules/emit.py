"""Writing loops: a stack of statement lists with the few statements a generated kernel needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tvm import ir, tirx
from tvm.tirx.stmt import AllocBuffer, Bind, BufferStore, DeclBuffer, For, ForKind, IfThenElse

_KINDS = {
    "serial": ForKind.SERIAL,
    "parallel": ForKind.PARALLEL,
    "vectorized": ForKind.VECTORIZED,
}


def vector(buffer: tirx.Buffer, base: Any, lanes: int) -> ir.Expr:
    """`lanes` consecutive values of a flat buffer."""
    return buffer[base] if lanes == 1 else buffer[tirx.Ramp(base, 1, lanes)]


def splat(value: ir.Expr, lanes: int) -> ir.Expr:
    """The same value in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def dtype_bits(dtype: str) -> int:
    """Bits of one value."""
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))


def vector_parts(count: int, lanes: int) -> list[tuple[int, int]]:
    """`count` as start and width of vectors with power-of-two widths."""
    parts, start = [], 0
    while count - start:
        while lanes > count - start:
            lanes //= 2
        parts.append((start, lanes))
        start += lanes
    return parts


class Emitter:
    """Collects statements; `loop` and `when` open a nested list for the time of a `with`."""

    def __init__(self, finish: Callable[[ir.Expr], ir.Expr] | None = None) -> None:
        """`finish`: what a target makes of every expression that is stored."""
        self._lists: list[list[tirx.Stmt]] = [[]]
        self._finish = finish

    def _add(self, stmt: tirx.Stmt) -> None:
        self._lists[-1].append(stmt)

    def _close(self) -> tirx.Stmt:
        stmts = self._lists.pop()
        return stmts[0] if len(stmts) == 1 else tirx.SeqStmt(stmts)

    @contextmanager
    def loop(self, name: str, extent: Any, kind: str = "serial") -> Iterator[Any]:
        """A loop from 0; of extent 1 just its body, with the constant 0 as variable."""
        if isinstance(extent, int) and extent == 1:
            yield tirx.const(0, "int32")
            return
        variable = tirx.Var(name, "int32")
        self._lists.append([])
        yield variable
        body = self._close()
        self._add(For(variable, 0, extent, _KINDS[kind], body))

    def each(self, name: str, extent: int, unrolled: bool) -> Iterator[Any]:
        """The values of a loop variable: numbers, the body written out, or one variable of a
        loop."""
        if unrolled:
            for number in range(extent):
                yield tirx.const(number, "int32")
            return
        with self.loop(name, extent) as variable:
            yield variable

    def unrolled(self, name: str, extent: int, factor: int, body: Callable[[Any], None]) -> None:
        """body(i) for i in 0..extent, `factor` of them written out in each turn of a loop."""
        if extent // factor:
            with self.loop(name, extent // factor) as i:
                for offset in range(factor):
                    body(i * factor + offset)
        for i in range(extent - extent % factor, extent):
            body(tirx.const(i, "int32"))

    @contextmanager
    def when(self, condition: ir.Expr) -> Iterator[None]:
        """The body of an if without else."""
        self._lists.append([])
        yield
        self._add(IfThenElse(condition, self._close(), None))

    def branch(
        self, condition: ir.Expr, then: Callable[[], None], otherwise: Callable[[], None]
    ) -> None:
        """if / else, each side written by its callable."""
        self._lists.append([])
        then()
        yes = self._close()
        self._lists.append([])
        otherwise()
        self._add(IfThenElse(condition, yes, self._close()))

    def ragged(
        self, block: Any, blocks: int, rest: int, lanes: int, write: Callable[..., None]
    ) -> None:
        """write(parts) for block number `block` of `blocks`: whole vectors of `lanes`, but the last
        one has `rest` elements unless `rest` is 0."""
        whole, end = [(0, lanes)], vector_parts(rest, lanes)
        if not rest:
            write(whole)
        elif blocks == 1:
            write(end)
        else:
            self.branch(block == blocks - 1, lambda: write(end), lambda: write(whole))

    def alloc(self, size: int, dtype: str, name: str, registers: bool = False) -> tirx.Buffer:
        """A flat buffer, on the stack (and in registers, if always indexed by constants) or in
        workspace."""
        buffer = tirx.decl_buffer((size,), dtype, name, scope="local" if registers else "global")
        self._add(AllocBuffer(buffer))
        return buffer

    def opaque(self, size: int, dtype: str, name: str) -> tirx.Buffer:
        """A workspace that functions read or write through its address. TVM would cut it down to
        what loops access, so its end is named."""
        buffer = self.alloc(size, dtype, name)
        self.evaluate(tirx.address_of(buffer[size - 1]))
        return buffer

    def flat(self, buffer: tirx.Buffer) -> tirx.Buffer:
        """A one-dimensional view of a compact buffer."""
        size: Any = 1
        for extent in buffer.shape:
            size = size * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
        dtype = str(buffer.dtype)
        view = tirx.decl_buffer(
            (size,), dtype, f"{buffer.name}_flat", data=tirx.buffer_data(buffer)
        )
        self._add(DeclBuffer(view, data=tirx.buffer_data(buffer)))
        return view

    def bind(self, name: str, value: ir.Expr) -> tirx.Var:
        """A variable that holds `value`."""
        variable = tirx.Var(name, value.ty)
        self._add(Bind(variable, value))
        return variable

    def store(self, buffer: tirx.Buffer, value: ir.Expr, *indices: Any) -> None:
        """buffer[indices] = value"""
        if self._finish is not None:
            value = self._finish(value)
        self._add(BufferStore(buffer, value, list(indices)))

    def store_vector(self, buffer: tirx.Buffer, value: ir.Expr, base: Any, lanes: int) -> None:
        """Store `lanes` consecutive values of a flat buffer."""
        self.store(buffer, value, base if lanes == 1 else tirx.Ramp(base, 1, lanes))

    def chunks(self, extent: int, lanes: int) -> Iterator[tuple[Any, int]]:
        """Cover 0..extent: yields (start, width) inside the loops made for it, widths descending
        from `lanes`."""
        start = 0
        while extent - start > 0:
            while lanes > extent - start:
                lanes //= 2
            count = (extent - start) // lanes
            with self.loop("i", count) as i:
                yield start + i * lanes, lanes
            start += count * lanes

    def elementwise(
        self, extent: int, lanes: int, body: Callable[[Any], None], name: str = "l"
    ) -> None:
        """body(i) for i in 0..extent in vectorised loops of at most `lanes`, the rest in smaller
        ones."""
        for start, width in self.chunks(extent, lanes):
            with self.loop(name, width, "vectorized") as lane:
                body(start + lane)

    def evaluate(self, call: ir.Expr) -> None:
        """A call for its effect."""
        self._add(tirx.Evaluate(call))

    def function(
        self, params: list[tirx.Buffer], attrs: Mapping[str, Any], llvm: str = ""
    ) -> tirx.PrimFunc:
        """Close everything into a function, with a module of LLVM's that it calls."""
        body = self._close()
        if llvm:
            body = tirx.AttrStmt(
                tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(llvm), body
            )
        return tirx.PrimFunc(params, body).with_attr(dict(attrs))
