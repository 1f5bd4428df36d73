"""Compressed graph => C project in memory: program, kernels, arena."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import TargetError
from ..sections import sections_of, undefined_symbols
from .arena import ram_shortage
from .compile import CompiledKernel, ScheduledKernels, alignment, schedule_kernels
from .program import Program, plan_memory, program_of, with_kernels

if TYPE_CHECKING:
    import tvm

    from ..kernel_cache import KernelCache
    from ..kernels import Call
    from ..relay_passes.integer_edges import Edge
    from ..schedules import Choice
    from ..targets import Target
    from .order import GraphPlan

FORMS = ("object", "c")
C_FLAGS = ("-O2", "-std=c11", "-fno-strict-aliasing", "-ffp-contract=off")
# Of <math.h>, as TVM's C writes them.
_MATHEMATICAL = re.compile(
    r"\b((?:exp|exp2|log|log2|log10|log1p|tanh|sinh|cosh|sin|cos|tan|asin|acos|atan|atan2|pow|erf|"
    r"sqrt|floor|ceil|trunc|fabs|fmod|round|nearbyint|rint)f?)\("
)


@dataclass(frozen=True)
class BareBuilt:
    """All that a C project is written from."""

    target: Target
    form: str
    program: Program
    kernels: tuple[CompiledKernel, ...]
    """The different ones."""
    plan: GraphPlan
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    cached_kernels: int

    @property
    def alignment(self) -> int:
        """Of the arena, the inputs, the outputs and the constants, in bytes."""
        return alignment(self.target)

    @property
    def arena_bytes(self) -> int:
        return self.plan.arena.bytes

    @property
    def steps(self) -> tuple[str, ...]:
        """The layers of each call, or what it writes where it belongs to none."""
        return steps_of(self.program)

    @property
    def library_functions(self) -> tuple[str, ...]:
        """What the kernels call of the mathematical library: only layers that stayed float do.

        Not counted: `memcpy`, `memset` and the compiler's own helpers (`__aeabi_ldivmod`).
        """
        found: dict[str, None] = {}
        for kernel in self.kernels:
            if self.form == "c":
                names = _MATHEMATICAL.findall(kernel.code.decode())
            else:
                names = list(undefined_symbols(kernel.code, kernel.symbol))
            found |= dict.fromkeys(names)
        own = ("memcpy", "memset", "memmove")
        return tuple(sorted(n for n in found if n not in own and not n.startswith("__")))

    def kernel_bytes(self) -> int:
        """Code and constants of the kernels' object files.

        0 for kernels that are C where the target's compiler is not installed.
        """
        if self.form == "c":
            objects = [self._compiled_c()]
        else:
            objects = [kernel.code for kernel in self.kernels]
        return sum(
            size
            for content in objects
            if content
            for name, size in sections_of(content, "kernels").items()
            if name.startswith((".text", ".rodata", ".data"))
        )

    def _compiled_c(self) -> bytes:
        """What the target's compiler makes of the kernels; empty: it is not there."""
        compiler = shutil.which(self.target.compiler)
        if compiler is None:
            return b""
        with TemporaryDirectory() as folder:
            source = Path(folder) / "kernels.c"
            names = ["stdbool", "stdint", *(["math"] if self.library_functions else [])]
            # So that <stdint.h> is the compiler's own, whatever C library there is.
            flags = [*C_FLAGS, *([] if self.library_functions else ["-ffreestanding"])]
            includes = "".join(f"#include <{name}.h>\n" for name in names)
            source.write_text(includes + "\n".join(k.code.decode() for k in self.kernels))
            command = [compiler, *self.target.compiler_flags, *flags, "-c", str(source)]
            done = subprocess.run(
                [*command, "-o", str(source.with_suffix(".o"))],
                check=False, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            if done.returncode != 0:
                return b""  # a C library that is not there; building the program says so
            return source.with_suffix(".o").read_bytes()


def steps_of(program: Program) -> tuple[str, ...]:
    """The layers of each call, or what it writes where it belongs to none."""
    return tuple(", ".join(c.layers) or c.output or ", ".join(c.outputs) for c in program.calls)


@dataclass(frozen=True)
class Planned:
    """A project before its kernels are compiled: order of calls, and where everything lies."""

    target: Target
    form: str
    program: Program
    plan: GraphPlan
    scheduled: ScheduledKernels
    edges: tuple[tuple[Edge, ...], tuple[Edge, ...]]

    def built(self, cache: KernelCache | None = None) -> BareBuilt:
        """Compile the kernels."""
        used = {call.symbol for call in self.program.calls}
        kernels = self.scheduled.compiled(cache).values()
        different = {kernel.symbol: kernel for kernel in kernels if kernel.symbol in used}
        return BareBuilt(
            target=self.target,
            form=self.form,
            program=self.program,
            kernels=tuple(different[symbol] for symbol in sorted(different)),
            plan=self.plan,
            inputs=self.edges[0],
            outputs=self.edges[1],
            cached_kernels=self.scheduled.cached,
        )


def plan_program(
    module: tvm.IRModule,
    edges: tuple[tuple[Edge, ...], tuple[Edge, ...]],
    calls: tuple[Call, ...],
    target: Target,
    form: str = "object",
    choices: Mapping[str, Choice | None] | None = None,
    cache: KernelCache | None = None,
) -> Planned:
    """Plan what came out of `pipeline.destination_pipeline`.

    `calls` says which layers a kernel call holds. Raises `TargetError` for what a C project cannot
    do, naming it, and for an arena larger than the target's RAM.
    """
    from tvm import tirx

    program = program_of(module, calls)
    functions = {
        var.name_hint: function
        for var, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    scheduled = schedule_kernels(functions, target, choices or {}, form == "c", cache)
    program, plan = plan_memory(with_kernels(program, scheduled.kernels), alignment(target))
    outside = sum(program.tensors[name].bytes for name in (*program.inputs, *program.outputs))
    shortage = ram_shortage(target.name, plan.arena, steps_of(program), target.ram_bytes, outside)
    if shortage is not None:
        raise TargetError(shortage)
    return Planned(target, form, program, plan, scheduled, edges)
