"""Peak memory of calibration by number of samples, each count in a process of its own.

    python tests/benchmarks/calibration_memory.py [--samples 100,1000] [--layers 8] [--recipe int8]

Random weights and images (32x32x3); every tensor of the network is observed for every sample.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from build_time import stack

from tvm_compress.calibrate import calibrate
from tvm_compress.flow import schemes_of
from tvm_compress.importers import load_model
from tvm_compress.recipe import load_recipe
from tvm_compress.relay_passes.observations import Observations
from tvm_compress.relay_passes.passes import PASSES
from tvm_compress.targets import get_target


def stream(count: int) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {"input": random.normal(size=(1, 3, 32, 32)).astype(np.float32)}


def measure(samples: int, layers: int, recipe: str) -> None:
    """Calibrate what the recipe's steps ask for and print this process's peak."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(stack(layers), str(path))
        model = load_model(path)
    wanted = Observations()
    for step in load_recipe(recipe).steps:
        schemes = schemes_of(model.module, [step])
        wanted = wanted | (PASSES[step.name].observe(model.module, schemes) or Observations())
    started = time.perf_counter()
    statistics = calibrate(model, stream(samples), wanted, target=get_target("host"))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{samples:6d} samples  {len(statistics):3d} tensors  peak {peak:7.1f} MiB  {seconds:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", default="100,1000")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--recipe", default="int8")
    arguments = parser.parse_args()
    counts = [int(part) for part in arguments.samples.split(",")]
    if len(counts) == 1:
        measure(counts[0], arguments.layers, arguments.recipe)
        return
    for count in counts:
        options = [f"--samples={count}", f"--layers={arguments.layers}"]
        options.append(f"--recipe={arguments.recipe}")
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
