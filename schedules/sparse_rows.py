"""Linear layers of few rows by the weights that are not zero, found by bits:

acc[m, n] = sum over k with bit(n, k) of data[m, k] * values[how many bits are set before it]

A product of one row takes as long as its weights take to arrive, and bits are few: an eighth of the
bytes of dense int8 weights, or, where 16 outputs share their inputs, a 128th.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .matmul import reference as dense_reference
from .spec import SparseRowsSpec, ceil_div
from .weights import kernel_attrs

if TYPE_CHECKING:
    from tvm import te

_BITS = 64
# Kernels load whole registers of values.
_BEHIND = 64


def describe(spec: SparseRowsSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (data, values, words, starts) and the accumulators."""
    from tvm import te, tirx

    data = te.placeholder(spec.data_shape, spec.data_dtype, name="data")
    values = te.placeholder((spec.stored,), spec.weight_dtype, name="values")
    words = te.placeholder((spec.blocks * spec.words_of_a_block,), "uint64", name="words")
    starts = te.placeholder((spec.blocks * spec.starts_of_a_block + 1,), "int32", name="starts")
    k = te.reduce_axis((0, spec.in_features), name="k")
    lanes, run, inputs = spec.LANES, spec.RUN, spec.inputs_of_a_word
    one = tirx.const(1, "uint64")

    def term(m: tirx.Var, n: tirx.Var) -> tirx.PrimExpr:
        block, lane, inner = n // lanes, n % lanes, k % inputs
        word = k // inputs
        bit = inner
        if not spec.shared:
            bit = lane * spec.group + inner if spec.group > 1 else inner * lanes + lane
        first = block * spec.words_of_a_block + word // run * run
        mine = words[first + word % run]
        before = starts[block * spec.starts_of_a_block + word // run]
        for i in range(run - 1):
            others = tirx.popcount(words[first + i]).astype("int32")
            before += tirx.if_then_else(i < word % run, others, tirx.const(0, "int32"))
        shift = bit.astype("uint64")
        before += tirx.popcount(mine & ((one << shift) - one)).astype("int32")
        place = before
        if spec.shared:
            place = (before // spec.group * lanes + lane) * spec.group + before % spec.group
        product = data[m, k].astype(spec.acc_dtype) * values[place].astype(spec.acc_dtype)
        is_set = tirx.NE((mine >> shift) & one, tirx.const(0, "uint64"))
        return tirx.if_then_else(is_set, product, tirx.const(0, spec.acc_dtype))

    acc = te.compute(
        spec.output_shape,
        lambda m, n: te.sum(term(m, n), axis=k),
        name="sparse_rows",
        attrs=kernel_attrs(spec),
    )
    return [data, values, words, starts], acc


def encode(
    weight: np.ndarray, group: int, shared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """[K, N] => values, words uint64, starts int32 of `SparseRowsSpec`, and the most bits that a
    block sets."""
    lanes, run = SparseRowsSpec.LANES, SparseRowsSpec.RUN
    reduction, outputs = weight.shape
    blocks = ceil_div(outputs, lanes)
    inputs = _BITS if shared else _BITS // lanes
    words = ceil_div(reduction, inputs)
    full = np.zeros((words * inputs, blocks * lanes), weight.dtype)
    full[:reduction, :outputs] = weight
    # [K, N] => [blocks, words, inputs of a word, lanes]
    by_word = full.reshape(words, inputs, blocks, lanes).transpose(2, 0, 1, 3)
    if shared:
        bits = (by_word != 0).any(axis=3)
        parts = []
        for block, kept in zip(by_word, bits, strict=True):
            found = block[kept]  # [inputs, lanes]
            padded = np.zeros((ceil_div(len(found), group) * group, lanes), weight.dtype)
            padded[: len(found)] = found
            parts.append(padded.reshape(-1, group, lanes).transpose(0, 2, 1).reshape(-1))
    else:
        turned = by_word.swapaxes(2, 3) if group > 1 else by_word
        ordered = turned.reshape(blocks, words, _BITS)
        bits = ordered != 0
        parts = [block[kept] for block, kept in zip(ordered, bits, strict=True)]
    values = np.concatenate([*parts, np.zeros(0 if shared else _BEHIND, weight.dtype)])
    if not len(values):  # nothing is left of the layer, and arrays are not empty
        values = np.zeros(group * lanes, weight.dtype)
    # Where the runs of words begin: within a block, and blocks one behind the other.
    counts = np.zeros((blocks, ceil_div(words, run) * run), np.int64)
    counts[:, :words] = bits.sum(axis=2)
    of_runs = counts.reshape(blocks, -1, run).sum(axis=2)
    sizes = np.array([len(part) // (lanes if shared else 1) for part in parts])
    ends = np.cumsum(sizes)
    firsts = (np.cumsum(of_runs, axis=1) - of_runs) + (ends - sizes)[:, None]
    starts = np.concatenate([firsts.reshape(-1), ends[-1:]]).astype(np.int32)
    packed = np.packbits(bits.reshape(-1), bitorder="little").view("<u8")
    return values, packed.astype(np.uint64), starts, int(sizes.max())


def decode(
    spec: SparseRowsSpec, values: np.ndarray, words: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Inverse of `encode`: the weight [in_features, out_features]."""
    lanes, inputs, blocks = spec.LANES, spec.inputs_of_a_word, spec.blocks
    in_bytes = words.astype("<u8").view(np.uint8)
    bits = np.unpackbits(in_bytes, bitorder="little").astype(bool).reshape(blocks, -1, _BITS)
    firsts = starts[: -1 : spec.starts_of_a_block]
    full = np.zeros((blocks, spec.words_of_a_block, inputs, lanes), values.dtype)
    for block, (kept, first) in enumerate(zip(bits, firsts, strict=True)):
        count = int(kept.sum())
        if spec.shared:
            whole = ceil_div(count, spec.group) * spec.group
            mine = values[first * lanes : (first + whole) * lanes]
            entries = mine.reshape(-1, lanes, spec.group).swapaxes(1, 2).reshape(-1, lanes)
            full[block][kept] = entries[:count]
            continue
        ordered = np.zeros((spec.words_of_a_block, _BITS), values.dtype)
        ordered[kept] = values[first : first + count]
        if spec.group > 1:
            full[block] = ordered.reshape(-1, lanes, spec.group).swapaxes(1, 2)
        else:
            full[block] = ordered.reshape(-1, inputs, lanes)
    # [blocks, words, inputs, lanes] => [K, N]
    weight = full.transpose(1, 2, 0, 3).reshape(-1, blocks * lanes)
    return np.ascontiguousarray(weight[: spec.in_features, : spec.out_features])


def reference(spec: SparseRowsSpec, data: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """The same in NumPy: the dense layer with the weight that the parts stand for."""
    result: np.ndarray = dense_reference(spec.dense, data, decode(spec, *parts))
    return result


def spec_of(
    rows: int, weight: np.ndarray, group: int, shared: bool
) -> tuple[SparseRowsSpec, list[np.ndarray]]:
    """The layer of a weight [K, N], of floats or bytes, and its values, words and starts."""
    values, words, starts, longest = encode(weight, group, shared)
    dtypes: dict[str, Any] = {}
    if weight.dtype == np.int8:
        dtypes = {"data_dtype": "uint8", "weight_dtype": "int8", "acc_dtype": "int32"}
    spec = SparseRowsSpec(
        rows=rows, in_features=weight.shape[0], out_features=weight.shape[1], group=group,
        shared=shared, stored=len(values), longest=longest, **dtypes,
    )  # fmt: skip
    return spec, [values, words, starts]
