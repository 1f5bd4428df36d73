"""How soon tuning is good: the best after 50, 100, 200... trials of one layer after the other.

    python tests/benchmarks/tuning_convergence.py --trials 2000 --database FOLDER

Every layer is tuned to the last trial (or to the end of its space), whether anything more is to be
expected or not. Times are of single measurements in the order in which they were made, each the
least of its repeats; all is kept in `--database`, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np

# name => (height, in, out, kernel, dtype)
LAYERS = {
    "resnet-50 3x3 14 int8": (14, 256, 256, 3, "int8"),
    "resnet-50 1x1 56 int8": (56, 64, 256, 1, "int8"),
    "resnet-50 3x3 28 float32": (28, 128, 128, 3, "float32"),
    "resnet-50 1x1 14 float32": (14, 1024, 256, 1, "float32"),
    "mobilenet-v2 1x1 28 int8": (28, 192, 32, 1, "int8"),
}
SHOWN = (1, 50, 100, 200, 500, 1000, 2000)


def main() -> None:
    """One line for each layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="host")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--database", type=Path, required=True)
    arguments = parser.parse_args()
    print(f"{'layer':28s} {'space':>6s} {'a minute':>8s}", *(f"{n:>8d}" for n in SHOWN))
    for name in LAYERS:
        if arguments.only in name:
            converge(name, arguments)


def converge(name: str, arguments: argparse.Namespace) -> None:
    """Tune one layer and print the microseconds of the best after each number of trials."""
    from tvm_compress.progress import TerminalProgress
    from tvm_compress.schedules import Conv2dSpec, pack_weight, prim_func
    from tvm_compress.targets import get_target
    from tvm_compress.tuning.database import Database
    from tvm_compress.tuning.driver import Budget, tune_tasks
    from tvm_compress.tuning.record import Conditions
    from tvm_compress.tuning.tasks import make_task
    from tvm_compress.tuning.tune import this_cpu
    from tvm_compress.tuning.workload import workload_key

    height, channels, outputs, kernel, dtype = LAYERS[name]
    target = dataclasses.replace(get_target(arguments.target), threads=arguments.threads)
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
    if key is None:
        raise SystemExit(f"{name}: nothing to tune")
    constants = {1: weight if packed is None else packed[1]}
    task = make_task(key, name, func, target, constants)
    if task is None:
        raise SystemExit(f"{name}: no space for {arguments.target}")
    budget = Budget(trials=arguments.trials, is_exhaustive=True)
    database = Database(arguments.database, shipped=False)
    cpu = this_cpu()
    result = tune_tasks([task], target, database, budget, cpu=cpu, progress=TerminalProgress())
    best, bests = math.inf, []
    for record in database.measured(key, Conditions.of(target, cpu)):
        if not record.is_verified:
            best = min(best, record.seconds or math.inf)
            bests.append(best * 1e6)
    shown = [f"{bests[n - 1]:8.1f}" if n <= len(bests) else f"{'-':>8s}" for n in SHOWN]
    size = result.tasks[0].space
    print(f"{name:28s} {size or 0:6d} {result.trials_per_minute:8.0f}", *shown, flush=True)


if __name__ == "__main__":
    main()
