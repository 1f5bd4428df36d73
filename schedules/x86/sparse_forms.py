"""Sparse forms of x86 and what they cost against dense kernels, measured on Zen 4."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from ...targets import Target
from ..sparse_conv2d import BYTES
from ..sparse_cost import DenseCost, GatheredCost
from ..sparse_form import SparseForm
from ..spec import Conv2dSpec, MatmulSpec, ceil_div
from . import winograd
from .sparse_byte_planes import fits_byte_planes, planes_dot
from .sparse_bytes import CHAINS, PAIRS, QUADS
from .sparse_compiled import fits_compiled
from .sparse_planes import fits_planes
from .sparse_row_forms import byte_row_forms, float_row_forms, has_few_rows

# Outputs that share their inputs => cycles of a sparse multiply-add against a dense one: indices,
# data without an order, narrow vectors (1.05 to 1.3 for blocks of 16).
_COST = {16: 1.2, 8: 1.7, 4: 3.0}
# The same of vectors of positions: every multiply-add loads data, most from the second-level cache.
_PLANES = {1: 2.5, 2: 1.5, 4: 1.4}
# The same with the pattern in the code, by the lanes of a vector.
_COMPILED = {16: 1.2, 8: 1.6}
# The same of bytes, against `vpdpbusd`: most of it is interleaving.
_BYTE_PLANES = {1: 4.5, 2: 3.0, 4: 2.2}
# The same without it, against `vpmaddwd`.
_PAIR_PLANES = {1: 2.0, 2: 1.4, 4: 1.2}
# Multiply-adds that turning over one number of the input or the output takes as long as.
_TURNED, _TURNED_BYTES, _TURNED_PAIRS = 8, 28, 14
# Bytes in blocks of 16, in times of a dense multiply-add: by `vpdpbusd`, and without it.
_BYTES = (
    DenseCost(1, 20),
    GatheredCost({16: 1.43}, 21, woven=4.6, copied=1.2, tile=16, run=64),
)
_BYTES_IN_PAIRS = (
    DenseCost(1, 20),
    GatheredCost({16: 0.75}, 21, woven=7.1, copied=6.3, tile=4, run=32),
)
# Winograd's filtering makes a dense 3x3 layer so much cheaper (14x14 and up).
_WINOGRAD = 0.42


def sparse_forms(spec: Conv2dSpec | MatmulSpec, target: Target) -> list[SparseForm]:
    """Forms of float32 layers, and of bytes."""
    dtypes = spec.data_dtype, spec.weight_dtype, spec.acc_dtype
    if dtypes == ("float32",) * 3:
        dense = _dense_cost(spec) * _filled(spec, target)
        forms = [SparseForm(block, cost / dense) for block, cost in _COST.items()]
        costs = {n: c for n, c in _PLANES.items() if fits_planes(_outputs(spec), n, target)}
        forms += _planes(spec, costs, dense, 8, _TURNED)
        if fits_compiled(_outputs(spec), target):
            [form] = _planes(spec, {1: _COMPILED[min(16, target.lanes(32))]}, dense, 8, _TURNED)
            forms.append(replace(form, compiled=True))
        return forms + (float_row_forms(spec, target) if has_few_rows(spec) else [])
    if dtypes != BYTES or not target.has("avx2"):
        return []
    if has_few_rows(spec):
        return byte_row_forms(spec, target)
    dot = planes_dot(target)
    assert dot is not None
    run, fits = 4 * dot.lanes, partial(fits_byte_planes, _outputs(spec), target=target)
    cost, gathered = _BYTES_IN_PAIRS if dot.is_chained else _BYTES
    dense = cost.of(spec) * _filled(spec, target)
    if not dot.is_chained:
        costs = {n: c for n, c in _BYTE_PLANES.items() if fits(n)}
        forms = _planes(spec, costs, dense, run, _TURNED_BYTES, QUADS)
        return [*forms, gathered.form(spec, 16, QUADS, dense)]
    pairs = gathered.form(spec, 16, PAIRS, dense)
    # Weights that prove this make the dense kernel as much faster (0.20 to 0.41 at 80 %, pairs 0.25
    # to 0.50 where nothing is proven).
    chained = replace(pairs, cost=0.99 * pairs.cost, group=QUADS, sums=CHAINS)
    costs = {n: c for n, c in _PAIR_PLANES.items() if fits(n)}
    planes = _planes(spec, costs, dense, run, _TURNED_PAIRS, QUADS)
    return [chained, pairs, *(replace(form, sums=CHAINS) for form in planes)]


def _filled(spec: Conv2dSpec | MatmulSpec, target: Target) -> float:
    """Outputs that the dense kernel computes for each output of a group: it fills up registers."""
    lanes = target.lanes(32)
    return ceil_div(spec.columns, lanes) * lanes / spec.columns


def _outputs(spec: Conv2dSpec | MatmulSpec) -> int:
    return spec.output_shape[-1]


def _planes(
    spec: Conv2dSpec | MatmulSpec, costs: dict[int, float], dense: float, run: int, turned: float,
    group: int = 1,
) -> list[SparseForm]:  # fmt: skip
    """Forms on vectors of positions, `run` at a time."""
    batch, rows, columns, _ = (1, 1, *spec.output_shape)[-4:]
    positions = slots = rows * columns
    if isinstance(spec, Conv2dSpec) and spec.kernel != (1, 1):
        # Bytes run on through the borders; floats fill up every row.
        across = ceil_div(spec.padded_width, spec.strides[1])
        slots = rows * (across if group > 1 else ceil_div(columns, run) * run)
    else:
        positions = slots = batch * positions
    waste = ceil_div(slots, run) * run / positions
    numbers = math.prod(spec.data_shape) + math.prod(spec.output_shape)
    constant = turned * numbers / spec.macs / dense
    return [
        SparseForm(block, cost * waste / dense, group, constant, by_channel=True)
        for block, cost in costs.items()
    ]


def _dense_cost(spec: Conv2dSpec | MatmulSpec) -> float:
    """Of a multiply-add of the dense layer, in times of the direct kernel's."""
    is_filtered = (
        isinstance(spec, Conv2dSpec)
        and winograd.is_applicable(spec)
        and min(spec.out_height, spec.out_width) >= 8
    )
    return _WINOGRAD if is_filtered else 1.0
