"""Run a program over samples: on this machine, or under QEMU."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArtefactError, TargetError
from ..targets.machines import MACHINES
from .counting import Counts, prepare, read_counts
from .project import Program, pack_samples, tensor_bytes, unpack_samples
from .rpc import run_remote

if TYPE_CHECKING:
    from ..targets import Target

_POLL_SECONDS = 0.05
_LEAST_SAMPLES = 8  # a process: an emulator takes a moment to start
_SEMIHOSTING = ("-semihosting-config", "enable=on,target=native")
_QUIET = ("-nographic", "-monitor", "none", "-serial", "none")


@dataclass(frozen=True)
class RunResult:
    """Outputs of every sample by name, and what was counted."""

    outputs: tuple[dict[str, np.ndarray], ...]
    instructions: tuple[int, ...] | None
    """Executed between the call of the model and its return; None: not counted."""
    by_function: tuple[dict[str, int], ...]
    """The same by function, for those that ran; empty: not counted."""
    stack_bytes: int | None
    """Deepest use below `main`; None: not measured (Linux)."""
    ticks: tuple[int, ...]
    """Of the program's own timer, for every sample; microseconds under Linux."""


def run_program(
    program: Program,
    feeds: Iterable[Mapping[str, np.ndarray]],
    *,
    count: bool = True,
    is_timed_by_instructions: bool = False,
    seconds: float = 600.0,
    progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Run `feeds` through `program`, in as few processes as keep all cores busy.

    `count` counts instructions (emulated targets). `is_timed_by_instructions` makes the machine's
    timer advance by one nanosecond an instruction, a check of the counts by other means
    (`Machine.tick_ns`). `progress` is told how many samples are done. Raises `ArtefactError` when
    the program fails or takes more than `seconds`.
    """
    listed_feeds = list(feeds)
    if program.target.runner == "rpc":
        outputs = tuple(run_remote(program, listed_feeds, progress))
        return RunResult(outputs, None, (), None, ())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    size = max(_LEAST_SAMPLES, -(-len(listed_feeds) // cores))
    pieces = [listed_feeds[at : at + size] for at in range(0, len(listed_feeds), size)]
    done = [0] * len(pieces)

    def run(index: int) -> RunResult:
        def piece_progress(samples: int) -> None:
            done[index] = samples
            if progress is not None:
                progress(sum(done))

        arguments = (count, is_timed_by_instructions, seconds, piece_progress)
        return _run_piece(program, pieces[index], *arguments)

    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(run, range(len(pieces))))
    return _joined(results) if results else RunResult((), () if count else None, (), None, ())


def _joined(results: list[RunResult]) -> RunResult:
    counted = [result.instructions for result in results]
    stacks = [result.stack_bytes for result in results if result.stack_bytes is not None]
    return RunResult(
        outputs=tuple(outputs for result in results for outputs in result.outputs),
        instructions=None
        if None in counted
        else tuple(number for numbers in counted for number in numbers or ()),
        by_function=tuple(row for result in results for row in result.by_function),
        stack_bytes=max(stacks, default=None),
        ticks=tuple(number for result in results for number in result.ticks),
    )


def _run_piece(
    program: Program,
    feeds: list[Mapping[str, np.ndarray]],
    count: bool,
    is_timed_by_instructions: bool,
    seconds: float,
    progress: Callable[[int], None],
) -> RunResult:
    """All in one process."""
    with TemporaryDirectory(prefix="tvm-compress-run-") as name:
        folder = Path(name)
        (folder / "input.bin").write_bytes(pack_samples(program.project, feeds))
        command = _command(program.target, program.elf, is_timed_by_instructions)
        listed = None
        if count and program.target.machine:
            listed, arguments = prepare(program.elf, folder)
            command = [command[0], *arguments, *command[1:]]
        sample_bytes = sum(tensor_bytes(spec) for spec in program.project.outputs)
        _call(command, folder, program.target, seconds, sample_bytes, progress)
        outputs = unpack_samples(program.project, (folder / "output.bin").read_bytes())
        if len(outputs) != len(feeds):
            raise ArtefactError(f"the program answered {len(outputs)} of {len(feeds)} samples")
        numbers = np.fromfile(folder / "counters.bin", "<u4")
        counts = Counts((), ())
        if listed is not None:
            counts = read_counts(folder, listed, len(outputs))
    return RunResult(
        outputs=tuple(outputs),
        instructions=None if listed is None else counts.samples,
        by_function=counts.by_function,
        stack_bytes=int(numbers[-1]) if program.target.is_bare_metal else None,
        ticks=tuple(int(n) for n in numbers[:-1]),
    )


def _command(target: Target, elf: Path, is_timed: bool) -> list[str]:
    program = str(elf.resolve())
    if not target.machine:
        return [program]
    machine = MACHINES[target.machine]
    if target.runner == "qemu_user":
        return [machine.emulator, *machine.arguments, program]
    if target.runner == "qemu_system":
        timed = ["-icount", "shift=0"] if is_timed else []
        options = [*machine.arguments, *_QUIET, *_SEMIHOSTING, *timed]
        return [machine.emulator, *options, "-kernel", program]
    raise TargetError(
        f"target {target.name!r} is run by hand (runner {target.runner}): put its program on the "
        "board; deploy/README.md shows how"
    )


def _call(
    command: list[str],
    folder: Path,
    target: Target,
    seconds: float,
    sample_bytes: int,
    progress: Callable[[int], None],
) -> None:
    output, messages = folder / "output.bin", folder / "messages.txt"
    end = time.monotonic() + seconds
    with messages.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise ArtefactError(
                        f"{command[0]}: no end after {seconds:.0f} s on target {target.name!r}"
                    )
                if output.exists():
                    progress(output.stat().st_size // sample_bytes)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        said = " ".join(messages.read_text(errors="replace").split())[:300]
        raise ArtefactError(
            f"{Path(command[0]).name} ended with status {process.returncode} on target "
            f"{target.name!r}: {said or 'no message'}"
        )
