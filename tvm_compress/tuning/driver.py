"""The tuning run: which task gets the next trials, workers kept busy, every result stored at once.

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
from ..report.text import time_text
from ..schedules.choice import choice_from_json, choice_to_json
from .pool import Worker, wait_for
from .proposals import Proposals
from .record import Conditions, Record
from .rpc import Rpc
from .scratch import scratch_folder
from .worker import ARGUMENTS, DETAILS, FUNCTION, REFERENCE

if TYPE_CHECKING:
    from ..schedules.choice import Choice
    from ..targets import Target
    from .database import Database
    from .tasks import Task

_BATCH = 8  # trials of a task before another may get the next
# A task is finished when this many trials brought less than this much.
_PATIENCE, _LEAST_GAIN = 64, 0.01
# What the first batch of a task wins on average (measured: 0 to 15 % in all, most of it soon).
_HOPE = 0.08
# All tasks together: when no more than this part of the time is expected to be won.
_LEAST_TOTAL_GAIN = 0.002
# A new best is checked against the default when it gains this much over the last one checked.
_WORTH_CHECKING = 0.98
# A winner that is not faster than the default by this much, measured in turns, is not one.
_WORTH_USING = 0.99
# Failures in a row, from the first trial on, after which a task is given up.
_HOPELESS_FAILURES = 12
_AHEAD = 6  # candidates that wait for a worker
_MOST_BUILDERS = 8  # more build faster than one can measure


@dataclass(frozen=True)
class Budget:
    """When to stop: after `trials` measured candidates, those of earlier runs included, or after
    `minutes`; before that, when nothing more is to be expected, but not if `is_exhaustive`."""

    trials: int | None = None
    minutes: float | None = None
    is_exhaustive: bool = False


@dataclass(frozen=True)
class Limits:
    """Seconds that one request may take."""

    build: float = 60.0
    prepare: float = 180.0
    measure: float = 30.0
    compare: float = 240.0


@dataclass(frozen=True)
class TaskResult:
    """What tuning knows about one task. Times are of one call, on the machine that measured."""

    workload: str
    name: str
    template: str
    calls: int
    space: int | None  # choices; None: too many to count
    trials: int
    failures: int
    default_us: float | None
    best_us: float | None
    default: Mapping[str, int]
    choice: Mapping[str, int] | None  # verified, and faster than the default
    speedup: float
    state: Literal["converged", "open", "given up"]
    note: str = ""


@dataclass(frozen=True)
class TuningResult:
    """The result of one run."""

    tasks: tuple[TaskResult, ...]
    trials: int  # of this run
    trials_before: int  # of earlier runs, found in the database
    seconds: float
    default_us: float  # of one inference, tuned kernels only
    best_us: float
    expected_gain: float  # part of `best_us` that more trials might win
    stopped: Literal["converged", "trials", "minutes"]

    @property
    def trials_per_minute(self) -> float:
        return 60 * self.trials / max(self.seconds, 1e-9)


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


# --- one task -----------------------------------------------------------------------------------


@dataclass
class _State:
    """A task while it is tuned."""

    task: Task
    folder: Path
    proposals: Proposals
    trials: int = 0
    failures: int = 0
    in_flight: int = 0  # candidates between proposal and result
    results: dict[str, float] = field(default_factory=dict)  # choice => seconds, no failures
    history: list[float | None] = field(default_factory=list)  # best after each trial
    verified: Record | None = None
    checked: set[str] = field(default_factory=set)  # choices compared with the default
    winner: _Job | None = None  # built, to be compared when the default is built as well
    is_asked: bool = False  # its reference is being built
    is_ready: bool = False  # the naive function ran
    is_checking: bool = False
    is_exhausted: bool = False
    is_patient: bool = False  # does not converge
    given_up: str = ""

    @property
    def default(self) -> str:
        return choice_to_json(self.task.space.default)

    @property
    def default_seconds(self) -> float | None:
        return self.results.get(self.default)

    @property
    def best(self) -> str | None:
        """The fastest choice, as text."""
        return min(self.results, key=self.results.__getitem__, default=None)

    @property
    def best_seconds(self) -> float | None:
        return min(self.results.values(), default=None)

    @property
    def default_library(self) -> Path:
        return self.folder / "default.so"

    @property
    def share(self) -> float:
        """Seconds of one inference spent in this task, at its best."""
        return self.task.calls * (self.best_seconds or self.default_seconds or 0.0)

    @property
    def is_converged(self) -> bool:
        if self.given_up or self.is_exhausted:
            return True
        if len(self.history) < _PATIENCE or self.is_patient:
            return False
        before = self.history[-_PATIENCE]
        if before is None or self.best_seconds is None:
            return False
        return self.best_seconds > before * (1 - _LEAST_GAIN)

    @property
    def expected_gain(self) -> float:
        """Part of its time that the next batch may win: what the last trials won, and a hope that
        shrinks with their number."""
        if self.is_converged:
            return 0.0
        window = self.history[-2 * _BATCH :]
        recent = 0.0
        if window and window[0] and self.best_seconds:
            recent = 1 - self.best_seconds / window[0]
        return 0.5 * recent + _HOPE / (1 + len(self.history) / (2 * _BATCH))

    @property
    def wants_check(self) -> bool:
        """Whether the best so far should be compared with the default on fresh data."""
        best, seconds = self.best, self.best_seconds
        if best is None or seconds is None or self.default_seconds is None:
            return False
        if self.given_up or self.is_checking or best == self.default or best in self.checked:
            return False
        known = self.verified.seconds if self.verified is not None else None
        if known is None:
            known = self.default_seconds
        return seconds < _WORTH_CHECKING * known


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


class _Run:
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
        self.target, self.database, self.budget = target, database, budget
        self.limits, self.folder = limits, folder
        self.conditions = Conditions.of(target, cpu)
        self.target_fields = target_fields(target)
        self.builders, self.runner = _workers(target, rpc)
        self.pausing = [b for b in self.builders if rpc is None and b.shares(self.runner)]
        self.states = [self._state(task, index) for index, task in enumerate(tasks)]
        self.to_build: deque[_Job] = deque()
        self.to_run: deque[_Job] = deque()
        self.trials = 0
        self.trials_before = sum(state.trials for state in self.states)
        self.stopping = False
        self.numbers = 0

    def _state(self, task: Task, index: int) -> _State:
        proposals = Proposals(task.space, int(task.key[:8], 16))
        state = _State(
            task,
            self.folder / f"task{index}",
            proposals,
            is_patient=self.budget.is_exhaustive,
        )
        trials: dict[str, Record] = {}  # a winner refused by the comparison has two records
        for record in self.database.measured(task.key, self.conditions):
            if not record.fits(task.space):
                continue
            if record.is_verified:
                state.verified = record
                state.checked.add(choice_to_json(record.choice))
            else:
                trials[choice_to_json(record.choice)] = record
        for record in trials.values():
            self._take(state, record.choice, record.seconds)
        return state

    # The loop

    def run(self, progress: Progress) -> TuningResult:
        started = time.monotonic()
        stopped: Literal["converged", "trials", "minutes"] = "converged"
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
                    self._summary(time.monotonic() - started),
                    self._fraction(elapsed),
                )
        return self._result(time.monotonic() - started, stopped)

    def _reason_to_stop(self, elapsed: float) -> Literal["converged", "trials", "minutes"] | None:
        budget = self.budget
        planned = sum(state.in_flight for state in self.states)
        if budget.trials is not None and self.trials_before + self.trials >= budget.trials:
            return "trials"
        if budget.minutes is not None and elapsed >= 60 * budget.minutes:
            return "minutes"
        if planned == 0 and self._is_idle() and self._next_task() is None:
            return "converged"
        return None

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

    def _next_task(self) -> _State | None:
        """First every task's default is measured; then the task with the most to win gets a
        batch."""
        fresh = [s for s in self.states if s.trials + s.in_flight == 0 and not s.given_up]
        if fresh:
            return fresh[0]
        if any(s.default_seconds is None and s.in_flight for s in self.states):
            return None  # their share of the time is not known yet
        totals = self._totals_of_sides()
        open_states = [
            s for s in self.states if not s.is_converged and s.in_flight < 2 * _BATCH and s.share
        ]
        if not open_states:
            return None
        gains = [s.share / totals[s.task.side] * s.expected_gain for s in open_states]
        if sum(gains) < _LEAST_TOTAL_GAIN * len(totals) and not self.budget.is_exhaustive:
            return None
        return open_states[max(range(len(gains)), key=gains.__getitem__)]

    def _totals_of_sides(self) -> dict[str, float]:
        """Seconds of one inference of each model."""
        totals: dict[str, float] = {}
        for state in self.states:
            totals[state.task.side] = totals.get(state.task.side, 0.0) + state.share
        return totals

    def _propose(self) -> None:
        if self.stopping or len(self.to_build) + len(self.to_run) >= _AHEAD:
            return
        state = self._next_task()
        if state is None:
            return
        self._ask_reference(state)
        count = 1 if state.default_seconds is None and not state.trials else _BATCH
        if self.budget.trials is not None:
            planned = sum(s.in_flight for s in self.states)
            left = self.budget.trials - self.trials_before - self.trials - planned
            count = min(count, left)
        choices = state.proposals.ask(count)
        state.is_exhausted = len(choices) < count
        for choice in choices:
            state.in_flight += 1
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
                "best": state.best_seconds,
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
        state.in_flight -= 1
        self.trials += 1
        self._store(self._record(state, choice, seconds, error))
        self._take(state, choice, seconds)
        is_default = choice_to_json(choice) == state.default
        if is_default and seconds is not None and job.built is not None:
            job.built.replace(state.default_library)
        else:
            _remove(job.built)
        if state.failures >= _HOPELESS_FAILURES and state.best is None:
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
            self._store(self._record(state, choice, None, error))
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
            self._record(state, choice, seconds, ""),
            default_seconds=default_seconds,
            default=dict(state.task.space.default),
        )
        if state.verified is None or record.speedup > state.verified.speedup:
            state.verified = record
        self._store(record)

    def _record(self, state: _State, choice: Choice, seconds: float | None, error: str) -> Record:
        space = state.task.space
        return Record(state.task.key, space.template, choice, self.conditions, seconds, error)

    def _take(self, state: _State, choice: Choice, seconds: float | None) -> None:
        """Note the result of a trial, of this run or an earlier one."""
        state.trials += 1
        state.failures += seconds is None
        state.proposals.tell(choice, seconds)
        if seconds is not None:
            state.results[choice_to_json(choice)] = seconds
        state.history.append(state.best_seconds)

    def _store(self, record: Record) -> None:
        state = next(s for s in self.states if s.task.key == record.workload)
        self.database.add(
            record,
            space=state.task.space,
            block=state.task.block,
            func=state.task.func,
            tvm_options=self.target.tvm_options,
        )

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

    # What to say

    def _totals(self) -> tuple[float, float]:
        """Seconds of one inference by default, and with what builds would use now: winners that
        were compared with their default."""
        default = best = 0.0
        for state in self.states:
            if state.default_seconds is not None:
                seconds = state.task.calls * state.default_seconds
                default += seconds
                best += seconds / (state.verified.speedup if state.verified is not None else 1.0)
        return default, best

    def _expected_gain(self) -> float:
        total = sum(state.share for state in self.states)
        gain = sum(state.share * min(0.3, state.expected_gain) for state in self.states)
        return gain / total if total else 0.0

    def _summary(self, elapsed: float) -> str:
        default, best = self._totals()
        if not default:
            return "starting"
        rate = 60 * self.trials / max(elapsed, 1e-9)
        return (
            f"{time_text(default * 1e6)} -> {time_text(best * 1e6)}, "
            f"{self._expected_gain():.0%} to win, {rate:.0f}/min"
        )

    def _fraction(self, elapsed: float) -> float | None:
        if self.budget.minutes is not None:
            return min(1.0, elapsed / (60 * self.budget.minutes))
        if self.budget.trials is not None:
            return min(1.0, (self.trials_before + self.trials) / self.budget.trials)
        return None

    def _result(
        self, seconds: float, stopped: Literal["converged", "trials", "minutes"]
    ) -> TuningResult:
        default, best = self._totals()
        return TuningResult(
            tasks=tuple(_task_result(state) for state in self.states),
            trials=self.trials,
            trials_before=self.trials_before,
            seconds=seconds,
            default_us=default * 1e6,
            best_us=best * 1e6,
            expected_gain=self._expected_gain(),
            stopped=stopped,
        )


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


def _task_result(state: _State) -> TaskResult:
    verified = state.verified
    is_better = verified is not None and dict(verified.choice) != dict(state.task.space.default)
    is_open = not state.is_converged
    return TaskResult(
        workload=state.task.key,
        name=state.task.name,
        template=state.task.space.template,
        calls=state.task.calls,
        space=state.proposals.size,
        trials=state.trials,
        failures=state.failures,
        default_us=None if state.default_seconds is None else state.default_seconds * 1e6,
        best_us=None if state.best_seconds is None else state.best_seconds * 1e6,
        default=dict(state.task.space.default),
        choice=dict(verified.choice) if verified is not None and is_better else None,
        speedup=verified.speedup if verified is not None else 1.0,
        state="given up" if state.given_up else "open" if is_open else "converged",
        note=state.given_up,
    )


def _workers(target: Target, rpc: Rpc | None) -> tuple[list[Worker], Worker]:
    """A builder for each core, and the runner on the last cores."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    builders = [Worker([core], 1) for core in cores[:_MOST_BUILDERS]]
    if rpc is None:
        return builders, Worker(cores[-target.threads :], target.threads)
    remote = {"op": "connect", "tracker": rpc.tracker, "key": rpc.key, "threads": target.threads}
    return builders, Worker(cores, 1, [remote])


def target_fields(target: Target) -> dict[str, Any]:
    """A target as JSON has it."""
    fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    fields["tvm_options"] = {
        k: list(v) if isinstance(v, (list, tuple)) else v for k, v in target.tvm_options.items()
    }
    fields["capabilities"] = sorted(target.capabilities)
    fields["toolchain"] = list(target.toolchain)
    return fields


def _remove(path: Path | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()
