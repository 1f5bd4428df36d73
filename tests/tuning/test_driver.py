"""A tuning run whose candidates crash, hang and lie goes on; what was measured is never lost."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tvm_compress import interrupts
from tvm_compress.progress import Progress
from tvm_compress.schedules.choice import choice_to_json
from tvm_compress.tuning import driver, pool
from tvm_compress.tuning.database import Database
from tvm_compress.tuning.driver import Limits, tune_tasks
from tvm_compress.tuning.ledger import Budget, TuningResult
from tvm_compress.tuning.record import Conditions
from tvm_compress.tuning.tasks import Task, merge_tasks

from .tuning_tasks import CPU, TARGET, conv_task, small_task

pytestmark = pytest.mark.links

FAULTS = ("does not compile", "compiler crashes", "wrong", "hangs", "lucky")
LIMITS = Limits(measure=3.0)


def run(
    tasks: list[Task], folder: Path, budget: Budget | None = None, progress: Progress | None = None
) -> TuningResult:
    return tune_tasks(
        tasks,
        TARGET,
        Database(folder, shipped=False),
        budget or Budget(),
        cpu=CPU,
        limits=LIMITS,
        progress=progress,
    )


def measured(folder: Path, task: Task) -> dict[str, str]:
    """Choice => error of everything in the database, winners' records left out."""
    records = Database(folder, shipped=False).measured(task.key, Conditions.of(TARGET, CPU))
    return {choice_to_json(r.choice): r.error for r in records if not r.is_verified}


def test_faults_are_recorded_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small_task(len(FAULTS) + 4)
    texts = [choice_to_json(choice) for choice in task.space]
    faults = dict(zip(texts[2:], FAULTS, strict=False))
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    script = Path(__file__).parent / "faulty_worker.py"
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, str(script)))
    result = run([task], tmp_path)

    (found,) = result.tasks
    assert result.stopped == "converged"
    assert found.trials == found.space == len(texts)
    assert found.failures == len(FAULTS)
    errors = {faults[text]: error for text, error in measured(tmp_path, task).items() if error}
    assert set(errors) == set(FAULTS)
    assert "out of registers while compiling" in errors["does not compile"]
    assert errors["compiler crashes"] == "does not compile: crashed: SIGSEGV"
    assert errors["hangs"] == "timeout: no answer within 3 s"
    assert errors["wrong"].startswith("wrong result: ")
    # It had the best time by far, and was refused on fresh data.
    assert errors["lucky"].startswith("wrong result: ")
    for winner in Database(tmp_path, shipped=False).winners():
        assert choice_to_json(winner.choice) not in faults


class Stop(Progress):
    """Ctrl-C after some trials."""

    def __init__(self, after: int) -> None:
        self.after = after

    def meter(self, label: str, total: int | None) -> Stop:  # type: ignore[override]
        return self

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, done: int, _text: str, _fraction: float | None) -> None:
        if done >= self.after:
            signal.raise_signal(signal.SIGINT)


class Listener(Stop):
    """Notes what would be shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def show(self, done: int, text: str, fraction: float | None) -> None:
        assert fraction is None or 0 <= fraction <= 1
        self.shown.append(text)


@pytest.fixture
def watched() -> Iterator[None]:
    """SIGINT as the command line handles it; forgotten afterwards."""
    before = signal.getsignal(signal.SIGINT)
    interrupts.watch()
    yield
    interrupts.watch()
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("watched")
def test_interrupted_then_resumed(tmp_path: Path) -> None:
    tasks = [conv_task(), conv_task(strides=(2, 2))]
    with pytest.raises(KeyboardInterrupt):
        run(tasks, tmp_path, Budget(trials=12), Stop(after=5))
    interrupts.watch()
    before = sum(len(measured(tmp_path, task)) for task in tasks)
    assert 5 <= before <= 8
    listener = Listener()
    result = run(tasks, tmp_path, Budget(trials=12), listener)
    assert "/min" in listener.shown[-1] and "to win" in listener.shown[-1]
    assert (result.trials_before, result.trials, result.stopped) == (before, 12 - before, "trials")
    assert sum(len(measured(tmp_path, task)) for task in tasks) == 12
    assert all(task.default_cost for task in result.tasks)
    assert result.best_cost <= result.default_cost
    again = run(tasks, tmp_path, Budget(trials=12))
    assert (again.trials_before, again.trials) == (12, 0)


def test_models_tuned_together_share_their_kernels_and_their_chances(tmp_path: Path) -> None:
    """A large original takes no trials away from the small model that it is compared with."""
    one, other = conv_task(), conv_task(strides=(2, 2))
    merged = merge_tasks({"small": [one], "large": [one, other]})
    assert [(task.key, task.side) for task in merged] == [(one.key, "small"), (other.key, "large")]
    for sides, expected in ((("small", "large"), one), (("same", "same"), other)):
        folder = tmp_path / "-".join(sides)
        database = Database(folder / "db", shipped=False)
        tasks = [dataclasses.replace(t, side=s) for t, s in zip((one, other), sides, strict=True)]
        waiting = driver._Run(tasks, TARGET, database, Budget(), CPU, None, LIMITS, folder)
        small, large = waiting.states
        # Both have their default; the larger had eight trials more, which brought nothing.
        small.take(one.space.default, 1e-6)
        for _, choice in zip(range(9), other.space, strict=False):
            large.take(choice, 1e-3)
        large.take(other.space.default, 1e-3)
        chosen = waiting.next_task()
        assert chosen is not None and chosen.task.key == expected.key


def test_naive_function_that_does_not_run_ends_its_task_only(tmp_path: Path) -> None:
    good = small_task(2)
    bad = dataclasses.replace(conv_task(strides=(2, 2)), constants={1: good.constants[1][:, :1]})
    result = run([bad, good], tmp_path)
    assert [task.state for task in result.tasks] == ["given up", "converged"]
    assert "naive function does not run" in result.tasks[0].note
    assert result.tasks[1].trials == 2
