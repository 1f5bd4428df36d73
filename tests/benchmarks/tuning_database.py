"""Make the tuning records that ship with the package (tvm_compress/databases/).

    python tests/benchmarks/tuning_database.py --target x86-64-v4-vnni --threads 1 --minutes 20

Tunes the shipped example and the benchmark networks, float32 and int8, for one target and number of
threads, in turns until the time is over, and writes the winners to one file. Records stay in
`--database`, so that the next call goes on from there. Run it on a quiet machine that has the
target's instructions; every figure it prints is of that machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import networks
import onnx

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "tvm_compress" / "databases"
RECIPES = ("int8", "none")
# Less is within the noise of a machine, and another machine may see the opposite.
LEAST_SPEEDUP = 1.03


def models(folder: Path, names: list[str]) -> dict[str, Path]:
    """Name => file of the networks that were asked for."""
    found = {"example": REPOSITORY / "examples" / "fashion_mnist" / "model.onnx"}
    for name in ("mobilenet_v2", "resnet_50", "bert_encoder"):
        if name in names:
            found[name] = folder / f"{name}.onnx"
            onnx.save(getattr(networks, name)(), str(found[name]))
    return {name: found[name] for name in names}


def main() -> None:
    """Tune, then write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="x86-64-v4-vnni")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0, help="for all networks together")
    parser.add_argument("--models", default="example,mobilenet_v2,resnet_50,bert_encoder")
    parser.add_argument("--database", type=Path, default=Path("tuning-records"))
    parser.add_argument("--out", type=Path, help="default: databases/TARGET-THREADSt.json")
    arguments = parser.parse_args()

    from tvm_compress.progress import TerminalProgress
    from tvm_compress.targets import get_target
    from tvm_compress.tuning.database import Database, write_export
    from tvm_compress.tuning.record import Conditions
    from tvm_compress.tuning.tune import this_cpu, tune

    out = arguments.out or SHIPPED / f"{arguments.target}-{arguments.threads}t.json"
    deadline = time.monotonic() + 60 * arguments.minutes
    defaults: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = models(Path(folder), arguments.models.split(","))
        jobs = [(name, recipe) for recipe in RECIPES for name in files]
        for left, (name, recipe) in zip(range(len(jobs), 0, -1), jobs, strict=True):
            minutes = max(0.1, (deadline - time.monotonic()) / 60 / left)
            result = tune(
                files[name],
                recipe=recipe,
                target=arguments.target,
                threads=arguments.threads,
                minutes=minutes,
                database=arguments.database,
                progress=TerminalProgress(),
            )
            defaults |= {task.workload: dict(task.default) for task in result.tasks}
            show(name, recipe, result)
    target = dataclasses.replace(get_target(arguments.target), threads=arguments.threads)
    conditions = Conditions.of(target, this_cpu())
    database = Database(arguments.database, shipped=False)
    records = [
        record
        for record in database.winners()
        if dict(record.default or {}) == defaults.get(record.workload)
        and record.conditions == conditions
        and record.speedup >= LEAST_SPEEDUP
    ]
    out.parent.mkdir(exist_ok=True)
    write_export(out, records)
    print(f"{out}: {len(records)} records of {len(defaults)} workloads")


def show(name: str, recipe: str, result: Any) -> None:
    """One line for one network."""
    print(
        f"{name:14s} {recipe:6s} {len(result.tasks):3d} kernels  {result.trials:5d} trials  "
        f"{result.default_us / 1e3:8.3f} -> {result.best_us / 1e3:8.3f} ms  "
        f"{result.trials_per_minute:4.0f} a minute",
        flush=True,
    )


if __name__ == "__main__":
    main()
