"""Bring an imported module to graph form; see the README of `relay_passes`."""

from __future__ import annotations

import tvm
from tvm import relax

from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_pad import FoldPad
from .name_layers import NameLayers
from .remove_identities import RemoveIdentities

__all__ = [
    "FoldBatchNorm",
    "FoldConstants",
    "FoldPad",
    "NameLayers",
    "RemoveIdentities",
    "canonicalize",
]


def canonicalize() -> tvm.transform.Sequential:
    """The canonicalisation as one pass. Order matters where a comment says so."""
    return tvm.transform.Sequential(
        [
            relax.transform.Normalize(),
            relax.transform.ConvertToDataflow(min_size=1),
            # Constants first: what looks like an operator (a transposed weight) is then a weight.
            FoldConstants(),
            RemoveIdentities(),
            FoldPad(),
            FoldBatchNorm(),
            # A batch-norm that stayed may have become `x * 1`, a bias `x + 0`.
            FoldConstants(),
            RemoveIdentities(),
            relax.transform.DeadCodeElimination(["main"]),
            NameLayers(),
        ],
        name="tvm_compress.canonicalize",
    )
