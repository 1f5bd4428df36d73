"""What a kernel's schedule leaves open: parameters with a few values each, and a strong default.

A template decides everything by itself when it is given no choice. Tuning measures other choices;
the best is stored as data (`Choice`, JSON on the function as `CHOICE_ATTR`) and handed to the same
template, so a stored result and a fresh default are one code path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

CHOICE_ATTR = "tvm_compress.choice"

Choice = Mapping[str, int]
"""Parameter => value."""


@dataclass(frozen=True)
class SearchSpace:
    """The parameters of one kernel. `default` is what the template chooses by itself.

    `is_valid` says which combinations fit the machine (registers, caches): the space is what is
    left of the product.
    """

    template: str
    parameters: Mapping[str, tuple[int, ...]]
    default: Choice
    is_valid: Callable[[Choice], bool]

    def __iter__(self) -> Iterator[dict[str, int]]:
        """All valid choices, the default first."""
        yield dict(self.default)
        names = list(self.parameters)
        for values in itertools.product(*self.parameters.values()):
            choice = dict(zip(names, values, strict=True))
            if choice != self.default and self.is_valid(choice):
                yield choice

    def contains(self, choice: Choice) -> bool:
        """Whether a stored choice is one of this space: spaces change as templates do."""
        return (
            set(choice) == set(self.parameters)
            and all(choice[name] in values for name, values in self.parameters.items())
            and self.is_valid(choice)
        ) or dict(choice) == dict(self.default)


def choice_to_json(choice: Choice) -> str:
    """A choice as text: equal choices give equal texts."""
    return json.dumps(dict(choice), sort_keys=True, separators=(",", ":"))


def choice_from_json(text: str) -> dict[str, int]:
    """The choice in a text of `choice_to_json`. Raises `ValueError` for anything else."""
    parsed = json.loads(text)
    if not isinstance(parsed, dict) or not all(isinstance(v, int) for v in parsed.values()):
        raise ValueError(f"not a schedule choice: {text}")
    return {str(name): int(value) for name, value in parsed.items()}


def digest(text: str) -> str:
    """A short, stable name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
