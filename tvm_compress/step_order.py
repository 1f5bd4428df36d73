"""Whether the steps of a recipe can work in their order: refused before any work is done.

A step that finds all its layers spoiled by an earlier one is an error, some of them a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import RecipeError

if TYPE_CHECKING:
    import tvm

    from .recipe import Step

# Steps that solve for biases with the weights that they leave.
_OWN_BIASES = {"lowrank", "shrink", "sparsify"}


def check_order(module: tvm.IRModule, plan: Sequence[Sequence[Step]]) -> list[str]:
    """What the user should know of layers that steps have to leave alone, one line for each step.

    `plan` are a recipe's steps, consecutive ones of a name together. Raises `RecipeError` with
    the step's file and line where a step has nothing left that it could work on.
    """
    from .flow import schemes_of
    from .relay_passes.passes import PASSES
    from .relay_passes.select import list_layers
    from .relay_passes.step_notes import left_alone

    came_quantised = {layer.name for layer in list_layers(module) if layer.is_quantized}
    changed: list[tuple[str, set[str]]] = []
    notes = []
    for group in plan:
        entry = PASSES[group[0].name]
        for step in group:
            layers = _changed(module, [step])
            left = set(layers)
            reasons = []
            for earlier, theirs in changed:
                if earlier in entry.refused_behind and left & theirs:
                    reasons.append(f"behind {earlier}: {entry.refused_behind[earlier]}")
                    left -= theirs
            if entry.needs_before is not None:
                needed, why = entry.needs_before
                having = {
                    name for earlier, theirs in changed if earlier == needed for name in theirs
                }
                if left - having - came_quantised:
                    reasons.append(f"without {needed} before it: {why}")
                    left &= having | came_quantised
            if entry.is_for_floats and left & came_quantised:
                reasons.append("on a model that came quantised: its weights are integer codes")
                left -= came_quantised
            place = f"{step.origin}: " if step.origin else ""
            if layers and not left:
                done = [name for name, _ in changed]
                raise RecipeError(
                    f"{place}{step.name} can change none of its layers, {'; '.join(reasons)}; "
                    f"{_advice(step.name, reasons, done)}"
                )
            schemes = schemes_of(module, [step])
            unfit = left_alone(step.name, module, schemes)
            asked = left or schemes.keys()  # also layers of operators that it is not for
            if asked and asked <= unfit.keys():
                name = next(layer for layer in unfit if layer in asked)
                count = f"its {len(asked)} layers, such as" if len(asked) > 1 else "its only layer"
                raise RecipeError(f"{place}{step.name} cannot change {count} {name}: {unfit[name]}")
            if reasons:
                spoiled = len(layers) - len(left)
                notes.append(
                    f"{step.name} leaves {spoiled} of {len(layers)} layers alone, "
                    f"{'; '.join(reasons)}"
                )
        changed.append((group[0].name, _changed(module, group)))
    return notes


def _changed(module: tvm.IRModule, steps: Sequence[Step]) -> set[str]:
    """The layers that steps do something to: `quantize` with `weights: none` does not."""
    from .flow import schemes_of
    from .relay_passes.passes import PASSES
    from .relay_passes.select import list_layers

    schemes = schemes_of(module, steps)
    name, only = steps[0].name, PASSES[steps[0].name].operator
    return {
        layer.name
        for layer in list_layers(module)
        if layer.name in schemes
        and only in (None, layer.op)
        and (name != "quantize" or schemes[layer.name].weights)
    }


def _advice(name: str, reasons: Sequence[str], done: Sequence[str]) -> str:
    """`done`: the steps before."""
    if name == "correct_bias" and set(done) & _OWN_BIASES:
        steps = ", ".join(sorted(set(done) & _OWN_BIASES))
        return f"leave it out ({steps} with data sets biases itself), or put quantize before it"
    if any(reason.startswith("behind") for reason in reasons):
        return f"put {name} before that step, or give the two different layers"
    if any(reason.startswith("without") for reason in reasons):
        return "add that step in front of it, or leave it out"
    return "start from the float model"
