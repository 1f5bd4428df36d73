"""What a report says, as typed rows. `report.json` is these rows; its JSON Schema comes from them.

Units live in the names. `None` means not applicable or not measured, never zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from .arena import Arena

FORMAT = 2


@dataclass(frozen=True)
class Bytes:
    """Bytes of one emitted library or C project, by what they hold."""

    total: Annotated[int, "size of the library file; of a C project, what it takes in flash"]
    weights: Annotated[int, "encoded weights as stored, packed for the kernels"]
    scales: Annotated[int, "scales, zero points, multipliers and shifts"]
    biases: Annotated[int, "biases"]
    tables: Annotated[int, "look-up tables"]
    indices: Annotated[int, "indices of sparse or shared weights"]
    code: Annotated[int, "machine code of the kernels"]
    other: Annotated[int, "the rest: other constants, virtual machine, symbols, padding"]


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
    """One of the two programs that are compared: the original or the compressed artefact."""

    bytes: Bytes
    plan_bytes: Annotated[int, "memory for activations and temporaries in the compiled plan"]
    latency: Annotated[Latency | None, "on the machine named in `device`"]
    tuned_kernels: Annotated[int, "kernels with measured schedules, of `tunable_kernels`"] = 0
    tunable_kernels: Annotated[int, "different kernels whose schedules leave a choice"] = 0
    kernels_us: Annotated[
        float | None, "all kernel calls of one inference, each alone; `latency` holds more"
    ] = None


@dataclass(frozen=True)
class KernelChoice:
    """What became of a layer with zeros: costs of its sparse kernel and of its dense one."""

    form: Annotated[str, "how the zeros are left out, such as 16x1; empty: the kernel is dense"]
    stored_share: Annotated[
        float | None, "stored weights as part of the layer's, 0 to 1; None: dense"
    ]
    reason: Annotated[str, "why it stayed dense, or what speaks against it; empty: it pays"]
    cost: Annotated[float | None, "of the best sparse kernel; None: nobody compared"] = None
    dense_cost: float | None = None
    unit: Annotated[str, "of the costs: us, instructions or cycles; empty: nobody compared"] = ""
    kind: Annotated[
        str, "measured on the target, counted under its emulator, or predicted from tables"
    ] = ""


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after."""

    name: str
    type: str
    scheme: Annotated[
        str, "weights x activations, e.g. `int8/channel x int8`; `float` when nothing was done"
    ]
    macs: Annotated[int, "multiply-accumulates of the original"]
    parameters: int
    bytes_before: int
    bytes_after: int
    time_before_us: Annotated[float | None, "its kernels in the original, each repeated alone"]
    time_after_us: Annotated[float | None, "its kernels in the artefact, each repeated alone"]
    time_share: Annotated[float | None, "part of the artefact's kernel time, 0 to 1"]
    sqnr_db: Annotated[
        float | None, "signal to noise of its output against the original: all errors so far"
    ]
    own_sqnr_db: Annotated[
        float | None,
        "the same with the original's values at its inputs: the error that the layer itself adds",
    ]
    cosine: float | None
    max_abs_error: float | None
    kernels: Annotated[tuple[str, ...], "symbols of the kernels that compute it"]
    instructions: Annotated[
        int | None,
        "of its kernels, counted on an emulator; those of several layers shared by multiply-adds",
    ] = None
    instructions_before: Annotated[int | None, "the same of the original"] = None
    change: Annotated[
        str, "what steps made of it: channels, rank, pattern and zeros; empty: nothing"
    ] = ""
    choice: Annotated[KernelChoice | None, "of a layer with zeros"] = None
    macs_after: Annotated[
        int | None,
        "multiply-accumulates that its kernels execute: of a sparse one those of stored weights; "
        "zeros in a dense one count",
    ] = None
    calls: Annotated[int, "that share its weight: the steps of a loop; figures are of all"] = 1


@dataclass(frozen=True)
class OtherKernelRow:
    """A kernel of the artefact that belongs to no layer (pooling, add, conversions ...)."""

    name: str
    kernel: str
    time_us: float | None
    time_share: float | None
    sqnr_db: float | None
    calls: Annotated[int, "of the kernel; figures are of all, the error is the worst"] = 1


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
    before_low: Annotated[float, "lower end of the 95 % Wilson interval"]
    before_high: float
    after: float
    after_low: float
    after_high: float
    drop: Annotated[float, "before minus after"]
    drop_low: Annotated[float, "lower end of the paired 95 % interval"]
    drop_high: float
    only_before_right: int
    only_after_right: int
    p_value: Annotated[float, "McNemar's mid-p test"]


@dataclass(frozen=True)
class Exactness:
    """The shipped library against the executable reference graph, integer tensors bit for bit."""

    inputs: int
    tensors: int
    elements: int
    differing: Annotated[
        tuple[str, ...], "integer tensors that differ, with their layers; empty when exact"
    ]
    float_difference: Annotated[
        float | None,
        "largest difference of float outputs, relative to the largest value of the output",
    ]
    rounded: Annotated[
        int,
        "codes rounded from computed floats that are one step off",
    ] = 0


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
class KernelInstructions:
    """A function of the linked program; a kernel with its own parts."""

    symbol: str
    layers: Annotated[tuple[str, ...], "that it computes; empty: copies, glue"]
    instructions: Annotated[int, "median over the counted inputs"]
    share: Annotated[float, "of all, 0 to 1"]


@dataclass(frozen=True)
class OriginalCost:
    """What one inference of the original costs on the board's machine."""

    instructions: Annotated[int, "of one inference, median"]
    kernels: Annotated[tuple[KernelInstructions, ...], "the most expensive first"]
    flash_bytes: Annotated[int, "of the model as linked: constants, kernels, calls"]
    arena_bytes: int


@dataclass(frozen=True)
class BoardCost:
    """What one inference of a C project costs. Instructions are counted exactly on an emulator:
    they are neither cycles nor a latency."""

    machine: Annotated[str, "what ran the program"]
    instructions: Annotated[int | None, "of one inference, median; None: not counted"]
    least_instructions: int | None
    most_instructions: int | None
    inputs: Annotated[int, "inputs that were counted"]
    kernels: Annotated[tuple[KernelInstructions, ...], "the most expensive first"]
    flash_bytes: Annotated[int, "of the model as linked: constants, kernels, calls"]
    program_flash_bytes: Annotated[int, "of the whole program, start-up code and C library too"]
    arena_bytes: int
    other_ram_bytes: Annotated[int, "of the model as linked, besides the arena"]
    stack_bytes: Annotated[int | None, "deepest use below `main`"]
    original: Annotated[
        OriginalCost | None, "of the original, as a C project for the same machine"
    ] = None
    no_original: Annotated[str, "why that is missing; empty: it is there"] = ""


@dataclass(frozen=True)
class StepTime:
    """How long one step of the flow took; `cached` steps were taken over from an earlier run."""

    name: str
    seconds: float
    cached: bool
    detail: Annotated[str, "of a build: its kernels, and how many came from the cache"] = ""


@dataclass(frozen=True)
class StepEffect:
    """To how many layers a step of the recipe did something; a loop's calls are one layer."""

    step: str
    changed: int
    put_back: Annotated[int, "layers that stay as they were: no gain on the target"]
    left: Annotated[int, "layers that it is for but cannot change, or had no reason to"]
    put_back_because: Annotated[str, "an example, with the reason"] = ""
    left_because: Annotated[str, "an example, with the reason"] = ""
    dense: Annotated[int, "of the changed ones: zeros that a dense kernel computes with"] = 0
    dense_because: Annotated[str, "an example, with the reason"] = ""
    share_of: Annotated[
        str, "selectors of the layers whose operations or weights its share counts; empty: all"
    ] = ""


@dataclass(frozen=True)
class Report:
    """Everything that is known about one artefact."""

    model: str
    source_format: str
    recipe: Annotated[str, "the recipe's name or file name"]
    recipe_yaml: Annotated[str, "the resolved recipe"]
    target: str
    target_description: str
    created: Annotated[str, "UTC, ISO 8601"]
    device: Device
    macs: Annotated[int, "multiply-accumulates of the original"]
    parameters: int
    original: Annotated[
        str, "what `before` is: `float original`, or `source, as imported` when that is quantised"
    ]
    before: Annotated[
        Side, "always a library: what a C project is compared with is in `board.original`"
    ]
    after: Side
    layers: tuple[LayerRow, ...]
    other_kernels: tuple[OtherKernelRow, ...]
    stayed_float: tuple[FloatRow, ...]
    outputs: tuple[OutputRow, ...]
    worst_layer: Annotated[str | None, "the layer with the lowest `own_sqnr_db`"]
    accuracy: Accuracy | None
    exactness: Exactness | None
    checks: tuple[Check, ...]
    steps: tuple[StepTime, ...]
    versions: dict[str, str]
    arena: Annotated[Arena | None, "of a C project: where everything lies in its memory"] = None
    board: Annotated[BoardCost | None, "of a C project that was run"] = None
    notes: Annotated[tuple[str, ...], "about the recipe: layers that its steps leave alone"] = ()
    is_project: Annotated[bool, "C for the compiler of a board, not a shared library"] = False
    macs_after: Annotated[int | None, "multiply-accumulates that the artefact executes"] = None
    effects: Annotated[tuple[StepEffect, ...], "of the steps that take weights away"] = ()
    other_shapes: Annotated[
        tuple[str, ...], "layers without errors: their outputs have another shape than before"
    ] = ()
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
