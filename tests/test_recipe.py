"""Recipes: parsing with line numbers, refusals, round trips, and the JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tvm_compress.errors import RecipeError
from tvm_compress.recipe import (
    Calibration,
    Goals,
    Preprocessing,
    Recipe,
    Step,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
    recipe_summary,
    shipped_recipes,
)
from tvm_compress.relay_passes.correct_bias import CorrectBiasConfig
from tvm_compress.relay_passes.equalize_inputs import EqualizeInputsConfig
from tvm_compress.relay_passes.numerics.granularity import PerGroup, PerTensor
from tvm_compress.relay_passes.numerics.ranges import Percentile, Sqnr
from tvm_compress.relay_passes.quantize_config import QuantizeConfig

FULL = """\
version: 1
steps:
  - equalize
  - quantize: {layers: all, weights: int8, activations: int8, calibrate: {percentile: 99.9}}
  - quantize:
      layers: [stem, "re:head.*"]
      weights: int4
      activations: none
      granularity: {per_group: 32}
goals: {max_drop: 0.01}
calibration: {samples: 100}
preprocessing: {resize: [32, 40], crop: 28, mean: [0.1, 0.2, 0.3], std: 0.5, channels: bgr}
seed: 7
shapes: {x: [1, 3, 32, 32]}
input_values: {rate: 16000}
"""


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return str(caught.value)


def step_refusal(body: str) -> str:
    return refusal(f"version: 1\nsteps:\n  - quantize: {body}\n")


def test_every_field_is_read() -> None:
    recipe = parse_recipe(FULL)
    assert [step.name for step in recipe.steps] == ["equalize", "quantize", "quantize"]
    assert recipe.steps[0].layers == ("all",)
    assert recipe.steps[1].config == QuantizeConfig(calibrate=Percentile(99.9))
    assert recipe.steps[2] == Step(
        "quantize",
        QuantizeConfig(weights="int4", activations=None, granularity=PerGroup(32)),
        ("stem", "re:head.*"),
    )
    assert recipe.goals == Goals(0.01)
    assert recipe.calibration == Calibration(100)
    assert recipe.preprocessing == Preprocessing(
        resize=(32, 40), crop=28, mean=(0.1, 0.2, 0.3), std=(0.5,), channels="bgr"
    )
    assert (recipe.seed, recipe.shapes) == (7, {"x": (1, 3, 32, 32)})
    assert recipe.input_values == {"rate": 16000.0}


def test_dump_and_parse_are_inverse() -> None:
    recipe = parse_recipe(FULL).replace(target="host")
    text = dump_recipe(recipe, "two\nlines")
    assert text.startswith("# two\n# lines\nversion: 1\n")
    assert parse_recipe(text) == recipe


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_round_trips_and_says_what_it_is_for(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert recipe.goals.max_drop is not None
    assert len(recipe_summary(shipped_recipes()[name])) > 30


def test_the_four_promised_recipes_ship() -> None:
    assert {"int8", "int8_w_only", "w4_group", "int16x8"} <= set(shipped_recipes())
    step = load_recipe("w4_group").steps[0]
    assert step.config.weights == "int4"
    assert isinstance(step.config.granularity, PerGroup)
    assert load_recipe("int16x8").steps[0].config.activations == "int16"
    assert load_recipe("int8_w_only").steps[0].config.is_weight_only
    names = [step.name for step in load_recipe("int8").steps]
    assert names == ["equalize_inputs", "quantize", "correct_bias"]
    assert load_recipe("int8").steps[1].config.calibrate == Sqnr()


def test_tagged_values_have_both_spellings() -> None:
    bare = parse_recipe("version: 1\nsteps: [{quantize: {granularity: per_tensor}}]")
    assert bare.steps[0].config.granularity == PerTensor()
    long = parse_recipe("version: 1\nsteps: [{quantize: {calibrate: {percentile: {percent: 99}}}}]")
    assert long.steps[0].config.calibrate == Percentile(99.0)


def test_none_is_a_word_for_null() -> None:
    for word in ("none", "null", "~"):
        recipe = parse_recipe(f"version: 1\nsteps: [{{quantize: {{activations: {word}}}}}]")
        assert recipe.steps[0].config.activations is None


def test_exponents_and_integers_are_numbers() -> None:
    assert parse_recipe(FULL.replace("0.01}", "1e-2}")).goals.max_drop == 0.01
    assert parse_recipe(FULL.replace("0.01}", "0}")).goals.max_drop == 0.0


# Each mistake: the text, and what the one line must say.
@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("{weigths: int8}", ["r.yaml:3:", "'weigths'", "did you mean 'weights'"]),
        ("{weights: int9}", ["r.yaml:3:", "'int9'", "did you mean 'int8'", "int5"]),
        ("{weights: 8}", ["weights: '8' is not a choice"]),
        ("{symmetric: maybe}", ["symmetric must be true or false"]),
        ("{granularity: {per_grup: 4}}", ["'per_grup'", "did you mean 'per_group'"]),
        ("{granularity: {per_group: 0}}", ["per_group", "positive"]),
        ("{granularity: {per_group: 4, per_channel: 1}}", ["exactly one of"]),
        ("{calibrate: [mse]}", ["calibrate must be a mapping"]),
        ("{layers: []}", ["layers is an empty list"]),
        ("{layers: {a: b}}", ["layers must be a single value"]),
        ("{weights: int6, activations: none}", ["r.yaml:3:", "int6 without activations"]),
        ("{weights: int8, weights: int4}", ["'weights' appears twice"]),
        ("[1, 2]", ["quantize must be a mapping"]),
        ("{calibrate: {percentile: .nan}}", ["finite number"]),
        ("{calibrate: {percentile: 1e999}}", ["finite number"]),
        ("{calibrate: {percentile: 9" + "9" * 5000 + "}}", ["percent"]),
        ("{symmetric: !!python/name:os.system x}", ["tag", "not supported"]),
    ],
)
def test_mistake_in_a_step(body: str, parts: list[str]) -> None:
    message = step_refusal(body)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("step", "form"),
    [
        ("lowrank: {rank: 8}", "write `rank: {rank: 8}`"),
        ("quantize: {weights: int4, granularity: 32}", "write `granularity: {per_group: 32}`"),
        ("lowrank: {rank: half}", "allowed: bytes"),
    ],
)
def test_a_bare_number_gets_the_form_that_takes_it(step: str, form: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"version: 1\nsteps:\n  - {step}\n", "r.yaml")
    assert form in str(caught.value)
    if "`" in form:
        right = step.replace(
            step.partition("{")[2].rpartition(",")[2].strip(" }"), form.split("`")[1]
        )
        assert parse_recipe(f"version: 1\nsteps:\n  - {right}\n").steps


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("- a\n- b\n", ["a recipe must be a mapping"]),
        ("steps: [quantize]\n", ["`version: 1` is missing"]),
        ("version: 2\nsteps: [quantize]\n", ["r.yaml:1:", "version 2 is not known"]),
        ("version: 1\n", ["`steps:` is missing"]),
        ("version: 1\nsteps: []\n", ["at least one"]),
        ("version: 1\nsteps:\n  - quantise: {}\n", ["r.yaml:3:", "did you mean 'quantize'"]),
        ("version: 1\nsteps:\n  - {quantize: {}, equalize: {}}\n", ["one name", "2 keys"]),
        ("version: 1\nsteps: [quantize]\ngoal: {}\n", ["r.yaml:3:", "did you mean 'goals'"]),
        ("version: 1\nsteps: [quantize]\ngoals: {max_drop: 2}\n", ["r.yaml:3:", "from 0 to 1"]),
        ("version: 1\nsteps: [quantize]\nseed: -1\n", ["seed"]),
        ("version: 1\nsteps: [quantize]\nseed: 010\n", ["r.yaml:3:", "no decimal integer"]),
        ("version: 1\nsteps: [quantize\n", ["r.yaml:", "not valid YAML"]),
        ("version: 1\nsteps: \x07\n", ["not valid YAML"]),
        ("a: &x [1]\nb: *x\n", ["r.yaml:1:", "anchors"]),
        ("version: 1\nsteps: [quantize]\nshapes: {x: [a]}\n", ["must be an integer"]),
        ("version: 1\nsteps: [quantize]\npreprocessing: {std: 0}\n", ["positive"]),
        ("version: 1\nsteps: [quantize]\npreprocessing: {mean: [1, 2]}\n", ["1 or 3 values"]),
    ],
)
def test_mistake_in_a_recipe(text: str, parts: list[str]) -> None:
    message = refusal(text)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    assert "nested" in refusal("version: 1\nsteps: " + "[" * 100 + "]" * 100)
    assert "nested" in refusal("steps: " + "[" * 50_000)
    assert "nested" in refusal("- " * 30_000 + "a")


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_text("version: 1\n" + "#" * 70_000)
    with pytest.raises(RecipeError, match="limit"):
        load_recipe(path)
    assert "limit" in refusal("x" * 70_000)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        load_recipe("int9")


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)


def schema_errors(text: str) -> list[Any]:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    return list(validator.iter_errors(yaml.safe_load(text)))


def test_schema_is_valid_and_accepts_what_the_parser_accepts() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    assert not schema_errors(FULL)
    for path in shipped_recipes().values():
        assert not schema_errors(path.read_text())
    assert not schema_errors(dump_recipe(parse_recipe(FULL)))


@pytest.mark.parametrize(
    "text",
    [
        "version: 2\nsteps: [quantize]\n",
        "version: 1\nsteps: []\n",
        "version: 1\nsteps: [{quantize: {weigths: int8}}]\n",
        "version: 1\nsteps: [{quantize: {weights: int9}}]\n",
        "version: 1\nsteps: [{quantize: {granularity: {per_group: a}}}]\n",
        "version: 1\nsteps: [quantize]\ngoal: {}\n",
    ],
)
def test_schema_refuses_what_the_parser_refuses(text: str) -> None:
    refusal(text)
    assert schema_errors(text)


def test_recipe_in_python_equals_the_yaml() -> None:
    steps = (
        Step("equalize_inputs", EqualizeInputsConfig()),
        Step("quantize", QuantizeConfig(calibrate=Sqnr())),
        Step("correct_bias", CorrectBiasConfig()),
    )
    recipe = Recipe(steps=steps, goals=Goals(0.01))
    assert recipe == load_recipe("int8")


def test_n_m_as_people_write_it_gets_its_key() -> None:
    text = "version: 1\nsteps:\n  - sparsify: {layers: all, pattern: 2:4}\n"
    with pytest.raises(RecipeError, match=r"write semi_structured: \{kept: 2, of: 4\}"):
        parse_recipe(text)
