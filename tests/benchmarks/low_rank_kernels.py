"""Speed of layers split into two beside the whole ones, of ONNX Runtime and OpenVINO as well.

    python tests/benchmarks/low_rank_kernels.py [--target x86-64-v3] [--threads 1] [--only 56x56]

float32 layers with bias and ReLU, split in the forms `channels` and `rows_and_columns` of the step
`lowrank` at the rank (a multiple of 16) that is nearest to 2x and 4x fewer multiply-adds. The parts
run one behind the other on one middle tensor. The contestants take turns; figures are the best of
many runs: microseconds of the whole layers, then for each form the rank, how many times fewer its
operations are, and which share of that it is faster than our own whole layer, and than the faster
library's (1: a layer of half the operations takes half the time); last, what the middle tensor
takes of the second-level cache.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from contest import chosen_target, contest, options, same_convolutions
from kernels_x86 import built, calls, onnxruntime, openvino, ours, packed
from sparse_kernels import LAYERS

FORMS = ("channels", "rows_and_columns")
FEWER, MULTIPLE = (2, 4), 16


def main() -> None:
    """Print one line a layer, form and rank, and geometric means."""
    arguments = options(__doc__ or "").parse_args()
    target = chosen_target(arguments)
    print(f"{arguments.target}, {arguments.threads} threads")
    titles = ["layer", "ORT us", "OV us", "own us", "form", "rank", "fewer", "us"]
    titles += ["of own", "of library", "middle / L2"]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    shares: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for name, spec in same_convolutions(LAYERS, arguments.only):
        splits = [
            (form, times, split(spec, form, times))
            for form in FORMS
            for times in FEWER
            if spec.kernel[0] > 1 or form == "channels"
        ]
        best = contest(
            [
                onnxruntime(spec, arguments.threads, quantised=False),
                openvino(spec, arguments.threads, quantised=False),
                ours(spec, target),
                *(chain(parts, target) for _, _, parts in splits),
            ]
        )
        whole = [name, *(f"{1e6 * seconds:.0f}" for seconds in best[:3])]
        for (form, times, parts), seconds in zip(splits, best[3:], strict=True):
            fewer = spec.macs / sum(part.macs for part in parts)
            share = best[2] / seconds / fewer, min(best[:2]) / seconds / fewer
            shares[form, times].append(share)
            middle = 4 * math.prod(parts[0].output_shape) / target.l2_bytes
            figures = [form, str(parts[0].out_channels), f"{fewer:.2f}", f"{1e6 * seconds:.0f}"]
            figures += [f"{share[0]:.2f}", f"{share[1]:.2f}", f"{middle:.2f}"]
            print("| " + " | ".join([*whole, *figures]) + " |", flush=True)
    for (form, times), pairs in shares.items():
        own, library = (math.exp(np.mean(np.log(column))) for column in zip(*pairs, strict=True))
        print(f"geometric mean, {form}, {times}x fewer: {own:.2f} of own, {library:.2f} of library")


def split(whole: Any, form: str, fewer: int) -> list[Any]:
    """The two parts of a layer."""
    rows, columns = whole.kernel
    top, left, bottom, right = whole.padding
    inputs, outputs = whole.in_channels, whole.out_channels
    one = rows * inputs + columns * outputs
    if form == "channels":
        one = rows * columns * inputs + outputs
    rank = max(1, round(rows * columns * inputs * outputs / fewer / one / MULTIPLE)) * MULTIPLE
    if form == "channels":
        first = whole.replace(out_channels=rank)
        return [first, whole.replace(in_channels=rank, kernel=(1, 1), padding=(0, 0, 0, 0))]
    return [
        whole.replace(out_channels=rank, kernel=(rows, 1), padding=(top, 0, bottom, 0)),
        whole.replace(in_channels=rank, kernel=(1, columns), padding=(0, left, 0, right)),
    ]


def chain(parts: list[Any], target: Any) -> Callable[[], float]:
    """The parts one behind the other, the last with ReLU: returns seconds of one call of all."""
    steps: list[tuple[Callable[..., None], list[Any]]] = []
    for part in parts:
        spec, weight = packed(part, target)
        library, arguments = built(spec, [weight], target, activation=part is parts[-1])
        if steps:
            arguments[0] = steps[-1][1][-1]
        steps.append((library.mod["main"], arguments))
    number = calls(sum(part.macs for part in parts))

    def run() -> float:
        started = time.perf_counter()
        for _ in range(number):
            for function, arguments in steps:
                function(*arguments)
        return (time.perf_counter() - started) / number

    return run


if __name__ == "__main__":
    main()
