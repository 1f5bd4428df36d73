"""Bring an imported module to graph form; see the README of `relay_passes`."""

from __future__ import annotations

import tvm
from tvm import relax

from .attach_bias import AttachBias
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_pad import FoldPad
from .fold_safe_softmax import FoldSafeSoftmax
from .name_layers import NameLayers
from .outline_branches import OutlineBranches
from .remove_identities import RemoveIdentities
from .split_concat import SplitConcat
from .wrap_indices import WrapIndices

__all__ = [
    "AttachBias",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldPad",
    "FoldSafeSoftmax",
    "NameLayers",
    "OutlineBranches",
    "RemoveIdentities",
    "SplitConcat",
    "WrapIndices",
    "canonicalize",
]


def canonicalize() -> tvm.transform.Sequential:
    """The canonicalisation as one pass. Order matters where a comment says so."""
    return tvm.transform.Sequential(
        [
            relax.transform.Normalize(),
            # Before anything is computed.
            WrapIndices(),
            # Constants first: what looks like an operator (a transposed weight) is then a weight.
            FoldConstants(),
            RemoveIdentities(),
            FoldPad(),
            FoldSafeSoftmax(),
            FoldBatchNorm(),
            SplitConcat(),
            AttachBias(),
            # A batch-norm that stayed may have become `x * 1`, a bias `x + 0`.
            FoldConstants(),
            RemoveIdentities(),
            # Not earlier: it keeps the name of `output = x` and loses that of `x`.
            relax.transform.ConvertToDataflow(min_size=1),
            relax.transform.DeadCodeElimination(["main"]),
            NameLayers(),
            # Branch functions are called after the branch, so names come before.
            OutlineBranches(),
        ],
        name="tvm_compress.canonicalize",
    )
