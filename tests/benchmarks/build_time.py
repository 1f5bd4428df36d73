"""What compiling costs: from an ONNX file to a runnable int8 library, by step and by depth.

    python tests/benchmarks/build_time.py [--layers 20,50,100,200]

Random weights: first a MobileNetV2-class network at 224x224, then plain stacks of convolutions of
growing depth (distinct shapes, so that no two layers share a kernel).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from networks import Network, mobilenet_v2

EVIDENCE = ("build original", "verify", "benchmark")  # what the artefact runs without


def stack(layers: int) -> onnx.ModelProto:
    """`layers` 3x3 convolutions with ReLU, no two of the same shape."""
    net = Network((1, 3, 32, 32))
    x, width = "input", 3
    for layer in range(layers):
        channels = 16 + 8 * (layer % 7) + layer // 7
        x, width = net.relu(net.conv(x, width, channels, 3)), channels
    return net.model(net.head(x, width, 10), 1, 10)


def measure(label: str, model: onnx.ModelProto) -> None:
    """Compress with 16 calibration samples and print the seconds of every step."""
    from tvm_compress import compress

    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    samples = [{"input": random.normal(size=shape).astype(np.float32)} for _ in range(16)]
    layers = sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path))
        started, cpu_started = time.perf_counter(), time.process_time()
        artefact = compress(path, recipe="int8", calibration=samples, out=Path(folder) / "out")
        total, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        steps = {step["name"]: step["seconds"] for step in artefact.report["steps"]}
    runnable = sum(seconds for name, seconds in steps.items() if name not in EVIDENCE)
    parts = "  ".join(f"{name} {seconds:.1f}" for name, seconds in steps.items())
    print(
        f"{label:14s} {layers:4d} layers  runnable after {runnable:6.1f} s, with its evidence "
        f"{total:6.1f} s ({cpu:.1f} s of CPU)  ({parts})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="20,50,100,200")
    arguments = parser.parse_args()
    measure("MobileNetV2", mobilenet_v2())
    for layers in (int(part) for part in arguments.layers.split(",") if part):
        measure(f"stack of {layers}", stack(layers))


if __name__ == "__main__":
    main()
