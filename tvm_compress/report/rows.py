"""What a report says, as typed rows. `report.json` is these rows; its JSON Schema comes from them.

Units live in the names. `None` means not applicable or not measured, never zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1


def _row(help_text: str, **options: Any) -> Any:
    return field(metadata={"help": help_text}, **options)


@dataclass(frozen=True)
class Bytes:
    """Bytes of one emitted library, by what they hold."""

    total: int = _row("size of the library file")
    weights: int = _row("encoded weights as stored, packed for the kernels")
    scales: int = _row("scales, zero points, multipliers and shifts")
    biases: int = _row("biases")
    tables: int = _row("look-up tables")
    indices: int = _row("indices of sparse or shared weights")
    code: int = _row("machine code of the kernels")
    other: int = _row("the rest: other constants, virtual machine, symbols, padding")


@dataclass(frozen=True)
class Latency:
    """Times of single inferences, measured interleaved with the other side."""

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    runs: int


@dataclass(frozen=True)
class Side:
    """One of the two programs that are compared: the float original or the compressed artefact."""

    bytes: Bytes
    plan_bytes: int = _row("memory for activations and temporaries in the compiled plan")
    latency: Latency | None = _row("on the machine named in `device`")


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after."""

    name: str
    type: str
    scheme: str = _row("weights x activations, e.g. `int8/channel x int8`; `float` when nothing was done")
    macs: int
    parameters: int
    bytes_before: int
    bytes_after: int
    time_before_us: float | None = _row("its kernels in the float original, least of the observed runs")
    time_after_us: float | None = _row("its kernels in the artefact, least of the observed runs")
    time_share: float | None = _row("part of the artefact's kernel time, 0 to 1")
    sqnr_db: float | None = _row("signal to noise of its output against the float original")
    cosine: float | None
    max_abs_error: float | None
    kernels: tuple[str, ...] = _row("symbols of the kernels that compute it")


@dataclass(frozen=True)
class OtherKernelRow:
    """A kernel of the artefact that belongs to no layer (pooling, add, conversions ...)."""

    name: str
    kernel: str
    time_us: float | None
    time_share: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class FloatRow:
    """A layer or operator that stayed in floating point."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True)
class OutputRow:
    """One output of the model, compressed against float."""

    name: str
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float
    samples: int


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on the same labelled samples, measured on the compiled programs."""

    samples: int
    before: float
    before_low: float = _row("lower end of the 95 % Wilson interval")
    before_high: float
    after: float
    after_low: float
    after_high: float
    drop: float = _row("before minus after")
    drop_low: float = _row("lower end of the paired 95 % interval")
    drop_high: float
    only_before_right: int
    only_after_right: int
    p_value: float = _row("McNemar's exact test")


@dataclass(frozen=True)
class Exactness:
    """The shipped library against the executable reference graph, integer tensors bit for bit."""

    inputs: int
    tensors: int
    elements: int
    differing: tuple[str, ...] = _row("names of integer tensors that differ; empty when exact")
    float_max_abs_difference: float | None = _row("largest difference of float outputs")


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and whether it holds."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Device:
    """Where times were measured."""

    cpu: str
    cores: int
    threads: int
    system: str


@dataclass(frozen=True)
class StepTime:
    """How long one step of the flow took; `cached` steps were taken over from an earlier run."""

    name: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Report:
    """Everything that is known about one artefact."""

    model: str
    source_format: str
    recipe: str = _row("the recipe's name or file name")
    recipe_yaml: str = _row("the resolved recipe")
    target: str
    target_description: str
    created: str = _row("UTC, ISO 8601")
    device: Device
    macs: int
    parameters: int
    before: Side
    after: Side
    layers: tuple[LayerRow, ...]
    other_kernels: tuple[OtherKernelRow, ...]
    stayed_float: tuple[FloatRow, ...]
    outputs: tuple[OutputRow, ...]
    worst_layer: str | None = _row("the layer whose output has the lowest signal to noise")
    accuracy: Accuracy | None
    exactness: Exactness | None
    checks: tuple[Check, ...]
    steps: tuple[StepTime, ...]
    versions: dict[str, str]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain data for `report.json`."""
        return dataclasses.asdict(self)


def report_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `report.json`."""
    from ..typed_yaml import dataclass_schema

    schema = dataclass_schema(Report, strict=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tvm-compress report",
        **schema,
    }
