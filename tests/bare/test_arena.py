"""Arena plans: no two live buffers overlap, no heuristic is better, exact means exact."""

from __future__ import annotations

import random
from itertools import permutations, product

import pytest

from tvm_compress.bare.arena import (
    FITS,
    ORDERS,
    Lifetime,
    Share,
    _Problem,
    flash_shortage,
    plan,
    ram_shortage,
    rows_lead,
)


def random_lifetimes(seed: int, count: int, share: bool = True) -> list[Lifetime]:
    generator = random.Random(seed)
    steps = generator.randint(2, 8)
    lifetimes: list[Lifetime] = []
    for i in range(count):
        first = generator.randrange(steps)
        last = min(steps - 1, first + generator.choice([0, 0, 1, 1, 2, 4]))
        sources = [x for x in lifetimes if x.last == first]
        shares: tuple[Share, ...] = ()
        if share and sources and generator.random() < 0.7:
            chosen = generator.sample(sources, min(len(sources), generator.randint(1, 2)))
            shares = tuple(Share(x.name, generator.choice([0, 0, 1, 3, 8])) for x in chosen)
        size = generator.choice([0, 1, 2, 3, 4, 5, 6, 8, 12, 17])
        alignment = generator.choice([1, 1, 2, 4])
        lifetimes.append(Lifetime(f"t{i}", size, first, last, alignment, shares))
    generator.shuffle(lifetimes)
    return lifetimes


def apart(a: Lifetime, at_a: int, b: Lifetime, at_b: int) -> bool:
    """Whether a and b may lie there, from the definition, by no formula of the planner."""
    if a.last < b.first or b.last < a.first or not a.bytes or not b.bytes:
        return True
    if at_a + a.bytes <= at_b or at_b + b.bytes <= at_a:
        return True
    for output, at_output, source, at_source in ((a, at_a, b, at_b), (b, at_b, a, at_a)):
        if source.last == output.first:
            for share in output.may_share_with:
                if share.name == source.name and at_output + share.lead_bytes <= at_source:
                    return True
    return False


def valid(lifetimes: list[Lifetime], offsets: dict[str, int]) -> bool:
    return all(
        offsets[x.name] >= 0 and offsets[x.name] % x.alignment == 0 for x in lifetimes
    ) and all(
        apart(a, offsets[a.name], b, offsets[b.name])
        for i, a in enumerate(lifetimes)
        for b in lifetimes[:i]
    )


def brute_force(lifetimes: list[Lifetime], above: int) -> int:
    """The least arena, by trying every offset of every buffer, up to the size `above`."""
    buffers = sorted((x for x in lifetimes if x.bytes), key=lambda x: -x.bytes)

    def fits(size: int, placed: list[tuple[Lifetime, int]]) -> bool:
        if len(placed) == len(buffers):
            return True
        new = buffers[len(placed)]
        return any(
            all(apart(new, at, old, there) for old, there in placed)
            and fits(size, [*placed, (new, at)])
            for at in range(0, size - new.bytes + 1, new.alignment)
        )

    largest = max((x.bytes for x in buffers), default=0)
    return next(size for size in range(largest, above + 1) if fits(size, []))


@pytest.mark.parametrize("seed", range(30))
def test_exact_equals_brute_force(seed: int) -> None:
    lifetimes = random_lifetimes(seed, 3 + seed % 4)
    found = plan(lifetimes)
    assert valid(lifetimes, found.offsets)
    assert found.is_optimal
    assert found.bytes == brute_force(lifetimes, found.bytes)
    assert found.bound_bytes <= found.bytes


def test_search_alone_equals_brute_force() -> None:
    """From the worst start: heuristics that reach the optimum must not hide a faulty search."""
    from tvm_compress.bare.arena import _search

    improved = 0
    for seed in range(60):
        lifetimes = random_lifetimes(1000 + seed, 3 + seed % 4)
        problem = _Problem(lifetimes)
        start, stack = 0, []
        for life in problem.buffers:
            start = -(-start // life.alignment) * life.alignment
            stack.append(start)
            start += life.bytes
        offsets, proved = _search(problem, stack, 10**6)
        assert proved
        named = {x.name: 0 for x in lifetimes} | {
            x.name: at for x, at in zip(problem.buffers, offsets, strict=True)
        }
        assert valid(lifetimes, named)
        assert problem.top(offsets) == brute_force(lifetimes, problem.top(offsets))
        improved += problem.top(offsets) < problem.top(stack)
    assert improved > 30


@pytest.mark.parametrize("seed", range(20))
def test_never_above_any_single_heuristic(seed: int) -> None:
    lifetimes = random_lifetimes(seed, 25)
    found = plan(lifetimes, improve_work=5_000, exact_nodes=500)
    assert valid(lifetimes, found.offsets)
    problem = _Problem(lifetimes)
    singles = [
        problem.top(problem.place_all(order(problem), fit))
        for order, fit in product(ORDERS.values(), FITS.values())
    ]
    assert found.bound_bytes <= found.bytes <= min(singles)
    assert found.bytes == min(found.tried.values()) == found.tried[found.heuristic]
    assert found.bytes == max(found.offsets[x.name] + x.bytes for x in lifetimes if x.bytes)
    again = plan(lifetimes, improve_work=5_000, exact_nodes=500)
    assert again == found


def test_every_heuristic_is_valid_alone() -> None:
    for seed in range(30):
        lifetimes = random_lifetimes(seed, 20)
        problem = _Problem(lifetimes)
        for order, fit in product(ORDERS.values(), FITS.values()):
            offsets = problem.place_all(order(problem), fit)
            named = {x.name: 0 for x in lifetimes} | {
                x.name: at for x, at in zip(problem.buffers, offsets, strict=True)
            }
            assert valid(lifetimes, named)


def simulate(lead: int, rows: int, wide_out: int, wide_in: int, stride: int, padding: int) -> bool:
    """Whether a row kernel, run in one array, never reads an input row that it has written over."""
    height = (rows - 1) * stride + 1
    memory: list[object] = [None] * (lead + max(height * wide_in, rows * wide_out) + 1)
    for row in range(height):
        memory[lead + row * wide_in : lead + (row + 1) * wide_in] = [("in", row)] * wide_in
    for row in range(rows):
        needed = range(max(0, row * stride - padding), min(height, row * stride + padding + 1))
        for column in range(wide_out):
            memory[row * wide_out + column] = ("out", row)
            # Rows are made as a whole: the last byte may still need all of the input rows.
            for r in needed:
                at = lead + r * wide_in
                if any(cell != ("in", r) for cell in memory[at : at + wide_in]):
                    return False
    return True


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize(("wide_in", "wide_out"), [(3, 3), (2, 5), (5, 2), (4, 8), (1, 1)])
def test_rows_lead_is_the_least_safe_one(
    stride: int, padding: int, wide_in: int, wide_out: int
) -> None:
    rows = 6
    lead = rows_lead(rows, wide_out, wide_in, stride, padding)
    assert simulate(lead, rows, wide_out, wide_in, stride, padding)
    assert lead == 0 or not simulate(lead - 1, rows, wide_out, wide_in, stride, padding)


def test_rows_lead_of_common_kernels() -> None:
    assert rows_lead(64, 16, 16) == 16  # 1x1: one pixel
    assert rows_lead(32, 512, 512, padding=1) == 1024  # 3x3: two rows
    assert rows_lead(32, 512, 512, padding=1, held_rows=2) == 0
    assert rows_lead(16, 512, 1024, stride=2) == 512  # pooling
    assert rows_lead(4, 100, 1) == 397
    assert rows_lead(1, 7, 3, padding=1) == 7


# Int8 activations, NHWC, of the networks in MLPerf Tiny.
def chain(sizes: list[int], shares: dict[int, int] | None = None) -> list[Lifetime]:
    shares = shares or {}
    return [
        Lifetime(
            f"t{i}",
            size,
            max(0, i - 1),
            min(i, len(sizes) - 2),
            may_share_with=(Share(f"t{i - 1}", shares[i]),) if i in shares else (),
        )
        for i, size in enumerate(sizes)
    ]


RESNET8 = [
    # name, bytes, first, last
    Lifetime("image", 3072, 0, 0),
    Lifetime("stem", 16384, 0, 3),
    Lifetime("a1", 16384, 1, 2),
    Lifetime("a2", 16384, 2, 3, may_share_with=(Share("a1", rows_lead(32, 512, 512, 1, 1)),)),
    Lifetime("a", 16384, 3, 6, may_share_with=(Share("stem"), Share("a2"))),
    Lifetime("b1", 8192, 4, 5),
    Lifetime("b2", 8192, 5, 7),
    Lifetime("b_skip", 8192, 6, 7),
    Lifetime("b", 8192, 7, 10, may_share_with=(Share("b2"), Share("b_skip"))),
    Lifetime("c1", 4096, 8, 9),
    Lifetime("c2", 4096, 9, 11),
    Lifetime("c_skip", 4096, 10, 11),
    Lifetime("c", 4096, 11, 12, may_share_with=(Share("c2"), Share("c_skip"))),
    Lifetime("pooled", 64, 12, 13),
    Lifetime("logits", 10, 13, 14),
    Lifetime("classes", 10, 14, 14),
]


def without_shares(lifetimes: list[Lifetime]) -> list[Lifetime]:
    return [Lifetime(x.name, x.bytes, x.first, x.last, x.alignment) for x in lifetimes]


def test_resnet8() -> None:
    apart_plan, shared = plan(without_shares(RESNET8)), plan(RESNET8)
    # Three 32x32x16 tensors with everything apart; two and two rows of 512 bytes with in-place.
    assert (apart_plan.bytes, apart_plan.peak_step) == (3 * 16384, 2)
    assert shared.bytes == 2 * 16384 + 1024
    assert shared.is_optimal and valid(RESNET8, shared.offsets)


def test_ds_cnn() -> None:
    block = 25 * 5 * 64
    sizes = [490, *[block] * 9, 64, 12]
    assert plan(chain(sizes)).bytes == 2 * block
    # Depthwise and pointwise write over their inputs. Leads add up: 4 x (two rows + a pixel).
    leads = [rows_lead(25, 320, 320, padding=1), rows_lead(125, 64, 64)]
    drifting = plan(chain(sizes, {i: leads[i % 2] for i in range(2, 10)}))
    assert drifting.bytes == block + 4 * (640 + 64)
    # Not so with two rows (a pixel) held back in a workspace.
    held = [rows_lead(25, 320, 320, padding=1, held_rows=2), rows_lead(125, 64, 64, held_rows=1)]
    tensors = chain(sizes, {i: held[i % 2] for i in range(2, 10)})
    workspaces = [Lifetime(f"w{i}", (640, 64)[i % 2], i - 1, i - 1) for i in range(2, 10)]
    found = plan([*tensors, *workspaces])
    assert (found.bytes, found.is_optimal) == (block + 640, True)


def test_stops_at_the_bound_and_names_the_winner() -> None:
    found = plan(chain([100, 200, 50]))
    assert found.bytes == found.bound_bytes
    assert list(found.tried) == ["by size, lowest gap"] == [found.heuristic]


def test_where_every_simple_order_fails() -> None:
    winners = []
    for seed in range(60):
        found = plan(random_lifetimes(seed, 9, share=False))
        assert found.is_optimal
        winners.append(found.heuristic)
    assert winners.count("exact search") >= 5
    assert len(set(winners)) >= 4  # no order is there for nothing


def test_improving_an_order_finds_what_the_simple_ones_miss() -> None:
    better = 0
    for seed in range(12):
        found = plan(random_lifetimes(seed, 30, share=False), improve_work=20_000, exact_nodes=0)
        better += found.heuristic == "improved order"
    assert better >= 3


def test_workspaces_count() -> None:
    tensors = chain([64, 64, 64])
    workspace = Lifetime("conv.workspace", 1000, 1, 1)
    found = plan([*tensors, workspace])
    assert (found.bytes, found.peak_step) == (1000 + 128, 1)
    assert found.alive(1)[0] is workspace


def test_a_source_that_lives_on_is_not_written_over() -> None:
    a = Lifetime("a", 64, 0, 2)
    b = Lifetime("b", 64, 1, 2, may_share_with=(Share("a"),))
    assert plan([a, b]).bytes == 128


def test_empty_and_single() -> None:
    assert plan([]).bytes == 0
    assert plan([Lifetime("a", 0, 0, 0)]).offsets == {"a": 0}
    only = plan([Lifetime("a", 7, 0, 3, alignment=8)])
    assert (only.bytes, only.alignment, only.is_optimal) == (7, 8, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lifetime("a", -1, 0, 0), "a: -1 bytes"),
        (lambda: Lifetime("a", 1, 2, 1), "steps 2 to 1"),
        (lambda: Lifetime("a", 1, 0, 0, alignment=12), "alignment 12"),
        (lambda: Lifetime("a", 1, 0, 0, may_share_with=(Share("b", -2),)), "-2 bytes over b"),
        (lambda: plan([Lifetime("a", 1, 0, 0), Lifetime("a", 1, 0, 0)]), "2 buffers are called a"),
        (lambda: plan([Lifetime("a", 1, 0, 0, may_share_with=(Share("b"),))]), "no such one"),
    ],
)
def test_bad_lifetimes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_shortage_of_ram() -> None:
    arena = plan(chain([48, 108, 64]))
    steps = ["conv1", "conv2"]
    assert arena.bytes == 172
    assert ram_shortage("nucleo", arena, steps, 172) is None
    assert ram_shortage("nucleo", arena, steps, None) is None
    message = ram_shortage("nucleo", arena, steps, 171)
    assert message is not None and "172 bytes of RAM, 1 more than the 171" in message
    assert "the peak is at conv2 (step 2 of 2)" in message and "t1 108, t2 64" in message


def test_shortage_of_flash() -> None:
    layers = {"conv1": 10, "conv2": 30}
    assert flash_shortage("nucleo", layers, 5, 45) is None
    assert flash_shortage("nucleo", layers, 5, None) is None
    assert flash_shortage("nucleo", layers, 5, 44) == (
        "the model does not fit nucleo: it needs 45 bytes of flash, 1 more than the 44 there are; "
        "the largest layers in bytes: conv2 30, conv1 10"
    )
    message = flash_shortage("nucleo", layers, 0, 39)
    assert message is not None and "40 bytes of flash for its weights alone, 1 more" in message


def test_permutations_of_the_list_do_not_matter_for_small_graphs() -> None:
    lifetimes = random_lifetimes(7, 5)
    sizes = {plan(list(order)).bytes for order in permutations(lifetimes)}
    assert len(sizes) == 1
