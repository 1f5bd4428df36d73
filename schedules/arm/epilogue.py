"""The epilogue on scalars: the bias goes where the sums start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

from ...targets import Target
from ..emit import Emitter
from ..epilogue import Epilogue
from ..fused import FusedFunction, Index, Stage, rewrite
from .patterns import is_widened_load


class DspEpilogue(Epilogue):
    """Takes `sum + bias` apart when the sum is used for nothing else and the bias depends on the
    channel alone: accumulators start from `initial`."""

    def __init__(self, fused: FusedFunction, anchor: Stage, target: Target) -> None:
        super().__init__(fused, anchor, target)
        self.channels = self.shape[-1]
        self.biased = self._find_bias()
        self.sums: tirx.Buffer | None = None
        """The registers that hold the sums, biased."""
        self._emitter: Emitter | None = None
        self._constants: dict[tuple[tirx.Buffer, str], ir.Expr] = {}

    def _find_bias(self) -> Stage | None:
        """The stage that adds the bias."""
        readers = [
            s
            for s in self.fused.stages
            if s is not self.anchor and any(b.same_as(self.anchor.buffer) for b in s.reads)
        ]
        if len(readers) != 1 or readers[0] not in self.aligned or self.anchor in self.stored:
            return None
        reads = sum(b.same_as(self.anchor.buffer) for b in readers[0].reads)
        found = _additions(readers[0].value, self.anchor.buffer, self._is_bias)
        return readers[0] if found and len(found) == reads else None

    def _is_bias(self, e: ir.Expr) -> bool:
        if not isinstance(e, ir.TensorLoad) or str(e.ty.dtype) != "int32":
            return False
        shape = tuple(int(n) for n in e.source.shape)
        size = 1
        for extent in shape:
            size *= extent
        return (
            e.source not in self.fused.producers
            and size in (1, self.channels)
            and (size == 1 or shape[-1] == size)
        )

    @property
    def bias_buffer(self) -> tirx.Buffer | None:
        """The biases of all channels, or None."""
        if self.biased is None:
            return None
        bias = _additions(self.biased.value, self.anchor.buffer, self._is_bias)[0]
        size = 1
        for extent in bias.source.shape:
            size *= int(extent)
        return bias.source if size == self.channels else None

    def initial(self, indices: Index) -> ir.Expr:
        """What the sum at one position starts from."""
        stage = self.biased
        if stage is None:
            return tirx.const(0, "int32")
        bias = _additions(stage.value, self.anchor.buffer, self._is_bias)[0]
        binding = dict(zip(stage.variables, indices, strict=True))
        return rewrite(bias, binding, lambda buffer, where: buffer[where])

    def finish(self, value: ir.Expr) -> ir.Expr:
        if self.biased is not None and self.sums is not None:
            value = _without(value, self.sums, self._is_bias)
        return _loaded_once(value, self._constant)

    def start_channel(self, e: Emitter, indices: Index | None = None) -> None:
        """Constants loaded from here on are those of one channel, for all its positions; with the
        indices of one of them loaded now."""
        self._emitter = e
        self._constants = {}
        if indices is None:
            return

        for stage in self.aligned[1:]:
            binding = dict(zip(stage.variables, indices, strict=True))
            _loaded_once(rewrite(stage.value, binding, lambda b, i: b[i]), self._constant)

    def _constant(self, load: ir.Expr, buffer: tirx.Buffer) -> ir.Expr:
        """A load, widened or not, or the variable that has its value already."""
        if self._emitter is None or not self._is_of_channel(buffer):
            return load
        key = buffer, str(load.ty.dtype)
        if key not in self._constants:
            self._constants[key] = self._emitter.bind(f"{buffer.name}_value", load)
        return self._constants[key]

    def _is_of_channel(self, buffer: tirx.Buffer) -> bool:
        if not any(buffer.same_as(p) for p in self.fused.func.params):
            return False
        shape = tuple(int(n) for n in buffer.shape)
        return math.prod(shape) in (1, self.channels) and math.prod(shape[:-1]) == 1


def _widened(e: tirx.Add) -> tirx.Add | None:
    """a + b of int64(a) + int64(b): what TE makes of int64(a + b)."""
    sides = e.a, e.b
    if str(e.ty.dtype) != "int64" or not all(isinstance(side, tirx.Cast) for side in sides):
        return None
    if any(str(side.value.ty.dtype) != "int32" for side in sides):
        return None
    return tirx.Add(e.a.value, e.b.value)


def _sum_of(e: ir.Expr) -> ir.Expr:
    """The accumulator behind a conversion that changes nothing."""
    while isinstance(e, tirx.Cast) and str(e.ty.dtype) == "int32":
        e = e.value
    return e


def _additions(e: Any, acc: tirx.Buffer, is_bias: Any) -> list[ir.Expr]:
    """The biases added to the accumulator in an expression."""
    if isinstance(e, tirx.Add):
        narrow = _widened(e)
        e = e if narrow is None else narrow
        inner = _sum_of(e.a)
        if isinstance(inner, ir.TensorLoad) and inner.source.same_as(acc) and is_bias(e.b):
            return [e.b]
    found: list[ir.Expr] = []
    for child in _children(e):
        found += _additions(child, acc, is_bias)
    return found


def _without(e: Any, sums: tirx.Buffer, is_bias: Any) -> ir.Expr:
    """`e` with the sums themselves for sum + bias."""
    if isinstance(e, tirx.Add):
        narrow = _widened(e)
        added = e if narrow is None else narrow
        inner = _sum_of(added.a)
        if isinstance(inner, ir.TensorLoad) and inner.source.same_as(sums) and is_bias(added.b):
            return inner if narrow is None else tirx.Cast(e.ty, inner)
        return tirx.Add(_without(e.a, sums, is_bias), _without(e.b, sums, is_bias))
    if isinstance(e, tirx.Cast):
        return tirx.Cast(e.ty, _without(e.value, sums, is_bias))
    if isinstance(e, tirx.Select):
        parts = (e.condition, e.true_value, e.false_value)
        return tirx.Select(*(_without(part, sums, is_bias) for part in parts))
    if isinstance(e, ir.Call):
        arguments = [_without(a, sums, is_bias) for a in e.args]
        return ir.Call(e.op, arguments, e.attrs, ty_args=e.ty_args, ret_ty=e.ty)
    if hasattr(e, "a") and hasattr(e, "b"):
        return type(e)(_without(e.a, sums, is_bias), _without(e.b, sums, is_bias))
    return e


def _loaded_once(e: Any, load: Callable[[ir.Expr, tirx.Buffer], ir.Expr]) -> ir.Expr:
    """`e` with every load replaced, those of bytes together with their widening."""
    if isinstance(e, ir.TensorLoad):
        return load(e, e.source)
    if isinstance(e, tirx.Cast):
        if is_widened_load(e):
            return load(e, e.value.source)
        return tirx.Cast(e.ty, _loaded_once(e.value, load))
    if isinstance(e, tirx.Select):
        parts = (e.condition, e.true_value, e.false_value)
        return tirx.Select(*(_loaded_once(part, load) for part in parts))
    if isinstance(e, ir.Call):
        arguments = [_loaded_once(a, load) for a in e.args]
        return ir.Call(e.op, arguments, e.attrs, ty_args=e.ty_args, ret_ty=e.ty)
    if hasattr(e, "a") and hasattr(e, "b"):
        return type(e)(_loaded_once(e.a, load), _loaded_once(e.b, load))
    return e


def _children(e: Any) -> list[ir.Expr]:
    children = list(getattr(e, "args", ()))
    for name in ("a", "b", "value", "condition", "true_value", "false_value"):
        child = getattr(e, name, None)
        if isinstance(child, ir.Expr):
            children.append(child)
    return children
