"""What compiling costs: from an ONNX file to a runnable int8 library, by step and by depth.

    python tests/benchmarks/build_time.py [--layers 20,50,100,200]

Random weights: first a MobileNetV2-class network at 224x224, then plain stacks of convolutions of
growing depth, no two layers of one shape and so no kernel used twice. Each is compressed with an
empty cache of kernels ("cold"), again into another folder ("warm"), and with one layer left in
floating point between ("changed": a small change of the recipe). All three calibrate anew.
Checks and the original's library are not made; `compress` reports their seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import Network, mobilenet_v2

WIDTHS = tuple(range(16, 241, 16))  # whole blocks of channels: padding would make shapes equal
CALIBRATION_SAMPLES = 16
CHANGED = """version: 1
steps:
  - quantize: {layers: all, weights: int8, activations: int8}
  - quantize: {layers: %s, weights: int8, activations: none}
"""


def stack(layers: int) -> onnx.ModelProto:
    """`layers` 3x3 convolutions with ReLU on 8x8 images, no two of the same shape."""
    net = Network((1, 16, 8, 8))
    x, widths = "input", list(_each_pair_once(len(WIDTHS)))
    for before, after in pairwise(widths[: layers + 1]):
        x = net.relu(net.conv(x, WIDTHS[before], WIDTHS[after], 3))
    return net.model(net.head(x, WIDTHS[widths[layers]], 10), 1, 10)


def _each_pair_once(symbols: int) -> Iterator[int]:
    """A walk over `symbols` that takes every ordered pair of different ones once, from 0."""
    left = {a: [b for b in range(symbols) if b != a] for a in range(symbols)}
    trail, walk = [0], []
    while trail:  # Hierholzer
        if left[trail[-1]]:
            trail.append(left[trail[-1]].pop())
        else:
            walk.append(trail.pop())
    return reversed(walk)


def measure(label: str, model: onnx.ModelProto) -> None:
    """Compress cold, warm and changed; print the seconds that a runnable library needs."""
    from tvm_compress.importers import load_model
    from tvm_compress.relay_passes.select import list_layers

    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    samples = [
        {"input": random.normal(size=shape).astype(np.float32)} for _ in range(CALIBRATION_SAMPLES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        changed = Path(folder) / "changed.yaml"
        layers = [layer.name for layer in list_layers(load_model(path).module)]
        changed.write_text(CHANGED % layers[len(layers) // 2])
        for name, recipe in (("cold", "int8"), ("warm", "int8"), ("changed", str(changed))):
            _measure_one(
                label, len(layers), name, path, recipe, samples, Path(folder) / f"{name}.so"
            )


def _measure_one(
    label: str, layers: int, name: str, path: Path, recipe: str, samples: list[Any], out: Path
) -> None:
    from tvm_compress.build import compile_lowered, lower
    from tvm_compress.flow import compress_job, load_job
    from tvm_compress.progress import Progress

    times = [time.perf_counter()]

    def done(value: Any) -> Any:
        times.append(time.perf_counter())
        return value

    job = done(load_job(path, recipe, None, samples))
    compressed = done(compress_job(job, Progress()))
    lowered = done(lower(compressed, job.target))
    built = done(compile_lowered(lowered, job.kernel_cache))
    done(built.export(out))
    steps = ("import", "calibrate and quantise", "lower", "compile", "link")
    seconds = [after - before for before, after in pairwise(times)]
    parts = ", ".join(f"{step} {s:.1f}" for step, s in zip(steps, seconds, strict=True))
    print(
        f"{label:14s} {layers:4d} layers  {name:8s} {sum(seconds):6.1f} s  ({parts})  "
        f"{built.kernels}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="20,50,100,200")
    parser.add_argument("--stacks-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.stacks_only:
        measure("MobileNetV2", mobilenet_v2())
    for layers in (int(part) for part in arguments.layers.split(",") if part):
        measure(f"stack of {layers}", stack(layers))


if __name__ == "__main__":
    main()
