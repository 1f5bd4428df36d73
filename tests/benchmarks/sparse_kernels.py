"""Speed of sparse x86 kernels beside the dense layers of ONNX Runtime and OpenVINO.

    python tests/benchmarks/sparse_kernels.py [--target x86-64-v3] [--threads 1] [--block 16]
                                              [--int8] [--rows 1]

`--rows`: linear layers of so many rows instead, beside our own dense kernel, weights beyond the
second-level cache: microseconds, and how many times faster and smaller each sparsity is.

Random patterns; bias and ReLU everywhere, or bias and requantisation to bytes. The contestants take
turns; figures are the best of many runs: microseconds of the dense layers, and how many times
faster than the faster library each sparsity is (`dense`: our own dense kernel).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from contest import Convolution, chosen_target, contest, options, same_convolutions
from kernels_x86 import onnxruntime, openvino, ours, packed, timed

LAYERS: list[Convolution] = [
    (56, 56, 64, 64, 1),
    (28, 28, 512, 128, 1),
    (14, 14, 1024, 256, 1),
    (7, 7, 2048, 512, 1),
    (56, 56, 64, 64, 3),
    (28, 28, 128, 128, 3),
    (14, 14, 256, 256, 3),
    (7, 7, 512, 512, 3),
]
# Inputs and outputs of linear layers: a small recurrent one, classifiers.
LINEAR = [(256, 128), (512, 512), (1024, 1024), (2048, 1008)]
# Stands for two weights of every four inputs instead of a sparsity.
_N_OF_M = -1.0


def main() -> None:
    """Print one line a layer, and geometric means."""
    parser = options(__doc__ or "")
    parser.add_argument("--block", type=int, default=16, help="outputs that share a pattern")
    parser.add_argument("--int8", action="store_true", help="bytes instead of float32")
    parser.add_argument("--stride", type=int, default=1, help="of all layers")
    parser.add_argument("--sparsity", default="0.5,0.7,0.8,0.9,0.95")
    parser.add_argument("--n-of-m", action="store_true", help="also 2:4, as the last column")
    parser.add_argument("--rows", type=int, default=0, help="of linear layers, beside our own")
    arguments = parser.parse_args()
    target = chosen_target(arguments)
    sparsities = [float(part) for part in arguments.sparsity.split(",")]
    sparsities += [_N_OF_M] * arguments.n_of_m
    if arguments.rows:
        linear_layers(arguments, target, sparsities)
        return
    titles = ["layer", "ORT us", "OV us", "dense", *map(title, sparsities)]
    print(f"blocks of {arguments.block} outputs, {arguments.target}, {arguments.threads} threads")
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    gains: list[list[float]] = []
    for name, spec in same_convolutions(LAYERS, arguments.only):
        if arguments.int8:
            spec = spec.replace(data_dtype="uint8", weight_dtype="int8", acc_dtype="int32")
        spec = spec.replace(strides=(arguments.stride, arguments.stride))
        best = contest(
            [
                onnxruntime(spec, arguments.threads, quantised=arguments.int8),
                openvino(spec, arguments.threads, quantised=arguments.int8),
                ours(spec, target),
                *(sparse(spec, arguments.block, s, target) for s in sparsities),
            ]
        )
        library = min(best[:2])
        gains.append([library / seconds for seconds in best[2:]])
        figures = [f"{1e6 * seconds:.0f}" for seconds in best[:2]]
        figures += [f"{gain:.2f}" for gain in gains[-1]]
        print("| " + " | ".join([name, *figures]) + " |", flush=True)
    means = [
        math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*gains, strict=True)
    ]
    print("| geometric mean | | | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")


def title(sparsity: float) -> str:
    """Of a column."""
    return "2:4" if sparsity == _N_OF_M else f"{100 * sparsity:g} %"


def linear_layers(arguments: Any, target: Any, sparsities: list[float]) -> None:
    """Print one line for each layer of few rows."""
    from tvm_compress.kernel_bench import Kernel, LocalBench
    from tvm_compress.schedules import MatmulSpec

    print("| inputs x outputs | dense us | " + " | ".join(map(title, sparsities)) + " |")
    for inputs, outputs in LINEAR:
        dense: Any = MatmulSpec(rows=arguments.rows, in_features=inputs, out_features=outputs)
        if arguments.int8:
            dense = dense.replace(data_dtype="uint8", weight_dtype="int8", acc_dtype="int32")
        spec, weight = packed(dense, target)
        kernels = [Kernel(spec, (weight,))]
        for sparsity in sparsities:
            spec, parts = stored(dense, arguments.block, sparsity, target)
            kernels.append(Kernel(spec, tuple(parts)))
        costs = LocalBench(target).costs(kernels)
        sizes = [sum(array.nbytes for array in kernel.weights) for kernel in kernels]
        figures = [
            f"{costs[0] / cost:.2f}, {sizes[0] / size:.2f}"
            for cost, size in zip(costs[1:], sizes[1:], strict=True)
        ]
        print("| " + " | ".join([f"{inputs} x {outputs}", f"{costs[0]:.2f}", *figures]) + " |")


def sparse(dense: Any, block: int, sparsity: float, target: Any) -> Callable[[], float]:
    """Seconds of the layer without `sparsity` of its weights."""
    return timed(*stored(dense, block, sparsity, target), target)


def stored(dense: Any, block: int, sparsity: float, target: Any) -> tuple[Any, list[np.ndarray]]:
    """The layer without `sparsity` of its weights, in the same number for every block, in the form
    that is expected to be best."""
    from tvm_compress.schedules.sparse_weight import adds_exactly, encoded, sparse_candidates

    rng = np.random.default_rng(0)
    reduction, outputs = dense.reduction_size, dense.output_shape[-1]
    if sparsity == _N_OF_M:
        kept = rng.random((reduction // 4, 4, outputs // block)).argsort(axis=1).argsort(axis=1) < 2
        kept = kept.reshape(reduction, -1)
    else:
        entries = round(reduction * (1 - sparsity))
        kept = rng.random((reduction, outputs // block)).argsort(axis=0) < entries
    weight: np.ndarray = rng.standard_normal((reduction, outputs), dtype="float32")
    if dense.is_integer:
        # Signs of both kinds: without VNNI they decide which weights go together.
        largest = np.abs(weight).max(axis=0)
        weight = (np.sign(weight) * np.ceil(np.abs(weight) / largest * 127)).astype("int8")
    weight *= kept.repeat(block, axis=1)
    codes = weight[None]
    found = ((encoded(dense, codes, f), f) for _, f in sparse_candidates(dense, codes != 0, target))
    return next(layer for layer, form in found if adds_exactly(layer[0], form))


if __name__ == "__main__":
    main()
