"""The one ordered list of passes from graph form to scheduled kernels.

`kernel_pipeline(target)` is what `build.build` runs; `relax.get_pipeline("tvm_compress", ...)`, registered on
import of this module, is the same flow for somebody else's TVM build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm
from tvm import relax

from .relay_passes.fuse_epilogues import FuseEpilogues
from .relay_passes.lower import LowerToKernels
from .relay_passes.narrow_indices import NarrowIndices
from .relay_passes.pack_weights import PackWeights
from .relay_passes.schedule_kernels import ScheduleKernels

if TYPE_CHECKING:
    from .targets import Target


def reference_pipeline() -> tvm.transform.Pass:
    """Graph form => kernel form: the executable reference, naive kernels, any target."""
    return tvm.transform.Sequential([LowerToKernels()], name="reference")


def packing_pipeline(target: Target) -> tvm.transform.Pass:
    """Kernel form => the same with the target's weight layouts; constants are final behind it."""
    return tvm.transform.Sequential([PackWeights(target)], name="packing")


def fusion_pipeline(target: Target) -> tvm.transform.Pass:
    """Packed kernel form => fused and scheduled kernels, ready for TVM's own build."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            # Phase 1: every operator a kernel, with one index type so that they fuse.
            transform.LegalizeOps(),
            NarrowIndices(),
            transform.AnnotateTIROpPattern(),
            # Reshapes must become views before fusion, or they would be copied inside kernels.
            transform.RewriteDataflowReshape(),
            # Phase 2: epilogues into the kernels that feed them.
            FuseEpilogues(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(["main"]),
            # Phase 3: schedules. Last, because they dispatch on whole fused functions.
            ScheduleKernels(target),
        ],
        name="fusion",
    )


def kernel_pipeline(target: Target) -> tvm.transform.Pass:
    """Graph or kernel form => scheduled kernels for `target`."""
    return tvm.transform.Sequential(
        [reference_pipeline(), packing_pipeline(target), fusion_pipeline(target)],
        name="tvm_compress_kernels",
    )
