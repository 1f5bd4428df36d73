"""Accuracy, size and latency of real models before and after a recipe, on the compiled artefacts.

    python tests/benchmarks/assets_accuracy.py [--recipe int8] [--models resnet20,dscnn] [--json
    out.json]

One row per model and data set: top-1 of the float original and of the compressed library on the
same inputs, the paired difference with its 95 % interval, emitted weight bytes against float32,
latency.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from asset_data import ASSETS, TASKS, Task

from tvm_compress import compress
from tvm_compress.measures import paired_difference
from tvm_compress.runtime import Session


def predictions(session: Session, inputs: Iterable[np.ndarray]) -> np.ndarray:
    """Class of every input by the first output."""
    name, output = session.inputs[0].name, session.outputs[0].name
    return np.array([int(session.run({name: x})[output].ravel().argmax()) for x in inputs])


def run(task: Task, recipe: str, folder: Path) -> list[dict]:
    """Compress one model and score it on each of its data sets."""
    from tvm_compress.importers import load_model

    started = time.perf_counter()
    name = load_model(task.path).inputs[0].name
    artefact = compress(
        task.path,
        recipe=recipe,
        calibration=[{name: x} for x in task.calibration()],
        out=folder / task.model,
    )
    seconds = time.perf_counter() - started
    before, after = artefact.report["before"], artefact.report["after"]
    common = {
        "model": task.model,
        "weights_ratio": after["bytes"]["weights"] / before["bytes"]["weights"],
        "library_ratio": after["bytes"]["total"] / before["bytes"]["total"],
        "speedup": before["latency"]["median_us"] / after["latency"]["median_us"],
        "latency_us": after["latency"]["median_us"],
        "stayed_float": len(artefact.report["stayed_float"]),
        "exact": not artefact.report["exactness"]["differing"],
        "compress_seconds": seconds,
    }
    original, compressed = artefact.session("original"), artefact.session("compressed")
    rows = []
    for data, test in task.tests.items():
        inputs, labels = test()
        batch = list(inputs)
        right_before = predictions(original, batch) == labels
        right_after = predictions(compressed, batch) == labels
        difference = paired_difference(
            int((right_before & ~right_after).sum()),
            int((right_after & ~right_before).sum()),
            len(labels),
        )
        accuracy = {
            "samples": len(labels),
            "before": float(right_before.mean()),
            "after": float(right_after.mean()),
            "drop": difference.drop,
            "drop_low": difference.low,
            "drop_high": difference.high,
        }
        rows.append({**common, "data": data, **accuracy})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--models", default="", help="comma-separated parts of model names")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not ASSETS.is_dir():
        parser.error(f"no model assets: {ASSETS} does not exist (set TVM_COMPRESS_ASSETS)")
    wanted = [part for part in arguments.models.split(",") if part]
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            if wanted and not any(part in task.model for part in wanted):
                continue
            for row in run(task, arguments.recipe, Path(folder)):
                results.append(row)
                print(
                    f"{row['model']:32s} {row['data']:18s} n={row['samples']:5d} "
                    f"float {row['before']:.4f} {arguments.recipe} {row['after']:.4f} "
                    f"drop {100 * row['drop']:+.2f} [{100 * row['drop_low']:+.2f}, "
                    f"{100 * row['drop_high']:+.2f}] points  weights x{row['weights_ratio']:.3f} "
                    f"library x{row['library_ratio']:.3f}  speed-up {row['speedup']:.2f}  "
                    f"float ops {row['stayed_float']}  exact {row['exact']}  "
                    f"{row['compress_seconds']:.0f} s",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
