"""Orders of steps that cannot work are refused before any work is done, with the place."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax

from tvm_compress.errors import RecipeError
from tvm_compress.flow import load_job
from tvm_compress.recipe import Step, load_recipe, parse_recipe, shipped_recipes
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.relay_passes.step_notes import left_alone, with_left_alone
from tvm_compress.report.schemes import describe_changes, describe_effects
from tvm_compress.report.text import effect_text

from .relay_passes.floats import Net, build, quantize, samples

SPARSIFY = "sparsify: {sparsity: 0.8}"


def network(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 16)
    return net.conv_relu("b", x, 16, kernel=1)


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    return build(network)


def notes_of(module: tvm.IRModule, *steps: str) -> tuple[str, ...]:
    lines = "\n".join(f"- {step}" for step in steps)
    recipe = parse_recipe(f"version: 1\nsteps:\n{lines}\n", "r.yaml")
    data = [{"x": array} for array in samples(module, 2)]
    return load_job(module, recipe, "x86-64-v3", data).notes


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["quantize", SPARSIFY], ["r.yaml:4", "behind quantize", "integer codes", "before"]),
        (["quantize", "lowrank"], ["lowrank can change none", "behind quantize"]),
        (["quantize", "equalize"], ["equalize can change none"]),
        ([SPARSIFY, "lowrank"], ["r.yaml:4", "zeros would be lost"]),
        (["quantize", "correct_bias", "quantize"], ["r.yaml:5", "integer codes"]),
        (["correct_bias", "quantize"], ["r.yaml:3", "without quantize before it"]),
        (
            ["quantize: {layers: a}", f"{SPARSIFY[:-1]}, layers: a}}"],
            ["r.yaml:4", "the two different layers"],
        ),
    ],
)
def test_what_cannot_work_is_refused(
    module: tvm.IRModule, steps: list[str], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        notes_of(module, *steps)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [
        ["lowrank", SPARSIFY, "quantize"],
        ["equalize", "quantize", "correct_bias"],
        [SPARSIFY, "sparsify: {sparsity: 0.9, layers: b}"],
        ["quantize: {layers: a}", f"{SPARSIFY[:-1]}, layers: b}}"],
        ["quantize: {weights: none, activations: none}", SPARSIFY],
        ["quantize", "quantize: {layers: b, activations: none}"],
    ],
)
def test_what_works_has_no_notes(module: tvm.IRModule, steps: list[str]) -> None:
    assert notes_of(module, *steps) == ()


def test_layers_that_are_left_alone_are_said(module: tvm.IRModule) -> None:
    (note,) = notes_of(module, "quantize: {layers: a}", SPARSIFY)
    assert note.startswith("sparsify leaves 1 of 2 layers alone, behind quantize")


def test_models_that_came_quantised(module: tvm.IRModule) -> None:
    codes = quantize(module)
    with pytest.raises(RecipeError, match="came quantised.*start from the float model"):
        notes_of(codes, SPARSIFY)
    assert notes_of(codes, "equalize", "quantize", "correct_bias") == ()


def test_shipped_recipes_are_in_order() -> None:
    module = build(lambda net, x: net.linear("fc", net.conv_relu("a", x, 4), 4))
    data = [{"x": array} for array in samples(module, 2)]
    for name in shipped_recipes():
        assert load_job(module, load_recipe(name), "x86-64-v3", data).notes == (), name


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            "sparsify: {sparsity: 0.5, pattern: {block: {outputs: 5000, inputs: 5000}}}",
            (
                "r.yaml:3: sparsify cannot change its 2 layers, such as a: one of the blocks "
                "5000x5000 holds all its 16 x 36 weights"
            ),
        ),
        (
            "sparsify: {layers: b, pattern: kernel_shape}",
            (
                "r.yaml:3: sparsify cannot change its only layer b: a 1x1 kernel has no 8 kernel "
                "shapes of 4 entries"
            ),
        ),
        (
            "structured: {layers: a}",
            "r.yaml:3: structured cannot change its only layer a: only linear layers are changed",
        ),
    ],
)
def test_what_fits_no_layer_is_refused(module: tvm.IRModule, step: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        notes_of(module, step)
    assert str(caught.value) == words


def test_biases_that_a_step_sets_itself_need_no_correction(module: tvm.IRModule) -> None:
    with pytest.raises(RecipeError, match=r"leave it out \(sparsify with data sets biases itself"):
        notes_of(module, SPARSIFY, "correct_bias")


def test_layers_that_a_step_cannot_change_are_left_with_the_reason() -> None:
    def network(net: Net, x: relax.Var) -> relax.Var:
        return net.conv_relu("wide", net.conv_relu("depth", x, 4, groups=4), 16)

    module = build(network)
    schemes = dict.fromkeys(["wide", "depth"], SparsifyConfig(sparsity=0.5))
    left = left_alone("sparsify", module, schemes)
    assert left == {"depth": "depthwise: one output a group, where blocks 16x1 need several"}
    assert left_alone("lowrank", module, schemes).keys() == {"depth"}
    noted = with_left_alone(module, "sparsify", left)
    changes = describe_changes(noted)
    assert changes == {"depth": f"left by sparsify: {left['depth']}"}
    (effect,) = describe_effects(noted, [Step("sparsify", SparsifyConfig(sparsity=0.5))], {})
    assert effect_text(vars(effect)) == (
        "0 layers changed; 1 left alone (such as depth, depthwise: one output a group, where "
        "blocks 16x1 need several)"
    )
