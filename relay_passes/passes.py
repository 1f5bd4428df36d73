"""The passes that a recipe can name: step name => config, what to observe, how to apply.

Nothing is imported before it is used, so that listing the passes costs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

    from .costs import LayerCosts
    from .numerics.statistics import Statistics
    from .observations import Observations


@dataclass(frozen=True)
class PassEntry:
    """One recipe step.

    `observe` and `apply` take `schemes`: layer name => config, as `select.resolve` gives it.
    `keeps_statistics` is false when tensors have other values after the pass, so that calibration
    has to run again for the steps behind it.
    """

    summary: str
    config_at: str
    pass_at: str
    observe_at: str | None = None
    keeps_statistics: bool = True
    compares_with_float: bool = False
    """Not for layers that came quantised: there is no float original to compare with."""
    refused_behind: Mapping[str, str] = field(default_factory=dict)
    """Earlier steps on the same layers that leave this one nothing to do, with the reason."""
    needs_before: tuple[str, str] | None = None
    """A step that has to come before this one for the same layers, with the reason."""
    is_for_floats: bool = False
    """Refused where all layers it is for came quantised; other steps just leave those alone."""
    operator: str | None = None
    """The only one whose layers it changes."""
    uses_costs: bool = False
    """Whether the pass asks what layers cost on the target."""
    decide_at: str | None = None
    """Finds the configs of layers that have one together, by the network's losses (`decide`)."""
    undecided_at: str | None = None
    stages_at: str | None = None
    """Splits a step into parts, each calibrated behind those before (`stages`)."""

    @property
    def config(self) -> type:
        """The frozen dataclass of the step's fields."""
        return _load(self.config_at)

    def describe(self) -> tuple[tuple[str, ...], str]:
        """The config's fields and what its docstring begins with, without importing the pass."""
        module, name = self.config_at.split(":")
        text = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        (found,) = (
            node
            for node in ast.parse(text).body
            if isinstance(node, ast.ClassDef) and node.name == name
        )
        names = tuple(
            node.target.id
            for node in found.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        )
        return names, (ast.get_docstring(found) or "").partition("\n\n")[0].replace("\n", " ")

    @property
    def needs_statistics(self) -> bool:
        return self.observe_at is not None

    def observe(self, module: tvm.IRModule, schemes: Mapping[str, Any]) -> Observations | None:
        """What calibration has to gather on `module` before `apply`; `None` when nothing."""
        return None if self.observe_at is None else _load(self.observe_at)(module, schemes)

    def undecided(self, schemes: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `schemes` that `decide` has to look at."""
        return {} if self.undecided_at is None else _load(self.undecided_at)(schemes)

    def decide(
        self,
        module: tvm.IRModule,
        schemes: Mapping[str, Any],
        statistics: Statistics,
        loss: Callable[[tvm.IRModule], float] | None,
        costs: LayerCosts | None,
    ) -> dict[str, Any]:
        """`schemes` with a config for each layer alone; `statistics` is what `observe` asked for
        of the undecided ones, `loss` how far a module's outputs are from those of this one."""
        assert self.decide_at is not None
        return _load(self.decide_at)(module, schemes, statistics, loss, costs)

    def stages(self, module: tvm.IRModule, schemes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Parts of `schemes`, to be applied one after the other; only where `stages_at` is set."""
        assert self.stages_at is not None
        return _load(self.stages_at)(module, schemes)

    def apply(
        self,
        module: tvm.IRModule,
        schemes: Mapping[str, Any],
        statistics: Statistics | None = None,
        costs: LayerCosts | None = None,
    ) -> tvm.IRModule:
        """Run the pass. `statistics` is what `observe` asked for; without `costs` nothing is
        compared with the layers as they were."""
        make: Callable[..., tvm.transform.Pass] = _load(self.pass_at)
        arguments: list[Any] = [schemes]
        if self.needs_statistics:
            arguments.append(statistics)
        if self.uses_costs:
            arguments.append(costs)
        return make(*arguments)(module)


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f".{module}", __package__), name)


_CODES = {"quantize": "its weights are integer codes by then"}
_ZEROS = {"sparsify": "the zeros would be lost in weights that are dense again"}
_FACTORS = {"structured": "it has no matrix of weights any more"}

# Orders that make sense: shrink, lowrank or structured, sparsify, quantize, correct_bias.
PASSES: dict[str, PassEntry] = {
    "equalize": PassEntry(
        summary="even out weight ranges between neighbouring layers",
        config_at="equalize:EqualizeConfig",
        pass_at="equalize:Equalize",
        keeps_statistics=False,
        refused_behind=_CODES,
    ),
    "equalize_activations": PassEntry(
        summary="even out activation ranges of the channels between neighbouring layers",
        config_at="equalize_activations:EqualizeActivationsConfig",
        pass_at="equalize_activations:EqualizeActivations",
        observe_at="equalize_activations:observe",
        keeps_statistics=False,
        refused_behind=_CODES,
    ),
    "equalize_inputs": PassEntry(
        summary="even out the ranges of the features of the model's inputs",
        config_at="equalize_inputs:EqualizeInputsConfig",
        pass_at="equalize_inputs:EqualizeInputs",
        observe_at="equalize_inputs:observe",
        keeps_statistics=False,
        refused_behind=_CODES,
    ),
    "lowrank": PassEntry(
        summary="split layers into smaller ones whose product is nearest to them",
        config_at="low_rank_config:LowRankConfig",
        pass_at="low_rank:LowRank",
        observe_at="low_rank:observe",
        stages_at="low_rank:stages",
        decide_at="low_rank_ranks:decide",
        undecided_at="low_rank_ranks:undecided",
        keeps_statistics=False,
        uses_costs=True,
        refused_behind=_CODES | _ZEROS | _FACTORS,
        is_for_floats=True,
    ),
    "sparsify": PassEntry(
        summary="set weights to zero where they matter least, and let the others make up for it",
        config_at="sparsify_config:SparsifyConfig",
        pass_at="sparsify:Sparsify",
        observe_at="sparsify:observe",
        decide_at="sparsity_shares:decide",
        undecided_at="sparsity_shares:undecided",
        stages_at="sparsify:stages",
        keeps_statistics=False,
        uses_costs=True,
        refused_behind=_CODES,
        is_for_floats=True,
    ),
    "shrink": PassEntry(
        summary="remove whole channels, and let the layers that read them make up for it",
        config_at="shrink_config:ShrinkConfig",
        pass_at="shrink:Shrink",
        observe_at="shrink:observe",
        decide_at="channel_shares:decide",
        undecided_at="channel_shares:undecided",
        stages_at="shrink:stages",
        keeps_statistics=False,
        uses_costs=True,
        refused_behind=_CODES | _ZEROS | _FACTORS,
        is_for_floats=True,
    ),
    "structured": PassEntry(
        summary="give linear layers weights of few numbers, multiplied by fast transforms",
        config_at="structured_config:StructuredConfig",
        pass_at="structured:Structured",
        observe_at="structured:observe",
        operator="relax.matmul",
        keeps_statistics=False,
        uses_costs=True,
        refused_behind=_CODES | _ZEROS | _FACTORS,
        is_for_floats=True,
    ),
    "quantize": PassEntry(
        summary="integer weights and activations, or integer weights alone",
        config_at="quantize_config:QuantizeConfig",
        pass_at="quantize_branches:QuantizeBranches",
        observe_at="quantize_branches:observe",
        keeps_statistics=True,
        refused_behind=_CODES,
    ),
    "correct_bias": PassEntry(
        summary="give biases back what quantised weights take from each channel's mean",
        config_at="correct_bias:CorrectBiasConfig",
        pass_at="correct_bias:CorrectBias",
        observe_at="correct_bias:observe",
        keeps_statistics=True,
        compares_with_float=True,
        needs_before=("quantize", "biases make up for the rounding of weights"),
    ),
}
