"""Vectors of four 32-bit integers with Helium's own instructions.

TVM's vectoriser knows neither a rounding high product nor how to call one, and LLVM does not find
it in 64-bit arithmetic, which Helium has not. So loops over lanes in which such an expression
occurs are written as vectors here:

    int32((int64(x) * int64(m) + 2^30) >> 31)   =>  vqrdmulh(x, m)
    int32((int64(x) * int64(m)) >> 32)          =>  vmulh(x, m)
    (p + (2^(n-1) + (p >> 31))) >> n            =>  vrshl(p + (p >> 31), -n)
    (p + (2 z + 1) 2^(n-1)) >> n                =>  vrshl(p, -n) + z
    round_half_away(x / 2^n)                    =>  vrshl(x + saturating ((x & -n) >> 31), -n)
    lrint(x)                                    =>  vcvtn(x)

The integers are the same for every input: multipliers are never -2^31, for which `vqrdmulh` alone
would saturate. Everything else of such an expression is left to LLVM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir.prim.expr import BitwiseAnd, LShift, RShift
from tvm.sym import Analyzer
from tvm.tirx.stmt import Bind, BufferStore, For, ForKind

from ..emit import Emitter
from .patterns import high_product, is_lrint, is_widened_load, terms
from .rounding import llvm_helpers as scalar_helpers

LANES = 4
_PREFIX = "tvmc_mve_"
PICK, _GATHER = _PREFIX + "pick", _PREFIX + "gather"
_HIGH, _MULH, _SHIFT, _DIVIDE, _CONVERT = (
    _PREFIX + name for name in ("vqrdmulh", "vmulh", "vrshl", "divide", "vcvtn")
)


def llvm_helpers() -> str:
    """LLVM's form of what vectors, and scalars where channels are left over, call."""
    v, pure = "<4 x i32>", "alwaysinline nounwind memory(none)"
    high, product = "@llvm.arm.mve.vqrdmulh.v4i32", "@llvm.arm.mve.vmulh.v4i32"
    shift, add = "@llvm.arm.mve.vshl.vector.v4i32.v4i32", "@llvm.sadd.sat.v4i32"
    convert = "@llvm.arm.mve.vcvtn.v4i32.v4f32"
    gather = "@llvm.arm.mve.vldr.gather.offset.v4i32.p0.v4i32"
    # Shifts: neither saturating, rounding, signed.
    return f"""{scalar_helpers()}
declare {v} {high}({v}, {v})
declare {v} {product}({v}, {v}, i32)
declare {v} {shift}({v}, {v}, i32, i32, i32)
declare {v} {add}({v}, {v})
declare {v} {convert}(i32, <4 x float>)
declare {v} {gather}(ptr, {v}, i32, i32, i32)
define internal i32 @{PICK}(ptr %a, i32 %b) alwaysinline nounwind {{
  %p = getelementptr i8, ptr %a, i32 %b
  %r = load i32, ptr %p
  ret i32 %r
}}
define internal {v} @{_GATHER}(ptr %a, {v} %b) alwaysinline nounwind {{
  %r = call {v} {gather}(ptr %a, {v} %b, i32 32, i32 0, i32 0)
  ret {v} %r
}}
define internal {v} @{_HIGH}({v} %a, {v} %b) {pure} {{
  %r = call {v} {high}({v} %a, {v} %b)
  ret {v} %r
}}
define internal {v} @{_MULH}({v} %a, {v} %b) {pure} {{
  %r = call {v} {product}({v} %a, {v} %b, i32 0)
  ret {v} %r
}}
define internal {v} @{_SHIFT}({v} %a, {v} %b) {pure} {{
  %n = sub {v} zeroinitializer, %b
  %r = call {v} {shift}({v} %a, {v} %n, i32 0, i32 1, i32 0)
  ret {v} %r
}}
define internal {v} @{_DIVIDE}({v} %a, {v} %b) {pure} {{
  %n = sub {v} zeroinitializer, %b
  %m = and {v} %a, %n
  %s = ashr {v} %m, <i32 31, i32 31, i32 31, i32 31>
  %t = call {v} {add}({v} %a, {v} %s)
  %r = call {v} {shift}({v} %t, {v} %n, i32 0, i32 1, i32 0)
  ret {v} %r
}}
define internal {v} @{_CONVERT}(<4 x float> %a) {pure} {{
  %r = call {v} {convert}(i32 0, <4 x float> %a)
  ret {v} %r
}}
"""


class VectorEmitter(Emitter):
    """Writes loops over lanes with the instructions above; all others as ever.

    `finish` is for scalars."""

    def __init__(self, finish: Callable[[ir.Expr], ir.Expr] | None = None) -> None:
        super().__init__(finish)
        self._scalar_finish = finish
        self._constants: _Constants | None = None

    def function(
        self, params: list[tirx.Buffer], attrs: Mapping[str, Any], llvm: str = ""
    ) -> tirx.PrimFunc:
        return super().function(params, attrs, llvm + llvm_helpers())

    @contextmanager
    def constants_of_channels(
        self, channels: int, buffers: Sequence[tirx.Buffer]
    ) -> Iterator[None]:
        """What is loaded in here of `buffers` with one value a channel, or one, is loaded once, in
        front of the loops in here: all vectors are of the same channels. (LLVM may not, where a
        result may lie over an input.)"""
        self._constants = _Constants(channels, buffers, self._lists[-1])
        yield
        self._constants = None

    @contextmanager
    def loop(self, name: str, extent: int, kind: str = "serial") -> Iterator[Any]:
        if kind != "vectorized" or extent % LANES:
            with super().loop(name, extent, kind) as variable:
                yield variable
            return
        variable = tirx.Var(name, "int32")
        self._lists.append([])
        self._finish = None
        yield variable
        self._finish = self._scalar_finish
        stores = self._lists.pop()
        for store in stores:
            vectors = _vectors(store, variable, extent, self._constants)
            if vectors is None:
                self._add(For(variable, 0, extent, ForKind.VECTORIZED, store))
            else:
                for vector in vectors:
                    self._add(vector)


class _Constants:
    """Vectors of constants that were loaded already."""

    def __init__(
        self,
        channels: int,
        buffers: Sequence[tirx.Buffer],
        place: list[tirx.Stmt],
    ) -> None:
        self.place = place
        self.loaded: list[tuple[ir.Expr, tirx.Var]] = []
        self.buffers = []
        for buffer in buffers:
            shape = [int(n) for n in buffer.shape]
            if math.prod(shape) in (1, channels) and math.prod(shape[:-1]) == 1:
                self.buffers.append(buffer)

    def value(self, load: ir.Expr) -> ir.Expr:
        """A load, widened or not, or the variable that has its value."""
        inner = load
        while isinstance(inner, (tirx.Broadcast, tirx.Cast)):
            inner = inner.value
        if not isinstance(inner, ir.TensorLoad):
            return load
        if not any(inner.source.same_as(buffer) for buffer in self.buffers):
            return load
        for known, variable in self.loaded:
            if tvm_ffi.structural_equal(known, load):
                return variable
        variable = tirx.Var(f"{inner.source.name}_values", load.ty)
        self.place.append(Bind(variable, load))
        self.loaded.append((load, variable))
        return variable


def _vectors(
    store: tirx.Stmt, lane: tirx.Var, extent: int, constants: _Constants | None
) -> list[tirx.Stmt] | None:
    """The store of all lanes, four at a time; None: nothing in it needs that, or it cannot be."""
    if not isinstance(store, BufferStore):
        return None
    seen = _Patterns()
    value = seen.visit(store.value)
    if not seen.found:
        return None
    try:
        return [
            BufferStore(store.buffer, four.visit(value), four.indices(store.indices))
            for four in (_Four(lane, start, constants) for start in range(0, extent, LANES))
        ]
    except _NoVectorError:
        return None


def _call(name: str, *arguments: ir.Expr) -> ir.Expr:
    return tirx.call_pure_extern("int32", name, *arguments)


class _Patterns:
    """Replaces what has an instruction by a call of it, in scalar form still."""

    def __init__(self) -> None:
        self.found = False

    def visit(self, e: Any) -> ir.Expr:
        call = self._instruction(e)
        if call is not None:
            self.found = True
            return call
        return rebuilt(e, self.visit)

    def _instruction(self, e: ir.Expr) -> ir.Expr | None:
        if isinstance(e, tirx.Cast):
            return self._product(e)
        if isinstance(e, RShift):
            return self._small(e)
        if isinstance(e, tirx.Add):
            return self._division(e)
        if isinstance(e, ir.Call) and is_lrint(e):
            return _call(_CONVERT, self.visit(e.args[-1]))
        self.found |= _is_pick(e)
        return None

    def _product(self, e: tirx.Cast) -> ir.Expr | None:
        for name, places, half in ((_HIGH, 31, 1 << 30), (_MULH, 32, 0)):
            factors = high_product(e, places, half)
            if factors is not None:
                return _call(name, *map(self.visit, factors))
        return None

    def _small(self, e: RShift) -> ir.Expr | None:
        parts = terms(e.a)
        product = parts[0]
        if not isinstance(product, tirx.Cast) or high_product(product) is None:
            return None
        if len(parts) == 2:
            # Shifts by numbers have instructions that need no register for them.
            halves = None if isinstance(e.b, tirx.IntImm) else _halves(parts[1], e.b)
            if halves is None or halves % 2 == 0:
                return None
            rounded = _call(_SHIFT, self.visit(product), self.visit(e.b))
            return rounded + tirx.const(halves // 2, "int32")
        if len(parts) != 3:
            return None
        # TE moves numbers behind everything else.
        sign, half = parts[1:] if isinstance(parts[1], RShift) else parts[:0:-1]
        if not isinstance(sign, RShift) or not tvm_ffi.structural_equal(sign.a, product):
            return None
        if not _is_number(sign.b, 31) or _halves(half, e.b) != 1:
            return None
        high = self.visit(product)
        return _call(_SHIFT, high + (high >> tirx.const(31, "int32")), self.visit(e.b))

    def _division(self, e: tirx.Add) -> ir.Expr | None:
        """`rounding_divide_by_pot` of requantize.py."""
        if not isinstance(e.a, RShift) or not isinstance(e.b, tirx.Cast):
            return None
        x, exponent, more = e.a.a, e.a.b, e.b.value
        if not isinstance(more, tirx.GT) or not isinstance(more.a, BitwiseAnd):
            return None
        if not tvm_ffi.structural_equal(more.a.a, x) or not _is_mask(more.a.b, exponent):
            return None
        return _call(_DIVIDE, self.visit(x), self.visit(exponent))


def _is_number(e: ir.Expr, number: int) -> bool:
    return isinstance(e, tirx.IntImm) and int(e.value) == number


def _halves(e: ir.Expr, right: ir.Expr) -> int | None:
    """h of h << (right - 1), also as numbers."""
    if isinstance(e, tirx.IntImm) and isinstance(right, tirx.IntImm):
        count, rest = divmod(int(e.value), 1 << max(int(right.value) - 1, 0))
        return count if int(right.value) >= 1 and rest == 0 else None
    if not isinstance(e, LShift) or not isinstance(e.a, tirx.IntImm):
        return None
    return int(e.a.value) if Analyzer().can_prove_equal(e.b + 1, right) else None


def _is_mask(e: ir.Expr, exponent: ir.Expr) -> bool:
    """int32((1 << int64(exponent)) - 1)"""
    if not isinstance(e, tirx.Cast) or not isinstance(e.value, tirx.Sub):
        return False
    power, one = e.value.a, e.value.b
    return (
        isinstance(power, LShift)
        and _is_number(power.a, 1)
        and _is_number(one, 1)
        and isinstance(power.b, tirx.Cast)
        and bool(tvm_ffi.structural_equal(power.b.value, exponent))
    )


def rebuilt(e: Any, visit: Callable[[Any], ir.Expr]) -> ir.Expr:
    """`e` with `visit` of what it is made of; loads stay."""
    if isinstance(e, tirx.Cast):
        return tirx.Cast(e.ty, visit(e.value))
    if isinstance(e, tirx.Select):
        return tirx.Select(visit(e.condition), visit(e.true_value), visit(e.false_value))
    if isinstance(e, ir.Call):
        arguments = [visit(a) for a in e.args]
        return ir.Call(e.op, arguments, e.attrs, ty_args=e.ty_args, ret_ty=e.ty)
    if hasattr(e, "a") and hasattr(e, "b"):
        return type(e)(visit(e.a), visit(e.b))
    return e


def picked(buffer: tirx.Buffer, at: Any, offset: Any) -> ir.Expr:
    """buffer[at + offset / 4], for an offset that has the lane in it, in a vector's every lane
    another distance on. Not a pure function: what assembly writes changes it."""
    return tirx.call_extern("int32", PICK, tirx.address_of(buffer[at]), offset)


def _is_pick(e: Any) -> bool:
    return (
        isinstance(e, ir.Call)
        and str(getattr(e.op, "name", "")) == "tirx.call_extern"
        and str(e.args[0].value) == PICK
    )


class _NoVectorError(Exception):
    """An expression that has no vector form here."""


class _Four:
    """Scalar expressions => vectors: lane = start .. start + 3."""

    def __init__(self, lane: tirx.Var, start: int, constants: _Constants | None) -> None:
        self.lane, self.start = lane, tirx.const(start, "int32")
        self.constants = constants
        self.analyzer = Analyzer()

    def visit(self, e: Any) -> ir.Expr:
        if not self._depends(e):
            return self._loaded(tirx.Broadcast(e, LANES))
        if isinstance(e, tirx.Var):
            return tirx.Ramp(self.start, 1, LANES)
        if isinstance(e, ir.TensorLoad):
            return self._loaded(e.source[tuple(self.indices(e.indices))])
        if isinstance(e, tirx.Cast):
            wide = f"{e.ty.dtype}x{LANES}"
            if is_widened_load(e):
                indices = self.indices(e.value.indices)
                return self._loaded(tirx.Cast(wide, e.value.source[tuple(indices)]))
            return tirx.Cast(wide, self.visit(e.value))
        if isinstance(e, tirx.Select):
            parts = (e.condition, e.true_value, e.false_value)
            return tirx.Select(*(self.visit(part) for part in parts))
        if isinstance(e, ir.Call):
            return self._call(e)
        if hasattr(e, "a") and hasattr(e, "b"):
            return type(e)(self.visit(e.a), self.visit(e.b))
        raise _NoVectorError

    def _loaded(self, load: ir.Expr) -> ir.Expr:
        return load if self.constants is None else self.constants.value(load)

    def indices(self, indices: Any) -> list[ir.Expr]:
        """A position in a buffer as four neighbouring ones along the last axis."""
        *outer, last = indices
        if any(self._depends(index) for index in outer):
            raise _NoVectorError
        first = self._at(last, self.start)
        step = self._at(last, self.start + 1) - first
        if not self.analyzer.can_prove_equal(step, 1):
            raise _NoVectorError
        return [*outer, tirx.Ramp(self.analyzer.simplify(first), 1, LANES)]

    def _call(self, e: ir.Call) -> ir.Expr:
        name = str(getattr(e.op, "name", ""))
        dtype = f"{e.ty.dtype}x{LANES}"
        first, *arguments = e.args
        if _is_pick(e):
            return tirx.call_extern(dtype, _GATHER, arguments[0], self.visit(arguments[1]))
        if name == "tirx.call_pure_extern" and str(first.value).startswith(_PREFIX):
            return tirx.call_pure_extern(dtype, str(first.value), *map(self.visit, arguments))
        raise _NoVectorError

    def _depends(self, e: Any) -> bool:
        if isinstance(e, tirx.Var):
            return bool(e.same_as(self.lane))
        parts = list(getattr(e, "args", ())) + list(getattr(e, "indices", ()))
        for name in ("a", "b", "value", "condition", "true_value", "false_value"):
            parts.append(getattr(e, name, None))
        return any(self._depends(part) for part in parts if isinstance(part, ir.Expr))

    def _at(self, e: Any, lane: ir.Expr) -> ir.Expr:
        if isinstance(e, tirx.Var):
            return lane if e.same_as(self.lane) else e
        if isinstance(e, ir.TensorLoad):
            raise _NoVectorError
        return rebuilt(e, lambda part: self._at(part, lane))
