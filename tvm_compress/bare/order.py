"""The order of kernel calls that needs the least memory.

Which tensors are alive depends only on the set of calls that are done, so the least peak over all
orders is a shortest path over such sets, its length the largest step on the way. Liberis and Lane,
"Neural networks on microcontrollers: saving memory at inference via operator reordering",
arXiv 1910.05110, section 4, has this as dynamic programming; here it is a best-first search, which
visits no set with a peak above the optimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from .arena import ArenaPlan, Lifetime, Share, plan

SEARCH_WORK = 2_000_000  # looks at calls: about two seconds
BEAM_WORK = 1_000_000


@dataclass(frozen=True)
class InPlace:
    """A call may write `output` over `source`, as `arena.Share` says, if that is its last use."""

    output: str
    source: str
    lead_bytes: int = 0


@dataclass(frozen=True)
class Operator:
    """A kernel call. Tensors that the graph does not know (constants, say) live elsewhere."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    workspace_bytes: int = 0
    in_place: tuple[InPlace, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Calls in a valid order, and the bytes of the tensors that lie in the arena.

    `inputs` are there before the first call, `outputs` must be there after the last one; either may
    be left out of `tensors` where the caller of the network owns them.

    Raises `ValueError` where a tensor is read before it is written, or written twice.
    """

    tensors: Mapping[str, int]
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        written = set(self.inputs)
        for operator in self.operators:
            for name in operator.inputs:
                if name in self.tensors and name not in written:
                    raise ValueError(f"{operator.name} reads {name} before it is written")
            for name in operator.outputs:
                if name in written:
                    raise ValueError(f"{operator.name} writes {name}, which exists already")
                written.add(name)
        for name in self.tensors:
            if name not in written:
                raise ValueError(f"nothing writes {name}")


@dataclass(frozen=True)
class Order:
    """Indices of the operators in the order found."""

    indices: tuple[int, ...]
    peak_bytes: int
    given_peak_bytes: int
    """Of the order in which the graph has them."""
    method: str
    """`as given`, `exact search` or `beam search`."""
    is_optimal: bool


@dataclass(frozen=True)
class GraphPlan:
    """A graph's order and its arena."""

    order: Order
    arena: ArenaPlan
    steps: tuple[str, ...]
    """Names of the operators in that order."""


def plan_graph(graph: Graph, alignment: int = 16, reorder: bool = True) -> GraphPlan:
    """Order and offsets with the smallest arena that was found."""
    given = given_order(graph)
    order = best_order(graph) if reorder else given
    arena = plan(lifetimes(graph, order.indices, alignment))
    if order.indices != given.indices and arena.gap_bytes:
        # The peak is only a lower bound; where the plan has gaps the given order may win.
        other = plan(lifetimes(graph, given.indices, alignment))
        if other.bytes <= arena.bytes:
            order, arena = given, other
    return GraphPlan(order, arena, tuple(graph.operators[i].name for i in order.indices))


def given_order(graph: Graph) -> Order:
    """The order that the graph has."""
    search = _Search(graph)
    indices = tuple(range(len(graph.operators)))
    peak = search.peak(indices)
    return Order(indices, peak, peak, "as given", peak == search.bound)


def lifetimes(graph: Graph, order: Sequence[int], alignment: int = 16) -> list[Lifetime]:
    """Buffers of a graph in an order: its tensors, and `NAME.workspace` of calls that have one."""
    end = max(len(order) - 1, 0)
    first = dict.fromkeys(graph.inputs, 0)
    last: dict[str, int] = {}
    shares: dict[str, tuple[Share, ...]] = {}
    result: list[Lifetime] = []
    for step, index in enumerate(order):
        operator = graph.operators[index]
        last.update(dict.fromkeys(operator.inputs, step))
        for name in operator.outputs:
            first[name] = last[name] = step
            shares[name] = tuple(
                Share(p.source, p.lead_bytes)
                for p in operator.in_place
                if p.output == name and p.source in graph.tensors
            )
    for name in _kept(graph):
        last[name] = end
    for name, size in graph.tensors.items():
        result.append(
            Lifetime(name, size, first[name], last[name], alignment, shares.get(name, ()))
        )
    for step, index in enumerate(order):
        operator = graph.operators[index]
        if operator.workspace_bytes:
            name, size = f"{operator.name}.workspace", operator.workspace_bytes
            result.append(Lifetime(name, size, step, step, alignment, is_workspace=True))
    return result


def best_order(graph: Graph, search_work: int = SEARCH_WORK, beam_work: int = BEAM_WORK) -> Order:
    """The order with the least peak of bytes alive; the given one unless another is better.

    Exact unless `search_work` runs out; then a beam search, and the better of its order and the
    given one.
    """
    search = _Search(graph)
    given = given_order(graph)
    given_peak = given.peak_bytes
    if given.is_optimal:
        return given
    found, complete = search.best_first(given_peak, search_work)
    method = "exact search"
    if not complete:
        found, method = search.beam(given_peak, beam_work), "beam search"
    if found is None:
        return replace(given, is_optimal=complete)
    peak = search.peak(found)
    return Order(found, peak, given_peak, method, complete or peak == search.bound)


def _kept(graph: Graph) -> set[str]:
    """Tensors that live to the end: outputs, and inputs that nothing reads."""
    read = {name for operator in graph.operators for name in operator.inputs}
    return set(graph.outputs) | {name for name in graph.inputs if name not in read}


class _Search:
    """Sets of done calls as bit masks, with the bytes alive behind them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        operators = graph.operators
        kept = _kept(graph)
        self.everything = (1 << len(operators)) - 1
        readers: dict[str, int] = dict.fromkeys(graph.tensors, 0)
        writer: dict[str, int] = {}
        for i, operator in enumerate(operators):
            for name in operator.inputs:
                if name in readers:
                    readers[name] |= 1 << i
            for name in operator.outputs:
                writer[name] = 1 << i
        # Constants of the search, by operator.
        self.needs: list[int] = []  # calls that must be done before
        self.adds: list[int] = []  # bytes while it runs: outputs and workspace
        self.leaves: list[int] = []  # bytes of its outputs that live on
        self.frees: list[list[tuple[int, int]]] = []  # (readers, bytes) of inputs that may die
        # For each output that may lie over inputs: its bytes, and (readers, common bytes) of those.
        self.saves: list[list[tuple[int, list[tuple[int, int]]]]] = []
        for operator in operators:
            inputs = list(dict.fromkeys(operator.inputs))
            needs = 0
            for name in inputs:
                needs |= writer.get(name, 0)
            outputs = [n for n in operator.outputs if n in graph.tensors]
            self.needs.append(needs)
            self.adds.append(sum(graph.tensors[n] for n in outputs) + operator.workspace_bytes)
            self.leaves.append(sum(graph.tensors[n] for n in outputs if readers[n] or n in kept))
            mortal = [n for n in inputs if n in graph.tensors and n not in kept]
            self.frees.append([(readers[n], graph.tensors[n]) for n in mortal])
            saves = []
            for output in outputs:
                size = graph.tensors[output]
                over = [
                    (readers[p.source], min(graph.tensors[p.source], max(0, size - p.lead_bytes)))
                    for p in operator.in_place
                    if p.output == output and p.source in mortal
                ]
                if over:
                    saves.append((size, over))
            self.saves.append(saves)
        self.start = sum(graph.tensors[n] for n in graph.inputs if n in graph.tensors)
        self.bound = max(
            (
                sum(graph.tensors.get(n, 0) for n in set(operator.inputs))
                + self.adds[i]
                - sum(min(size, sum(b for _, b in over)) for size, over in self.saves[i])
                for i, operator in enumerate(operators)
            ),
            default=self.start,
        )

    def run(self, done: int, live: int, i: int) -> tuple[int, int, int]:
        """Bytes while call i runs after `done`, bytes alive behind it, and the new set."""
        after = done | 1 << i
        step = live + self.adds[i]
        for size, over in self.saves[i]:
            step -= min(size, sum(b for readers, b in over if not readers & ~after))
        live += self.leaves[i]
        for readers, size in self.frees[i]:
            if not readers & ~after:
                live -= size
        return step, live, after

    def peak(self, order: Iterable[int]) -> int:
        done, live, peak = 0, self.start, self.start
        for i in order:
            step, live, done = self.run(done, live, i)
            peak = max(peak, step)
        return peak

    def ready(self, done: int) -> list[int]:
        return [i for i, needs in enumerate(self.needs) if not done >> i & 1 and not needs & ~done]

    def settle(self, done: int, live: int, peak: int) -> tuple[int, int, list[int]]:
        """Run every call that neither raises the peak nor leaves more alive than before.

        It costs nothing to have them first: what a call leaves minus what it frees only falls as
        more of the other readers of its inputs are done.
        """
        ran: list[int] = []
        again = True
        while again:
            again = False
            for i in self.ready(done):
                step, live_after, after = self.run(done, live, i)
                if step <= peak and live_after <= live:
                    done, live, again = after, live_after, True
                    ran.append(i)
        return done, live, ran

    def best_first(self, limit: int, work: int) -> tuple[tuple[int, ...] | None, bool]:
        """An order with a peak below `limit`, and whether the search came to its end."""
        origin: dict[int, tuple[int, list[int]]] = {}  # set => the one before, calls in between
        least: dict[int, int] = {}
        heap: list[tuple[int, int, int, int]] = []  # peak, calls to do, bytes alive, set

        def push(before: int, calls: list[int], done: int, live: int, peak: int) -> None:
            if peak >= limit:
                return
            done, live, more = self.settle(done, live, peak)
            if peak < least.get(done, limit):
                least[done] = peak
                origin[done] = (before, calls + more)
                heappush(heap, (peak, (self.everything & ~done).bit_count(), live, done))

        push(0, [], 0, self.start, max(self.start, self.bound))
        root = heap[0][3] if heap else 0
        while heap:
            peak, _, live, done = heappop(heap)
            if peak > least[done]:
                continue
            if done == self.everything:
                return self._trace(origin, done, root), True
            ready = self.ready(done)
            work -= len(self.needs) * (1 + len(ready))
            if work < 0:
                return None, False
            for i in ready:
                step, live_after, after = self.run(done, live, i)
                push(done, [i], after, live_after, max(peak, step))
        return None, True

    @staticmethod
    def _trace(
        origin: Mapping[int, tuple[int, list[int]]], done: int, root: int
    ) -> tuple[int, ...]:
        parts: list[list[int]] = []
        while done:
            before, calls = origin[done]
            parts.append(calls)
            if done == root:
                break
            done = before
        return tuple(i for calls in reversed(parts) for i in calls)

    def beam(self, limit: int, work: int) -> tuple[int, ...] | None:
        """An order with a peak below `limit`, if the beam finds one."""
        count = len(self.needs)
        width = max(4, min(256, work // max(1, count * count)))
        # set => peak, bytes alive, calls so far
        states: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (self.start, self.start, ())}
        for _ in range(count):
            grown: dict[int, tuple[int, int, tuple[int, ...]]] = {}
            for done, (peak, live, calls) in states.items():
                for i in self.ready(done):
                    step, live_after, after = self.run(done, live, i)
                    entry = (max(peak, step), live_after, (*calls, i))
                    if entry[0] < limit and (after not in grown or entry < grown[after]):
                        grown[after] = entry
            kept = sorted(grown.items(), key=lambda item: item[1])[:width]
            states = dict(kept)
        final = states.get(self.everything)
        return final[2] if final else None
