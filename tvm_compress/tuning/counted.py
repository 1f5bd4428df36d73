"""A tuning run that counts instructions under an emulator: exact, so nothing is measured twice.

A batch of a task is built by all workers, then run as one program (`emulated.py`). Every candidate
is compared with the naive function on two data sets, so the cheapest is a winner without further
ado. A result is in the database before the next batch begins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bare.compile import CompiledKernel
from ..interrupts import check
from ..model import TensorSpec
from ..progress import Progress
from ..schedules.choice import choice_from_json
from .driver import Limits, builders_here, target_fields, write_task
from .emulated import Bench, DataSet
from .ledger import Budget, Ledger, Reason, TaskState, TuningResult
from .pool import wait_for
from .record import INSTRUCTIONS, Conditions
from .scratch import scratch_folder
from .worker import REFERENCE, SAMPLES

if TYPE_CHECKING:
    from ..targets import Target
    from .database import Database
    from .tasks import Task

_BATCH = 16  # candidates of one program
_SETS = 2  # of data
# A candidate that takes more than so many times the default's instructions may be stopped.
_SLOWEST = 20


def count_tasks(
    tasks: Sequence[Task],
    target: Target,
    database: Database,
    budget: Budget,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Count the instructions of choices of `tasks` until the budget is used up; all results go to
    `database`. Raises `TargetError` when tools of the target are missing."""
    from ..targets.toolchains import require_tools

    require_tools(target)
    with scratch_folder() as folder:
        run = _Run(tasks, target, database, budget, limits or Limits(), folder)
        try:
            return run.run(progress or Progress())
        finally:
            for worker in run.builders:
                worker.stop()


@dataclass
class _State(TaskState):
    bench: Bench | None = None


class _Run(Ledger[_State]):
    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        database: Database,
        budget: Budget,
        limits: Limits,
        folder: Path,
    ) -> None:
        states = [_State(task, folder / f"task{index}") for index, task in enumerate(tasks)]
        conditions = Conditions.of(target, target.machine, INSTRUCTIONS)
        super().__init__(states, target, database, budget, conditions)
        self.limits = limits
        self.target_fields = target_fields(target)
        self.builders = builders_here()

    def run(self, progress: Progress) -> TuningResult:
        started = time.monotonic()
        stopped: Reason | None = None
        with progress.meter("tune", self.budget.trials) as meter:
            while stopped is None:
                elapsed = time.monotonic() - started
                stopped = self.is_used_up(elapsed)
                state = None if stopped else self.next_task()
                if state is None:
                    break
                if state.bench is None:
                    self._prepare(state)
                if not state.given_up:
                    self._measure(state)
                elapsed = time.monotonic() - started
                done = self.trials_before + self.trials
                meter.show(done, self.summary(elapsed), self.fraction(elapsed))
        for state in self.states:
            self._note_winner(state)
        return self.result(time.monotonic() - started, stopped or "converged")

    def _prepare(self, state: _State) -> None:
        """Run the naive function, on this machine."""
        write_task(state.task, state.folder)
        reference = {"op": "build", "choice": None, "output": str(state.folder / REFERENCE)}
        for request, seconds, what in (
            ({**reference, "target": self.target_fields}, self.limits.build, "compile"),
            ({"op": "samples", "count": _SETS}, self.limits.prepare, "run"),
        ):
            (answer,) = self._ask([{**request, "task": str(state.folder)}], seconds)
            if "error" in answer:
                state.given_up = f"its naive function does not {what}: {answer['error']}"
                return
        state.bench = _bench(state.task, self.target, state.folder / SAMPLES)

    def _measure(self, state: _State) -> None:
        """One batch of a task."""
        assert state.bench is not None
        choices = state.ask(self.trials_for(state, _BATCH))
        requests = [
            {
                "op": "build_bare",
                "task": str(state.folder),
                "choice": choice,
                "symbol": f"candidate{number}",
                "output": str(state.folder / f"candidate{number}"),
                "target": self.target_fields,
            }
            for number, choice in enumerate(choices)
        ]
        results: list[int | str] = [
            f"does not compile: {answer['error']}" if "error" in answer else ""
            for answer in self._ask(requests, self.limits.build)
        ]
        built = [index for index, result in enumerate(results) if result == ""]
        kernels = []
        for index in built:
            path = Path(str(requests[index]["output"]))
            kernels.append(CompiledKernel.from_bytes(path.read_bytes()))
            path.unlink()
        if kernels:
            known = state.default_cost
            most = None if known is None else _SLOWEST * known
            counts = state.bench.count(kernels, state.folder, most)
            for index, count in zip(built, counts, strict=True):
                results[index] = count
        for choice, result in zip(choices, results, strict=True):
            if isinstance(result, str):
                self.finish_trial(state, choice, None, result)
            else:
                self.finish_trial(state, choice, float(result))
        if state.is_hopeless:
            state.given_up = f"no candidate runs: {results[-1]}"
        self._note_winner(state)

    def _note_winner(self, state: _State) -> None:
        """The cheapest so far, for builds to use; the default once nothing else is left to try."""
        best, cost, default_cost = state.best, state.best_cost, state.default_cost
        if best is None or cost is None or default_cost is None:
            return
        known = state.verified.cost if state.verified is not None else None
        is_better = cost < (default_cost if known is None else known)
        if is_better or (known is None and state.is_converged):
            choice = choice_from_json(best) if is_better else dict(state.task.space.default)
            state.verified = replace(
                self.record(state, choice, cost),
                default_cost=default_cost,
                default=dict(state.task.space.default),
            )
            self.store(state, state.verified)

    def _ask(self, requests: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """The answers of the workers, which share the requests out."""
        waiting = deque(enumerate(requests))
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(requests):
            for worker in self.builders:
                if waiting and worker.is_idle:
                    index, request = waiting.popleft()
                    worker.send((index,), request, seconds)
            wait_for(self.builders, 1.0)
            check()
            for worker in self.builders:
                job = worker.job
                answer = None if job is None else worker.receive()
                if answer is not None:
                    answers[job[0]] = answer
        return [answers[index] for index in range(len(requests))]


def _bench(task: Task, target: Target, samples: Path) -> Bench:
    """Of the data that a worker wrote."""
    with np.load(samples, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    samples.unlink()
    sets = []
    for number in range(_SETS):
        found: dict[str, dict[int, np.ndarray]] = {"argument": {}, "expected": {}}
        for name, array in arrays.items():
            kind, of, index = name.split("_")
            if int(of) == number:
                found[kind][int(index)] = array
        arguments = {i: a for i, a in found["argument"].items() if i not in task.results}
        sets.append(DataSet(arguments, found["expected"]))
    parameters = tuple(
        TensorSpec(str(i), tuple(int(side) for side in p.shape), str(p.dtype))
        for i, p in enumerate(task.func.params)
    )
    constants = {i: np.asarray(array) for i, array in task.constants.items()}
    return Bench(target, parameters, constants, task.is_integer, tuple(sets))
