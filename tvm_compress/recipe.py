"""A recipe: ordered steps, each a scheme with layer selectors. YAML and dataclasses, round-trips.

    version: 1
    steps:
      - quantize: {layers: all, weights: int8, activations: int8, calibrate: mse}
      - quantize: {layers: [stem, head], activations: none}
    goals: {max_drop: 0.01}

The step names and their configs are `relay_passes.PASSES`; nothing about a step is written here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RecipeError
from .typed_yaml import (
    MAX_BYTES,
    Source,
    compose,
    dataclass_schema,
    dump,
    nearest,
    pairs,
    parse,
    parse_dataclass,
    parse_fields,
)

if TYPE_CHECKING:
    import yaml

VERSION = 1
FOLDER = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Step:
    """One pass (a key of `relay_passes.PASSES`), its config and the layers it is for."""

    name: str
    config: Any
    layers: tuple[str, ...] = ("all",)
    origin: str | None = field(default=None, compare=False, repr=False)
    """File and line of the selectors, for errors."""


@dataclass(frozen=True)
class Goals:
    """What the artefact has to reach; `verify` fails with exit status 1 where it does not."""

    max_drop: float | None = field(
        default=None,
        metadata={"help": "largest loss of top-1 accuracy, as a fraction: 0.01 is one point"},
    )

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise RecipeError(f"max_drop is a fraction from 0 to 1, not {self.max_drop}")


@dataclass(frozen=True)
class Calibration:
    """How much of the calibration data is used."""

    samples: int = field(
        default=512,
        metadata={"help": "at most this many samples, evenly spaced over the calibration data"},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 1_000_000:
            raise RecipeError(f"samples is from 1 to 1,000,000, not {self.samples}")


@dataclass(frozen=True)
class Preprocessing:
    """From 8-bit images to the model's input: (pixel / divide_by - mean) / std.

    Applied to folders of images and to uint8 image arrays in an .npz.
    """

    resize: int | tuple[int, int] | None = field(
        default=None,
        metadata={"help": "length of the shorter side, or [height, width]; bilinear"},
    )
    crop: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "central crop: side, or [height, width]"}
    )
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    divide_by: float = 255.0
    mean: tuple[float, ...] = field(
        default=(0.0,), metadata={"help": "per channel in the model's order, after the division"}
    )
    std: tuple[float, ...] = field(default=(1.0,), metadata={"help": "per channel, like mean"})
    layout: Literal["auto", "NCHW", "NHWC"] = field(
        default="auto",
        metadata={"help": "auto takes the axis of the model's input that has 1 or 3 channels"},
    )

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            for side in value if isinstance(value, tuple) else (value,):
                if side is not None and not 1 <= side <= 8192:
                    raise RecipeError(f"{name} is from 1 to 8192 pixels, not {side}")
        count = 1 if self.channels == "gray" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, count):
                raise RecipeError(f"{name} needs 1 or {count} values for {self.channels} images")
        if self.divide_by <= 0 or min(self.std) <= 0:
            raise RecipeError("divide_by and std must be positive")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the artefact, next to the model and the data themselves."""

    steps: tuple[Step, ...]
    goals: Goals = Goals()
    calibration: Calibration = Calibration()
    preprocessing: Preprocessing | None = None
    seed: int = 0
    target: str | None = field(
        default=None, metadata={"help": "name from `tvm-compress list targets`"}
    )
    shapes: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict, metadata={"help": "shape of each dynamic model input, by name"}
    )
    input_values: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "inputs fixed to a constant, by name"}
    )
    measure: bool = field(
        default=True,
        metadata={
            "help": "compare what layers cost by running their kernels on the target, or under its "
            "emulator; false: by tables of expected costs"
        },
    )
    costs: Mapping[str, tuple[float, ...]] = field(
        default_factory=dict,
        metadata={
            "help": "what the run that wrote this recipe found layers to cost on the target, by "
            "comparison; the same decisions are made from it"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed is from 0 to 2**32 - 1, not {self.seed}")
        for name, figures in self.costs.items():
            if not all(0 < figure < math.inf for figure in figures):
                raise RecipeError(f"costs: {name}: {list(figures)}: costs are positive numbers")

    def replace(self, **changes: Any) -> Recipe:
        return dataclasses.replace(self, **changes)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file. Raises `RecipeError` with file and line."""
    path = Path(name_or_path)
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        path = shipped[str(name_or_path)]
    elif not path.is_file():
        hint = nearest(str(name_or_path), shipped)
        raise RecipeError(f"recipe {str(name_or_path)!r} is neither shipped nor a file{hint}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; the limit is {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file in UTF-8") from None
    return parse_recipe(text, path.name)


def shipped_recipes() -> dict[str, Path]:
    """Name => file of every recipe in the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """The first comment of a recipe file, on one line: what it is for and what it gave."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# ").rstrip())
    return " ".join(words)


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """The recipe that `text` (YAML) writes; `name` stands in the errors."""
    source = Source(name)
    root = compose(text, source)
    entries = {key: (key_node, node) for key, key_node, node in pairs(root, source, "a recipe")}
    if "version" not in entries:
        raise source.error(root, f"`version: {VERSION}` is missing")
    version = parse(int, entries["version"][1], source, "version")
    if version != VERSION:
        raise source.error(
            entries["version"][1],
            f"recipe version {version} is not known; this tvm-compress reads version {VERSION}",
        )
    if "steps" not in entries:
        raise source.error(root, "`steps:` is missing; it lists the passes in order")
    steps = _parse_steps(entries["steps"][1], source)
    values = parse_fields(Recipe, root, source, "a recipe", skip=("version", "steps"))
    try:
        return Recipe(steps=steps, **values)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from None


def _parse_steps(node: yaml.Node, source: Source) -> tuple[Step, ...]:
    import yaml

    from .relay_passes.passes import PASSES

    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise source.error(node, "steps must be a list with at least one `- name: {...}`")
    steps = []
    for item in node.value:
        name_node: yaml.Node
        body: yaml.Node | None
        if isinstance(item, yaml.ScalarNode):  # `- equalize`
            name, name_node, body = item.value, item, None
        else:
            entries = pairs(item, source, "a step")
            if len(entries) != 1:
                raise source.error(
                    item, f"a step has one name, `- name: {{...}}`, not {len(entries)} keys"
                )
            name, name_node, body = entries[0]
        if name not in PASSES:
            raise source.error(name_node, f"unknown step {name!r}{nearest(name, PASSES)}")
        if body is None or (isinstance(body, yaml.ScalarNode) and body.tag.endswith(":null")):
            body = yaml.MappingNode("", [], item.start_mark, item.end_mark)
        layers: tuple[str, ...] = ("all",)
        origin = source.place(item)
        for key, _, value in pairs(body, source, name):
            if key == "layers":
                layers = parse(tuple[str, ...], value, source, "layers")
                origin = source.place(value)
                if not layers:
                    raise source.error(value, "layers is an empty list; leave it out for all")
        config = parse_dataclass(PASSES[name].config, body, source, name, skip=("layers",))
        steps.append(Step(name, config, layers, origin))
    return tuple(steps)


def dump_recipe(recipe: Recipe, comment: str = "") -> str:
    """YAML with every field written out; `parse_recipe` gives an equal recipe back."""
    import yaml

    plain: dict[str, Any] = {"version": VERSION}
    for item in dataclasses.fields(Recipe):
        value = getattr(recipe, item.name)
        if item.name == "steps":
            plain["steps"] = [
                {step.name: {"layers": list(step.layers), **dump(step.config)}} for step in value
            ]
        elif value is not None and value != {}:
            plain[item.name] = dump(value)
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)
    return "".join(f"# {line}\n" for line in comment.splitlines()) + text


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors; made from the dataclasses."""
    from .relay_passes.passes import PASSES

    steps: list[dict[str, Any]] = []
    for name, entry in PASSES.items():
        body = dataclass_schema(entry.config)
        selector = {"type": "string"}
        body["properties"] = {
            "layers": {
                "anyOf": [selector, {"type": "array", "items": selector, "minItems": 1}],
                "default": "all",
                "description": "all, a layer name, a glob, an operator type, or re:<pattern>",
            },
            **body["properties"],
        }
        steps.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [{"type": "null"}, body]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
        if "required" not in body:
            steps.append({"const": name})
    schema = dataclass_schema(Recipe, skip=("steps",))
    schema["properties"] = {
        "version": {"const": VERSION},
        "steps": {"type": "array", "items": {"anyOf": steps}, "minItems": 1},
        **schema["properties"],
    }
    schema["required"] = ["version", "steps"]
    schema["description"] = "A tvm-compress recipe: ordered compression steps and goals."
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tvm-compress recipe",
        **schema,
    }
