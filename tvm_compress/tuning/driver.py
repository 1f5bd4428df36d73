"""A tuning run that takes times: workers kept busy, every result stored at once.

Processes build while another measures, which has cores of its own: builders on those cores are
stopped while it does. A result is in the database before the next request is
sent, so a killed run loses nothing, and the same command goes on from what it finds there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..interrupts import check
from ..progress import Progress
from ..runners.rpc import Rpc
from ..schedules.choice import choice_from_json, choice_to_json
from .ledger import Budget, Ledger, Reason, TaskState, TuningResult
from .pool import Worker, wait_for
from .record import Conditions, Record
from .scratch import scratch_folder
from .worker import ARGUMENTS, DETAILS, FUNCTION, REFERENCE

if TYPE_CHECKING:
    from ..schedules.choice import Choice
    from ..targets import Target
    from .database import Database
    from .tasks import Task

# A new best is checked against the default when it gains this much over the last one checked.
_WORTH_CHECKING = 0.98
# A winner that is not faster than the default by this much, measured in turns, is not one.
_WORTH_USING = 0.99
_AHEAD = 6  # candidates that wait for a worker
_MOST_BUILDERS = 8  # more build faster than one can measure


@dataclass(frozen=True)
class Limits:
    """Seconds that one request may take."""

    build: float = 60.0
    prepare: float = 180.0
    measure: float = 30.0
    compare: float = 240.0


def tune_tasks(
    tasks: Sequence[Task],
    target: Target,
    database: Database,
    budget: Budget,
    *,
    cpu: str,
    rpc: Rpc | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Measure choices of `tasks` until the budget is used up; all results go to `database`.

    `cpu` names the machine that measures. Raises `TargetError` when the device cannot be reached.
    """
    if rpc is not None:
        rpc.require()
    with scratch_folder() as folder:
        run = _Run(tasks, target, database, budget, cpu, rpc, limits or Limits(), folder)
        with run.workers_stopped_at_end():
            return run.run(progress or Progress())


@dataclass
class _State(TaskState):
    """A task, and what is under way for it."""

    checked: set[str] = field(default_factory=set)  # choices compared with the default
    winner: _Job | None = None  # built, to be compared when the default is built as well
    is_asked: bool = False  # its reference is being built
    is_ready: bool = False  # the naive function ran
    is_checking: bool = False

    @property
    def default_library(self) -> Path:
        return self.folder / "default.so"

    @property
    def wants_check(self) -> bool:
        """Whether the best so far should be compared with the default on fresh data."""
        best, seconds = self.best, self.best_cost
        if best is None or seconds is None or self.default_cost is None:
            return False
        if self.given_up or self.is_checking or best == self.default or best in self.checked:
            return False
        known = self.verified.cost if self.verified is not None else None
        if known is None:
            known = self.default_cost
        return seconds < _WORTH_CHECKING * known

    def recall(self, records: Sequence[Record]) -> None:
        super().recall(records)
        for record in records:
            if record.is_verified and record.fits(self.task.space):
                self.checked.add(choice_to_json(record.choice))


@dataclass(frozen=True)
class _Job:
    """One request: what it is for."""

    kind: Literal[
        "reference", "candidate", "default", "winner",  # built
        "prepare", "measure", "compare",  # run
    ]  # fmt: skip
    state: _State
    choice: Choice | None = None
    built: Path | None = None


# --- the run ------------------------------------------------------------------------------------


class _Run(Ledger[_State]):
    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        database: Database,
        budget: Budget,
        cpu: str,
        rpc: Rpc | None,
        limits: Limits,
        folder: Path,
    ) -> None:
        states = [_State(task, folder / f"task{index}") for index, task in enumerate(tasks)]
        super().__init__(states, target, database, budget, Conditions.of(target, cpu))
        self.limits = limits
        self.target_fields = target_fields(target)
        self.builders, self.runner = _workers(target, rpc)
        self.pausing = [b for b in self.builders if rpc is None and b.shares(self.runner)]
        self.to_build: deque[_Job] = deque()
        self.to_run: deque[_Job] = deque()
        self.stopping = False
        self.numbers = 0

    # The loop

    def run(self, progress: Progress) -> TuningResult:
        started = time.monotonic()
        stopped: Reason = "converged"
        with progress.meter("tune", self.budget.trials) as meter, self._out_of_the_way():
            while True:
                check()
                elapsed = time.monotonic() - started
                if not self.stopping:
                    reason = self._reason_to_stop(elapsed)
                    if reason is not None:
                        stopped, self.stopping = reason, True
                        self._stop_proposing()
                self._propose()
                self._dispatch()
                if self._is_idle():
                    if not self.stopping:
                        continue
                    self._check_winners()
                    if self._is_idle():
                        break
                wait_for([*self.builders, self.runner], 1.0)
                for worker in (*self.builders, self.runner):
                    self._receive(worker)
                meter.show(
                    self.trials_before + self.trials,
                    self.summary(time.monotonic() - started),
                    self.fraction(elapsed),
                )
        return self.result(time.monotonic() - started, stopped)

    def _reason_to_stop(self, elapsed: float) -> Reason | None:
        planned = sum(state.in_flight for state in self.states)
        reason = self.is_used_up(elapsed)
        if reason is None and planned == 0 and self._is_idle() and self.next_task() is None:
            return "converged"
        return reason

    def _is_idle(self) -> bool:
        workers = (*self.builders, self.runner)
        return not self.to_build and not self.to_run and all(w.is_idle for w in workers)

    @contextmanager
    def workers_stopped_at_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            for worker in (*self.builders, self.runner):
                worker.stop()

    @contextmanager
    def _out_of_the_way(self) -> Iterator[None]:
        """Keep this process off the cores that measure, where there are others."""
        if not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, (before - set(self.runner.cores)) or before)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    # What to do next

    def _propose(self) -> None:
        if self.stopping or len(self.to_build) + len(self.to_run) >= _AHEAD:
            return
        state = self.next_task()
        if state is None:
            return
        self._ask_reference(state)
        for choice in state.ask(self.trials_for(state)):
            self.to_build.append(_Job("candidate", state, choice))

    def _ask_reference(self, state: _State) -> None:
        if not state.is_asked:
            state.is_asked = True
            write_task(state.task, state.folder)
            self.to_build.append(_Job("reference", state))

    def _check_winners(self) -> None:
        """Have the best of every task that stands still compared with its default."""
        for state in self.states:
            if state.in_flight == 0 and state.wants_check:
                assert state.best is not None
                state.is_checking = True
                state.checked.add(state.best)
                self._ask_reference(state)
                if not state.default_library.exists():
                    self.to_build.append(_Job("default", state, state.task.space.default))
                self.to_build.append(_Job("winner", state, choice_from_json(state.best)))

    def _stop_proposing(self) -> None:
        for queue in (self.to_build, self.to_run):
            for job in [j for j in queue if j.kind in ("candidate", "measure")]:
                queue.remove(job)
                self._drop(job)

    def _dispatch(self) -> None:
        for worker in self.builders:
            if self.to_build and worker.is_idle and not worker.is_paused:
                self._build(worker, self.to_build.popleft())
        if not self.runner.is_idle:
            return
        for _ in range(len(self.to_run)):
            job = self.to_run.popleft()
            if job.state.given_up:
                self._drop(job)
            elif job.kind == "prepare" or job.state.is_ready:
                self._measure(job)
                return
            else:
                self.to_run.append(job)

    def _build(self, worker: Worker, job: _Job) -> None:
        state = job.state
        if state.given_up:
            self._drop(job)
            return
        self.numbers += 1
        is_reference = job.kind == "reference"
        names = {"reference": REFERENCE, "default": state.default_library.name}
        output = state.folder / names.get(job.kind, f"{job.kind}{self.numbers}.so")
        request = {
            "op": "build",
            "task": str(state.folder),
            "choice": None if is_reference else dict(job.choice or {}),
            "output": str(output),
            "target": self.target_fields,
        }
        worker.send(dataclasses.replace(job, built=output), request, self.limits.build)

    def _measure(self, job: _Job) -> None:
        state = job.state
        if job.kind == "prepare":
            request: dict[str, Any] = {"op": "prepare", "task": str(state.folder)}
            limit = self.limits.prepare
        elif job.kind == "compare":
            libraries = [str(state.default_library), str(job.built)]
            self.numbers += 1
            request = {
                "op": "compare",
                "task": str(state.folder),
                "libraries": libraries,
                "seed": self.numbers,
            }
            limit = self.limits.compare
        else:
            request = {
                "op": "measure",
                "task": str(state.folder),
                "library": str(job.built),
                "best": state.best_cost,
            }
            limit = self.limits.measure
        if job.kind != "prepare":
            for worker in self.pausing:
                worker.pause()
        self.runner.send(job, request, limit)

    # What came back

    def _receive(self, worker: Worker) -> None:
        job = worker.job
        if job is None:
            return
        answer = worker.receive()
        if answer is None:
            return
        if worker is self.runner:
            for builder in self.pausing:
                builder.resume()
        error = str(answer.get("error", ""))
        handlers = {
            "reference": self._reference_built,
            "candidate": self._candidate_built,
            "default": self._contestant_built,
            "winner": self._contestant_built,
            "prepare": self._prepared,
            "measure": self._measured,
            "compare": self._compared,
        }
        handlers[job.kind](job, answer, error)

    def _reference_built(self, job: _Job, _answer: Mapping[str, Any], error: str) -> None:
        if error:
            self._give_up(job.state, f"its naive function does not compile: {error}")
        else:
            self.to_run.appendleft(_Job("prepare", job.state))

    def _prepared(self, job: _Job, _answer: Mapping[str, Any], error: str) -> None:
        if error:
            self._give_up(job.state, f"its naive function does not run: {error}")
        else:
            job.state.is_ready = True

    def _candidate_built(self, job: _Job, _answer: Mapping[str, Any], error: str) -> None:
        if error:
            self._finish_trial(job, None, f"does not compile: {error}")
        elif self.stopping:
            self._drop(job)
        else:
            self.to_run.append(dataclasses.replace(job, kind="measure"))

    def _measured(self, job: _Job, answer: Mapping[str, Any], error: str) -> None:
        self._finish_trial(job, None if error else float(answer["seconds"]), error)

    def _finish_trial(self, job: _Job, seconds: float | None, error: str) -> None:
        state, choice = job.state, job.choice
        assert choice is not None
        self.finish_trial(state, choice, seconds, error)
        is_default = choice_to_json(choice) == state.default
        if is_default and seconds is not None and job.built is not None:
            job.built.replace(state.default_library)
        else:
            _remove(job.built)
        if state.is_hopeless:
            self._give_up(state, f"no candidate runs: {error}")
        elif state.in_flight == 0:
            self._check_winners()

    def _contestant_built(self, job: _Job, _answer: Mapping[str, Any], error: str) -> None:
        state = job.state
        if error:
            state.is_checking = False
            return
        if job.kind == "winner":
            state.winner = job
        if state.winner is not None and state.default_library.exists():
            winner, state.winner = state.winner, None
            self.to_run.appendleft(dataclasses.replace(winner, kind="compare"))

    def _compared(self, job: _Job, answer: Mapping[str, Any], error: str) -> None:
        """Both were run in turns, on data that neither saw before."""
        state, choice = job.state, job.choice
        assert choice is not None
        state.is_checking = False
        _remove(job.built)
        if not error:
            error = answer["errors"][0] or answer["errors"][1]
        if error:
            # It passed on other data: forget it, and go on with the next best.
            self.store(state, self.record(state, choice, None, error))
            state.failures += 1
            state.results.pop(choice_to_json(choice))
            state.proposals.tell(choice, None)
            return
        default_seconds, seconds = map(float, answer["seconds"])
        state.results[state.default] = min(default_seconds, state.results[state.default])
        state.results[choice_to_json(choice)] = seconds
        state.proposals.tell(state.task.space.default, default_seconds)
        state.proposals.tell(choice, seconds)
        if seconds > _WORTH_USING * default_seconds:
            choice, seconds = state.task.space.default, default_seconds
        record = dataclasses.replace(
            self.record(state, choice, seconds),
            default_cost=default_seconds,
            default=dict(state.task.space.default),
        )
        if state.verified is None or record.speedup > state.verified.speedup:
            state.verified = record
        self.store(state, record)

    def _drop(self, job: _Job) -> None:
        _remove(job.built)
        if job.kind in ("candidate", "measure"):
            job.state.in_flight -= 1

    def _give_up(self, state: _State, why: str) -> None:
        state.given_up = why
        for queue in (self.to_build, self.to_run):
            for job in [j for j in queue if j.state is state]:
                queue.remove(job)
                self._drop(job)


def write_task(task: Task, folder: Path) -> None:
    """What workers read about a task, to a new folder."""
    import numpy as np
    import tvm

    folder.mkdir()
    (folder / FUNCTION).write_text(tvm.ir.save_json(task.func), encoding="utf-8")
    with (folder / ARGUMENTS).open("wb") as file:
        arrays = {str(index): array for index, array in task.constants.items()}
        np.savez(file, allow_pickle=False, **arrays)
    parameters = [
        [[int(side) for side in buffer.shape], str(buffer.dtype)] for buffer in task.func.params
    ]
    details = {
        "parameters": parameters,
        "results": list(task.results),
        "is_integer": task.is_integer,
    }
    (folder / DETAILS).write_text(json.dumps(details), encoding="utf-8")


def _workers(target: Target, rpc: Rpc | None) -> tuple[list[Worker], Worker]:
    """A builder for each core, and the runner on the last cores."""
    cores = _cores()
    builders = builders_here()
    if rpc is None:
        return builders, Worker(cores[-target.threads :], target.threads)
    remote = {"op": "connect", "tracker": rpc.tracker, "key": rpc.key, "threads": target.threads}
    return builders, Worker(cores, 1, [remote])


def builders_here() -> list[Worker]:
    """A worker for each core, up to what is of use."""
    return [Worker([core], 1) for core in _cores()[:_MOST_BUILDERS]]


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def target_fields(target: Target) -> dict[str, Any]:
    """A target as JSON has it."""
    fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    fields["tvm_options"] = {
        k: list(v) if isinstance(v, (list, tuple)) else v for k, v in target.tvm_options.items()
    }
    fields["capabilities"] = sorted(target.capabilities)
    for name in ("toolchain", "compiler_flags"):
        fields[name] = list(fields[name])
    return fields


def _remove(path: Path | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()
