"""Kernels of a program => object files or C, taken from the cache of kernels where they are there.

An entry of the cache holds the code and what the caller must know of it: its workspaces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .kernel_code import BareKernel, Workspace, c_source, object_file, scheduling_target, to_bare

if TYPE_CHECKING:
    from tvm import tirx

    from ..kernel_cache import KernelCache
    from ..schedules import Choice
    from ..targets import Target

PREFIX = "tvmc_"
_SYMBOL_DIGITS = 12


@dataclass(frozen=True)
class CompiledKernel:
    """`code` is an object file, or C."""

    symbol: str
    parameters: tuple[str, ...]
    """C types of the pointers, workspaces last."""
    workspaces: tuple[Workspace, ...]
    code: bytes
    alignment: int
    leads: tuple[tuple[int, int, int], ...] = ()
    """As in `BareKernel`."""

    def to_bytes(self) -> bytes:
        head = {
            "symbol": self.symbol,
            "parameters": self.parameters,
            "workspaces": [(w.name, w.bytes) for w in self.workspaces],
            "alignment": self.alignment,
            "leads": self.leads,
        }
        return json.dumps(head).encode() + b"\n" + self.code

    @classmethod
    def from_bytes(cls, content: bytes) -> CompiledKernel:
        """Inverse of `to_bytes`."""
        line, _, code = content.partition(b"\n")
        head = json.loads(line)
        workspaces = tuple(Workspace(name, size) for name, size in head["workspaces"])
        parameters = tuple(head["parameters"])
        leads = tuple((output, source, lead) for output, source, lead in head["leads"])
        return cls(head["symbol"], parameters, workspaces, code, head["alignment"], leads)


@dataclass(frozen=True)
class ScheduledKernels:
    """Kernels of which everything is known but the code of those that no cache had."""

    kernels: Mapping[str, CompiledKernel]
    """By their name in the module; `code` is empty where it is still to be generated."""
    cached: int
    """Different ones that came from the cache."""
    _fresh: Mapping[str, BareKernel]
    """By symbol."""
    _keys: Mapping[str, str]
    _target: Target
    _is_c: bool

    def compiled(self, cache: KernelCache | None) -> dict[str, CompiledKernel]:
        """The same with code, in parallel."""
        names = {kernel.symbol: name for name, kernel in self.kernels.items()}
        with ThreadPoolExecutor(2, thread_name_prefix="compile") as pool:
            codes = pool.map(
                lambda kernel: _code(kernel, self._target, self._is_c), self._fresh.values()
            )
            done = {
                symbol: replace(self.kernels[names[symbol]], code=code)
                for symbol, code in zip(self._fresh, codes, strict=True)
            }
        if cache is not None:
            for symbol, kernel in done.items():
                cache.put(self._keys[names[symbol]], kernel.to_bytes())
        return {name: done.get(k.symbol, k) for name, k in self.kernels.items()}


def schedule_kernels(
    functions: Mapping[str, tirx.PrimFunc],
    target: Target,
    choices: Mapping[str, Choice | None],
    is_c: bool,
    cache: KernelCache | None,
) -> ScheduledKernels:
    """Kernels with what their callers must know: workspaces, and what may lie over what."""
    keys = {n: _key(n, f, target, choices.get(n), is_c) for n, f in functions.items()}
    done: dict[str, CompiledKernel] = {}
    fresh: dict[str, BareKernel] = {}
    for key, name in {key: name for name, key in keys.items()}.items():  # equal ones once
        content = None if cache is None else cache.get(key)
        if content is not None:
            done[key] = CompiledKernel.from_bytes(content)
            continue
        symbol = f"{PREFIX}{_base(name)}_{key[:_SYMBOL_DIGITS]}"
        kernel = _bare(functions[name], symbol, target, choices.get(name), is_c)
        done[key], fresh[symbol] = _described(kernel, symbol, target), kernel
    kernels = {name: done[key] for name, key in keys.items()}
    return ScheduledKernels(kernels, len(done) - len(fresh), fresh, keys, target, is_c)


def _base(name: str) -> str:
    return name.rstrip("0123456789").rstrip("_")  # numbers only tell them apart


def _bare(
    function: tirx.PrimFunc, symbol: str, target: Target, choice: Choice | None, is_c: bool
) -> BareKernel:
    from ..relay_passes.schedule_kernels import schedule_kernel

    with_schedule = scheduling_target(target, is_c)
    scheduled = schedule_kernel(function, with_schedule, None if is_c else choice)
    return to_bare(scheduled, symbol, target, is_c)


def _described(kernel: BareKernel, symbol: str, target: Target) -> CompiledKernel:
    return CompiledKernel(
        symbol, kernel.parameters, kernel.workspaces, b"", alignment(target), kernel.leads
    )


def _code(kernel: BareKernel, target: Target, is_c: bool) -> bytes:
    return c_source(kernel).encode() if is_c else object_file(kernel, target)


def compile_kernel(
    function: tirx.PrimFunc, symbol: str, target: Target, choice: Choice | None
) -> CompiledKernel:
    """The machine code of one choice of a kernel, for tuning; None: of the default."""
    kernel = _bare(function, symbol, target, choice, False)
    return replace(_described(kernel, symbol, target), code=_code(kernel, target, False))


def alignment(target: Target) -> int:
    """Of every buffer in bytes: what the widest load of a kernel may take for granted."""
    return max(8, target.vector_bits // 8)


def _key(
    name: str, function: tirx.PrimFunc, target: Target, choice: Choice | None, is_c: bool
) -> str:
    from ..compile_kernels import kernel_text

    form = "c" if is_c else "object"
    chosen = "" if choice is None else json.dumps(dict(choice), sort_keys=True)
    parts = [_sources(), form, target.fingerprint(), chosen, _base(name), kernel_text(function)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _sources() -> str:
    from ..compile_kernels import compiler_version
    from ..workspace import hash_sources

    here = Path(__file__).parent
    files = [
        "kernel_code.py",
        "rewrite_body.py",
        "rounding.py",
        "compile.py",
        "in_place.py",
        "float_calls.py",
    ]
    return hash_sources([here / name for name in files], compiler_version())
