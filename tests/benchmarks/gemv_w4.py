"""Products of a few rows with a 4-bit weight in memory, against ONNX Runtime's MatMulNBits.

    python tests/benchmarks/gemv_w4.py [--shapes 4096x4096,2048x8192] [--threads 1] [--target host]

Every call takes the next of many copies of the weight, so that none is in a cache. Ours: 8-bit
activations and sums in int32, with 4-bit weights of one scale for each output channel (`w4a8`), in
groups of 32 or 128 with whole-number scales, of tables of 16 values (one for all channels, one for
4, and with groups of 32), and 8-bit weights for comparison (`w8a8`); exact, checked against NumPy
first. ONNX Runtime: 4-bit weights in blocks of 128 or 32 with `accuracy_level` 4 (it quantises the
activations to 8 bits itself), and float32. The bandwidth is bytes of weight, tables and scales over
the median time; the last column compares with MatMulNBits of the same block, 128 where there are no
groups. DRAM's own is measured by reading with NumPy. Interleaved runs, medians and minima in
microseconds.
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
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from tvm_compress.schedules import MatmulSpec

CACHE_BYTES = 96 << 20  # copies of a weight together exceed any last-level cache by this
Kernel = tuple[Sequence[Callable[[], Any]], int]
"""Calls, one for each copy of the weight, and the bytes of one copy."""

FORMS: dict[str, dict[str, int]] = {
    "w4a8": {},
    "w4a8 group 128": {"group_size": 128},
    "w4a8 group 32": {"group_size": 32},
    "codebook": {"table_channels": 1 << 20},
    "codebook, table for 4": {"table_channels": 4},
    "codebook, table for 4, group 32": {"table_channels": 4, "group_size": 32},
}
"""Ours with 4-bit weights: fields of their specs."""


def random_parts(spec: MatmulSpec) -> tuple[np.ndarray, list[np.ndarray]]:
    """Whole weights [K, N] and the parts that stand for them, all of their ranges in use."""
    from tvm_compress.schedules.weights import pack_int4

    rng = np.random.default_rng(0)
    shape = (spec.in_features, spec.out_features)
    if spec.weight_dtype == "int8":
        weight = rng.integers(-127, 128, shape).astype(np.int8)
        return weight.astype(np.int64), [weight]
    codes = rng.integers(-8, 8, shape).astype(np.int8)
    values, parts = codes.astype(np.int64), [pack_int4(codes)]
    if spec.table_channels:
        tables = rng.integers(-64, 65, spec.tables_shape).astype(np.int8)
        tables[:, 8] = 0
        owners = np.arange(spec.out_features) // spec.table_channels
        values = tables[owners, codes & 15].astype(np.int64)
        parts.append(tables)
    if spec.group_size:
        scales = rng.integers(1, 16, spec.scales_shape).astype(np.uint8)
        values *= scales[np.arange(spec.in_features) // spec.group_size]
        parts.append(scales)
    return values, parts


def ours(spec: MatmulSpec, copies: int, target_name: str, threads: int) -> Kernel:
    """Calls of our kernel, one for each copy of the weight."""
    import tvm

    from tvm_compress.schedules import pack_parts, prim_func, schedule
    from tvm_compress.targets import get_target

    target = replace(get_target(target_name), threads=threads)
    values, parts = random_parts(spec)
    x = np.random.default_rng(1).integers(0, 256, spec.data_shape).astype(np.uint8)
    packed = pack_parts(spec, parts, target)
    assert packed is not None
    func = schedule(prim_func(packed[0]), target).with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": func}), target=target.tvm_target())
    result = tvm.runtime.tensor(np.zeros(spec.output_shape, np.int32))
    data = tvm.runtime.tensor(x)
    weights = [[tvm.runtime.tensor(part.copy()) for part in packed[1]] for _ in range(copies)]
    library["main"](data, *weights[0], result)
    np.testing.assert_array_equal(result.numpy(), x.astype(np.int64) @ values)
    calls = [partial(library["main"], data, *w, result) for w in weights]
    return calls, sum(part.nbytes for part in packed[1])


def theirs(rows: int, inputs: int, outputs: int, copies: int, threads: int, block: int) -> Kernel:
    """Sessions of ONNX Runtime, one for each copy of the weight; `block` 0 is float32."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    if block:
        blocks = inputs // block
        codes = rng.integers(0, 256, (outputs, blocks, block // 2)).astype(np.uint8)
        scales = rng.uniform(0.01, 0.02, outputs * blocks).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=inputs, N=outputs, bits=4, block_size=block, accuracy_level=4,
        )  # fmt: skip
        parts = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")]
    else:
        weight = rng.normal(0, 1, (inputs, outputs)).astype(np.float32)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        parts = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(
        [node], "gemv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])], parts,
    )  # fmt: skip
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    x = {"x": rng.normal(0, 1, (rows, inputs)).astype(np.float32)}
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
    parser.add_argument("--rows", type=int, default=1, help="positions that share a weight")
    parser.add_argument("--only", default="", help="part of the names of our kernels")
    arguments = parser.parse_args()
    from tvm_compress.schedules import MatmulSpec

    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    print(f"memory, one core: {stream_bandwidth() / 1e9:.1f} GB/s")
    print("| inputs x outputs | kernel | median us | least us | GB/s | against MatMulNBits |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        inputs, outputs = (int(side) for side in shape.split("x"))
        copies = max(4, CACHE_BYTES // (inputs * outputs // 2))
        bytes_spec = MatmulSpec(
            rows=arguments.rows, in_features=inputs, out_features=outputs,
            data_dtype="uint8", weight_dtype="int8", acc_dtype="int32",
        )  # fmt: skip
        specs = {
            name: bytes_spec.replace(weight_dtype="int4", **fields)
            for name, fields in FORMS.items()
        } | {"w8a8": bytes_spec}
        kernels: dict[str, Kernel] = {
            name: ours(spec, copies, arguments.target, arguments.threads)
            for name, spec in specs.items()
            if arguments.only in name
        }
        for block in (128, 32):
            name = f"ORT MatMulNBits 4, block {block}"
            kernels[name] = theirs(
                arguments.rows, inputs, outputs, copies, arguments.threads, block
            )
        kernels["ORT float32"] = theirs(
            arguments.rows, inputs, outputs, max(2, copies // 8), arguments.threads, 0
        )
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(arguments.rounds):
            for name, (calls, _) in kernels.items():
                for call in calls:
                    begin = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - begin)
        for name, (_, size) in kernels.items():
            median = float(np.median(times[name]))
            block = 32 if name.endswith(" 32") else 128  # the same amount of scales
            reference = np.median(times[f"ORT MatMulNBits 4, block {block}"])
            print(
                f"| {shape} | {name} | {median * 1e6:.0f} | {min(times[name]) * 1e6:.0f} | "
                f"{size / median / 1e9:.1f} | {reference / median:.2f} |"
            )


if __name__ == "__main__":
    main()
