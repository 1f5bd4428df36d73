"""Top-1 of real networks with zeros, one shot: sparsity x pattern x criterion.

    python tests/benchmarks/sparsify_accuracy.py [--models resnet20] [--samples 256] \
        [--sparsities 0.5,0.7,0.8,0.9] [--patterns unstructured,16x1] [--criteria second_order,..]

Criteria: magnitude (no compensation, as a baseline), reconstructed (magnitude, then least squares),
second_order, and sensitivity (second_order, the total split by measured sensitivity). No kernel is
asked whether it pays (`insist`). Float kernels; one row each, with the number of images and the
paired difference to the float network.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import product

import numpy as np
from asset_data import ASSETS, TASKS, Task

from tvm_compress.build import compile_module
from tvm_compress.flow import compress_job, load_job
from tvm_compress.importers import load_model
from tvm_compress.measures import paired_difference
from tvm_compress.model import Model
from tvm_compress.progress import Progress
from tvm_compress.recipe import Recipe, Step
from tvm_compress.relay_passes.numerics.sparsity_pattern import Block, Unstructured
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

PATTERNS = {"unstructured": Unstructured(), "16x1": Block(16, 1), "8x1": Block(8, 1)}


def config(sparsity: float, pattern: Block, criterion: str) -> SparsifyConfig:
    """A step by its name in the table."""
    if criterion == "magnitude":
        return SparsifyConfig(sparsity, pattern, "magnitude", reconstruct=False, insist=True)
    if criterion == "reconstructed":
        return SparsifyConfig(sparsity, pattern, "magnitude", insist=True)
    scope = "sensitivity" if criterion == "sensitivity" else "layer"
    return SparsifyConfig(sparsity, pattern, "second_order", scope, insist=True)  # type: ignore[arg-type]


def right(task: Task, model: Model) -> dict[str, np.ndarray]:
    """By data set, which images have their label first."""

    session = Session(
        compile_module(model.module, get_target("host"), None), model.inputs, model.outputs
    )
    name, output = model.inputs[0].name, model.outputs[0].name
    found = {}
    for data, test in task.tests.items():
        inputs, labels = test()
        classes = [int(session.run({name: x})[output].ravel().argmax()) for x in inputs]
        found[data] = np.array(classes) == labels
    return found


def run(task: Task, arguments: argparse.Namespace) -> None:
    """All rows of one model."""
    model = load_model(task.path)
    name = model.inputs[0].name
    samples = [
        {name: x} for x, _ in zip(task.calibration(), range(arguments.samples), strict=False)
    ]
    before = right(task, model)
    patterns, criteria = arguments.patterns.split(","), arguments.criteria.split(",")
    sparsities = [float(item) for item in arguments.sparsities.split(",")]
    for pattern, sparsity, criterion in product(patterns, sparsities, criteria):
        started = time.perf_counter()
        step = Step("sparsify", config(sparsity, PATTERNS[pattern], criterion))
        recipe = Recipe((step,), measure=False)  # how fast kernels are changes no accuracy
        module = compress_job(load_job(task.path, recipe, "host", samples), Progress())
        seconds = time.perf_counter() - started
        after = right(task, replace(model, module=module))
        for data, was in before.items():
            is_now = after[data]
            lost = paired_difference(
                int((was & ~is_now).sum()), int((is_now & ~was).sum()), len(was)
            )
            print(
                f"{task.model:24s} {pattern:12s} {sparsity:.0%} {criterion:13s} {data:18s} "
                f"n={len(was)} float {was.mean():.3f} sparse {is_now.mean():.3f} "
                f"drop {100 * lost.drop:+.1f} [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}] "
                f"{seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="resnet20", help="comma-separated parts of model names")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sparsities", default="0.5,0.7,0.8,0.9")
    parser.add_argument("--patterns", default="unstructured,16x1", help=", ".join(PATTERNS))
    parser.add_argument("--criteria", default="magnitude,second_order,sensitivity")
    arguments = parser.parse_args()
    if not ASSETS.is_dir():
        parser.error(f"no model assets: {ASSETS} does not exist (set TVM_COMPRESS_ASSETS)")
    for task in TASKS:
        if any(part in task.model for part in arguments.models.split(",")):
            run(task, arguments)


if __name__ == "__main__":
    main()
