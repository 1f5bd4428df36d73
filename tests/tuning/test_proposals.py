"""What is measured next: every choice once, the default first, good ones soon."""

from __future__ import annotations

import math

from tvm_compress.schedules.choice import Choice, SearchSpace, choice_to_json
from tvm_compress.tuning.proposals import Proposals


def space(side: int, parameters: int = 3) -> SearchSpace:
    names = [f"p{i}" for i in range(parameters)]
    return SearchSpace(
        "test",
        {name: tuple(range(1, side + 1)) for name in names},
        dict.fromkeys(names, 1),
        lambda choice: sum(choice.values()) <= 2 * side,
    )


def seconds(choice: Choice) -> float:
    """Least where the product of the first two is 12 and the third is 5."""
    return 1 + abs(math.log(choice["p0"] * choice["p1"] / 12)) + 0.1 * abs(choice["p2"] - 5)


def test_each_valid_choice_once_default_first() -> None:
    small = space(3)
    proposals = Proposals(small)
    asked = [proposals.ask(4) for _ in range(10)]
    assert asked[0][0] == small.default
    flat = [choice_to_json(choice) for batch in asked for choice in batch]
    assert sorted(flat) == sorted(choice_to_json(choice) for choice in small)
    assert proposals.ask(4) == []


def test_what_was_told_is_not_asked_again() -> None:
    small = space(3)
    proposals = Proposals(small)
    known = list(small)[:5]
    for choice in known:
        proposals.tell(choice, 1.0)
    assert all(choice not in known for choice in proposals.ask(100))


def best_after(which: SearchSpace, trials: int) -> float:
    proposals = Proposals(which)
    best = math.inf
    for _ in range(trials // 8):
        for choice in proposals.ask(8):
            failed = choice["p2"] == 7
            proposals.tell(choice, None if failed else seconds(choice))
            best = best if failed else min(best, seconds(choice))
    return best


def test_learns() -> None:
    which = space(10)
    everything = sorted(seconds(choice) for choice in which)
    # Ten of 1,000 reached in 80 trials would take luck: (1 - 10 / 1000) ** 80 = 45 % without.
    assert best_after(which, 80) <= everything[10]


def test_spaces_too_large_to_write_out() -> None:
    which = space(14, parameters=5)
    assert math.prod(len(v) for v in which.parameters.values()) > 100_000
    assert Proposals(which).size is None
    assert best_after(which, 160) < 1.15
    asked = Proposals(which).ask(64)
    assert all(which.contains(choice) for choice in asked)
    assert len({choice_to_json(choice) for choice in asked}) == 64
