"""What the verb `tune` does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .database import Database
from .record import INSTRUCTIONS, SECONDS, Record

if TYPE_CHECKING:
    from ..progress import Progress
    from ..runners.rpc import Rpc
    from .ledger import TuningResult

_UNITS = {SECONDS: "us", INSTRUCTIONS: "instructions"}


def tune_command(
    model: Path | None,
    *,
    imports: tuple[Path, ...],
    export: Path | None,
    is_list: bool,
    database: Path | None,
    rpc: Rpc | None,
    progress: Progress,
    is_quiet: bool,
    **options: Any,
) -> dict[str, Any]:
    """Import, tune, list and export, in this order; returns what `--json` prints."""
    from ..report.terminal import print_rows
    from .tune import result_to_json, tune

    said: dict[str, Any] = {}
    opened = Database(database)
    for path in imports:
        said.setdefault("imported", []).append({"file": str(path), "records": opened.merge(path)})
        progress.note(f"{path}: {said['imported'][-1]['records']} records are new or better")
    workloads = None
    if model is not None:
        result = tune(
            model,
            database=database,
            rpc=rpc,
            progress=progress,
            **options,
        )
        said.update(result_to_json(result))
        workloads = [task.workload for task in result.tasks]
        opened = Database(database)
        if not is_quiet:
            print_result(result)
    if is_list:
        rows = [_row(record) for record in opened.winners()]
        said["records"] = [record.to_json() for record in opened.winners()]
        if not is_quiet:
            print_rows(rows)
    if export is not None:
        said["exported"] = opened.export(export, workloads)
        progress.note(f"{export}: {said['exported']} records")
    return said


def print_result(result: TuningResult) -> None:
    """A table of the tasks, the costliest first, and a line for all."""
    import click

    from ..report.terminal import print_rows
    from .ledger import cost_text

    tasks = sorted(result.tasks, key=lambda task: -(task.best_cost or 0) * task.calls)
    unit = _UNITS[result.measure]
    print_rows(
        [
            {
                "kernel": task.name,
                "calls": task.calls,
                "trials": task.trials,
                "failed": task.failures,
                f"default {unit}": _number(task.default_cost, result.measure),
                f"best {unit}": _number(task.best_cost, result.measure),
                "speed-up": f"{task.speedup:.2f}x",
                "state": task.state + (f": {task.note}" if task.note else ""),
            }
            for task in tasks
        ]
    )
    why = {
        "converged": "nothing more is expected",
        "trials": "all trials are used",
        "minutes": "the time is over",
    }[result.stopped]
    before = f" ({result.trials_before} from earlier runs)" if result.trials_before else ""
    speedup = result.default_cost / result.best_cost if result.best_cost else 1.0
    click.echo(
        f"{result.trials + result.trials_before} trials{before} in {result.seconds:.0f} s, "
        f"{result.trials_per_minute:.0f} a minute; {why}\n"
        f"tuned kernels {cost_text(result.default_cost, result.measure)} -> "
        f"{cost_text(result.best_cost, result.measure)}, "
        f"{speedup:.2f}x; {result.expected_gain:.1%} more to be expected"
    )


def _row(record: Record) -> dict[str, Any]:
    conditions = record.conditions
    return {
        "workload": record.workload,
        "template": record.template,
        "bits": conditions.vector_bits,
        "threads": conditions.threads,
        "cpu": conditions.cpu,
        "cost": f"{_number(record.cost, conditions.measure)} {_UNITS[conditions.measure]}",
        "speed-up": f"{record.speedup:.2f}x",
        "choice": " ".join(f"{name}={value}" for name, value in record.choice.items()),
    }


def _number(cost: float | None, measure: str) -> str:
    if cost is None:
        return "-"
    return f"{cost * 1e6:.1f}" if measure == SECONDS else f"{cost:,.0f}"
