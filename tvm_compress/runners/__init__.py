"""Programs of other machines, built and run here. See README.md of this folder."""

from .elf import Footprint, footprint
from .project import Program, Project, build_program
from .run import RunResult, run_program

__all__ = [
    "Footprint",
    "Program",
    "Project",
    "RunResult",
    "build_program",
    "footprint",
    "run_program",
]
