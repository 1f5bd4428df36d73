"""`tune`: measure the kernels of a model for a target; later builds use what was found."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, TargetError
from ..progress import Progress
from ..runners.rpc import Rpc
from .counted import count_tasks
from .database import Database
from .driver import tune_tasks
from .ledger import Budget, TuningResult

if TYPE_CHECKING:
    import tvm

    from ..flow import Job
    from ..model import Model
    from ..recipe import Recipe
    from ..targets import Target
    from .tasks import Task

FLOAT_RECIPE = "none"  # the model as it is
_RANDOM_SAMPLES = 4


def tune(
    model: Any,
    *,
    recipe: str | Path | Recipe = "int8",
    target: str | None = None,
    calibration: Any = None,
    trials: int | None = None,
    minutes: float | None = None,
    threads: int | None = None,
    database: Path | None = None,
    rpc: Rpc | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_values: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Tune the kernels that `compress` would build for the same model, recipe and target.

    `recipe` "none" is the model as it is. Without `calibration` random data gives the ranges: they
    change no schedule. `trials` counts those of earlier runs, so that the same call goes on where
    one was stopped; with neither `trials` nor `minutes` the run ends when nothing more is to be
    expected. `database` is a folder (default: the user's own). Raises the errors of `errors.py`.
    """
    from .. import flow

    progress = progress or Progress()
    opened = Database(database)
    with progress.step("import"):
        job = job_of(model, recipe, target, calibration, shapes, input_values, threads)
    if rpc is None and job.target.runner == "rpc":
        rpc = Rpc.of(job.target)
    require_device(job.target, rpc)
    module = flow.compress_job(job, progress)
    with progress.step("find kernels"):
        from .tasks import extract_tasks

        tasks = extract_tasks(module, job.target)
    return measure_tasks(tasks, job.target, opened, Budget(trials, minutes), rpc, progress)


def job_of(
    model: Any,
    recipe: str | Path | Recipe,
    target: str | None,
    calibration: Any = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_values: Mapping[str, float] | None = None,
    threads: int | None = None,
) -> Job:
    """What `compress` would work on; see `tune` for `recipe` and `calibration`."""
    from .. import flow
    from ..importers import load_model
    from ..recipe import Recipe

    if isinstance(model, str | Path):
        _refuse_artefact(Path(model))
    if calibration is None:
        loaded = load_model(model, shapes=shapes, input_values=input_values)
        calibration = _random_samples(loaded)
    chosen = Recipe(steps=()) if recipe == FLOAT_RECIPE else recipe
    return flow.load_job(model, chosen, target, calibration, shapes, input_values, threads)


def _refuse_artefact(path: Path) -> None:
    from ..artefact import MANIFEST, RECIPE, Artefact

    if (path / MANIFEST).is_file():
        name = Artefact.open(path).manifest["model"]["name"]
        same = f"MODEL --recipe {path / RECIPE}"
        raise ModelError(
            f"{path}: is an artefact, whose kernels are compiled and can no longer be tuned; tune "
            f"the model it was made from ({name}) by the same recipe, and compress it again: "
            f"`tvm-compress tune {same}`, then `tvm-compress compress {same} -o {path}`"
        )


def tune_modules(
    sides: Mapping[str, tvm.IRModule],
    target: Target,
    budget: Budget,
    database: Database,
    progress: Progress | None = None,
) -> TuningResult:
    """Tune what `build.build` compiles of several modules, where its target runs.

    A percent of one module's time counts as much as a percent of another's, so that the modules can
    be compared afterwards.
    """
    from .tasks import extract_tasks, merge_tasks

    rpc = Rpc.of(target) if target.runner == "rpc" else None
    require_device(target, rpc)
    tasks = merge_tasks({side: extract_tasks(module, target) for side, module in sides.items()})
    return measure_tasks(tasks, target, database, budget, rpc, progress)


def measure_tasks(
    tasks: Sequence[Task],
    target: Target,
    database: Database,
    budget: Budget,
    rpc: Rpc | None,
    progress: Progress | None,
) -> TuningResult:
    """By time on this machine or behind the tracker, by instructions for a target that has an
    emulator."""
    if rpc is None and target.is_cross:
        return count_tasks(tasks, emulated(target), database, budget, progress=progress)
    cpu = device_of(target, rpc)
    return tune_tasks(tasks, target, database, budget, cpu=cpu, rpc=rpc, progress=progress)


def require_device(target: Target, rpc: Rpc | None = None) -> None:
    """Raise `TargetError` where nothing can measure for the target."""
    from ..targets.toolchains import require_tools

    if rpc is not None:
        rpc.require()
        return
    if target.is_cross:
        require_tools(emulated(target))
        return
    if not target.runs_here():
        missing = ", ".join(sorted(target.missing_here()))
        raise TargetError(
            f"target {target.name!r} cannot be measured on this machine: its CPU lacks {missing}; "
            "tune on a machine that has it, through --rpc-tracker and --rpc-key"
        )
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
        if target.threads > cores:
            raise TargetError(
                f"target {target.name!r} has {target.threads} threads, this machine {cores} cores: "
                f"their times would say nothing; give --threads {cores} or fewer"
            )


def emulated(target: Target) -> Target:
    """A board that is run by hand, as the emulator of its CPU runs it; others as they are."""
    if target.runner != "serial":
        return target
    return dataclasses.replace(
        target, runner="qemu_system" if target.is_bare_metal else "qemu_user"
    )


def device_of(target: Target, rpc: Rpc | None = None) -> str:
    """What records call the machine that measures for the target."""
    if rpc is not None:
        return f"rpc {rpc.key}"
    if target.rpc_key:
        return f"rpc {target.rpc_key}"
    return target.machine or this_cpu()


def this_cpu() -> str:
    """What records of this machine call it."""
    from ..benchmarking import this_device

    return this_device(1).cpu


def _random_samples(model: Model) -> list[dict[str, Any]]:
    import numpy as np

    from ..flow import random_input

    random = np.random.default_rng(0)
    return [
        {spec.name: random_input(random, spec.shape, spec.dtype) for spec in model.inputs}
        for _ in range(_RANDOM_SAMPLES)
    ]


def result_to_json(result: TuningResult) -> dict[str, Any]:
    """For `--json`."""
    return {**dataclasses.asdict(result), "trials_per_minute": result.trials_per_minute}
