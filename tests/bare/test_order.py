"""Orders of kernel calls: never worse than the given one, exact against all orders."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tvm_compress.bare.arena import plan
from tvm_compress.bare.order import (
    Graph,
    InPlace,
    Operator,
    _Search,
    best_order,
    given_order,
    lifetimes,
    plan_graph,
)


def random_graph(seed: int, count: int) -> Graph:
    generator = random.Random(seed)
    tensors = {"x": generator.randint(1, 20), "y": generator.randint(1, 20)}
    operators = []
    for i in range(count):
        known = list(tensors)
        inputs = generator.sample(known[-5:], min(len(known), generator.choice([1, 1, 2, 2, 3])))
        written = [f"t{i}"] + ([f"u{i}"] if generator.random() < 0.2 else [])
        tensors.update({name: generator.randint(0, 20) for name in written})
        in_place = tuple(
            InPlace(written[0], name, generator.choice([0, 0, 2]))
            for name in inputs
            if generator.random() < 0.4
        )
        workspace = generator.choice([0, 0, 5, 10])
        constants = ("weights",) if generator.random() < 0.5 else ()
        operators.append(
            Operator(f"op{i}", (*inputs, *constants), tuple(written), workspace, in_place)
        )
    outputs = (f"t{count - 1}", generator.choice(list(tensors)))
    return Graph(tensors, tuple(operators), ("x", "y"), outputs)


def peak_by_definition(graph: Graph, order: tuple[int, ...]) -> int:
    """Bytes alive in the worst step: needed later, read or written now, or kept to the end."""
    peak = 0
    read = {name for operator in graph.operators for name in operator.inputs}
    kept = set(graph.outputs) | set(graph.inputs) - read
    written = set(graph.inputs)
    for step, index in enumerate(order):
        operator = graph.operators[index]
        assert all(name in written or name not in graph.tensors for name in operator.inputs)
        later = {n for i in order[step + 1 :] for n in graph.operators[i].inputs} | kept
        alive = {n for n in written if n in later or n in operator.inputs} | set(operator.outputs)
        written |= set(operator.outputs)
        total = sum(graph.tensors.get(n, 0) for n in alive) + operator.workspace_bytes
        for output in operator.outputs:
            common = sum(
                min(graph.tensors[p.source], max(0, graph.tensors[output] - p.lead_bytes))
                for p in operator.in_place
                if p.output == output and p.source not in later
            )
            total -= min(common, graph.tensors[output])
        peak = max(peak, total)
    return peak


def all_orders(graph: Graph) -> Iterator[tuple[int, ...]]:
    writer = {name: i for i, op in enumerate(graph.operators) for name in op.outputs}
    needs = [{writer[n] for n in op.inputs if n in writer} for op in graph.operators]

    def extend(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(order) == len(needs):
            yield order
        for i in range(len(needs)):
            if i not in order and needs[i] <= set(order):
                yield from extend((*order, i))

    return extend(())


@pytest.mark.parametrize("seed", range(60))
def test_exact_equals_all_orders(seed: int) -> None:
    graph = random_graph(seed, 3 + seed % 5)
    found = best_order(graph)
    least = min(peak_by_definition(graph, order) for order in all_orders(graph))
    assert found.is_optimal
    assert found.peak_bytes == least == peak_by_definition(graph, found.indices)
    assert found.given_peak_bytes == peak_by_definition(graph, tuple(range(len(graph.operators))))


def test_some_of_these_graphs_gain() -> None:
    found = [best_order(random_graph(seed, 3 + seed % 5)) for seed in range(60)]
    assert sum(order.peak_bytes < order.given_peak_bytes for order in found) >= 10
    for order in found:
        if order.peak_bytes == order.given_peak_bytes:  # nothing is moved for nothing
            assert order.method == "as given"
            assert list(order.indices) == sorted(order.indices)


@pytest.mark.parametrize("seed", range(30))
def test_beam_is_valid_and_never_worse(seed: int) -> None:
    graph = random_graph(seed, 12)
    exact, beam = best_order(graph), best_order(graph, search_work=0)
    assert exact.is_optimal
    assert beam.method in ("as given", "beam search")
    assert exact.peak_bytes <= beam.peak_bytes <= beam.given_peak_bytes
    assert beam.peak_bytes == peak_by_definition(graph, beam.indices)
    assert sorted(beam.indices) == list(range(12))


def test_beam_finds_what_there_is_in_most() -> None:
    graphs = [random_graph(seed, 12) for seed in range(30)]
    gains = [g for g in graphs if best_order(g).peak_bytes < given_order(g).peak_bytes]
    found = [g for g in gains if best_order(g, search_work=0).method == "beam search"]
    assert len(found) >= 0.9 * len(gains) > 5


def test_a_narrow_beam_is_honest() -> None:
    graph = random_graph(3, 14)
    narrow = best_order(graph, search_work=0, beam_work=1)
    assert narrow.peak_bytes <= narrow.given_peak_bytes


@pytest.mark.parametrize("seed", range(30))
def test_the_peak_is_the_bound_of_the_arena(seed: int) -> None:
    graph = random_graph(seed, 10)
    order = best_order(graph)
    arena = plan(lifetimes(graph, order.indices, 1), improve_work=2_000, exact_nodes=2_000)
    assert arena.bound_bytes == order.peak_bytes


@pytest.mark.parametrize("seed", range(20))
def test_plan_graph_is_no_worse_than_the_given_order(seed: int) -> None:
    graph = random_graph(seed, 8)
    best, given = plan_graph(graph, 4), plan_graph(graph, 4, reorder=False)
    assert best.arena.bytes <= given.arena.bytes
    assert given.steps == tuple(operator.name for operator in graph.operators)
    assert sorted(best.steps) == sorted(given.steps)
    assert best.steps == tuple(graph.operators[i].name for i in best.order.indices)


def test_residual_block() -> None:
    """The short cut is better taken after the wide tensor of the main path has gone."""
    kb = 1024
    tensors = {"x": 16 * kb, "skip": 8 * kb, "wide": 40 * kb, "narrow": 2 * kb, "y": 8 * kb}
    skip = Operator("conv_skip", ("x", "w3"), ("skip",))
    expand = Operator("expand", ("x", "w1"), ("wide",))
    project = Operator("project", ("wide", "w2"), ("narrow",))
    add = Operator("add", ("narrow", "skip"), ("y",), in_place=(InPlace("y", "skip"),))
    found = plan_graph(Graph(tensors, (skip, expand, project, add), ("x",), ("y",)))
    assert (found.order.given_peak_bytes, found.order.peak_bytes) == (64 * kb, 58 * kb)
    assert found.steps == ("expand", "project", "conv_skip", "add")
    assert found.arena.bytes == 58 * kb
    assert found.arena.offsets["y"] == found.arena.offsets["skip"]


def test_inception_like_branches() -> None:
    """Branches whose first tensors are large and whose results are small: one after the other."""
    operators = []
    tensors = {"x": 100}
    for level in ("wide", "narrow"):  # given level by level, which holds all the wide ones
        for b in range(4):
            source = "x" if level == "wide" else f"wide{b}"
            tensors[f"{level}{b}"] = 1000 if level == "wide" else 10
            operators.append(Operator(f"{level}_op{b}", (source,), (f"{level}{b}",)))
    tensors["y"] = 40
    operators.append(Operator("concat", tuple(f"narrow{b}" for b in range(4)), ("y",)))
    found = plan_graph(Graph(tensors, tuple(operators), ("x",), ("y",)), alignment=1)
    assert found.order.given_peak_bytes == 4 * 1000 + 100
    assert found.order.peak_bytes == found.arena.bytes == 1000 + 100 + 3 * 10
    assert found.order.is_optimal and found.arena.is_optimal


def test_a_long_chain_and_many_branches_end_soon() -> None:
    chain = [Operator(f"op{i}", (f"t{i}",), (f"t{i + 1}",)) for i in range(400)]
    sizes = {f"t{i}": 100 + i % 7 for i in range(401)}
    assert best_order(Graph(sizes, tuple(chain), ("t0",), ("t400",))).is_optimal
    fan = [Operator(f"op{i}", ("x",), (f"t{i}",)) for i in range(40)]
    join = Operator("join", tuple(f"t{i}" for i in range(40)), ("y",))
    sizes = {"x": 50, "y": 5} | {f"t{i}": 3 + i for i in range(40)}
    graph = Graph(sizes, (*fan, join), ("x",), ("y",))
    assert best_order(graph).peak_bytes == sum(3 + i for i in range(40)) + 50


def test_inputs_that_the_caller_owns_are_not_counted() -> None:
    operators = (Operator("a", ("x",), ("t",)), Operator("b", ("t",), ("y",)))
    graph = Graph({"t": 64}, operators, ("x",), ("y",))
    assert plan_graph(graph).arena.offsets == {"t": 0}


def test_workspaces_are_named_after_their_call() -> None:
    graph = Graph({"x": 1, "t": 2}, (Operator("conv", ("x",), ("t",), 100),), ("x",), ("t",))
    found = plan_graph(graph)
    assert found.arena.offsets.keys() == {"x", "t", "conv.workspace"}


def test_empty() -> None:
    assert plan_graph(Graph({}, ())).arena.bytes == 0


@pytest.mark.parametrize(
    ("operators", "tensors", "message"),
    [
        ((Operator("a", ("t",), ("u",)),), {"t": 1, "u": 1}, "a reads t before it is written"),
        ((Operator("a", (), ("x",)),), {"x": 1}, "a writes x, which exists already"),
        ((), {"lost": 1}, "nothing writes lost"),
    ],
)
def test_bad_graphs(operators: tuple[Operator, ...], tensors: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(tensors, operators, ("x",))


def test_settling_early_changes_no_optimum() -> None:
    """The shortcut of the search against the search without it."""

    class Plain(_Search):
        def settle(self, done: int, live: int, peak: int) -> tuple[int, int, list[int]]:
            return done, live, []

    for seed in range(40):
        graph = random_graph(100 + seed, 9)
        quick, slow = _Search(graph), Plain(graph)
        limit = quick.peak(range(9))
        found, plain = quick.best_first(limit, 10**9)[0], slow.best_first(limit, 10**9)[0]
        assert (found is None) == (plain is None)
        if found is not None and plain is not None:
            assert quick.peak(found) == quick.peak(plain)
