"""The register tile, chosen by a small cost model."""

from __future__ import annotations

from functools import lru_cache

from ..tile import Tile

# A register tile's body is unrolled; beyond this many output positions code size buys nothing.
_MAX_POSITIONS = 14
# Every row of a tile is a stream of its own for the first-level cache, whose way predictor confuses
# streams at like offsets; the columns of a row are one stream. So is every vector of weights.
_MAX_ROWS = 7
_STREAM = 0.25
# Where there is a second vector of channels to fill registers with, more positions are slower: by
# half for 14 x 1 on AVX2 (measured on Zen 4).
_POSITIONS_OF_MANY = 8
# A multiply-add's result is available after this many cycles: fewer accumulators than that stall.
_LATENCY = 4
# Loads a cycle; and what a tile costs outside its reduction loop, per accumulator and as a whole.
_LOADS = 2
_EPILOGUE = 6
_OVERHEAD = 20


@lru_cache(maxsize=4096)
def choose_tile(
    rows: int,
    columns: int,
    blocks: int,
    steps: int,
    registers: int,
    cycles: float,
    weight_instructions: int,
    spare: int,
) -> tuple[Tile, float]:
    """The cheapest tile for `rows` x `columns` positions, `blocks` registers of channels, `steps`
    steps; and the cycles of all of them.

    A step takes `cycles` per accumulator and `weight_instructions` per weight register;
    `spare` registers are needed besides accumulators and weights. Ragged ends are computed twice
    (the last tile is moved back inside), which is what the rounded-up counts below charge.
    """
    best, best_cost = Tile(1, 1, 1), float("inf")
    for vectors in range(1, min(blocks, 8) + 1):
        for tile_columns in range(1, min(columns, _MAX_POSITIONS) + 1):
            for tile_rows in range(1, min(rows, _MAX_ROWS, _MAX_POSITIONS // tile_columns) + 1):
                positions = tile_rows * tile_columns
                if positions * vectors + vectors + spare > registers:
                    break
                if blocks > 1 and positions > _POSITIONS_OF_MANY:
                    break
                accumulators = positions * vectors
                issue = accumulators * cycles + vectors * weight_instructions
                step = (
                    max(issue, (positions + vectors) / _LOADS, _LATENCY)
                    + 1
                    + _STREAM * (tile_rows + vectors)
                )
                cost = (
                    -(-rows // tile_rows)
                    * -(-columns // tile_columns)
                    * -(-blocks // vectors)
                    * (step * steps + _EPILOGUE * accumulators + _OVERHEAD)
                )
                if cost < best_cost:
                    best, best_cost = Tile(tile_rows, tile_columns, vectors), cost
    return best, best_cost
