"""Is the artefact right? Against its reference graph, against the float original, against labels.

The reference graph is the same integer arithmetic in the unscheduled kernels that define it,
compiled by TVM's stock pipeline: other loops, other fusion, other packing than the shipped library,
and the same integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .accuracy import measure_accuracy
from .bare.observe import checksum
from .errors import ArtefactError, CheckFailed
from .kernels import LibraryInfo, capture
from .measures import ErrorSums
from .model import TensorSpec
from .progress import Progress
from .report.rows import Accuracy, Check, Exactness, OutputRow

if TYPE_CHECKING:
    from pathlib import Path

    from .artefact import Artefact
    from .bare.session import ProjectSession
    from .data import Dataset
    from .runtime import Session

TAP = "tap:"  # prefix of the intermediate tensors among the reference library's outputs
# Other loop orders and fused multiply-adds round float sums differently: about 1e-7 for one sum of
# hundreds of terms, 1e-5 through a deep network. A wrong kernel is off by far more.
FLOAT_TOLERANCE = 1e-4
ROUNDED = 0.01  # most codes rounded from floats that may be one step off
FIDELITY_INPUTS = 32  # inputs on which every layer is compared with the float original


@dataclass(frozen=True)
class TensorError:
    """One tensor of the artefact, as real numbers, against the float original's."""

    name: str
    layers: tuple[str, ...]
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float
    own_sqnr_db: float | None
    """Of the kernel alone: with the original's values, as codes, where it reads tensors."""


@dataclass(frozen=True)
class Verification:
    """What was found. `require` raises where a check failed."""

    exactness: Exactness | None
    outputs: tuple[OutputRow, ...]
    tensors: tuple[TensorError, ...]
    worst_layer: str | None
    accuracy: Accuracy | None
    checks: tuple[Check, ...]

    def require(self) -> None:
        """Raise `CheckFailed` naming every check that failed."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failed:
            raise CheckFailed("; ".join(failed))


def verify(
    artefact: Artefact,
    data: str | Path | Dataset | Iterable[Any] | None = None,
    *,
    per_layer: bool = True,
    exact_inputs: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a finished artefact on this machine.

    Without `data` the inputs kept in the artefact are used. With labelled data the top-1 accuracy
    is measured on all of it, for both programs. `per_layer` asks for the error of every layer.
    Raises `DataError` when the data does not fit, `TargetError` when the artefact is for another
    machine; a failed check is in the result, and `Verification.require` turns it into an error.
    """
    from .benchmarking import probe_inputs, set_threads

    artefact.require_can_run()
    set_threads(threads)
    progress = progress or Progress()
    feeds: Iterable[Mapping[str, np.ndarray]] = probe_inputs(artefact)
    dataset = None
    if data is not None:
        dataset = artefact.load_data(data)
        feeds = dataset
    exact_feeds = islice(iter(feeds), exact_inputs)
    compared_feeds = islice(iter(feeds), FIDELITY_INPUTS)
    tensors: tuple[TensorError, ...] = ()
    if artefact.is_project:
        exactness = check_project(artefact, exact_feeds, progress)
        outputs = compare_project(artefact, compared_feeds, progress)
    else:
        exactness = check_exactness(artefact, exact_feeds, progress)
        outputs, tensors = compare_with_original(artefact, compared_feeds, per_layer, progress)
    accuracy = None
    if dataset is not None and dataset.has_labels:
        accuracy = measure_accuracy(artefact, dataset, progress)
    return Verification(
        exactness=exactness,
        outputs=outputs,
        tensors=tensors,
        worst_layer=_worst(tensors),
        accuracy=accuracy,
        checks=tuple(_checks(exactness, accuracy, artefact.recipe.goals.max_drop)),
    )


# --- (a) the reference graph --------------------------------------------------------------------


def reference_session(artefact: Artefact) -> Session:
    """The reference graph; besides the model's outputs it returns its integer tensors.

    Of a C project it takes and gives what the C function does.
    """
    from .runtime import Session

    inputs, outputs = artefact.inputs, artefact.outputs
    if artefact.is_project:
        project = artefact.project()
        inputs = tuple(port.spec for port in project.input_ports)
        outputs = tuple(port.spec for port in project.output_ports)
    taps = tap_specs(artefact.kernels["taps"])
    return Session(artefact.path_of("reference"), inputs, outputs + taps)


def tap_specs(taps: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """What a reference graph returns after the model's outputs."""
    return tuple(TensorSpec(TAP + tap["name"], tuple(tap["shape"]), tap["dtype"]) for tap in taps)


class _Differences:
    """Integers that differ from the reference's, by tensor, and how far floats are off."""

    def __init__(self) -> None:
        self.differing: dict[str, None] = {}
        self.elements = 0
        self._difference: float | None = None
        self._largest = 0.0

    def add_outputs(
        self, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
    ) -> None:
        """The outputs of one run."""
        for name, array in found.items():
            wanted = expected[name]
            if array.dtype.kind == "f":
                difference = float(np.max(np.abs(array - wanted), initial=0.0))
                self._difference = max(self._difference or 0.0, difference)
                self._largest = max(self._largest, float(np.max(np.abs(wanted), initial=0.0)))
                continue
            self.elements += wanted.size
            if not np.array_equal(array, wanted):
                self.differing[name] = None

    @property
    def float_difference(self) -> float | None:
        """The largest one, relative to the largest value; None: there are no floats."""
        if self._difference is None or self._largest == 0.0:
            return self._difference
        return self._difference / self._largest


def check_project(
    artefact: Artefact, feeds: Iterable[Mapping[str, np.ndarray]], progress: Progress
) -> Exactness:
    """Compare a C project, run as its target is, with the reference graph: its outputs, and by
    checksum the integer tensors between its layers, as soon as they are written.

    Not so where a layer stayed float, behind which a code may be one step off (`check_exactness`).
    """
    project, reference = artefact.project(), reference_session(artefact)
    layers = _comparable(project, artefact.kernels["taps"])
    with progress.step("comparing integers"):
        codes = [project.codes(feed) for feed in feeds]
        results = project.run_codes(codes).outputs
        sums = project.checksums(codes) if layers else [{} for _ in codes]
        compared = _Differences()
        for code, found, between in zip(codes, results, sums, strict=True):
            expected = reference.run(code)
            for name, named in layers.items():
                wanted = expected[TAP + name]
                compared.elements += wanted.size
                if between[name] != checksum(wanted):
                    compared.differing[named] = None
            compared.add_outputs(found, expected)
    integers = sum(port.spec.dtype.startswith(("int", "uint")) for port in project.output_ports)
    return Exactness(
        len(codes), len(layers) + integers, compared.elements, tuple(compared.differing),
        compared.float_difference, 0,
    )  # fmt: skip


def _comparable(project: ProjectSession, taps: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tensors of the arena that the reference has in the same form, in the order of their layers:
    name => name with layers. Those that lost channels differ in shape."""
    taps = list(taps)
    if any(tap.get("from_floats", False) for tap in taps):
        return {}
    forms = {tap["name"]: (list(tap["shape"]), tap["dtype"]) for tap in taps}
    return {
        entry["name"]: _with_layers(entry["name"], entry["layers"])
        for entry in project.observed
        if forms.get(entry["name"]) == (entry["shape"], entry["dtype"])
    }


def _with_layers(name: str, layers: Sequence[str]) -> str:
    return f"{name} ({', '.join(layers)})" if layers else name


def compare_project(
    artefact: Artefact, feeds: Iterable[Mapping[str, np.ndarray]], progress: Progress
) -> tuple[OutputRow, ...]:
    """The outputs of a C project, as real numbers, against the original's."""
    project, original = artefact.project(), artefact.session("original")
    listed = list(feeds)
    with progress.step(f"comparing with the {artefact.original}"):
        results = project.run_all(listed)
        sums = {spec.name: ErrorSums() for spec in artefact.outputs}
        for feed, found in zip(listed, results, strict=True):
            wanted = original.run(feed)
            for name, total in sums.items():
                total.add(wanted[name], found[name])
    return _output_rows(sums, len(listed))


def _output_rows(sums: Mapping[str, ErrorSums], count: int) -> tuple[OutputRow, ...]:
    return tuple(
        OutputRow(name, total.sqnr_db, total.cosine, total.max_abs_error, count)
        for name, total in sums.items()
    )


def check_exactness(
    artefact: Artefact, feeds: Iterator[Mapping[str, np.ndarray]], progress: Progress
) -> Exactness:
    """Compare every integer tensor that both programs materialise, bit for bit.

    Where a recipe leaves layers in float, their sums depend on the order of additions, and a code
    rounded from a near tie may be one step off. Those codes are counted, and replaced by the
    reference's, so that the integers computed from them still have to be equal.
    """
    info = LibraryInfo.from_json(artefact.kernels["compressed"])
    shipped, reference = artefact.session(), reference_session(artefact)
    from_floats = {tap["name"]: tap.get("from_floats", False) for tap in artefact.kernels["taps"]}
    compared = _Differences()
    inputs = rounded = 0
    with progress.step("comparing integers"):
        for feed in feeds:
            inputs += 1
            expected = reference.run(feed)

            def near(
                name: str, _written: np.ndarray, wanted: Mapping[str, np.ndarray] = expected
            ) -> np.ndarray | None:
                return wanted[TAP + name] if from_floats.get(name) else None

            outputs, tensors = capture(shipped, info, feed, replace=near)
            for name, is_rounded in from_floats.items():
                if name not in tensors:
                    raise ArtefactError(
                        f"{artefact.path}: kernel lists name {name!r}, which the library does not "
                        "write; compress again"
                    )
                wanted = expected[TAP + name]
                compared.elements += wanted.size
                distance = np.abs(
                    tensors[name].ravel().astype(np.int64) - wanted.ravel().astype(np.int64)
                )
                off = int(np.count_nonzero(distance))
                if is_rounded and distance.max(initial=0) <= 1 and off <= ROUNDED * wanted.size:
                    rounded += off
                elif off:
                    compared.differing[name] = None
            compared.add_outputs(outputs, expected)
    layers = {call.output: call.layers for call in info.calls}
    named = tuple(_with_layers(name, layers.get(name, ())) for name in compared.differing)
    return Exactness(
        inputs, len(from_floats), compared.elements, named, compared.float_difference, rounded
    )


# --- (b) the float original ---------------------------------------------------------------------


def compare_with_original(
    artefact: Artefact,
    feeds: Iterator[Mapping[str, np.ndarray]],
    per_layer: bool,
    progress: Progress,
) -> tuple[tuple[OutputRow, ...], tuple[TensorError, ...]]:
    """Signal to noise, cosine and largest error of the outputs and of every layer's output.

    A layer's error holds what came in from the layers before it. Its own error comes from a second
    run of the shipped kernels in which every tensor, once written and compared, is overwritten with
    the original's, so that no kernel reads what an earlier one did wrong.
    """
    compressed, original = artefact.session(), artefact.session("original")
    infos = {
        side: LibraryInfo.from_json(artefact.kernels[side]) for side in ("compressed", "original")
    }
    output_sums = {spec.name: ErrorSums() for spec in artefact.outputs}
    tensor_sums: dict[str, ErrorSums] = {}
    own_sums: dict[str, ErrorSums] = {}
    count = 0
    with progress.step("comparing with the float original"):
        for feed in feeds:
            count += 1
            if per_layer:
                results, tensors = capture(compressed, infos["compressed"], feed)
                wanted, captured = capture(original, infos["original"], feed)
                originals = _by_tensor_of_artefact(infos, captured)
                _add_tensors(tensor_sums, infos["compressed"], tensors, originals)
                _, alone = capture(compressed, infos["compressed"], feed, forced=originals)
                _add_tensors(own_sums, infos["compressed"], alone, originals)
            else:
                results, wanted = compressed.run(feed), original.run(feed)
            for name, sums in output_sums.items():
                sums.add(wanted[name], results[name])
    layers = {call.output: call.layers for call in infos["compressed"].calls}
    rows = tuple(
        TensorError(
            name,
            layers[name],
            sums.sqnr_db,
            sums.cosine,
            sums.max_abs_error,
            own_sums[name].sqnr_db,
        )
        for name, sums in tensor_sums.items()
    )
    return _output_rows(output_sums, count), rows


def _by_tensor_of_artefact(
    infos: Mapping[str, LibraryInfo], captured: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Tensor of the artefact => the original's real numbers for it, in the graph's axis order."""
    from .relay_passes.biases import CORRECTED

    by_source = {
        info.source: name for name, info in infos["original"].tensors.items() if name in captured
    }
    found = {}
    for name, info in infos["compressed"].tensors.items():
        partner = by_source.get(info.source, by_source.get(info.source.removesuffix(CORRECTED)))
        if partner is None or infos["original"].tensors[partner].shape != info.shape:
            continue
        found[name] = infos["original"].tensors[partner].real(captured[partner])
    return found


def _add_tensors(
    sums: dict[str, ErrorSums],
    info: LibraryInfo,
    tensors: Mapping[str, np.ndarray],
    originals: Mapping[str, np.ndarray],
) -> None:
    for name, wanted in originals.items():
        if name in tensors:
            found = info.tensors[name].real(tensors[name])
            sums.setdefault(name, ErrorSums()).add(wanted, found)


def _worst(tensors: tuple[TensorError, ...]) -> str | None:
    """The layers whose kernel adds most noise to its own output."""
    measured = [row for row in tensors if row.own_sqnr_db is not None and row.layers]
    if not measured:
        return None
    worst = min(measured, key=lambda row: row.own_sqnr_db or 0.0)
    return ", ".join(worst.layers)


# --- checks -------------------------------------------------------------------------------------


def _checks(
    exactness: Exactness | None, accuracy: Accuracy | None, max_drop: float | None
) -> Iterator[Check]:
    if exactness is not None:
        yield from _exactness_checks(exactness)
    if accuracy is not None and max_drop is not None:
        measured = f"top-1 drop {accuracy.drop * 100:.2f} points (n = {accuracy.samples})"
        limit = f"{max_drop * 100:g}"
        if accuracy.drop > max_drop:
            yield Check("accuracy", False, f"{measured}; the recipe allows {limit}")
        else:
            yield Check("accuracy", True, f"{measured}, at most {limit} allowed")


def _exactness_checks(exactness: Exactness) -> Iterator[Check]:
    checked = f"{exactness.tensors} integer tensors, {exactness.inputs} inputs"
    if exactness.differing:
        names = ", ".join(exactness.differing[:5])
        more = f" and {len(exactness.differing) - 5} more" if exactness.differing[5:] else ""
        detail = f"{len(exactness.differing)} of {checked} differ from the reference: "
        yield Check("exact integers", False, f"{detail}{names}{more}")
    elif exactness.elements:
        but = f" but {exactness.rounded:,} one step off, rounded from floats"
        detail = f"{checked}, {exactness.elements:,} values: all equal"
        yield Check("exact integers", True, detail + (but if exactness.rounded else ""))
    difference = exactness.float_difference
    if difference is not None:
        distance = f"differ by {difference:.1e} of their range" if difference else "equal"
        detail = f"{distance}, {exactness.inputs} inputs; at most {FLOAT_TOLERANCE:.0e} allowed"
        yield Check("float outputs", bool(difference <= FLOAT_TOLERANCE), detail)
