"""Which choices of one kernel to measure next: xgboost ranks what was not tried, some are random.

The spaces are products of a few small parameters, so a model over the parameters themselves learns
from a few dozen measurements what MetaSchedule's model needs loop features and hundreds for.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..schedules.choice import Choice, SearchSpace, choice_to_json

if TYPE_CHECKING:
    import xgboost

# Spaces up to this size (before `is_valid`) are written out once; larger ones are sampled.
_ENUMERATED = 100_000
_SAMPLES = 512
_ATTEMPTS = 20  # of drawing a valid choice, for each one wanted
_NEIGHBOURED = 6  # of the best measured choices get their neighbours considered
# Measurements below which a model says nothing.
_MIN_TO_LEARN = 12
_ROUNDS = 60
_EPSILON = 0.25


class Proposals:
    """The choices of one space: what was measured, and what to measure next.

    The default comes first. `tell` everything that was measured, failures with None.
    """

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        self.space = space
        self._random = random.Random(seed)
        self._names = list(space.parameters)
        self._seen: set[str] = set()
        self._results: dict[str, tuple[Choice, float | None]] = {}
        product = math.prod(len(values) for values in space.parameters.values())
        self._all: list[dict[str, int]] | None = None
        if product <= _ENUMERATED:
            self._all = list(space)

    @property
    def size(self) -> int | None:
        """How many choices there are; None for a space that is too large to write out."""
        return None if self._all is None else len(self._all)

    def seen(self, choice: Choice) -> None:
        """Do not propose this choice (again)."""
        self._seen.add(choice_to_json(choice))

    def tell(self, choice: Choice, seconds: float | None) -> None:
        """The result of a choice, proposed here or by an earlier run; the last one counts."""
        self.seen(choice)
        self._results[choice_to_json(choice)] = (choice, seconds)

    def ask(self, count: int) -> list[dict[str, int]]:
        """At most `count` choices that were not proposed before; fewer when there are no more."""
        chosen: list[dict[str, int]] = []

        def take(choice: dict[str, int]) -> None:
            if len(chosen) < count and choice_to_json(choice) not in self._seen:
                self.seen(choice)
                chosen.append(choice)

        take(dict(self.space.default))
        candidates = [c for c in self._candidates() if choice_to_json(c) not in self._seen]
        if not candidates:
            return chosen
        order = self._ranked(candidates)
        explored = math.ceil(_EPSILON * (count - len(chosen)))
        for index in order[: max(0, count - len(chosen) - explored)]:
            take(candidates[index])
        self._random.shuffle(candidates)
        for choice in candidates:
            take(choice)
        return chosen

    # What could be next

    def _candidates(self) -> list[dict[str, int]]:
        if self._all is not None:
            return self._all
        found = {choice_to_json(c): c for c in self._samples()}
        centres = self._fastest(_NEIGHBOURED) or [self.space.default]
        for choice in itertools.chain.from_iterable(map(self._neighbours, centres)):
            found.setdefault(choice_to_json(choice), choice)
        return list(found.values())

    def _samples(self) -> Iterator[dict[str, int]]:
        found = 0
        for _ in range(_SAMPLES * _ATTEMPTS):
            choice = {n: self._random.choice(v) for n, v in self.space.parameters.items()}
            if self.space.is_valid(choice):
                yield choice
                found += 1
                if found == _SAMPLES:
                    return

    def _neighbours(self, choice: Choice) -> Iterator[dict[str, int]]:
        """Valid choices that differ in one or two parameters."""
        for one, other in itertools.combinations_with_replacement(self._names, 2):
            for _ in range(8):
                changed = dict(choice)
                for name in {one, other}:
                    changed[name] = self._random.choice(self.space.parameters[name])
                if self.space.is_valid(changed):
                    yield changed

    # What is likely good

    def _ranked(self, candidates: list[dict[str, int]]) -> list[int]:
        """Indices of candidates, the most promising first."""
        order = self._random.sample(range(len(candidates)), len(candidates))
        if sum(s is not None for _, s in self._results.values()) < _MIN_TO_LEARN:
            centre = (self._fastest(1) or [self.space.default])[0]
            return sorted(order, key=lambda i: self._distance(candidates[i], centre))
        predicted = self._model().inplace_predict(self._features(candidates))
        return sorted(order, key=lambda i: -float(predicted[i]))

    def _model(self) -> xgboost.Booster:
        """Predicts speed relative to the best; failures count as infinitely slow."""
        import xgboost

        choices, seconds = zip(*self._results.values(), strict=True)
        best = min(s for s in seconds if s is not None)
        speeds = np.array([0.0 if s is None else best / s for s in seconds])
        data = xgboost.DMatrix(self._features(list(choices)), label=speeds)
        options = {
            "max_depth": 6,
            "eta": 0.2,
            "min_child_weight": 1,
            "subsample": 0.9,
            "nthread": 1,
            "seed": 1,
            "verbosity": 0,
        }
        return xgboost.train(options, data, num_boost_round=_ROUNDS)

    def _fastest(self, count: int) -> list[Choice]:
        succeeded = [(s, text) for text, (_, s) in self._results.items() if s is not None]
        return [self._results[text][0] for _, text in sorted(succeeded)[:count]]

    def _distance(self, one: Choice, other: Choice) -> int:
        return sum(one[name] != other.get(name) for name in self._names)

    def _features(self, choices: list[dict[str, int]] | list[Choice]) -> np.ndarray:
        """[choices, features]: the values, their pairwise products and ratios, and how much of the
        largest value of a parameter is wasted when it is covered in steps of the chosen one."""
        values = np.array([[c.get(n, 0) for n in self._names] for c in choices], np.float32)
        largest = np.array([max(map(abs, v)) for v in self.space.parameters.values()], np.float32)
        steps = np.maximum(values, 1)
        waste = np.ceil(largest / steps) * steps / np.maximum(largest, 1)
        columns: list[np.ndarray] = [values, waste]
        for i, j in itertools.combinations(range(len(self._names)), 2):
            columns.append((steps[:, i] * steps[:, j])[:, None])
            columns.append((steps[:, i] / steps[:, j])[:, None])
        return np.concatenate(columns, axis=1)
