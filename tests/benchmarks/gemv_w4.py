"""Products of one row with a 4-bit weight that lies in memory, against ONNX Runtime's MatMulNBits.

    python tests/benchmarks/gemv_w4.py [--shapes 4096x4096,2048x8192] [--threads 1] [--target host]

Every call takes the next of many copies of the weight, so that none is in a cache. Ours: 8-bit
activations, 4-bit weights with one scale for each output channel, sums in int32 (`w4a8`), and 8-bit
weights for comparison (`w8a8`); exact, checked against NumPy first. ONNX Runtime: 4-bit weights in
blocks of 128 with `accuracy_level` 4 (it quantises the activations to 8 bits itself), and float32.
The bandwidth is bytes of weight over the median time; DRAM's own is measured by reading the same
copies with NumPy. Interleaved runs, medians and minima in microseconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CACHE_BYTES = 96 << 20  # copies of a weight together exceed any last-level cache by this
BLOCK = 128

Kernel = tuple[Sequence[Callable[[], Any]], int]
"""Calls, one for each copy of the weight, and the bytes of one copy."""


def ours(
    inputs: int, outputs: int, bits: int, copies: int, target_name: str, threads: int
) -> Kernel:
    """Calls of our kernel, one for each copy of the weight."""
    import tvm

    from tvm_compress.schedules import MatmulSpec, pack_weight, prim_func, schedule
    from tvm_compress.targets import get_target

    target = replace(get_target(target_name), threads=threads)
    spec = MatmulSpec(
        rows=1, in_features=inputs, out_features=outputs,
        data_dtype="uint8", weight_dtype="int8", acc_dtype="int32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    largest = 2 ** (bits - 1) - 1
    weight = rng.integers(-largest, largest + 1, (inputs, outputs)).astype(np.int8)
    x = rng.integers(0, 256, (1, inputs)).astype(np.uint8)
    packed = pack_weight(spec, weight, target)
    assert packed is not None
    func = schedule(prim_func(packed[0]), target).with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": func}), target=target.tvm_target())
    result = tvm.runtime.tensor(np.zeros((1, outputs), np.int32))
    data = tvm.runtime.tensor(x)
    weights = [tvm.runtime.tensor(packed[1].copy()) for _ in range(copies)]
    library["main"](data, weights[0], result)
    np.testing.assert_array_equal(result.numpy(), x.astype(np.int64) @ weight.astype(np.int64))
    calls = [partial(library["main"], data, w, result) for w in weights]
    return calls, packed[1].nbytes


def theirs(inputs: int, outputs: int, copies: int, threads: int, nbits: bool) -> Kernel:
    """Sessions of ONNX Runtime, one for each copy of the weight."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    if nbits:
        blocks = inputs // BLOCK
        codes = rng.integers(0, 256, (outputs, blocks, BLOCK // 2)).astype(np.uint8)
        scales = rng.uniform(0.01, 0.02, outputs * blocks).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=inputs, N=outputs, bits=4, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip
        parts = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")]
    else:
        weight = rng.normal(0, 1, (inputs, outputs)).astype(np.float32)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        parts = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(
        [node], "gemv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])], parts,
    )  # fmt: skip
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    x = {"x": rng.normal(0, 1, (1, inputs)).astype(np.float32)}
    sessions = [ort.InferenceSession(model, options) for _ in range(copies)]
    calls = [partial(session.run, None, x) for session in sessions]
    return calls, sum(len(part.raw_data) for part in parts)


def stream_bandwidth() -> float:
    """Bytes a second of reading memory on one core."""
    array = np.ones(64 << 20, np.uint8).view(np.int64)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        array.max()
        times.append(time.perf_counter() - begin)
    return array.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,2048x8192,1280x1000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    print(f"memory, one core: {stream_bandwidth() / 1e9:.1f} GB/s")
    print("| inputs x outputs | kernel | median us | least us | GB/s | against MatMulNBits |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        inputs, outputs = (int(side) for side in shape.split("x"))
        copies = max(4, CACHE_BYTES // (inputs * outputs // 2))
        kernels: dict[str, Kernel] = {
            "w4a8": ours(inputs, outputs, 4, copies, arguments.target, arguments.threads),
            "w8a8": ours(inputs, outputs, 8, copies // 2, arguments.target, arguments.threads),
            "ORT MatMulNBits 4": theirs(inputs, outputs, copies, arguments.threads, True),
            "ORT float32": theirs(inputs, outputs, max(2, copies // 8), arguments.threads, False),
        }
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(arguments.rounds):
            for name, (calls, _) in kernels.items():
                for call in calls:
                    begin = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - begin)
        reference = np.median(times["ORT MatMulNBits 4"])
        for name, (_, size) in kernels.items():
            median = float(np.median(times[name]))
            print(
                f"| {shape} | {name} | {median * 1e6:.0f} | {min(times[name]) * 1e6:.0f} | "
                f"{size / median / 1e9:.1f} | {reference / median:.2f} |"
            )


if __name__ == "__main__":
    main()
