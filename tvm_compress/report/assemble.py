"""From what the flow found out to the rows of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..kernels import LibraryInfo
from .arena import Arena
from .loops import joined, joined_others, loop_firsts
from .rows import (
    BoardCost,
    FloatRow,
    KernelChoice,
    KernelInstructions,
    LayerRow,
    OtherKernelRow,
    Report,
    Side,
    StepEffect,
    StepTime,
)
from .schemes import FLOAT, describe_changes, describe_effects, describe_schemes

if TYPE_CHECKING:
    import tvm

    from ..artefact import Artefact
    from ..benchmarking import Benchmark, KernelTime
    from ..flow import Evidence, Job
    from ..profiling import Profile
    from ..verification import TensorError


def assemble(
    artefact: Artefact,
    job: Job,
    profile: Profile,
    compressed: tvm.IRModule,
    evidence: Evidence,
    steps: Iterable[StepTime],
) -> Report:
    """The report of a staged artefact; what was not measured is `None`."""
    from ..benchmarking import this_device
    from ..relay_passes.step_notes import read_missed

    before = LibraryInfo.from_json(artefact.kernels["original"])
    after = LibraryInfo.from_json(artefact.kernels["compressed"])
    benchmark: Benchmark | None = evidence.benchmark
    verification = evidence.verification
    tensors = verification.tensors if verification else ()
    schemes = describe_schemes(compressed)
    arena = artefact.kernels.get("arena")
    for name in artefact.kernels.get("decoded_per_call", []):
        schemes[name] = f"{schemes.get(name, FLOAT)}, decoded per call"
    for name in artefact.kernels.get("generic_layers", []):
        schemes[name] = f"{schemes.get(name, FLOAT)}, generic kernel"
    changes = describe_changes(compressed)
    dead: dict[str, str] = artefact.kernels.get("dead_channels", {})
    for name, words in dead.items():
        changes[name] = "; ".join(filter(None, (changes.get(name), words)))
    rows, others = _rows(profile, before, after, benchmark, tensors, schemes)
    sparse = artefact.kernels.get("sparse_kernels", {})
    rows = with_changes(rows, compressed, job.target.name, changes, sparse)
    if evidence.board is not None:
        rows = _counted(rows, evidence.board, after.layer_macs)
    firsts = loop_firsts(job.model.module)
    layers = joined(rows, firsts)
    floats = [FloatRow(**_float_fields(entry)) for entry in artefact.kernels["left_float"]]
    floats += _untouched(rows, floats)
    effects = describe_effects(compressed, job.recipe.steps, firsts)
    worst = verification.worst_layer if verification else None
    return Report(
        model=job.model.name,
        source_format=job.model.source_format,
        recipe=job.recipe_name,
        recipe_yaml=(artefact.path / "recipe.yaml").read_text(encoding="utf-8"),
        target=job.target.name,
        target_description=job.target.description,
        created=artefact.manifest["created"],
        device=benchmark.device if benchmark else this_device(1),
        macs=profile.macs,
        parameters=profile.parameters,
        original=artefact.original,
        before=_side(before, "original", benchmark),
        after=_side(after, "compressed", benchmark),
        layers=layers,
        other_kernels=joined_others(others),
        stayed_float=_floats_of_loops(floats, firsts),
        outputs=verification.outputs if verification else (),
        worst_layer=None if worst is None else firsts.get(worst, worst),
        accuracy=verification.accuracy if verification else None,
        exactness=verification.exactness if verification else None,
        checks=verification.checks if verification else (),
        steps=tuple(steps),
        versions=dict(artefact.manifest["versions"]),
        arena=None if arena is None else Arena.from_json(arena),
        board=evidence.board,
        is_project=artefact.is_project,
        notes=(*job.notes, *read_missed(compressed), *_of_dead_channels(dead)),
        macs_after=sum(after.layer_macs.values()),
        effects=_with_dense_kernels(effects, layers),
        other_shapes=of_other_shapes(before, after, rows) if tensors else (),
    )


def _of_dead_channels(dead: Mapping[str, str]) -> tuple[str, ...]:
    if not dead:
        return ()
    name, words = next(iter(dead.items()))
    layers = "1 layer" if len(dead) == 1 else f"{len(dead)} layers"
    why = "without channels that are the same whatever the input, or that nobody reads"
    return (f"{layers} of the C project {why} (such as {name}, {words}); same outputs",)


def of_other_shapes(
    before: LibraryInfo, after: LibraryInfo, rows: Iterable[LayerRow]
) -> tuple[str, ...]:
    """Those of `rows` that lost channels on their way out: no error of theirs can be measured."""
    shapes = {tensor.source: tensor.shape for tensor in before.tensors.values()}
    names = [row.name for row in rows]
    lost = {
        owner_of(layer, names)
        for call in after.calls
        if (tensor := after.tensors.get(call.output)) is not None
        and shapes.get(tensor.source, tensor.shape) != tensor.shape
        for layer in call.layers
    }
    return tuple(row.name for row in rows if row.name in lost and row.sqnr_db is None)


def _with_dense_kernels(
    effects: Iterable[StepEffect], layers: Iterable[LayerRow]
) -> tuple[StepEffect, ...]:
    """Zeros that came to nothing: the comparison behind the last step decided for dense kernels."""
    dense = {
        row.name: row.choice.reason
        for row in layers
        if row.choice is not None and not row.choice.form and "% zeros" in row.change
    }
    because = next((f"{name}, {reason}" for name, reason in dense.items()), "")
    return tuple(
        replace(effect, dense=len(dense), dense_because=because)
        if effect.step == "sparsify"
        else effect
        for effect in effects
    )


def _floats_of_loops(rows: Iterable[FloatRow], firsts: Mapping[str, str]) -> tuple[FloatRow, ...]:
    """Without those of later steps of a loop."""
    return tuple(row for row in rows if firsts.get(row.name, row.name) == row.name)


def _side(info: LibraryInfo, side: str, benchmark: Benchmark | None) -> Side:
    return Side(
        info.bytes,
        info.plan_bytes,
        benchmark.latencies[side] if benchmark else None,
        info.tuned_kernels,
        info.tunable_kernels,
        sum(kernel.time_us for kernel in benchmark.kernels[side]) if benchmark else None,
    )


def _float_fields(entry: Mapping[str, str]) -> dict[str, str]:
    operator = entry["op"].removeprefix("relax.").removeprefix("nn.")
    return {"name": entry["name"], "operator": operator, "reason": entry["reason"]}


def _untouched(layers: Iterable[LayerRow], named: Iterable[FloatRow]) -> list[FloatRow]:
    """Layers without any scheme that no pass has named."""
    seen = {row.name for row in named}
    return [
        FloatRow(row.name, row.type, "the recipe does not ask for it")
        for row in layers
        if row.scheme == FLOAT and not row.change and row.name not in seen
    ]


def _rows(
    profile: Profile,
    before: LibraryInfo,
    after: LibraryInfo,
    benchmark: Benchmark | None,
    tensors: tuple[TensorError, ...],
    schemes: Mapping[str, str],
) -> tuple[tuple[LayerRow, ...], tuple[OtherKernelRow, ...]]:
    kernels_before = benchmark.kernels["original"] if benchmark else ()
    kernels_after = benchmark.kernels["compressed"] if benchmark else ()
    time_before, time_after = _layer_times(kernels_before), _layer_times(kernels_after)
    total = sum(kernel.time_us for kernel in kernels_after)
    names = [layer.name for layer in profile.layers]
    errors = {name: error for error in tensors for name in error.layers}
    symbols: dict[str, list[str]] = {}
    for call in after.calls:
        for name in call.layers:
            symbols.setdefault(owner_of(name, names), []).append(call.symbol)
    time_after = _of_owners(time_after, names)
    bytes_after = _of_owners(after.layer_bytes, names)
    macs_after = _of_owners(after.layer_macs, names)
    layers = []
    for layer in profile.layers:
        error = errors.get(layer.name)
        taken = time_after.get(layer.name)
        layers.append(
            LayerRow(
                name=layer.name,
                type=layer.type,
                scheme=schemes.get(layer.name, FLOAT),
                macs=layer.macs,
                macs_after=macs_after.get(layer.name, 0),
                parameters=layer.parameters,
                bytes_before=before.layer_bytes.get(layer.name, 0),
                bytes_after=bytes_after.get(layer.name, 0),
                time_before_us=time_before.get(layer.name),
                time_after_us=taken,
                time_share=taken / total if taken is not None and total else None,
                sqnr_db=error.sqnr_db if error else None,
                own_sqnr_db=error.own_sqnr_db if error else None,
                cosine=error.cosine if error else None,
                max_abs_error=error.max_abs_error if error else None,
                kernels=tuple(symbols.get(layer.name, ())),
            )
        )
    by_name = {error.name: error for error in tensors}
    others = tuple(
        OtherKernelRow(
            name=kernel.output,
            kernel=kernel.symbol,
            time_us=kernel.time_us,
            time_share=kernel.time_us / total if total else None,
            sqnr_db=by_name[kernel.output].sqnr_db if kernel.output in by_name else None,
        )
        for kernel in kernels_after
        if not kernel.layers
    )
    return tuple(layers), others


def with_changes(
    layers: tuple[LayerRow, ...],
    compressed: tvm.IRModule,
    target: str,
    words: Mapping[str, str],
    sparse: Mapping[str, float],
) -> tuple[LayerRow, ...]:
    """With what steps did to them (`words`), and which kernels were chosen for it; `sparse`: which
    share of a layer's weights is stored."""
    from ..relay_passes.costs import HOW
    from ..relay_passes.sparse_choices import read_choices

    names = [row.name for row in layers]
    changes: dict[str, list[str]] = {}
    for name, change in words.items():
        owner = owner_of(name, names)
        part = name.removeprefix(owner).removeprefix("_")
        changes.setdefault(owner, []).append(f"{part}: {change}" if part else change)
    choices = read_choices(compressed["main"], target)
    rows = []
    for row in layers:
        choice = choices.get(row.name)
        share, found = sparse.get(row.name), None
        if choice is not None:
            costs = (choice.cost, choice.dense_cost, choice.unit)
            kind = HOW.get(choice.unit, "")
            found = KernelChoice(choice.form, share, choice.reason, *costs, kind)
        elif share is not None:
            found = KernelChoice("sparse", share, "")
        rows.append(replace(row, change="; ".join(changes.get(row.name, [])), choice=found))
    return tuple(rows)


def owner_of(name: str, layers: Iterable[str]) -> str:
    """Of the original's `layers` the one that a layer of the compressed model is, or a part of."""
    owners = [layer for layer in layers if name == layer or name.startswith(f"{layer}_")]
    return max(owners, key=len, default=name)


Figure = TypeVar("Figure", int, float)


def _of_owners(figures: Mapping[str, Figure], layers: Sequence[str]) -> dict[str, Figure]:
    """Figures of the compressed model's layers, added up over the parts of the original's."""
    found: dict[str, Figure] = {}
    for name, figure in figures.items():
        owner = owner_of(name, layers)
        found[owner] = found[owner] + figure if owner in found else figure
    return found


def _counted(
    layers: tuple[LayerRow, ...], cost: BoardCost, macs: Mapping[str, int]
) -> tuple[LayerRow, ...]:
    """With the instructions of their kernels; `macs` of the compressed model's layers."""
    names = [row.name for row in layers]
    original = cost.original.kernels if cost.original else ()
    before = _of_owners(_layer_instructions(original, {r.name: r.macs for r in layers}), names)
    after = _of_owners(_layer_instructions(cost.kernels, macs), names)
    return tuple(
        replace(row, instructions=after.get(row.name), instructions_before=before.get(row.name))
        for row in layers
    )


def _layer_instructions(
    kernels: Iterable[KernelInstructions], macs: Mapping[str, int]
) -> dict[str, int]:
    """Those of several layers, equal ones or with a loop in common, shared out by their `macs`."""
    counts: dict[str, int] = {}
    for kernel in kernels:
        total = sum(macs.get(name, 0) for name in kernel.layers)
        for name in kernel.layers:
            share = macs.get(name, 0) / total if total else 1 / len(kernel.layers)
            counts[name] = counts.get(name, 0) + round(kernel.instructions * share)
    return counts


def _layer_times(kernels: Iterable[KernelTime]) -> dict[str, float]:
    """Time of each layer; a kernel that computes several layers is shared out evenly."""
    times: dict[str, float] = {}
    for kernel in kernels:
        for layer in kernel.layers:
            times[layer] = times.get(layer, 0.0) + kernel.time_us / len(kernel.layers)
    return times


def plain(value: Any) -> Any:
    """A report as plain data, whichever way it came (rows or `report.json`)."""
    return value.to_json() if isinstance(value, Report) else value
