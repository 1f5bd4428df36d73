"""Compressed graph => C project in memory: program, kernels, arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compile import CompiledKernel, alignment, compile_kernels
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

    def kernel_bytes(self) -> int:
        """Code and constants of the kernels' object files; 0 where they are C."""
        from ..sections import sections_of

        if self.form == "c":
            return 0
        sizes = [sections_of(kernel.code, kernel.symbol) for kernel in self.kernels]
        return sum(
            size
            for sections in sizes
            for name, size in sections.items()
            if name.startswith((".text", ".rodata", ".data"))
        )


def build_program(
    module: tvm.IRModule,
    edges: tuple[tuple[Edge, ...], tuple[Edge, ...]],
    calls: tuple[Call, ...],
    target: Target,
    form: str = "object",
    choices: Mapping[str, Choice | None] | None = None,
    cached: KernelCache | None = None,
) -> BareBuilt:
    """Compile what came out of `pipeline.destination_pipeline`.

    `calls` says which layers a kernel call holds. Raises `TargetError` for what a C project cannot
    do, naming it.
    """
    from tvm import tirx

    program = program_of(module, calls)
    functions = {
        var.name_hint: function
        for var, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    kernels, hits = compile_kernels(functions, target, choices or {}, form == "c", cached)
    program, plan = plan_memory(with_kernels(program, kernels), alignment(target))
    used = {call.symbol for call in program.calls}
    different = {k.symbol: k for k in kernels.values() if k.symbol in used}
    return BareBuilt(
        target=target,
        form=form,
        program=program,
        kernels=tuple(different[symbol] for symbol in sorted(different)),
        plan=plan,
        inputs=edges[0],
        outputs=edges[1],
        cached_kernels=hits,
    )
