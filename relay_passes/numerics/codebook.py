"""Weights that share sixteen values: 4-bit indices into a table, [K, N], K summed, N outputs.

    w[k, n] = tables[n // c, codes[k, n]] * multiples[k // g, n] * scales[n]

Han et al. 2016, "Deep Compression", section 3: the values are the centroids of the weights
(k-means). Here weights are first divided by their channel's (or group's) scale, so that one table
serves many channels, and count by the square of that scale: what is least is the squared error of
the weights themselves. `NORMAL_TABLE` is the fixed alternative of Dettmers et al. 2023, "QLoRA",
section 3: quantiles of the normal distribution. One value is zero: pruned weights stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .two_level import LARGEST_ACTIVATION, LARGEST_SUM, split_scales

TABLE_SIZE = 16
# Entries of a table. Two products of such with bytes of data fit 16 bits (vpmaddubsw), and 64 steps
# are fine beside sixteen values.
LARGEST_ENTRY = 64
# Weights are counted in so many bins of their range: the table's own precision is 1/128 of it.
_BINS = 4096
_ROUNDS = 40
# Turns of scales and tables, and what each scale is multiplied with to find a better one.
_TURNS = 3
_FACTORS = (0.8, 0.86, 0.92, 0.97, 1.0, 1.04, 1.09)


@dataclass(frozen=True)
class Codebook:
    """The parts of a weight [K, N]."""

    codes: NDArray[np.int8]
    """0..15, [K, N]."""
    tables: NDArray[np.int8]
    """[ceil(N/c), 16], ascending."""
    table_channels: int
    scales: NDArray[np.float32]
    """[N]"""
    multiples: NDArray[np.uint8] | None
    """[ceil(K/g), N]; None without groups."""
    group_size: int

    def integers(self) -> NDArray[np.int64]:
        """What the scales multiply, [K, N]."""
        owner = np.arange(self.codes.shape[1]) // self.table_channels
        values = self.tables[owner, self.codes].astype(np.int64)
        if self.multiples is None:
            return values
        return values * self.multiples[np.arange(len(values)) // self.group_size]

    def decode(self) -> NDArray[np.float32]:
        """The weights, [K, N]."""
        return self.integers().astype(np.float32) * self.scales


def normal_table() -> NDArray[np.float64]:
    """Quantiles of the normal distribution, -1 to 1, zero among them, one more above than below."""
    # The outermost quantile: half a sixteenth of the mass lies beyond it, averaged over both sides.
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    inverse = NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    table = np.array(sorted([*below, 0.0, *above]))
    return np.asarray(table / table.max())


def quantize_codebook(
    weight: NDArray[np.float32],
    table_channels: int,
    group_size: int = 0,
    is_normal: bool = False,
    smallest_scale: NDArray[np.float64] | float = 0.0,
) -> Codebook:
    """`table_channels` output channels share a table; `group_size` inputs share a multiple of their
    channel's scale (0: none). Tables are fitted, or all the normal one.

    Scales and tables are chosen in turns for the least squared error; each weight takes the nearest
    value. No sum with bytes of data leaves 31 bits: where it might, a channel's multiples are
    halved.
    """
    reduction, outputs = weight.shape
    table_channels = min(table_channels, outputs)
    size = min(group_size or reduction, reduction)
    group = np.arange(reduction) // size
    covering = np.maximum.reduceat(np.abs(weight), np.arange(0, reduction, size), axis=0)  # [G, N]
    wanted = (covering / LARGEST_ENTRY).astype(np.float32)
    for _ in range(_TURNS):
        wanted = _better_scales(weight, wanted, group, table_channels, is_normal)
    largest = np.full(outputs, 255, np.int64)
    while True:
        if len(covering) > 1:
            multiples, scales = split_scales(wanted, smallest_scale, largest)
        else:
            scales = np.maximum(wanted[0], smallest_scale).astype(np.float32)
            scales[scales <= 0] = 1.0
            multiples = np.ones((1, outputs), np.uint8)
        step = multiples * scales  # [G, N]
        values = weight / step[group]
        tables = _tables(values, (step**2)[group], table_channels, is_normal)
        codes = _nearest(values, tables, table_channels)
        book = Codebook(
            codes, tables, table_channels, scales,
            multiples if len(covering) > 1 else None, size,
        )  # fmt: skip
        sums = LARGEST_ACTIVATION * np.abs(book.integers()).sum(axis=0)
        is_large = (sums > LARGEST_SUM) & (largest > 1)
        if book.multiples is None or not is_large.any():
            return book
        largest[is_large] = np.maximum(largest[is_large] // 2, 1)


def _better_scales(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    group: NDArray[np.int64],
    table_channels: int,
    is_normal: bool,
) -> NDArray[np.float32]:
    """Of each scale [G, N] the multiple with the least squared error, for tables fitted to it."""
    scales = np.where(scales > 0, scales, np.float32(1))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    tables = _tables(weight / scales[group], (scales**2)[group], table_channels, is_normal)
    owner = np.arange(weight.shape[1]) // table_channels
    best = np.full(scales.shape, np.inf)
    chosen = scales
    for factor in _FACTORS:
        tried = (scales * factor).astype(np.float32)
        step = tried[group]
        codes = _nearest(weight / step, tables, table_channels)
        error = (tables[owner, codes] * step - weight).astype(np.float64) ** 2
        summed = np.add.reduceat(error, starts, axis=0)
        chosen = np.where(summed < best, tried, chosen)
        best = np.minimum(summed, best)
    return np.asarray(chosen)


def _tables(
    values: NDArray[np.float32],
    importance: NDArray[np.float32],
    table_channels: int,
    is_normal: bool,
) -> NDArray[np.int8]:
    """A table for every `table_channels` columns, int8 [T, 16]."""
    count = -(-values.shape[1] // table_channels)
    if is_normal:
        entries = np.rint(normal_table() * LARGEST_ENTRY).astype(np.int8)
        return np.tile(entries, (count, 1))
    edges = np.linspace(-LARGEST_ENTRY, LARGEST_ENTRY, _BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    tables = []
    for table in range(count):
        columns = slice(table * table_channels, (table + 1) * table_channels)
        part = np.clip(values[:, columns], -LARGEST_ENTRY, LARGEST_ENTRY)
        counts, _ = np.histogram(part, edges, weights=importance[:, columns])
        centroids = fit_centroids(middles, counts.astype(np.float64))
        tables.append(np.rint(centroids).astype(np.int8))
    return np.stack(tables)


def fit_centroids(
    values: NDArray[np.float64], counts: NDArray[np.float64], rounds: int = _ROUNDS
) -> NDArray[np.float64]:
    """Sixteen centroids, ascending, one of them 0, of `values` (ascending) with `counts`.

    Lloyd's algorithm from equal shares of the cube root of the density (best for many centroids:
    Panter and Dite 1951), on running sums: a round costs sixteen searches.
    """
    total = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * values)])
    spread = np.concatenate([[0.0], np.cumsum(np.cbrt(counts))])
    if total[-1] <= 0:
        return np.zeros(TABLE_SIZE)
    shares = (np.arange(TABLE_SIZE) + 0.5) / TABLE_SIZE * spread[-1]
    places = np.minimum(np.searchsorted(spread, shares, side="right") - 1, len(values) - 1)
    centroids = values[np.maximum(places, 0)]
    zero = int(np.abs(centroids).argmin())
    centroids[zero] = 0.0
    centroids.sort()
    for _ in range(rounds):
        borders = np.searchsorted(values, (centroids[:-1] + centroids[1:]) / 2)
        ends = np.concatenate([[0], borders, [len(values)]])
        masses, moments = np.diff(total[ends]), np.diff(moment[ends])
        moved = np.where(masses > 0, moments / np.maximum(masses, 1e-300), centroids)
        moved[int(np.abs(centroids).argmin())] = 0.0
        moved.sort()
        if np.allclose(moved, centroids, atol=1e-3):
            break
        centroids = moved
    return centroids


def _nearest(
    values: NDArray[np.float32], tables: NDArray[np.int8], table_channels: int
) -> NDArray[np.int8]:
    """Index of the nearest entry of its table for each value; the lower one of two."""
    codes = np.empty(values.shape, np.int8)
    for table, entries in enumerate(tables.astype(np.float32)):
        columns = slice(table * table_channels, (table + 1) * table_channels)
        borders = (entries[:-1] + entries[1:]) / 2
        codes[:, columns] = np.searchsorted(borders, values[:, columns])
    return codes
