"""What a C project costs on its machine: instructions or time, flash, RAM and stack.

Under an emulator instructions are counted, exactly and repeatably; the emulator's wall time is no
latency and is not measured. A board behind an RPC tracker measures time itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .accuracy import SideAccuracy, beside, right_answers_of_project, scores_output
from .errors import CheckFailed, DataError
from .progress import Progress
from .runners import Footprint, footprint

if TYPE_CHECKING:
    from .artefact import Artefact
    from .report.rows import BoardCost
    from .runners import RunResult
    from .targets import Target

COUNTED_INPUTS = 4


@dataclass(frozen=True)
class Instructions:
    """Of one inference, over the counted inputs."""

    median: int
    least: int
    most: int
    inputs: int


@dataclass(frozen=True)
class BoardLatency:
    """Of single inferences with one input, measured by the board."""

    median_us: float
    least_us: float
    p90_us: float
    runs: int


@dataclass(frozen=True)
class FunctionCount:
    """Median over the counted inputs. `layers` is empty for what is no kernel (copies, glue)."""

    symbol: str
    layers: tuple[str, ...]
    instructions: int
    share: float


@dataclass(frozen=True)
class BoardBenchmark:
    """`instructions` None: the target's runner cannot count; `latency` None: it is no board."""

    target: str
    machine: str
    """What it ran on."""
    instructions: Instructions | None
    functions: tuple[FunctionCount, ...]
    memory: Footprint
    """Of the linked program."""
    arena_bytes: int
    stack_bytes: int | None
    """Deepest use below `main`, measured by painting; None: not measured."""
    accuracies: dict[str, SideAccuracy]
    latency: BoardLatency | None = None


def benchmark_board(
    artefact: Artefact,
    *,
    evaluate: Any = None,
    seconds: float = 5.0,
    progress: Progress | None = None,
) -> BoardBenchmark:
    """Run the C project of `artefact` on its machine, with the inputs kept in the artefact.
    `seconds` are those of measuring time, where that is done.

    With `evaluate` (labelled data) the accuracy on the board and of the original are measured on
    the same samples. Raises `TargetError` when the machine is not at hand, `CheckFailed` when the
    program does not give the same outputs twice.
    """
    from .artefact import DEPLOY
    from .benchmarking import probe_inputs

    artefact.require_can_run()
    progress = progress or Progress()
    dataset = None
    if evaluate is not None:
        dataset = artefact.load_data(evaluate)
        if not dataset.has_labels:
            raise DataError(f"{dataset.source}: has no labels, so that no accuracy can be measured")
    project = artefact.project()
    feeds = [project.codes(feed) for feed in islice(probe_inputs(artefact), COUNTED_INPUTS)]
    is_remote = artefact.target.runner == "rpc"
    with progress.step("running" if is_remote else "counting instructions"):
        result = project.run_codes(feeds, count=True)
        _require_repeatable(result, project.run_codes(feeds, count=True))
    latency = None
    if is_remote:
        with progress.step("timing"):
            latency = _latency(project.times(probe_inputs(artefact)[0], seconds))
    accuracies = {}
    if dataset is not None:
        spec = scores_output(artefact.outputs, dataset)
        accuracies = beside(right_answers_of_project(artefact, dataset, spec, progress))
    program = project.program
    return BoardBenchmark(
        target=artefact.target.name,
        machine=machine_text(artefact.target),
        instructions=_instructions(result),
        functions=functions_of(result, layers_of(artefact.path / DEPLOY)),
        memory=footprint(program.elf, program.link_map),
        arena_bytes=program.project.arena_bytes,
        stack_bytes=result.stack_bytes,
        accuracies=accuracies,
        latency=latency,
    )


def board_cost(measured: BoardBenchmark) -> BoardCost:
    """As rows of a report."""
    from .report.rows import BoardCost, KernelInstructions

    counted = measured.instructions
    return BoardCost(
        machine=measured.machine,
        instructions=counted.median if counted else None,
        least_instructions=counted.least if counted else None,
        most_instructions=counted.most if counted else None,
        inputs=counted.inputs if counted else 0,
        kernels=tuple(
            KernelInstructions(row.symbol, row.layers, row.instructions, row.share)
            for row in measured.functions
        ),
        flash_bytes=measured.memory.model_flash_bytes,
        program_flash_bytes=measured.memory.flash_bytes,
        arena_bytes=measured.arena_bytes,
        other_ram_bytes=measured.memory.model_ram_bytes,
        stack_bytes=measured.stack_bytes,
    )


def machine_text(target: Target) -> str:
    """What runs the target's programs here."""
    from .targets.machines import MACHINES

    if target.runner == "rpc":
        return f"device {target.rpc_key} of the RPC tracker at {target.rpc_tracker}"
    machine = MACHINES[target.machine]
    return " ".join([machine.emulator, *machine.arguments])


def layers_of(project: Path) -> dict[str, list[str]]:
    """By symbol of a kernel, or of a loop in assembly that kernels call, of the C project in a
    folder."""
    from .bare.emit import read_interface

    found: dict[str, list[str]] = {}
    for call in read_interface(project)["calls"]:
        for symbol in (call["symbol"], *call.get("loops", ())):
            named = found.setdefault(str(symbol), [])
            named += [layer for layer in call["layers"] if layer not in named]
    return found


def _require_repeatable(first: RunResult, second: RunResult) -> None:
    is_equal = all(
        np.array_equal(a[name], b[name])
        for a, b in zip(first.outputs, second.outputs, strict=True)
        for name in a
    )
    if not is_equal or first.instructions != second.instructions:
        raise CheckFailed("two runs of the same inputs differ; the program reads what it never set")


def _latency(seconds: Sequence[float]) -> BoardLatency:
    micros = 1e6 * np.asarray(seconds)
    median, p90 = (float(np.quantile(micros, q)) for q in (0.5, 0.9))
    return BoardLatency(median, float(micros.min()), p90, len(micros))


def _instructions(result: RunResult) -> Instructions | None:
    counts = result.instructions
    if not counts:
        return None
    return Instructions(int(np.median(counts)), min(counts), max(counts), len(counts))


def functions_of(
    result: RunResult, layers: Mapping[str, Sequence[str]]
) -> tuple[FunctionCount, ...]:
    """The most expensive first; a kernel with its own parts."""
    rows = [_by_kernel(row, layers) for row in result.by_function]
    names = dict.fromkeys(name for row in rows for name in row)
    medians = {name: int(np.median([row.get(name, 0) for row in rows])) for name in names}
    total = sum(medians.values()) or 1
    return tuple(
        FunctionCount(name, tuple(layers.get(name, ())), count, count / total)
        for name, count in sorted(medians.items(), key=lambda item: -item[1])
    )


def _by_kernel(counts: Mapping[str, int], kernels: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, count in counts.items():
        kernel = name.partition("/")[0]
        key = kernel if kernel in kernels else name
        found[key] = found.get(key, 0) + count
    return found
