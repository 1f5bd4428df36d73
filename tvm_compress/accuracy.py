"""Top-1 accuracy on labelled data: programs side by side, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from .errors import DataError
from .measures import paired_difference, wilson
from .model import TensorSpec
from .progress import Progress
from .report.rows import Accuracy

if TYPE_CHECKING:
    from .artefact import Artefact
    from .data import Dataset

_RUNS_AT_ONCE = 64
Scorer = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""A model's inputs => one score for each class, the first axis being samples."""


@dataclass(frozen=True)
class SideAccuracy:
    """Top-1 accuracy of one program, and how far it is ahead of the artefact's."""

    samples: int
    accuracy: float
    low: float  # of the 95 % Wilson interval
    high: float
    ahead: float  # its accuracy minus the artefact's
    ahead_low: float  # of the paired 95 % interval
    ahead_high: float
    p_value: float  # McNemar's mid-p test


def measure_accuracy(artefact: Artefact, dataset: Dataset, progress: Progress) -> Accuracy:
    """Top-1 accuracy of both programs of `artefact` on every sample of `dataset`."""
    spec = scores_output(artefact.outputs, dataset)
    if artefact.is_project:
        right = right_answers_of_project(artefact, dataset, spec, progress)
    else:
        right = right_answers(sides_of(artefact, spec), dataset, spec, progress)
    before, after = right["original"], right["compressed"]
    count = len(before)
    only_before, only_after = int(np.sum(before & ~after)), int(np.sum(~before & after))
    low_before, high_before = wilson(int(before.sum()), count)
    low_after, high_after = wilson(int(after.sum()), count)
    difference = paired_difference(only_before, only_after, count)
    return Accuracy(
        samples=count,
        before=int(before.sum()) / count,
        before_low=low_before,
        before_high=high_before,
        after=int(after.sum()) / count,
        after_low=low_after,
        after_high=high_after,
        drop=difference.drop,
        drop_low=difference.low,
        drop_high=difference.high,
        only_before_right=only_before,
        only_after_right=only_after,
        p_value=difference.p_value,
    )


def sides_of(artefact: Artefact, spec: TensorSpec) -> dict[str, Scorer]:
    """The two programs of an artefact; `spec` is the output with the scores."""

    def scorer(side: str) -> Scorer:
        session = artefact.runnable(side)
        return lambda feed: session.run(feed)[spec.name]

    return {side: scorer(side) for side in ("compressed", "original")}


def right_answers(
    scorers: Mapping[str, Scorer], dataset: Dataset, spec: TensorSpec, progress: Progress
) -> dict[str, np.ndarray]:
    """For each program whether the largest score of each sample is its label's: bool [samples].

    `spec` is the output that the scores are: its shape says how many classes there are.
    """
    found: dict[str, list[np.ndarray]] = {side: [] for side in scorers}
    runs = -(-len(dataset) // dataset.batch)
    for run in progress.track(dataset.runs(), "measuring accuracy", runs):
        assert run.labels is not None
        check_labels(int(run.labels.min()), int(run.labels.max()), spec, dataset.source)
        for side, scorer in scorers.items():
            scores = scorer(run.feed)
            classes = scores.reshape(scores.shape[0], -1)[: run.count].argmax(1)
            found[side].append(classes == run.labels)
    return {side: np.concatenate(parts) for side, parts in found.items()}


def right_answers_of_project(
    artefact: Artefact, dataset: Dataset, spec: TensorSpec, progress: Progress
) -> dict[str, np.ndarray]:
    """`right_answers` of a C project and its original: many samples for each start of its
    emulator."""
    original, project = artefact.session("original"), artefact.project()
    found: dict[str, list[np.ndarray]] = {"compressed": [], "original": []}
    runs = iter(dataset.runs())
    pieces = -(-len(dataset) // (dataset.batch * _RUNS_AT_ONCE))
    pieces_of_runs = (list(islice(runs, _RUNS_AT_ONCE)) for _ in range(pieces))
    for piece in progress.track(pieces_of_runs, "measuring accuracy", pieces):
        results = {
            "compressed": project.run_all([run.feed for run in piece]),
            "original": [original.run(run.feed) for run in piece],
        }
        for side, outputs in results.items():
            for run, named in zip(piece, outputs, strict=True):
                assert run.labels is not None
                check_labels(int(run.labels.min()), int(run.labels.max()), spec, dataset.source)
                scores = named[spec.name]
                classes = scores.reshape(scores.shape[0], -1)[: run.count].argmax(1)
                found[side].append(classes == run.labels)
    return {side: np.concatenate(parts) for side, parts in found.items()}


def beside(right: Mapping[str, np.ndarray], ours: str = "compressed") -> dict[str, SideAccuracy]:
    """Accuracies from `right_answers`, each compared with the side `ours` sample by sample."""
    rows = {}
    for side, answers in right.items():
        count, good = len(answers), int(answers.sum())
        low, high = wilson(good, count)
        ahead = paired_difference(
            int(np.sum(answers & ~right[ours])), int(np.sum(~answers & right[ours])), count
        )
        rows[side] = SideAccuracy(
            samples=count,
            accuracy=good / count,
            low=low,
            high=high,
            ahead=ahead.drop,
            ahead_low=ahead.low,
            ahead_high=ahead.high,
            p_value=ahead.p_value,
        )
    return rows


def scores_output(outputs: tuple[TensorSpec, ...], dataset: Dataset) -> TensorSpec:
    """The output that holds one score for each class of `dataset`'s labels.

    Raises `DataError` when there is none, or when the labels are known and go beyond the classes.
    """
    for spec in outputs:
        classes = math.prod(spec.shape[1:])
        if spec.shape and spec.shape[0] == dataset.batch and classes > 1:
            if dataset.label_range is not None:
                check_labels(*dataset.label_range, spec, dataset.source)
            return spec
    shapes = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in outputs)
    raise DataError(
        f"{dataset.source}: labels are given, but no output holds one score for each class "
        f"({shapes}); leave the labels out"
    )


def check_labels(low: int, high: int, spec: TensorSpec, source: str) -> None:
    classes = math.prod(spec.shape[1:])
    if low < 0 or high >= classes:
        raise DataError(
            f"{source}: labels go from {low} to {high}; output {spec.name!r} has {classes} classes"
        )
