"""One measured choice, and its form in MetaSchedule's JSON database.

A choice is a trace there: for each parameter a `SampleCategorical` over its values with the
decision taken, annotated on the anchor's block; a last annotation (`RECORD_ATTR`, JSON) holds what
MetaSchedule has no place for. Traces are read and written here as plain JSON: nothing that comes
from a file reaches TVM's own deserialiser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..schedules.choice import SearchSpace
    from ..targets import Target

PARAMETER_ATTR = "tvm_compress.choice."
RECORD_ATTR = "tvm_compress.record"
# What MetaSchedule takes for a candidate that did not run.
FAILED_COST = 1e10
SECONDS, INSTRUCTIONS = "seconds", "instructions"
MEASURES = (SECONDS, INSTRUCTIONS)


@dataclass(frozen=True)
class Conditions:
    """What a measurement holds for: instruction sets, vector width, threads; where it was made,
    and what was measured."""

    capabilities: tuple[str, ...]
    vector_bits: int
    threads: int
    cpu: str
    """The machine that measured: a CPU, a device behind a tracker, what an emulator emulates."""
    measure: str = SECONDS
    """One of `MEASURES`."""

    @classmethod
    def of(cls, target: Target, cpu: str, measure: str = SECONDS) -> Conditions:
        """Conditions of measuring for `target` on the machine called `cpu`."""
        capabilities = tuple(sorted(target.capabilities))
        return cls(capabilities, target.vector_bits, target.threads, cpu, measure)


@dataclass(frozen=True)
class Record:
    """One choice of one workload as it was measured.

    `cost` is of one call, in what `conditions.measure` says; None for a candidate that failed, and
    `error` says how. `default` and `default_cost` are set on winners only: their results were
    checked against the naive function on more data than a candidate's, and times of both were taken
    in turns. A winner over a choice that is the default no longer has won nothing.
    """

    workload: str
    template: str
    choice: Mapping[str, int]
    conditions: Conditions
    cost: float | None
    error: str = ""
    default_cost: float | None = None
    default: Mapping[str, int] | None = None

    @property
    def is_verified(self) -> bool:
        """Whether builds may use the choice."""
        return None not in (self.default_cost, self.default, self.cost)

    def fits(self, space: SearchSpace) -> bool:
        """Whether what was measured still holds: same template, default and values."""
        return (
            self.template == space.template
            and space.contains(self.choice)
            and (self.default is None or dict(self.default) == dict(space.default))
        )

    @property
    def speedup(self) -> float:
        """Over the default choice, of a verified record."""
        if self.cost is None or self.default_cost is None:
            return 0.0
        return self.default_cost / self.cost

    def to_json(self) -> dict[str, Any]:
        """Plain data; fields that say nothing are left out. The costs are called `seconds` and
        `default_seconds`, or the same with `instructions`."""
        measure = self.conditions.measure
        number = int if measure == INSTRUCTIONS else float
        fields: dict[str, Any] = {
            "workload": self.workload,
            "template": self.template,
            "choice": dict(self.choice),
            "capabilities": list(self.conditions.capabilities),
            "vector_bits": self.conditions.vector_bits,
            "threads": self.conditions.threads,
            "cpu": self.conditions.cpu,
            measure: None if self.cost is None else number(self.cost),
        }
        if self.error:
            fields["error"] = self.error
        if self.default_cost is not None:
            fields[f"default_{measure}"] = number(self.default_cost)
        if self.default is not None:
            fields["default"] = dict(self.default)
        return fields

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Inverse of `to_json`. Raises `ValueError` for anything else."""
        try:
            measure = INSTRUCTIONS if INSTRUCTIONS in value else SECONDS
            record = cls(
                workload=_typed(value["workload"], str),
                template=_typed(value["template"], str),
                choice=_choice(value["choice"]),
                conditions=Conditions(
                    tuple(_typed(name, str) for name in value["capabilities"]),
                    _typed(value["vector_bits"], int),
                    _typed(value["threads"], int),
                    _typed(value["cpu"], str),
                    measure,
                ),
                cost=_cost(value[measure]),
                error=_typed(value.get("error", ""), str),
                default_cost=_cost(value.get(f"default_{measure}")),
                default=None if value.get("default") is None else _choice(value["default"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tuning record: {error}") from None
        return record


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _choice(value: Any) -> dict[str, int]:
    return {_typed(name, str): _typed(chosen, int) for name, chosen in value.items()}


def _cost(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise TypeError(f"{value!r:.40} is neither a time nor a number of instructions")
    return float(value)


def to_metaschedule(
    record: Record,
    space: SearchSpace,
    block: str,
    tvm_options: Mapping[str, Any],
) -> list[Any]:
    """`[trace, run_secs, target, args_info]`: what MetaSchedule's `TuningRecord.as_json` gives.

    Instructions stand where it has seconds: it compares them, and no more.
    """
    instructions: list[Any] = [["GetSBlock", [], [block, "main"], ["b0"]]]
    decisions: list[Any] = []
    for number, (name, value) in enumerate(record.choice.items()):
        values = sorted({*space.parameters.get(name, ()), value})
        decisions.append([len(instructions), values.index(value)])
        chances = [1 / len(values)] * len(values)
        instructions.append(["SampleCategorical", [], [values, chances], [f"v{number + 1}"]])
        instructions.append(["Annotate", ["b0", f"v{number + 1}"], [PARAMETER_ATTR + name], []])
    measure = record.conditions.measure
    rest = {k: v for k, v in record.to_json().items() if k not in ("choice", measure)}
    if measure != SECONDS:
        rest["measure"] = measure
    text = json.dumps(json.dumps(rest, sort_keys=True))  # a string literal in the trace's language
    instructions.append(["Annotate", ["b0", text], [RECORD_ATTR], []])
    cost = FAILED_COST if record.cost is None else record.cost
    target = {key: _plain(value) for key, value in tvm_options.items()}
    target["num-cores"] = record.conditions.threads
    return [[instructions, decisions], [cost], target, None]


def from_metaschedule(value: Any) -> Record | None:
    """Inverse of `to_metaschedule`; None for a record that somebody else's schedule rules made.

    Raises `ValueError` for what is no tuning record at all.
    """
    try:
        (instructions, decisions), run_secs = value[0], value[1]
        chosen = dict(decisions)
        values: dict[str, int] = {}
        choice: dict[str, int] = {}
        rest: dict[str, Any] | None = None
        for index, (name, inputs, attributes, outputs) in enumerate(instructions):
            if name == "SampleCategorical":
                values[outputs[0]] = attributes[0][chosen[index]]
            elif name == "Annotate" and attributes[0].startswith(PARAMETER_ATTR):
                choice[attributes[0][len(PARAMETER_ATTR) :]] = values[inputs[1]]
            elif name == "Annotate" and attributes[0] == RECORD_ATTR:
                rest = json.loads(json.loads(inputs[1]))
        if rest is None:
            return None
        cost = run_secs[0] if run_secs and run_secs[0] < FAILED_COST else None
        measure = rest.pop("measure", SECONDS)
        if measure not in MEASURES:
            raise ValueError(f"measure {measure!r:.40} is none of {', '.join(MEASURES)}")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"not a tuning record: {error}") from None
    return Record.from_json({**rest, "choice": choice, measure: cost})


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
