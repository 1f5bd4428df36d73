"""What a tuning run knows: results by task, where more is to be won, when to stop.

Costs are those of one call, in seconds or instructions (`record.MEASURES`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from ..report.text import count_text, time_text
from ..schedules.choice import choice_to_json
from .proposals import Proposals
from .record import SECONDS, Conditions, Record

if TYPE_CHECKING:
    from ..schedules.choice import Choice
    from ..targets import Target
    from .database import Database
    from .tasks import Task

BATCH = 8  # trials of a task before another may get the next
# A task is finished when this many trials brought less than this much.
_PATIENCE, _LEAST_GAIN = 64, 0.01
# What the first batch of a task wins on average (measured: 0 to 15 % in all, most of it soon).
_HOPE = 0.08
# All tasks together: when no more than this part of the cost is expected to be won.
_LEAST_TOTAL_GAIN = 0.002
# Failures in a row, from the first trial on, after which a task is given up.
_HOPELESS_FAILURES = 12

Reason = Literal["converged", "trials", "minutes"]


@dataclass(frozen=True)
class Budget:
    """When to stop: after `trials` measured candidates, those of earlier runs included, or after
    `minutes`; before that, when nothing more is to be expected, but not if `is_exhaustive`."""

    trials: int | None = None
    minutes: float | None = None
    is_exhaustive: bool = False


@dataclass(frozen=True)
class TaskResult:
    """What tuning knows about one task. Costs are of one call, on the machine that measured."""

    workload: str
    name: str
    template: str
    calls: int
    space: int | None  # choices; None: too many to count
    trials: int
    failures: int
    default_cost: float | None
    best_cost: float | None
    default: Mapping[str, int]
    choice: Mapping[str, int] | None  # verified, and cheaper than the default
    speedup: float
    state: Literal["converged", "open", "given up"]
    note: str = ""


@dataclass(frozen=True)
class TuningResult:
    """The result of one run."""

    measure: str
    """What costs are in: `seconds` or `instructions`."""
    tasks: tuple[TaskResult, ...]
    trials: int  # of this run
    trials_before: int  # of earlier runs, found in the database
    seconds: float
    default_cost: float  # of one inference, tuned kernels only
    best_cost: float
    expected_gain: float  # part of `best_cost` that more trials might win
    stopped: Reason

    @property
    def trials_per_minute(self) -> float:
        return 60 * self.trials / max(self.seconds, 1e-9)


def cost_text(cost: float, measure: str) -> str:
    """`1.23 ms`, `4.56 M instructions`."""
    return time_text(cost * 1e6) if measure == SECONDS else f"{count_text(cost)} instructions"


@dataclass
class TaskState:
    """A task while it is tuned."""

    task: Task
    folder: Path
    """Its own, for what is built."""
    is_patient: bool = False  # does not converge
    proposals: Proposals = field(init=False)
    trials: int = 0
    failures: int = 0
    in_flight: int = 0  # candidates between proposal and result
    results: dict[str, float] = field(default_factory=dict)  # choice => cost, no failures
    history: list[float | None] = field(default_factory=list)  # best after each trial
    verified: Record | None = None
    is_exhausted: bool = False
    given_up: str = ""

    def __post_init__(self) -> None:
        self.proposals = Proposals(self.task.space, int(self.task.key[:8], 16))

    @property
    def default(self) -> str:
        return choice_to_json(self.task.space.default)

    @property
    def default_cost(self) -> float | None:
        return self.results.get(self.default)

    @property
    def best(self) -> str | None:
        """The cheapest choice, as text."""
        return min(self.results, key=self.results.__getitem__, default=None)

    @property
    def best_cost(self) -> float | None:
        return min(self.results.values(), default=None)

    @property
    def share(self) -> float:
        """Cost of the task in one inference, at its best."""
        return self.task.calls * (self.best_cost or self.default_cost or 0.0)

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing ever ran, often enough."""
        return self.failures >= _HOPELESS_FAILURES and self.best is None

    @property
    def is_converged(self) -> bool:
        if self.given_up or self.is_exhausted:
            return True
        if len(self.history) < _PATIENCE or self.is_patient:
            return False
        before = self.history[-_PATIENCE]
        if before is None or self.best_cost is None:
            return False
        return self.best_cost > before * (1 - _LEAST_GAIN)

    @property
    def expected_gain(self) -> float:
        """Part of its cost that the next batch may win: what the last trials won, and a hope that
        shrinks with their number."""
        if self.is_converged:
            return 0.0
        window = self.history[-2 * BATCH :]
        recent = 0.0
        if window and window[0] and self.best_cost:
            recent = 1 - self.best_cost / window[0]
        return 0.5 * recent + _HOPE / (1 + len(self.history) / (2 * BATCH))

    def ask(self, count: int) -> list[dict[str, int]]:
        """The next choices to measure, at most `count`; they are in flight from now on."""
        choices = self.proposals.ask(count)
        self.is_exhausted = len(choices) < count
        self.in_flight += len(choices)
        return choices

    def take(self, choice: Choice, cost: float | None) -> None:
        """Note the result of a trial, of this run or an earlier one."""
        self.trials += 1
        self.failures += cost is None
        self.proposals.tell(choice, cost)
        if cost is not None:
            self.results[choice_to_json(choice)] = cost
        self.history.append(self.best_cost)

    def recall(self, records: Sequence[Record]) -> None:
        """Take over what earlier runs measured."""
        trials: dict[str, Record] = {}  # a winner refused by the comparison has two records
        for record in records:
            if not record.fits(self.task.space):
                continue
            if record.is_verified:
                self.verified = record
            else:
                trials[choice_to_json(record.choice)] = record
        for record in trials.values():
            self.take(record.choice, record.cost)

    def result(self) -> TaskResult:
        verified, default = self.verified, dict(self.task.space.default)
        is_better = verified is not None and dict(verified.choice) != default
        is_open = not self.is_converged
        return TaskResult(
            workload=self.task.key,
            name=self.task.name,
            template=self.task.space.template,
            calls=self.task.calls,
            space=self.proposals.size,
            trials=self.trials,
            failures=self.failures,
            default_cost=self.default_cost,
            best_cost=self.best_cost,
            default=default,
            choice=dict(verified.choice) if verified is not None and is_better else None,
            speedup=verified.speedup if verified is not None else 1.0,
            state="given up" if self.given_up else "open" if is_open else "converged",
            note=self.given_up,
        )


StateT = TypeVar("StateT", bound=TaskState)


class Ledger(Generic[StateT]):
    """All tasks of a run, over the database that every result goes to."""

    def __init__(
        self,
        states: Sequence[StateT],
        target: Target,
        database: Database,
        budget: Budget,
        conditions: Conditions,
    ) -> None:
        self.states, self.target, self.database = list(states), target, database
        self.budget, self.conditions = budget, conditions
        for state in self.states:
            state.is_patient = budget.is_exhaustive
            state.recall(database.measured(state.task.key, conditions))
        self.trials = 0
        self.trials_before = sum(state.trials for state in self.states)

    # What to do next

    def next_task(self) -> StateT | None:
        """First every task's default is measured; then the task with the most to win gets a
        batch."""
        fresh = [s for s in self.states if s.trials + s.in_flight == 0 and not s.given_up]
        if fresh:
            return fresh[0]
        if any(s.default_cost is None and s.in_flight for s in self.states):
            return None  # their share of the cost is not known yet
        totals = self._totals_of_sides()
        open_states = [
            s for s in self.states if not s.is_converged and s.in_flight < 2 * BATCH and s.share
        ]
        if not open_states:
            return None
        gains = [s.share / totals[s.task.side] * s.expected_gain for s in open_states]
        if sum(gains) < _LEAST_TOTAL_GAIN * len(totals) and not self.budget.is_exhaustive:
            return None
        return open_states[max(range(len(gains)), key=gains.__getitem__)]

    def _totals_of_sides(self) -> dict[str, float]:
        """Cost of one inference of each model."""
        totals: dict[str, float] = {}
        for state in self.states:
            totals[state.task.side] = totals.get(state.task.side, 0.0) + state.share
        return totals

    def trials_for(self, state: StateT, batch: int = BATCH) -> int:
        """How many choices of `state` to ask for: the default alone at first, then as many as the
        budget has left."""
        count = 1 if state.default_cost is None and not state.trials else batch
        if self.budget.trials is None:
            return count
        planned = sum(s.in_flight for s in self.states)
        return min(count, self.budget.trials - self.trials_before - self.trials - planned)

    def is_used_up(self, elapsed: float) -> Reason | None:
        """Whether the budget is, of trials or of time (`elapsed` seconds)."""
        budget = self.budget
        if budget.trials is not None and self.trials_before + self.trials >= budget.trials:
            return "trials"
        if budget.minutes is not None and elapsed >= 60 * budget.minutes:
            return "minutes"
        return None

    # What is known

    def finish_trial(
        self, state: StateT, choice: Choice, cost: float | None, error: str = ""
    ) -> None:
        """Store the result of a candidate that was in flight."""
        state.in_flight -= 1
        self.trials += 1
        self.store(state, self.record(state, choice, cost, error))
        state.take(choice, cost)

    def record(self, state: StateT, choice: Choice, cost: float | None, error: str = "") -> Record:
        template = state.task.space.template
        return Record(state.task.key, template, choice, self.conditions, cost, error)

    def store(self, state: StateT, record: Record) -> None:
        self.database.add(
            record,
            space=state.task.space,
            block=state.task.block,
            func=state.task.func,
            tvm_options=self.target.tvm_options,
        )

    # What to say

    def _totals(self) -> tuple[float, float]:
        """Cost of one inference by default, and with what builds would use now: winners that were
        compared with their default."""
        default = best = 0.0
        for state in self.states:
            if state.default_cost is not None:
                cost = state.task.calls * state.default_cost
                default += cost
                best += cost / (state.verified.speedup if state.verified is not None else 1.0)
        return default, best

    def _expected_gain(self) -> float:
        total = sum(state.share for state in self.states)
        gain = sum(state.share * min(0.3, state.expected_gain) for state in self.states)
        return gain / total if total else 0.0

    def summary(self, elapsed: float) -> str:
        default, best = self._totals()
        if not default:
            return "starting"
        measure = self.conditions.measure
        rate = 60 * self.trials / max(elapsed, 1e-9)
        return (
            f"{cost_text(default, measure)} -> {cost_text(best, measure)}, "
            f"{self._expected_gain():.0%} to win, {rate:.0f}/min"
        )

    def fraction(self, elapsed: float) -> float | None:
        """Of the budget that is used."""
        if self.budget.minutes is not None:
            return min(1.0, elapsed / (60 * self.budget.minutes))
        if self.budget.trials is not None:
            return min(1.0, (self.trials_before + self.trials) / self.budget.trials)
        return None

    def result(self, seconds: float, stopped: Reason) -> TuningResult:
        default, best = self._totals()
        return TuningResult(
            measure=self.conditions.measure,
            tasks=tuple(state.result() for state in self.states),
            trials=self.trials,
            trials_before=self.trials_before,
            seconds=seconds,
            default_cost=default,
            best_cost=best,
            expected_gain=self._expected_gain(),
            stopped=stopped,
        )
