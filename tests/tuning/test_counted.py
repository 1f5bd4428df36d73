"""Tuning by instructions: exact, repeatable, and a candidate that crashes takes none along."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.schedules import schedule
from tvm_compress.schedules.choice import choice_to_json
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools
from tvm_compress.tuning import pool
from tvm_compress.tuning.counted import count_tasks
from tvm_compress.tuning.database import Database, TunedChoices
from tvm_compress.tuning.ledger import Budget
from tvm_compress.tuning.record import INSTRUCTIONS, Conditions
from tvm_compress.tuning.tune import device_of

from .tuning_tasks import small_task

M4 = get_target("cortex-m4")
FAULTS = ("crashes", "does nothing")

pytestmark = [
    pytest.mark.links,
    pytest.mark.skipif(bool(missing_tools(M4)), reason=f"missing: {', '.join(missing_tools(M4))}"),
]


def test_candidates_are_counted_and_faults_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small_task(len(FAULTS) + 3, M4)
    texts = [choice_to_json(choice) for choice in task.space]
    faults = dict(zip(texts[1:], FAULTS, strict=False))
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    script = Path(__file__).parent / "faulty_worker.py"
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, str(script)))
    database = Database(tmp_path / "db", shipped=False)
    first = count_tasks([task], M4, database, Budget(trials=4))
    assert (first.measure, first.trials, first.stopped) == (INSTRUCTIONS, 4, "trials")
    again = Database(tmp_path / "db", shipped=False)
    result = count_tasks([task], M4, again, Budget())  # the same command goes on
    assert (result.trials_before, result.trials, result.stopped) == (4, 1, "converged")
    (found,) = result.tasks
    assert (found.trials, found.failures) == (len(texts), len(FAULTS))

    conditions = Conditions.of(M4, device_of(M4), INSTRUCTIONS)
    records = again.measured(task.key, conditions)
    errors = {choice_to_json(r.choice): r.error for r in records if r.error}
    assert {faults[text] for text in errors} == set(FAULTS)
    by_fault = {faults[text]: error for text, error in errors.items()}
    assert "qemu-system-arm ended with status" in by_fault["crashes"]
    assert by_fault["does nothing"].startswith("wrong result: ")
    counts = {choice_to_json(r.choice): r.cost for r in records if r.cost is not None}
    assert len(counts) == 3
    # Every product is computed: `smlad` does two at a time.
    products = 6 * 6 * 9 * 8 * 16
    assert all(products / 2 < cost < 4 * products and cost == int(cost) for cost in counts.values())
    (winner,) = again.winners()
    assert winner.cost == min(counts.values())
    assert winner.default_cost == counts[choice_to_json(task.space.default)]
    assert again.measured(task.key, dataclasses.replace(conditions, measure="seconds")) == []

    # Nothing is left to do, so nothing is started.
    done = count_tasks([task], M4, Database(tmp_path / "db", shipped=False), Budget())
    assert (done.trials_before, done.trials, done.stopped) == (len(texts), 0, "converged")
    assert done.best_cost == winner.cost

    choices = TunedChoices(again, M4, device_of(M4))
    chosen = choices(task.func)
    assert chosen == winner.choice and choices.tuned == 1
    assert schedule(task.func, M4, chosen) is not None
    exported = tmp_path / "records.json"
    again.export(exported)
    (entry,) = json.loads(exported.read_text())["records"]
    assert entry["instructions"] == winner.cost and "seconds" not in entry
    assert np.isclose(entry["default_instructions"] / entry["instructions"], winner.speedup)
