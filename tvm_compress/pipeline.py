"""The one ordered list of passes from graph form to scheduled kernels.

`build.build` runs its parts and compiles the kernels itself; `kernel_pipeline(target)` is all of it
as one pass, and `relax.get_pipeline("tvm_compress", ...)`, registered on import of this module, the
same flow for somebody else's TVM build.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.relax.pipeline import register_pipeline

from .relay_passes.branches import OnEachFunction
from .relay_passes.dead_channels import RemoveDeadChannels
from .relay_passes.fuse_epilogues import FuseEpilogues
from .relay_passes.integer_edges import IntegerEdges
from .relay_passes.lower import LowerToKernels
from .relay_passes.narrow_indices import NarrowIndices
from .relay_passes.pack_weights import PackWeights
from .relay_passes.schedule_kernels import ScheduleKernels
from .relay_passes.sparse_choices import CHOICES_ATTR, ChooseSparse
from .relay_passes.unsigned_activations import UnsignedActivations

if TYPE_CHECKING:
    from tvm import tirx

    from .recipe import Recipe
    from .relay_passes.costs import LayerCosts
    from .schedules import Choice
    from .targets import Target


def choosing_pipeline(
    target: Target, costs: LayerCosts, insisted: Collection[str]
) -> tvm.transform.Pass:
    """Graph form, behind a recipe's last step => the same with what costs decided noted.

    Decided on what ships: in a C project channels without a use have left by then, and with them
    zeros.
    """
    choose = ChooseSparse(target.name, costs, insisted)
    if not target.is_cross:
        return tvm.transform.Sequential([choose], name="choosing")
    shipped = tvm.transform.Sequential([edges_pipeline(), shrinking_pipeline(target), choose])

    @tvm.transform.module_pass(opt_level=0, name="choosing")
    def choosing(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        noted = (shipped(module)["main"].attrs or {}).get(CHOICES_ATTR)
        if noted is None:
            return module
        module = module.clone()
        module["main"] = module["main"].with_attr(CHOICES_ATTR, str(noted))
        return module

    return choosing


def edges_pipeline() -> tvm.transform.Pass:
    """Graph form => inputs and outputs as codes, for C projects; before all the others."""
    return tvm.transform.Sequential([IntegerEdges()], name="edges")


def shrinking_pipeline(target: Target) -> tvm.transform.Pass:
    """Graph form => the same outputs with less to compute; tensors inside may be smaller.

    Only of C projects: libraries are compared with the reference tensor by tensor.
    """
    passes = [RemoveDeadChannels()] if target.is_cross else []
    return tvm.transform.Sequential(passes, name="shrinking")


def storage_pipeline(target: Target) -> tvm.transform.Pass:
    """Graph form => the same numbers, with activations stored as the target's kernels like them."""
    passes = [UnsignedActivations()] if target.is_x86 else []
    return tvm.transform.Sequential(passes, name="storage")


def reference_pipeline() -> tvm.transform.Pass:
    """Graph form => kernel form: the executable reference, naive kernels, any target."""
    return tvm.transform.Sequential([OnEachFunction(LowerToKernels())], name="reference")


def packing_pipeline(target: Target) -> tvm.transform.Pass:
    """Kernel form => the same with the target's weight layouts; constants are final behind it."""
    return tvm.transform.Sequential([PackWeights(target)], name="packing")


def fusion_pipeline() -> tvm.transform.Pass:
    """Packed kernel form => one naive kernel for each fused group."""
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
            OnEachFunction(FuseEpilogues()),
            transform.FuseTIR(),
            transform.DeadCodeElimination(["main"]),
        ],
        name="fusion",
    )


def destination_pipeline() -> tvm.transform.Pass:
    """Fused kernels => kernels that write into tensors made before: TVM's own passes, in its order.

    This is what a C project is made of; it plans its memory itself, kernels' own included.
    """
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            transform.LegalizeOps(),
            NarrowIndices(),
            transform.RewriteDataflowReshape(),
            # The kernels of reshapes that became views would be scheduled and shipped.
            transform.DeadCodeElimination(["main"]),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
        ],
        name="destination",
    )


def memory_pipeline() -> tvm.transform.Pass:
    """Fused kernels => kernels that write into planned storages."""
    return tvm.transform.Sequential(
        [destination_pipeline(), relax.transform.StaticPlanBlockMemory()], name="memory"
    )


def runtime_pipeline() -> tvm.transform.Pass:
    """Planned memory => calls of the runtime; what is left to do is to schedule the kernels."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ],
        name="runtime",
    )


def schedule_pipeline(
    target: Target, choose: Callable[[tirx.PrimFunc], Choice | None] | None = None
) -> tvm.transform.Pass:
    """Planned memory => what `tvm.compile` hands to the code generator.

    `choose`: tuned choices, as `tuning.database.TunedChoices` gives them.
    """
    # Scheduled last, because Relax's own passes look into naive kernels (to find reshapes, say) and
    # insist on the blocks that a scheduled kernel no longer has.
    return tvm.transform.Sequential(
        [runtime_pipeline(), ScheduleKernels(target, choose)], name="schedule"
    )


def planning_pipeline(target: Target) -> tvm.transform.Pass:
    """Graph or kernel form => fused kernels with planned memory, before they are scheduled."""
    return tvm.transform.Sequential(
        [
            storage_pipeline(target),
            reference_pipeline(),
            packing_pipeline(target),
            fusion_pipeline(),
            memory_pipeline(),
        ],
        name="planning",
    )


def project_pipeline(target: Target) -> tvm.transform.Pass:
    """The same for a C project: inputs and outputs become integers, memory is planned later."""
    return tvm.transform.Sequential(
        [
            edges_pipeline(),
            shrinking_pipeline(target),
            storage_pipeline(target),
            reference_pipeline(),
            packing_pipeline(target),
            fusion_pipeline(),
            destination_pipeline(),
        ],
        name="project",
    )


def kernel_pipeline(
    target: Target, choose: Callable[[tirx.PrimFunc], Choice | None] | None = None
) -> tvm.transform.Pass:
    """Graph or kernel form => all that `tvm.compile` needs, for `relax_pipeline=`."""
    return tvm.transform.Sequential(
        [
            planning_pipeline(target),
            schedule_pipeline(target, choose),
        ],
        name="tvm_compress_kernels",
    )


@register_pipeline("tvm_compress")
def tvm_compress_pipeline(
    recipe: str | Path | Recipe = "int8", target: str = "host", calibration: Any = None
) -> tvm.transform.Pass:
    """A Relax pipeline for `tvm.compile`: compress by `recipe`, lower, schedule, build.

        tvm.compile(module, get_target("host").tvm_target(),
                    relax_pipeline=relax.get_pipeline("tvm_compress", calibration=samples))

    `recipe`, `target` and `calibration` are what `tvm_compress.compress` takes. The module's `main`
    needs static shapes and its weights as constants. Raises the errors of `tvm_compress.errors`.
    """

    @tvm.transform.module_pass(opt_level=0, name="tvm_compress")
    def run(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        from .flow import compress_module
        from .tuning.database import Database, TunedChoices

        compressed, chosen = compress_module(module, recipe, target, calibration)
        return kernel_pipeline(chosen, TunedChoices(Database(), chosen))(compressed)

    return run
