"""Kernels of a lowered module => object files: taken from the cache, or scheduled and compiled.

What is compiled is compiled in parallel. A kernel's key is everything that its object file is made
from: the fused function before it is scheduled, the choice for its schedule, the target, and the
code that turns one into the other. So a look-up costs no scheduling.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .object_code import compile_object

if TYPE_CHECKING:
    import tvm
    from tvm import ir, tirx

    from .kernel_cache import KernelCache
    from .schedules import Choice
    from .targets import Target

_SYMBOL_DIGITS = 16


@dataclass(frozen=True)
class KernelCounts:
    """How many different kernels a library has, and how many of them came from the cache."""

    total: int
    cached: int

    def __str__(self) -> str:
        plural = "" if self.total == 1 else "s"
        compiled = self.total - self.cached
        return f"{self.total} kernel{plural}: {self.cached} from cache, {compiled} compiled"


@dataclass(frozen=True)
class CompiledObject:
    """One object file and the symbols of the kernels in it."""

    content: bytes
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class CompiledKernels:
    """Object files, and the symbol of each kernel by its name in the module.

    A symbol is made from the kernel's content, so that equal kernels of different modules, or under
    different names, are one.
    """

    objects: tuple[CompiledObject, ...]
    symbols: Mapping[str, str]
    counts: KernelCounts


@dataclass(frozen=True)
class Scheduling:
    """What kernels are scheduled for, and the tuned choices by kernel name."""

    target: Target
    choices: Mapping[str, Choice | None]


def compile_kernels(
    functions: Mapping[ir.GlobalVar, tirx.PrimFunc],
    target: tvm.target.Target,
    scheduling: Scheduling | None,
    cached: KernelCache | None,
) -> CompiledKernels:
    """Object files for all kernels of a module.

    `scheduling` None compiles them as they are. `cached` None compiles all of them.
    """
    units = list(_units(functions, target, scheduling))
    by_key = {unit.key: unit for unit in units}  # equal ones once
    found: dict[str, bytes] = {}
    compiling: dict[str, Future[bytes]] = {}
    pool = ThreadPoolExecutor(_cores(), thread_name_prefix="compile")
    try:
        for key, unit in by_key.items():
            content = None if cached is None else cached.get(key)
            if content is None:
                # Schedules are Python, which no second thread would make faster.
                compiling[key] = pool.submit(_compile, key, unit.scheduled(), target, cached)
            else:
                found[key] = content
        found |= {key: future.result() for key, future in compiling.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    if cached is not None and compiling:
        cached.trim()
    total, fresh = (sum(len(by_key[k].functions) for k in keys) for keys in (by_key, compiling))
    return CompiledKernels(
        tuple(CompiledObject(found[key], unit.symbols) for key, unit in by_key.items()),
        {name: symbol for unit in units for name, symbol in unit.named_symbols()},
        KernelCounts(total, total - fresh),
    )


def _compile(
    key: str,
    functions: Mapping[ir.GlobalVar, tirx.PrimFunc],
    target: tvm.target.Target,
    cached: KernelCache | None,
) -> bytes:
    content = compile_object(functions, target)
    if cached is not None:
        cached.put(key, content)
    return content


@dataclass(frozen=True)
class _Unit:
    """What becomes one object file: a kernel, or kernels that call each other."""

    functions: Mapping[ir.GlobalVar, tirx.PrimFunc]
    scheduling: Scheduling | None
    key: str
    symbols: tuple[str, ...]  # of `functions`, in their order

    def named_symbols(self) -> Iterator[tuple[str, str]]:
        for var, symbol in zip(self.functions, self.symbols, strict=True):
            yield var.name_hint, symbol

    def scheduled(self) -> dict[ir.GlobalVar, tirx.PrimFunc]:
        """The functions as they are compiled, under their symbols."""
        from tvm import ir

        from .relay_passes.schedule_kernels import schedule_kernel

        result = {}
        for (var, function), symbol in zip(self.functions.items(), self.symbols, strict=True):
            if self.scheduling is not None:
                choice = self.scheduling.choices.get(var.name_hint)
                function = schedule_kernel(function, self.scheduling.target, choice)
            # Kernels that call each other know each other by their variables.
            result[var if symbol == var.name_hint else ir.GlobalVar(symbol)] = function
        return result


def _units(
    functions: Mapping[ir.GlobalVar, tirx.PrimFunc],
    target: tvm.target.Target,
    scheduling: Scheduling | None,
) -> Iterator[_Unit]:
    texts = {var: kernel_text(function) for var, function in functions.items()}
    surroundings = [
        compiler_version(),
        str(target),
        "" if scheduling is None else scheduling.target.fingerprint(),
    ]

    def key_of(kernels: list[tuple[str, ir.GlobalVar]]) -> str:
        parts = list(surroundings)
        for name, var in kernels:
            choice = None if scheduling is None else scheduling.choices.get(var.name_hint)
            chosen = "" if choice is None else json.dumps(dict(choice), sort_keys=True)
            parts += [name, chosen, texts[var]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    if any('"ir.GlobalVar"' in text for text in texts.values()):
        # Kernels that call kernels (none of ours do): one object file for all.
        kernels = [(var.name_hint, var) for var in functions]
        names = tuple(name for name, _ in kernels)
        yield _Unit(functions, scheduling, key_of(kernels), names)
        return
    for var, function in functions.items():
        base = var.name_hint.rstrip("0123456789").rstrip("_")  # numbers only tell them apart
        key = key_of([(base, var)])
        symbol = f"{base}_{key[:_SYMBOL_DIGITS]}"
        yield _Unit({var: function}, scheduling, key, (symbol,))


def kernel_text(function: tirx.PrimFunc) -> str:
    """All of a function but what it and its variables are called: it may be one of many equal
    kernels, in many networks."""
    import tvm
    from tvm_ffi import structural_hash

    function = function.without_attr("global_symbol")
    graph = json.loads(tvm.ir.save_json(function))
    nodes = graph["nodes"]
    names = {node["data"]["name"] for node in nodes if node["type"] == "ir.Var"}
    for index in names:
        nodes[index]["data"] = ""
    # A string may be more than a variable's name; the hash has those, and has no names.
    return f"{structural_hash(function)} {json.dumps(graph)}"


@cache
def compiler_version() -> str:
    """What compiles: TVM and LLVM, and those of our sources that schedule and emit kernels."""
    import importlib.metadata

    import tvm
    from tvm.target import codegen

    from .workspace import hash_sources

    root = Path(__file__).resolve().parent
    versions = [importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")]
    # Of a TVM that somebody builds while developing it, the version says too little.
    libraries = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for folder in tvm.libinfo.package_lib_paths()
        for file in sorted(folder.glob("libtvm*"))
    ]
    build = [codegen.llvm_version_major(), libraries]
    sources = [root / "schedules", root / "targets", root / "object_code.py", Path(__file__)]
    return hash_sources(sources, json.dumps([versions, build]))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
