"""Whether a weight's zeros are worth a kernel that skips them, and the weight for that kernel.

Zeros are looked at as they lie, wherever they came from: a step of the recipe, or a model that was
pruned elsewhere. A layer keeps its dense kernel where that is known to be faster or, when nobody
measured it, expected to be.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..targets import Target
from .paired_entries import pair_entries
from .sparse_conv2d import encode, group_entries, offsets_of
from .sparse_form import MOST_COMPILED, SparseForm
from .sparse_rows import spec_of as spec_by_bits
from .spec import Conv2dSpec, MatmulSpec, SparseConv2dSpec, SparseRowsSpec, WeightedSpec
from .weights import weight_codes

SparseSpec = SparseConv2dSpec | SparseRowsSpec
# Beyond this share of weights that are not zero nobody looks further.
_DENSE = 0.9


def sparse_candidates(
    spec: WeightedSpec, kept: np.ndarray, target: Target
) -> list[tuple[float, SparseForm]]:
    """(expected time in times of the dense kernel's, form) of all forms of the target for a layer
    of which only the weights `kept` [G, K, N] are not zero, best first."""
    from .dispatch import sparse_forms

    if not _is_plain(spec) or kept.mean() > _DENSE:
        return []
    assert isinstance(spec, (Conv2dSpec, MatmulSpec))
    together = _ungrouped(spec, kept)
    shares = []
    for form in sparse_forms(spec, target):
        entries = _entries(together, form.block)
        if not form.compiled or entries <= MOST_COMPILED:
            shares.append((form.share(entries * form.block, kept.size), form))
    return sorted(shares, key=lambda pair: pair[0])


def sparse_form(
    spec: WeightedSpec, weight: np.ndarray, target: Target, chosen: str | None = None
) -> tuple[SparseSpec, list[np.ndarray]] | None:
    """The layer by its nonzero weights alone, with the arrays that `encoded` lists; None:
    dense is as fast, or no kernel of the target skips zeros.

    `chosen` names the form (`SparseForm.words`) that was found to be best, empty for dense; None:
    the one that is expected to be best.
    """
    if chosen == "" or not _is_plain(spec):
        return None
    codes = weight_codes(spec, weight)
    found = sparse_candidates(spec, codes != 0, target)
    forms = [f for share, f in found if (share < 1 if chosen is None else f.words == chosen)]
    for form in forms:
        stored = encoded(spec, codes, form)
        if adds_exactly(stored[0], form):
            return stored
    return None


def leaves_out(spec: WeightedSpec, values: np.ndarray, form: SparseForm) -> bool:
    """Whether a form, whose values `encoded` gave, has fewer weights than the layer, its last block
    filled up: else it skips nothing."""
    blocks = -(-spec.columns // form.block)
    return values.size < spec.groups_of_channels * spec.reduction_size * blocks * form.block


def adds_exactly(spec: SparseSpec, form: SparseForm) -> bool:
    """Whether the weights prove what the form's kernel relies on."""
    return form.sums is None or (isinstance(spec, SparseConv2dSpec) and spec.chain > 0)


def _is_plain(spec: WeightedSpec) -> bool:
    """Whether the layer is one that sparse kernels compute, its weight as it was before packing."""
    return (
        isinstance(spec, (Conv2dSpec, MatmulSpec))
        and spec.columns > 1
        and spec.weight_layout == spec.plain_layout
        and not spec.weight_zero_point
        and not spec.group_size
    )


def _entries(kept: np.ndarray, block: int) -> int:
    """How many inputs all blocks of so many outputs read."""
    starts = np.arange(0, kept.shape[1], block)
    return int(np.count_nonzero(np.logical_or.reduceat(kept, starts, axis=1)))


def encoded(
    spec: WeightedSpec, codes: np.ndarray, form: SparseForm
) -> tuple[SparseSpec, list[np.ndarray]]:
    """A layer with the weight `codes` [G, K, N] in a form: values, offsets or words of bits, and
    starts."""
    if form.bits:
        assert isinstance(spec, MatmulSpec)
        return spec_by_bits(spec.rows, codes[0], form.group, shared=form.block > 1)
    taps = spec.reduction[0] * spec.reduction[1] if form.by_channel else 1
    values, positions, starts = encode(_ungrouped(spec, codes), form.block, taps=taps)
    if not len(values):  # nothing is left of the layer, and arrays are not empty
        values, positions = np.zeros((1, form.block), codes.dtype), np.zeros(1, np.int32)
        starts[1:] = 1
    if form.by_channel and form.sums is not None:
        values, positions, starts = pair_entries(values, positions, starts, form.sums)
    if form.group > 1:
        values, positions, starts = group_entries(values, positions, starts, form.group)
    common: dict[str, Any] = {
        "data_dtype": spec.data_dtype, "weight_dtype": spec.weight_dtype,
        "acc_dtype": spec.acc_dtype, "block": form.block, "group": form.group,
        "by_channel": form.by_channel,
        "entries": len(positions), "longest": int(np.diff(starts).max()),
        "chain": 0 if form.sums is None else form.sums.longest_chain(values, starts),
    }  # fmt: skip
    if isinstance(spec, MatmulSpec):
        sparse = SparseConv2dSpec(
            batch=1, height=1, width=spec.rows, in_channels=spec.in_features,
            out_channels=spec.out_features, kernel=(1, 1), is_flat=True, **common,
        )  # fmt: skip
    else:
        assert isinstance(spec, Conv2dSpec)
        sparse = SparseConv2dSpec(
            batch=spec.batch, height=spec.height, width=spec.width, in_channels=spec.in_channels,
            out_channels=spec.out_channels, kernel=spec.kernel, strides=spec.strides,
            padding=spec.padding, dilation=spec.dilation, pad_value=spec.pad_value, **common,
        )  # fmt: skip
    offsets = offsets_of(sparse, positions)
    if form.compiled:
        sparse = sparse.replace(pattern=(*offsets.tolist(), *starts.tolist()))
    return sparse, [values, offsets, starts]


def _ungrouped(spec: WeightedSpec, codes: np.ndarray) -> np.ndarray:
    """[G, K, N] => [K * G, N * G], the weight of the layer without groups: zeros where a group does
    not read."""
    groups, reduction, outputs = codes.shape
    taps = spec.reduction[0] * spec.reduction[1]
    full = np.zeros((taps, groups, reduction // taps, groups, outputs), codes.dtype)
    for group in range(groups):
        full[:, group, :, group] = codes[group].reshape(taps, -1, outputs)
    return full.reshape(groups * reduction, groups * outputs)
