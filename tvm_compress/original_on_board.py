"""What the original costs on a board's emulated machine, beside the compressed C project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from .board_benchmarking import functions_of, layers_of
from .errors import ArtefactError, ModelError, TargetError

if TYPE_CHECKING:
    from .flow import Job, Lowering
    from .report.rows import OriginalCost

LONGEST_S = 60.0


def original_cost(
    job: Job, lowering: Lowering, feed: Mapping[str, np.ndarray]
) -> tuple[OriginalCost | None, str]:
    """One counted inference of the original on the job's target, or why there is none: it does not
    fit the board, or takes more than a minute under the emulator."""
    from .bare.emit import c_identifier, write_project
    from .bare.session import ProjectSession
    from .build import compile_project
    from .contents import describe_project, require_project_fits
    from .report.rows import KernelInstructions, OriginalCost
    from .runners import footprint
    from .runners.run import run_program

    sources = ([s.name for s in job.model.inputs], [s.name for s in job.model.outputs])
    try:
        built = compile_project(lowering.lowered, job.emit, job.kernel_cache)
        require_project_fits(built, describe_project(built))
        with TemporaryDirectory(prefix="tvm-compress-original-") as folder:
            write_project(built.project, c_identifier(job.model.name), sources, Path(folder))
            session = ProjectSession(Path(folder), job.target)
            result = run_program(
                session.program, [session.codes(feed)], count=True, seconds=LONGEST_S
            )
            memory = footprint(session.program.elf, session.program.link_map)
            functions = functions_of(result, layers_of(Path(folder)))
    except (ArtefactError, ModelError, TargetError) as error:
        return None, str(error)
    if not result.instructions:
        return None, "this machine counts no instructions"
    kernels = tuple(
        KernelInstructions(row.symbol, row.layers, row.instructions, row.share) for row in functions
    )
    arena = session.program.project.arena_bytes
    return OriginalCost(result.instructions[0], kernels, memory.model_flash_bytes, arena), ""
