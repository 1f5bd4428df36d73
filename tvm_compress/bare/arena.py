"""Where every buffer lies in the one block of memory that a microcontroller gives a network.

A buffer is alive in a run of steps (kernel calls); buffers that are alive together must not
overlap, but where a kernel may write over what it has read. This is dynamic storage allocation,
NP-hard, and networks are small: several orders of placing are tried, the best is improved, and few
buffers are searched exactly. The bytes alive in the worst step are a lower bound, usually reached.

Orders by size and by breadth: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
Inference", arXiv 2001.03288, section 5.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

IMPROVE_WORK = 100_000  # placements of single buffers while improving: about a second
SMALL_BUFFERS = 16  # up to here the exact search ends sooner than improving does
EXACT_BUFFERS = 64  # more are not searched exactly
EXACT_NODES = 20_000  # of the search tree: about a second
SEED = 20010332


@dataclass(frozen=True)
class Share:
    """A kernel may write over its input `name` if the output starts `lead_bytes` or more before it.

    0: element by element, the output starts where the input starts, or anywhere before. An output
    whose lead is its own size does not overlap at all. See `rows_lead`. Leads add up along a chain
    of such kernels; one that holds finished rows back in its workspace can do without.
    """

    name: str
    lead_bytes: int = 0


@dataclass(frozen=True)
class Lifetime:
    """A buffer and the steps, both inclusive, in which it is alive.

    `first` is the step that writes it and `last` the last one that reads it; a kernel's workspace
    has both at its own step. `may_share_with` holds inputs of step `first`; one that is still
    needed afterwards is kept apart all the same.
    """

    name: str
    bytes: int
    first: int
    last: int
    alignment: int = 16
    may_share_with: tuple[Share, ...] = ()
    is_workspace: bool = False
    """For pictures only."""

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"buffer {self.name}: {self.bytes} bytes; it takes 0 or more")
        if not 0 <= self.first <= self.last:
            raise ValueError(
                f"buffer {self.name}: alive in steps {self.first} to {self.last}; it takes "
                "0 <= first <= last"
            )
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(
                f"buffer {self.name}: alignment {self.alignment}; it takes a power of two"
            )
        for share in self.may_share_with:
            if share.lead_bytes < 0:
                raise ValueError(
                    f"buffer {self.name}: lead of {share.lead_bytes} bytes over {share.name}; it "
                    "takes 0 or more"
                )


@dataclass(frozen=True)
class ArenaPlan:
    """Offsets for all buffers, and how good they are."""

    lifetimes: tuple[Lifetime, ...]
    offsets: dict[str, int]
    bytes: int
    bound_bytes: int
    """No plan for these lifetimes is smaller."""
    peak_step: int
    """The step with the most bytes alive: it sets `bound_bytes`."""
    heuristic: str
    """The one that found these offsets."""
    is_optimal: bool
    """Proved, by the bound or by an exact search that came to its end."""
    tried: dict[str, int]
    """Arena bytes by every heuristic that ran, in that order."""

    @property
    def gap_bytes(self) -> int:
        """Above the lower bound."""
        return self.bytes - self.bound_bytes

    @property
    def alignment(self) -> int:
        """What the arena's own address must be a multiple of."""
        return max((lifetime.alignment for lifetime in self.lifetimes), default=1)

    def alive(self, step: int) -> tuple[Lifetime, ...]:
        """The buffers of a step, largest first."""
        found = [life for life in self.lifetimes if life.first <= step <= life.last and life.bytes]
        return tuple(sorted(found, key=lambda life: -life.bytes))


def rows_lead(
    rows: int,
    output_row_bytes: int,
    input_row_bytes: int,
    stride: int = 1,
    padding: int = 0,
    held_rows: int = 0,
) -> int:
    """Lead of a kernel that makes output rows in order, reading input rows `i*stride - padding` on.

    `held_rows`: finished rows that the kernel keeps in a workspace before it writes them. A row may
    be any unit: for a 1x1 convolution that makes pixel after pixel, a pixel. While row
    `i - held_rows` is written, input rows from `i*stride - padding` on are still to be read; the
    lead keeps the written bytes below them.
    """
    lead = 0
    for row in range(rows):
        written = max(0, row + 1 - held_rows) * output_row_bytes
        read = max(0, row * stride - padding) * input_row_bytes
        lead = max(lead, written - read)
    return min(lead, rows * output_row_bytes)


def plan(
    lifetimes: Iterable[Lifetime],
    improve_work: int = IMPROVE_WORK,
    exact_nodes: int = EXACT_NODES,
) -> ArenaPlan:
    """The smallest arena that was found for these lifetimes; the same every time.

    `improve_work` bounds the time of improving, in single placements; `exact_nodes` that of the
    exact search. Stops as soon as the lower bound is reached.

    Raises `ValueError` for names that occur twice or shares of unknown buffers.
    """
    lifetimes = tuple(lifetimes)
    problem = _Problem(lifetimes)
    tried: dict[str, int] = {}
    best: tuple[int, str, Offsets] | None = None
    optimal = False

    def keep(name: str, offsets: Offsets) -> bool:
        """Whether the bound is reached."""
        nonlocal best
        tried[name] = problem.top(offsets)
        if best is None or tried[name] < best[0]:
            best = (tried[name], name, offsets)
        return best[0] == problem.bound

    for name, order in ORDERS.items():
        for fit_name, fit in FITS.items():
            if keep(f"{name}, {fit_name}", problem.place_all(order(problem), fit)):
                optimal = True
                break
        if optimal:
            break
    assert best is not None
    stages = (
        ["improve", "search"] if len(problem.buffers) > SMALL_BUFFERS else ["search", "improve"]
    )
    for stage in stages:
        if not optimal and stage == "improve":
            optimal = keep("improved order", _improve(problem, best[2], improve_work))
        elif not optimal and len(problem.buffers) <= EXACT_BUFFERS:
            exact, optimal = _search(problem, best[2], exact_nodes)
            keep("exact search", exact)
    _, heuristic, found = best
    problem.check(found)
    offsets = {life.name: 0 for life in lifetimes}
    offsets.update({life.name: found[i] for i, life in enumerate(problem.buffers)})
    return ArenaPlan(
        lifetimes=lifetimes,
        offsets=offsets,
        bytes=best[0],
        bound_bytes=problem.bound,
        peak_step=problem.peak_step,
        heuristic=heuristic,
        is_optimal=optimal,
        tried=tried,
    )


# --- the problem --------------------------------------------------------------------------------

Offsets = list[int]
Fit = Callable[[list[tuple[int, int]], int], int]


@dataclass(frozen=True)
class _Clique:
    """Buffers that are alive in one step, and the bytes that they need at least."""

    step: int
    members: tuple[int, ...]
    saved: int  # at most, by writing over inputs
    slack: int  # at most, of rounding up the one on top
    bound: int


class _Problem:
    """Buffers by index, and how far apart two of them must start."""

    def __init__(self, lifetimes: Sequence[Lifetime]) -> None:
        names = Counter(life.name for life in lifetimes)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"{count} buffers are called {name}")
        for life in lifetimes:
            for share in life.may_share_with:
                if share.name not in names:
                    raise ValueError(f"buffer {life.name} may share with {share.name}: no such one")
        self.buffers = [life for life in lifetimes if life.bytes]
        self.unit = min((life.alignment for life in self.buffers), default=1)
        self.rounded = [_round_up(life.bytes, self.unit) for life in self.buffers]
        self._index = {life.name: i for i, life in enumerate(self.buffers)}
        self.neighbours = self._separations()
        self.cliques = self._cliques()
        worst = max(self.cliques, key=lambda c: c.bound, default=None)
        self.bound = worst.bound if worst else 0
        self.peak_step = worst.step if worst else 0

    def _lead(self, output: Lifetime, source: Lifetime) -> int | None:
        """How far before `source` the start of `output` must be to lie over it, if it may."""
        if source.last != output.first:
            return None
        leads = [s.lead_bytes for s in output.may_share_with if s.name == source.name]
        return min(leads[0], output.bytes) if leads else None

    def _separations(self) -> list[list[tuple[int, int, int]]]:
        """For each i: (j, least distance of their starts with i below, the same with j below)."""
        neighbours: list[list[tuple[int, int, int]]] = [[] for _ in self.buffers]
        alive: list[int] = []
        for i in sorted(range(len(self.buffers)), key=lambda i: self.buffers[i].first):
            new = self.buffers[i]
            alive = [j for j in alive if self.buffers[j].last >= new.first]
            for j in alive:
                old = self.buffers[j]
                new_below, old_below = new.bytes, old.bytes
                lead = self._lead(new, old)
                if lead is not None:
                    new_below = lead
                lead = self._lead(old, new)  # an input of the network, in the first step
                if lead is not None:
                    old_below = lead
                neighbours[i].append((j, new_below, old_below))
                neighbours[j].append((i, old_below, new_below))
            alive.append(i)
        return neighbours

    def _cliques(self) -> list[_Clique]:
        """Of each step that adds a buffer."""
        cliques = []
        for step in sorted({life.first for life in self.buffers}):
            members = tuple(
                i for i, life in enumerate(self.buffers) if life.first <= step <= life.last
            )
            saved = sum(self._saved(i, step) for i in members)
            slack = max(self.rounded[i] - self.buffers[i].bytes for i in members)
            total = sum(self.rounded[i] for i in members)
            least = max(total - saved - slack, *(self.buffers[i].bytes for i in members))
            cliques.append(_Clique(step, members, saved, slack, least))
        return cliques

    def _saved(self, i: int, step: int) -> int:
        """Most bytes that buffer i can have in common with inputs of its step."""
        output = self.buffers[i]
        if output.first != step:
            return 0
        saved = 0
        for share in output.may_share_with:
            j = self._index.get(share.name)
            lead = self._lead(output, self.buffers[j]) if j is not None else None
            if j is not None and lead is not None:
                over = self.rounded[i] - _round_up(lead, self.unit)
                saved += min(self.rounded[j], max(0, over))
        return min(saved, self.rounded[i])

    def top(self, offsets: Offsets) -> int:
        """Arena bytes."""
        return max((x + b.bytes for x, b in zip(offsets, self.buffers, strict=True)), default=0)

    def place_all(self, order: Iterable[int], fit: Fit) -> Offsets:
        """Place one buffer after the other."""
        offsets = [-1] * len(self.buffers)
        for i in order:
            offsets[i] = fit(self.forbidden(i, offsets), self.buffers[i].alignment)
        return offsets

    def forbidden(self, i: int, offsets: Offsets) -> list[tuple[int, int]]:
        """Open intervals in which buffer i must not start; of those that are placed (>= 0)."""
        return sorted(
            (offsets[j] - below, offsets[j] + above)
            for j, below, above in self.neighbours[i]
            if offsets[j] >= 0
        )

    def check(self, offsets: Offsets) -> None:
        """A wrong plan corrupts memory silently, so none leaves this file."""
        for i, life in enumerate(self.buffers):
            if offsets[i] < 0 or offsets[i] % life.alignment:
                raise AssertionError(f"{life.name} is at {offsets[i]}")
            for j, below, above in self.neighbours[i]:
                if -above < offsets[j] - offsets[i] < below:
                    raise AssertionError(f"{life.name} overlaps {self.buffers[j].name}")


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# --- fits: where a buffer goes ------------------------------------------------------------------


def _lowest(forbidden: list[tuple[int, int]], alignment: int) -> int:
    start = 0
    for low, high in forbidden:
        if start <= low:
            break
        if start < high:
            start = _round_up(high, alignment)
    return start


def _tightest(forbidden: list[tuple[int, int]], alignment: int) -> int:
    """The gap with the least room to spare; above all others if there is none."""
    start, best, least = 0, -1, math.inf
    for low, high in forbidden:
        if start <= low and low - start < least:
            best, least = start, low - start
        if start < high:
            start = _round_up(high, alignment)
    return best if best >= 0 else start


FITS: dict[str, Fit] = {"lowest gap": _lowest, "tightest gap": _tightest}


# --- orders: which buffer is next ---------------------------------------------------------------


def _by_size(problem: _Problem) -> list[int]:
    def key(i: int) -> tuple[int, int]:
        return (-problem.buffers[i].bytes, problem.buffers[i].first)

    return sorted(range(len(problem.buffers)), key=key)


def _by_breadth(problem: _Problem) -> list[int]:
    """The buffers of the fullest step first, by size; then of the next."""
    sizes = [sum(problem.rounded[i] for i in clique.members) for clique in problem.cliques]
    ranked = sorted(range(len(sizes)), key=lambda c: -sizes[c])
    order: dict[int, None] = {}
    for c in ranked:
        for i in sorted(problem.cliques[c].members, key=lambda i: -problem.buffers[i].bytes):
            order.setdefault(i)
    return list(order)


def _by_lifetime(problem: _Problem) -> list[int]:
    def key(i: int) -> tuple[int, int]:
        life = problem.buffers[i]
        return (life.first - life.last, -life.bytes)

    return sorted(range(len(problem.buffers)), key=key)


def _by_area(problem: _Problem) -> list[int]:
    def key(i: int) -> int:
        life = problem.buffers[i]
        return -(life.last - life.first + 1) * life.bytes

    return sorted(range(len(problem.buffers)), key=key)


def _by_step(problem: _Problem) -> list[int]:
    def key(i: int) -> tuple[int, int]:
        return (problem.buffers[i].first, -problem.buffers[i].bytes)

    return sorted(range(len(problem.buffers)), key=key)


def _from_the_end(problem: _Problem) -> list[int]:
    def key(i: int) -> tuple[int, int]:
        return (-problem.buffers[i].last, -problem.buffers[i].bytes)

    return sorted(range(len(problem.buffers)), key=key)


ORDERS: dict[str, Callable[[_Problem], list[int]]] = {
    "by size": _by_size,
    "by breadth": _by_breadth,
    "by lifetime": _by_lifetime,
    "by size times lifetime": _by_area,
    "by step": _by_step,
    "from the end": _from_the_end,
}


# --- improving an order -------------------------------------------------------------------------


def _improve(problem: _Problem, offsets: Offsets, work: int) -> Offsets:
    """Simulated annealing over orders, beginning with the best known, cooling to hill climbing.

    A move takes a buffer that touches the top and puts it before one of its neighbours, or swaps
    any two.
    """
    count = len(problem.buffers)
    steps = work // max(1, count)
    generator = random.Random(SEED)
    order = sorted(range(count), key=offsets.__getitem__)
    current = problem.place_all(order, _lowest)
    size = problem.top(current)
    best, least = (
        (current, size) if size < problem.top(offsets) else (offsets, problem.top(offsets))
    )
    for step in range(steps):
        heat = 0.02 * problem.bound * (1 - step / steps) ** 2
        proposal = list(order)
        tops = [i for i in range(count) if current[i] + problem.buffers[i].bytes == size]
        moved = generator.choice(tops)
        if generator.random() < 0.7 and problem.neighbours[moved]:
            other = generator.choice(problem.neighbours[moved])[0]
            proposal.remove(moved)
            proposal.insert(proposal.index(other), moved)
        else:
            a, b = generator.randrange(count), generator.randrange(count)
            proposal[a], proposal[b] = proposal[b], proposal[a]
        placed = problem.place_all(proposal, _lowest)
        new_size = problem.top(placed)
        worse = new_size - size
        if worse <= 0 or (heat > 0 and generator.random() < math.exp(-worse / heat)):
            order, current, size = proposal, placed, new_size
            if size < least:
                best, least = current, size
                if least == problem.bound:
                    break
    return best


# --- exact search -------------------------------------------------------------------------------


def _search(problem: _Problem, offsets: Offsets, nodes: int) -> tuple[Offsets, bool]:
    """Depth-first branch and bound; returns the best plan and whether it is proved to be optimal.

    Buffers are placed by rising offset, each as low as it goes. That misses no optimum: pushed
    down, every buffer of one rests on 0 or on a lower one. (Leads are not negative for this reason:
    moving a buffer down then never forbids what lies above it.) A branch is cut where
    - some step cannot stay below the best plan with what is still to be placed, or
    - another buffer would fit wholly below the one to be placed: it can be moved there for nothing.
    """
    buffers, rounded = problem.buffers, problem.rounded
    best, least = list(offsets), problem.top(offsets)
    placed = [-1] * len(buffers)
    left = set(range(len(buffers)))
    remaining = [sum(rounded[i] for i in clique.members) for clique in problem.cliques]
    member_of: list[list[int]] = [[] for _ in buffers]
    for c, clique in enumerate(problem.cliques):
        for i in clique.members:
            member_of[i].append(c)
    budget = nodes

    def hopeless(floor: int) -> bool:
        for c, clique in enumerate(problem.cliques):
            base = floor
            if not clique.saved:  # then all to come lie above all that are there
                ends = [placed[i] + rounded[i] for i in clique.members if placed[i] >= 0]
                base = max([floor, *ends])
            if remaining[c] and base + remaining[c] - clique.saved - clique.slack >= least:
                return True
        return False

    def descend(floor: int, top: int) -> None:
        nonlocal best, least, budget
        if not left:
            if top < least:
                best, least = list(placed), top
            return
        if top >= least or hopeless(floor):
            return
        starts = {i: _lowest(problem.forbidden(i, placed), buffers[i].alignment) for i in left}
        roof = min(starts[i] + buffers[i].bytes for i in left)
        candidates = [(starts[i], -buffers[i].bytes, i) for i in left if floor <= starts[i] < roof]
        for start, negative, i in sorted(candidates):
            if budget <= 0 or least == problem.bound:
                return
            budget -= 1
            placed[i] = start
            left.discard(i)
            for c in member_of[i]:
                remaining[c] -= rounded[i]
            descend(start, max(top, start - negative))
            for c in member_of[i]:
                remaining[c] += rounded[i]
            left.add(i)
            placed[i] = -1

    descend(0, 0)
    return best, budget > 0 or least == problem.bound


# --- fitting a board ----------------------------------------------------------------------------


def peak_text(arena: ArenaPlan, steps: Sequence[str], names: int = 4) -> str:
    """Which layer sets the peak, and by which buffers; `steps` names the layer of each step."""
    alive = arena.alive(arena.peak_step)
    listed = ", ".join(f"{life.name} {life.bytes}" for life in alive[:names])
    more = f" and {len(alive) - names} more" if len(alive) > names else ""
    return (
        f"the peak is at {steps[arena.peak_step]} (step {arena.peak_step + 1} of {len(steps)}), "
        f"which needs at once, in bytes: {listed}{more}"
    )


def ram_shortage(
    board: str,
    arena: ArenaPlan,
    steps: Sequence[str],
    ram_bytes: int | None,
    caller_bytes: int = 0,
) -> str | None:
    """Why the model does not fit the board's RAM, on one line; None: it does, or has no limit.

    `caller_bytes` are those of inputs and outputs; the stack comes on top (some hundred bytes,
    which only the linked program tells).
    """
    needed = arena.bytes + caller_bytes
    if ram_bytes is None or needed <= ram_bytes:
        return None
    return (
        f"the model does not fit {board}: it needs {needed} bytes of RAM, {needed - ram_bytes} "
        f"more than the {ram_bytes} there are: {arena.bytes} of arena, {caller_bytes} of inputs "
        f"and outputs; {peak_text(arena, steps)}"
    )


def flash_shortage(
    board: str, layer_bytes: Mapping[str, int], code_bytes: int, flash_bytes: int | None
) -> str | None:
    """The same for flash: `layer_bytes` of every layer's constants, `code_bytes` of all else."""
    needed = sum(layer_bytes.values()) + code_bytes
    if flash_bytes is None or needed <= flash_bytes:
        return None
    largest = sorted(layer_bytes.items(), key=itemgetter(1), reverse=True)[:3]
    named = ", ".join(f"{name} {size}" for name, size in largest)
    what = "of flash" if code_bytes else "of flash for its weights alone"
    return (
        f"the model does not fit {board}: it needs {needed} bytes {what}, {needed - flash_bytes} "
        f"more than the {flash_bytes} there are; the largest layers in bytes: {named}"
    )
