"""How soon tuning is good: the best after 200 trials beside the best after 2,000, of five layers.

    python tests/benchmarks/tuning_convergence.py --minutes 60 --database FOLDER

Every layer is tuned to the last trial, or to the end of its space where that is smaller, whether
anything more is to be expected or not; what is left of the time is shared out among the layers that
are left. The best choice of the first trials and the best of all are then built again and timed in
turns. All is kept in `--database`: the same command goes on where one was stopped, and with
`--minutes 0` it only prints the table of what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tvm_compress.targets import Target
    from tvm_compress.tuning.database import Database
    from tvm_compress.tuning.record import Record
    from tvm_compress.tuning.tasks import Task

# name => (height, in, out, kernel, dtype)
LAYERS = {
    "resnet-50 3x3 14 int8": (14, 256, 256, 3, "int8"),
    "resnet-50 1x1 56 int8": (56, 64, 256, 1, "int8"),
    "resnet-50 3x3 28 float32": (28, 128, 128, 3, "float32"),
    "resnet-50 1x1 14 float32": (14, 1024, 256, 1, "float32"),
    "mobilenet-v2 1x1 28 int8": (28, 192, 32, 1, "int8"),
}
RATES = "rates.json"  # in the database's folder: trials and seconds of all runs, by layer
COMPARISONS = 7  # each on fresh data, with both in turns


def main() -> None:
    """Tune all layers, then print one row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="host")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--early", type=int, default=200, help="trials that should be enough")
    parser.add_argument("--trials", type=int, default=2000, help="of each layer")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all layers together")
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--database", type=Path, required=True)
    arguments = parser.parse_args()

    from tvm_compress.startup import start_without_torch

    start_without_torch()
    from tvm_compress.targets import get_target
    from tvm_compress.tuning.database import Database

    target = dataclasses.replace(get_target(arguments.target), threads=arguments.threads)
    target.require_runs_here()
    database = Database(arguments.database, shipped=False)
    tasks = {name: layer_task(name, target) for name in LAYERS if arguments.only in name}
    deadline = time.monotonic() + 60 * arguments.minutes
    for left, (name, task) in zip(range(len(tasks), 0, -1), tasks.items(), strict=True):
        minutes = (deadline - time.monotonic()) / 60 / left
        if minutes > 0:
            tune_layer(name, task, target, database, minutes, arguments)
    print_table(tasks, target, database, arguments)


def layer_task(name: str, target: Target) -> Task:
    """One convolution with random weights, packed as a build packs it."""
    from tvm_compress.schedules import Conv2dSpec, pack_weight, prim_func
    from tvm_compress.tuning.tasks import make_task
    from tvm_compress.tuning.workload import workload_key

    height, channels, outputs, kernel, dtype = LAYERS[name]
    spec = Conv2dSpec(
        batch=1,
        height=height,
        width=height,
        in_channels=channels,
        out_channels=outputs,
        kernel=(kernel, kernel),
        padding=(kernel // 2,) * 4,
        data_dtype=dtype,
        weight_dtype=dtype,
        acc_dtype="float32" if dtype == "float32" else "int32",
    )
    weight = np.random.default_rng(0).normal(scale=20, size=spec.weight_shape)
    weight = weight.clip(-127, 127).astype(dtype)
    packed = pack_weight(spec, weight, target)
    func = prim_func(spec if packed is None else packed[0])
    key = workload_key(func)
    constants = {1: weight if packed is None else packed[1]}
    task = None if key is None else make_task(key, name, func, target, constants)
    if task is None:
        raise SystemExit(f"{name}: nothing to tune for {target.name}")
    return task


def tune_layer(
    name: str,
    task: Task,
    target: Target,
    database: Database,
    minutes: float,
    arguments: argparse.Namespace,
) -> None:
    """Go on with one layer, and add to its trials and seconds."""
    from tvm_compress.progress import TerminalProgress
    from tvm_compress.tuning.driver import tune_tasks
    from tvm_compress.tuning.ledger import Budget
    from tvm_compress.tuning.tune import this_cpu

    budget = Budget(trials=arguments.trials, minutes=minutes, is_exhaustive=True)
    progress = TerminalProgress()
    progress.note(f"{name}: at most {minutes:.1f} minutes")
    result = tune_tasks([task], target, database, budget, cpu=this_cpu(), progress=progress)
    rates = read_rates(arguments.database)
    trials, seconds = rates.get(name, (0, 0.0))
    if result.trials:
        rates[name] = (trials + result.trials, seconds + result.seconds)
        (arguments.database / RATES).write_text(json.dumps(rates, indent=1))


def read_rates(folder: Path) -> dict[str, tuple[int, float]]:
    """Layer => trials, and the seconds that they took."""
    path = folder / RATES
    return json.loads(path.read_text()) if path.exists() else {}


def print_table(
    tasks: dict[str, Task], target: Target, database: Database, arguments: argparse.Namespace
) -> None:
    """Markdown. Times as measured while tuning; the ratio is of both choices timed in turns."""
    from tvm_compress.tuning.proposals import Proposals
    from tvm_compress.tuning.record import Conditions
    from tvm_compress.tuning.tune import this_cpu

    rates = read_rates(arguments.database)
    early = f"best after {arguments.early}, us"
    head = ["layer", "choices", "trials", "a minute", "default, us", early, "best of all, us",
            f"best after {arguments.early} / best of all, in turns"]  # fmt: skip
    rows = []
    for name, task in tasks.items():
        records = [
            record
            for record in database.measured(task.key, Conditions.of(target, this_cpu()))
            if record.fits(task.space) and not record.is_verified
        ]
        trials, seconds = rates.get(name, (0, 0.0))
        size = Proposals(task.space).size
        cells = [name, "many" if size is None else f"{size:,}", f"{len(records):,}"]
        cells.append(f"{60 * trials / seconds:.0f}" if seconds else "")
        default = [r for r in records if dict(r.choice) == dict(task.space.default)]
        first, best = fastest(records[: arguments.early]), fastest(records)
        cells += [micros(fastest(default)), micros(first), micros(best)]
        if first is None or best is None:
            cells.append("")
        elif dict(first.choice) == dict(best.choice):
            cells.append("1 (the same choice)")
        else:
            cells.append(f"{ratio_in_turns(task, target, first, best):.3f}")
        rows.append(cells)
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


def fastest(records: list[Record]) -> Record | None:
    succeeded = [record for record in records if record.cost is not None]
    return min(succeeded, key=lambda record: record.cost or 0.0, default=None)


def micros(record: Record | None) -> str:
    return "" if record is None or record.cost is None else f"{record.cost * 1e6:.1f}"


def ratio_in_turns(task: Task, target: Target, first: Record, best: Record) -> float:
    """Median of seconds of `first` by seconds of `best`, each pair timed in turns."""
    from tvm_compress.tuning import worker
    from tvm_compress.tuning.driver import target_fields, write_task
    from tvm_compress.tuning.scratch import scratch_folder

    worker.start(target.threads)
    fields: dict[str, Any] = target_fields(target)
    with scratch_folder() as scratch:
        folder = scratch / "task"
        write_task(task, folder)
        worker.build(str(folder), None, str(folder / worker.REFERENCE), fields)
        libraries = []
        for name, record in (("first", first), ("best", best)):
            libraries.append(str(folder / f"{name}.so"))
            worker.build(str(folder), record.choice, libraries[-1], fields)
        ratios = []
        for seed in range(COMPARISONS):
            found = worker.compare(str(folder), libraries, seed)
            if any(found["errors"]):
                raise SystemExit(f"{task.name}: {found['errors']}")
            ratios.append(found["seconds"][0] / found["seconds"][1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
