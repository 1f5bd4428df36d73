"""Records: in MetaSchedule's files and back, looked up by capabilities, merged, damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tvm

from tvm_compress.errors import DatabaseError
from tvm_compress.relay_passes.schedule_kernels import ScheduleKernels
from tvm_compress.schedules.choice import CHOICE_ATTR, choice_from_json
from tvm_compress.targets import Target
from tvm_compress.tuning.database import (
    RECORDS,
    SHIPPED,
    WORKLOADS,
    Database,
    TunedChoices,
    read_export,
)
from tvm_compress.tuning.record import INSTRUCTIONS, Conditions, Record
from tvm_compress.tuning.tasks import Task

from .tuning_tasks import CPU, TARGET, conv_task

TASK = conv_task()
OTHER = next(c for c in TASK.space if c != TASK.space.default)


def record(choice: Any = OTHER, target: Target = TARGET, **changes: Any) -> Record:
    """A verified record, twice as fast as the default."""
    fields: dict[str, Any] = {
        "workload": TASK.key,
        "template": TASK.space.template,
        "choice": dict(choice),
        "conditions": Conditions.of(target, CPU),
        "cost": 1e-5,
        "default_cost": 2e-5,
        "default": dict(TASK.space.default),
    }
    return Record(**{**fields, **changes})


def add(database: Database, found: Record, task: Task = TASK) -> None:
    database.add(
        found, space=task.space, block=task.block, func=task.func, tvm_options=TARGET.tvm_options
    )


def test_round_trip(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", shipped=False)
    records = [
        record(default_cost=None),
        record(TASK.space.default, cost=None, default_cost=None, error="crashed: SIGSEGV"),
        record(),
    ]
    for each in records:
        add(database, each)
    again = Database(tmp_path / "db", shipped=False)
    assert again.measured(TASK.key, records[0].conditions) == records
    assert again.winners() == [records[2]]
    assert again.measured(TASK.key, Conditions.of(TARGET, "another CPU")) == []


def test_metaschedule_reads_and_replays_the_records(tmp_path: Path) -> None:
    import tvm.s_tir.meta_schedule as ms

    database = Database(tmp_path, shipped=False)
    add(database, record(cost=None, default_cost=None, error="timeout"))
    add(database, record())
    theirs = ms.database.JSONDatabase(work_dir=str(tmp_path))
    (best,) = theirs.get_top_k(theirs.get_all_tuning_records()[0].workload, 1)
    assert [float(s) for s in best.run_secs] == [pytest.approx(1e-5)]
    assert best.target.attrs["num-cores"] == 1
    replayed = tvm.s_tir.Schedule(best.workload.mod)
    best.trace.apply_to_schedule(replayed, remove_postproc=False)
    block = replayed.get(replayed.get_sblock(TASK.block))
    noted = {
        str(key).rpartition(".")[2]: int(value)
        for key, value in block.annotations.items()
        if ".choice." in str(key)
    }
    assert noted == OTHER


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    add(Database(tmp_path, shipped=False), record(cost=1.5e-5))
    with (tmp_path / RECORDS).open("a") as file:
        file.write('[0,[[[["GetSB')
    database = Database(tmp_path, shipped=False)
    add(database, record())
    assert len(Database(tmp_path, shipped=False).measured(TASK.key, record().conditions)) == 2


def test_two_writers_share_the_files(tmp_path: Path) -> None:
    one, other = (Database(tmp_path, shipped=False) for _ in range(2))
    second = conv_task(strides=(2, 2))
    add(one, record())
    add(other, record(workload=second.key), second)
    add(one, record(workload=second.key, cost=None, default_cost=None), second)
    lines = (tmp_path / WORKLOADS).read_text().splitlines()
    assert len(lines) == 2
    indices = [json.loads(line)[0] for line in (tmp_path / RECORDS).read_text().splitlines()]
    assert indices == [0, 1, 1]


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "[0, [[[], []], [1.0], {}]",
        '[0,[[[["SampleCategorical",[],[[1],[1]],["v"]]],[]],[1e-5],{},null]]',
        '[0,[[[["Annotate",["b","\\"{}\\""],["tvm_compress.record"],[]]],[]],[1e-5],{},null]]',
    ],
)
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    add(Database(tmp_path, shipped=False), record())
    with (tmp_path / RECORDS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DatabaseError, match="line 2: .*--database"):
        Database(tmp_path, shipped=False)


def test_records_of_other_schedule_rules_are_left_alone(tmp_path: Path) -> None:
    tmp_path.joinpath(RECORDS).write_text(
        '[0,[[[["GetSBlock",[],["C","main"],["b0"]]],[]],[1e-5],{},null]]\n'
    )
    assert Database(tmp_path, shipped=False).winners() == []


def test_export_and_import(tmp_path: Path) -> None:
    database = Database(tmp_path / "one", shipped=False)
    add(database, record(default_cost=None))
    add(database, record())
    exported = tmp_path / "records.json"
    assert database.export(exported) == 1
    assert database.export(tmp_path / "none.json", workloads=["other"]) == 0
    other = Database(tmp_path / "two", shipped=False)
    add(other, record(TASK.space.default, default_cost=1.1e-5))
    assert other.merge(exported) == 1
    assert other.merge(exported) == 0
    assert Database(tmp_path / "two", shipped=False).winners() == [record()]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "tvm-compress tuning records", "version": 2, "records": []}',
        '{"format": "tvm-compress tuning records", "version": 1, "records": [{"workload": 1}]}',
        "[" * 100_000,
    ],
)
def test_import_of_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(DatabaseError, match="records.json"):
        Database(tmp_path / "db", shipped=False).merge(path)
    with pytest.raises(DatabaseError, match="missing.json"):
        Database(tmp_path / "db", shipped=False).merge(tmp_path / "missing.json")
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", True])
def test_times_are_times(seconds: Any) -> None:
    with pytest.raises(ValueError):
        Record.from_json({**record().to_json(), "seconds": seconds})


def test_lookup_by_capabilities_threads_and_cpu(tmp_path: Path) -> None:
    database = Database(tmp_path, shipped=False)
    mine, foreign = record(), record(conditions=Conditions.of(TARGET, "Z"), cost=1e-6)
    add(database, mine)
    add(database, foreign)

    def found(target: Target, cpu: str = "") -> list[Record]:
        return database.lookup(TASK.key, target, cpu)

    more = dataclasses.replace(TARGET, capabilities=TARGET.capabilities | {"avx9"})
    less = dataclasses.replace(TARGET, capabilities=TARGET.capabilities - {"popcnt"})
    assert found(TARGET) == [foreign, mine]
    assert found(TARGET, CPU) == [mine, foreign]
    assert found(more, CPU) == [mine, foreign]
    assert found(less) == []
    assert found(dataclasses.replace(TARGET, threads=2)) == []
    four = record(target=dataclasses.replace(TARGET, threads=4))
    add(database, four)
    assert found(TARGET, CPU) == [mine, foreign]
    for threads, expected in ((1, [mine, foreign]), (2, [four]), (4, [four]), (8, [])):
        assert found(dataclasses.replace(TARGET, threads=threads), CPU) == expected
    assert found(dataclasses.replace(TARGET, vector_bits=256)) == []


def scheduled(database: Database) -> tuple[Any, TunedChoices]:
    choices = TunedChoices(database, TARGET, CPU)
    module = tvm.IRModule({"conv": TASK.func})
    return ScheduleKernels(TARGET, choices)(module)["conv"].attrs, choices


def test_builds_use_the_choice(tmp_path: Path) -> None:
    database = Database(tmp_path, shipped=False)
    attrs, choices = scheduled(database)
    assert CHOICE_ATTR not in attrs
    assert (choices.tuned, choices.tunable) == (0, 1)
    add(database, record())
    attrs, choices = scheduled(database)
    assert choice_from_json(str(attrs[CHOICE_ATTR])) == OTHER
    assert (choices.tuned, choices.tunable) == (1, 1)


def test_a_change_of_the_default_starts_anew(tmp_path: Path) -> None:
    database = Database(tmp_path, shipped=False)
    third = next(c for c in TASK.space if c not in (OTHER, TASK.space.default))
    add(database, record(third, default=OTHER, default_cost=9e-5))
    add(database, record())
    assert choice_from_json(str(scheduled(database)[0][CHOICE_ATTR])) == OTHER


@pytest.mark.parametrize(
    "outdated",
    [
        {"choice": {**OTHER, "new": 1}},
        {"choice": {**OTHER, "rows": 1000}},
        {"template": "x86.other"},
        {"default_cost": None},
        {"cost": None},
        {"default": OTHER},
    ],
)
def test_what_does_not_fit_is_passed_over(tmp_path: Path, outdated: dict[str, Any]) -> None:
    database = Database(tmp_path, shipped=False)
    exported = tmp_path / "records.json"
    add(database, dataclasses.replace(record(), **outdated))
    attrs, choices = scheduled(database)
    assert CHOICE_ATTR not in attrs
    assert (choices.tuned, choices.tunable) == (0, 1)
    assert database.export(exported) == int(dataclasses.replace(record(), **outdated).is_verified)


def test_instructions_and_times_do_not_mix(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", shipped=False)
    counted = Conditions.of(TARGET, CPU, INSTRUCTIONS)
    found = record(conditions=counted, cost=1000, default_cost=1200)
    add(database, found)
    add(database, record(conditions=counted, cost=900, default_cost=None))
    again = Database(tmp_path / "db", shipped=False)
    assert again.winners() == [found]  # both files know what was measured
    assert again.measured(TASK.key, Conditions.of(TARGET, CPU)) == []
    assert again.lookup(TASK.key, TARGET, CPU) == []
    emulated = dataclasses.replace(TARGET, compiler="gcc", runner="qemu_user")
    assert again.lookup(TASK.key, emulated, CPU) == [found]
    add(again, record())  # what was measured on a real machine comes first
    best = [r.conditions.measure for r in again.lookup(TASK.key, emulated, CPU)]
    assert best == ["seconds", INSTRUCTIONS]


def test_shipped_files_hold_winners_only() -> None:
    records = [record for path in SHIPPED.glob("*.json") for record in read_export(path)]
    assert records
    assert all(record.is_verified and record.speedup >= 1 for record in records)
