"""Small sparse layers of float32 with the pattern as data and in the kernel's code, on x86.

    python tests/benchmarks/sparse_in_code.py [--target x86-64-v3] [--sparsity 0.8,0.9,0.95]

Zeros lie at random; bias and ReLU. The contestants take turns; figures are the best of
many runs, in microseconds: our dense kernel, then for every sparsity both forms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from contest import Convolution, chosen_target, contest, options, same_convolutions
from kernels_x86 import ours, timed
from sparse_kernels import title

LAYERS: list[Convolution] = [
    (32, 32, 16, 16, 3),
    (16, 16, 32, 32, 3),
    (8, 8, 64, 64, 3),
    (56, 56, 16, 16, 3),
    (25, 5, 64, 64, 1),
]


def main() -> None:
    """Print one line a layer."""
    parser = options(__doc__ or "")
    parser.add_argument("--sparsity", default="0.8,0.9,0.95")
    arguments = parser.parse_args()
    target = chosen_target(arguments)
    sparsities = [float(part) for part in arguments.sparsity.split(",")]
    pairs = [f"{title(s)} {form}" for s in sparsities for form in ("as data", "in code")]
    print("| " + " | ".join(["layer", "dense", *pairs]) + " |")
    print("|" + "---|" * (2 + len(pairs)))
    for name, spec in same_convolutions(LAYERS, arguments.only):
        contestants: list[Callable[[], float] | None] = [ours(spec, target)]
        for sparsity in sparsities:
            contestants += both_forms(spec, sparsity, target)
        times = iter(contest([run for run in contestants if run is not None]))
        figures = ["-" if run is None else f"{1e6 * next(times):.1f}" for run in contestants]
        print("| " + " | ".join([name, *figures]) + " |", flush=True)


def both_forms(spec: Any, sparsity: float, target: Any) -> list[Callable[[], float] | None]:
    """The layer with so many zeros, its pattern as data and in code (None: too many weights)."""
    from tvm_compress.schedules.sparse_weight import encoded, sparse_candidates

    rng = np.random.default_rng(0)
    shape = (1, spec.reduction_size, spec.out_channels)
    order = rng.random(shape).ravel().argsort().argsort().reshape(shape)
    codes = rng.standard_normal(shape, dtype="float32") * (order >= sparsity * order.size)
    found: list[Callable[[], float] | None] = [None, None]
    for _, form in sparse_candidates(spec, codes != 0, target):
        if form.block == 1:
            sparse, parts = encoded(spec, codes, form)
            found[form.compiled] = timed(sparse, parts, target)
    return found


if __name__ == "__main__":
    main()
