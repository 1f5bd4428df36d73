"""Make the tuning records that ship with the package (tvm_compress/databases/): one command.

    python tests/benchmarks/tuning_database.py --minutes 120
    python tests/benchmarks/tuning_database.py --targets cortex-m4,cortex-m7,cortex-m55 --minutes 30

Tunes the shipped example and the benchmark networks, float32 and int8, for every target and number
of threads, in turns until the time is over, and writes the winners to one file for each target and
number of threads. Everything measured stays in `--database`, so that the same command goes on where
one was stopped; by default that folder belongs to the present sources of the kernels, since times
of older kernels say nothing. Run it on a quiet machine that has the targets' instructions.

For targets that are emulated, instructions are counted, which a busy machine does not change; their
networks are those of MLPerf Tiny (`.tflite`, in the assets) and the example.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks
import onnx

if TYPE_CHECKING:
    import tvm

    from tvm_compress.targets import Target
    from tvm_compress.tuning.database import Database
    from tvm_compress.tuning.record import Record

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "tvm_compress" / "databases"
RECIPES = ("int8", "none")
TFLITE = {
    "resnet8": "pretrainedResnet_quant.tflite",
    "ds_cnn": "kws_ref_model.tflite",
    "vww": "vww_96_int8.tflite",
    "ad": "ad01_int8.tflite",
}
# Less is within the noise of a machine, and another machine may see the opposite.
LEAST_SPEEDUP = 1.03


def main() -> None:
    """Tune for one target and number of threads after the other; write the file of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="x86-64-v4-vnni,x86-64-v3")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--minutes", type=float, default=120.0, help="for everything together")
    parser.add_argument("--models", default="example,mobilenet_v2,resnet_50,bert_encoder")
    parser.add_argument("--board-models", default=f"{','.join(TFLITE)},example")
    parser.add_argument("--database", type=Path, help="default: build/tuning-records-HASH")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the files")
    arguments = parser.parse_args()

    from tvm_compress.startup import start_without_torch

    start_without_torch()
    from tvm_compress.targets import get_target
    from tvm_compress.tuning.database import Database
    from tvm_compress.tuning.tune import require_device

    folder = arguments.database or REPOSITORY / "build" / f"tuning-records-{hash_of_kernels()}"
    deadline = time.monotonic() + 60 * arguments.minutes
    names = arguments.targets.split(",")
    targets_of: dict[str, list[Target]] = {}
    for name in names:
        counts = [1] if get_target(name).is_cross else map(int, arguments.threads.split(","))
        targets_of[name] = [dataclasses.replace(get_target(name), threads=n) for n in counts]
        for target in targets_of[name]:
            require_device(target)
    arguments.out.mkdir(exist_ok=True, parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        files_of = {}
        for name, targets in targets_of.items():
            asked = arguments.board_models if targets[0].is_cross else arguments.models
            files_of[name] = models(Path(scratch), asked.split(","))
        left = sum(
            len(targets_of[name]) * len(recipes(path))
            for name, files in files_of.items()
            for path in files.values()
        )
        for name, targets in targets_of.items():
            database = Database(folder, shipped=False)
            known: dict[int, dict[str, dict[str, int]]] = {t.threads: {} for t in targets}
            for label, module in modules(files_of[name], name):
                for target in targets:
                    minutes = (deadline - time.monotonic()) / 60 / left
                    left -= 1
                    known[target.threads] |= tune(label, module, target, database, minutes)
            for target in targets:
                write(arguments.out, target, database, known[target.threads])


def hash_of_kernels() -> str:
    """Of the sources that decide what a choice compiles to."""
    digest = hashlib.sha256()
    for folder in ("schedules", "targets"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def models(folder: Path, names: list[str]) -> dict[str, Path]:
    """Name => file of the networks that were asked for."""
    found = {"example": REPOSITORY / "examples" / "fashion_mnist" / "model.onnx"}
    for name in ("mobilenet_v2", "resnet_50", "bert_encoder"):
        if name in names:
            found[name] = folder / f"{name}.onnx"
            onnx.save(getattr(networks, name)(), str(found[name]))
    assets = Path(os.environ.get("TVM_COMPRESS_ASSETS", REPOSITORY.parent / "shared" / "assets"))
    found |= {name: assets / "tflite" / file for name, file in TFLITE.items()}
    return {name: found[name] for name in names}


def recipes(path: Path) -> tuple[str, ...]:
    """What to tune a network with: one that came in integers stays as it is."""
    return ("none",) if path.suffix == ".tflite" else RECIPES


def modules(files: dict[str, Path], target: str) -> Iterator[tuple[str, tvm.IRModule]]:
    """Label and graph form of each network by each recipe, compressed as `tune` does it."""
    from tvm_compress.flow import compress_job
    from tvm_compress.progress import Progress
    from tvm_compress.tuning.tune import job_of

    for recipe in RECIPES:
        for name, path in files.items():
            if recipe in recipes(path):
                yield f"{name} {recipe}", compress_job(job_of(path, recipe, target), Progress())


def tune(
    label: str, module: tvm.IRModule, target: Target, database: Database, minutes: float
) -> dict[str, dict[str, int]]:
    """Go on with one network for at most `minutes`. Returns workload => today's default."""
    from tvm_compress.progress import TerminalProgress
    from tvm_compress.tuning.ledger import Budget
    from tvm_compress.tuning.tasks import extract_tasks
    from tvm_compress.tuning.tune import measure_tasks

    tasks = extract_tasks(module, target)
    if minutes > 0:
        budget = Budget(minutes=minutes)
        result = measure_tasks(tasks, target, database, budget, None, TerminalProgress())
        show(label, target, result)
    return {task.key: dict(task.space.default) for task in tasks}


def write(
    folder: Path, target: Target, database: Database, defaults: dict[str, dict[str, int]]
) -> None:
    """The winners of the workloads in `defaults` over today's default, or the default where nothing
    beats it: that is known as well."""
    from tvm_compress.tuning.database import write_export
    from tvm_compress.tuning.record import INSTRUCTIONS, SECONDS, Conditions
    from tvm_compress.tuning.tune import device_of

    measure = INSTRUCTIONS if target.is_cross else SECONDS
    conditions = Conditions.of(target, device_of(target), measure)
    records = [
        record if record.speedup >= LEAST_SPEEDUP else default_of(record)
        for record in database.winners()
        if dict(record.default or {}) == defaults.get(record.workload)
        and record.conditions == conditions
    ]
    out = folder / (
        f"{target.name}.json" if target.is_cross else f"{target.name}-{target.threads}t.json"
    )
    write_export(out, records)
    print(f"{out.name}: {len(records)} records of {len(defaults)} workloads", flush=True)


def default_of(record: Record) -> Record:
    """The default that the record was measured beside."""
    assert record.default is not None
    return dataclasses.replace(record, choice=dict(record.default), cost=record.default_cost)


def show(label: str, target: Target, result: Any) -> None:
    """One line for one network."""
    from tvm_compress.tuning.ledger import cost_text

    print(
        f"{target.name} {target.threads}t  {label:20s} {len(result.tasks):3d} kernels  "
        f"{result.trials:5d} trials  {cost_text(result.default_cost, result.measure)} -> "
        f"{cost_text(result.best_cost, result.measure)}  {result.trials_per_minute:4.0f} a minute  "
        f"({result.stopped})",
        flush=True,
    )


if __name__ == "__main__":
    main()
