"""Costs of layers on a target: what is asked, in which dtypes, and how figures are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress import kernel_bench, schedules
from tvm_compress.bare.compile import compile_kernel
from tvm_compress.errors import ArtefactError
from tvm_compress.flow import compress_job, load_job
from tvm_compress.kernel_bench import Kernel, LocalBench, bench_of
from tvm_compress.kernel_cache import KernelCache
from tvm_compress.layer_costs import TargetCosts
from tvm_compress.progress import Progress
from tvm_compress.recipe import Recipe, Step, dump_recipe, parse_recipe
from tvm_compress.relay_passes.costs import COUNTED, MEASURED, PREDICTED, Cost, LayerUse
from tvm_compress.relay_passes.low_rank import read_low_rank
from tvm_compress.relay_passes.low_rank_config import LowRankConfig, Rank
from tvm_compress.relay_passes.numerics.sparsity_pattern import Block
from tvm_compress.relay_passes.quantize_config import QuantizeConfig
from tvm_compress.relay_passes.sparse_choices import read_choices
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.schedules import Conv2dSpec, MatmulSpec, SparseConv2dSpec
from tvm_compress.schedules.stored_weight import STORED, WORD, StoredWeight, encode
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from .relay_passes.floats import Net, build, samples

X86 = get_target("x86-64-v3")
CONV = Conv2dSpec(
    batch=1, height=6, width=6, in_channels=8, out_channels=32, kernel=(3, 3),
    padding=(1, 1, 1, 1),
)  # fmt: skip
LINEAR = MatmulSpec(rows=1, in_features=64, out_features=48)


class FakeBench:
    """Costs by a rule; remembers what it was asked."""

    unit = MEASURED

    def __init__(self, sparse: float = 1.0, dense: float = 2.0) -> None:
        self.sparse, self.dense = sparse, dense
        self.asked: list[list[Any]] = []

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        self.asked.append([kernel.spec for kernel in kernels])
        is_sparse = [isinstance(kernel.spec, SparseConv2dSpec) for kernel in kernels]
        return [self.sparse if found else self.dense for found in is_sparse]


class NoBench:
    """Must not be asked."""

    unit = MEASURED

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        raise AssertionError(f"{len(kernels)} kernels were run again")


def kept(spec: Any, share: float = 0.1, block: int = 16) -> np.ndarray:
    """[groups, K, N] in blocks of outputs."""
    shape = (spec.groups_of_channels, spec.reduction_size, -(-spec.columns // block))
    found = np.random.default_rng(0).random(shape) < share
    return found.repeat(block, axis=2)[..., : spec.columns]


@pytest.mark.parametrize("spec", [CONV, LINEAR])
def test_a_sparse_layer_is_compared_with_its_dense_kernel(spec: Any) -> None:
    bench = FakeBench()
    found = TargetCosts(X86, bench).sparse("a", spec, kept(spec))
    assert found.sparse is not None and found.pays
    cost = found.sparse.cost
    assert (cost.time, cost.unit) == (1.0, MEASURED)
    assert found.dense == Cost(2.0, 4 * spec.reduction_size * spec.columns, MEASURED)
    assert 0 < cost.bytes < found.dense.bytes
    (asked,) = bench.asked
    assert asked[0].macs == spec.macs and not isinstance(asked[0], SparseConv2dSpec)
    *sparse, decoding, call = asked[1:]
    assert all(isinstance(item, SparseConv2dSpec) for item in sparse) and sparse
    assert isinstance(decoding, StoredWeight) and found.stored is not None
    assert isinstance(call, StoredWeight) and call.size == WORD < decoding.size


class DecodingBench(FakeBench):
    """Sparse kernels are twice as slow as dense ones, decoding takes `share` of these and the time
    of a call."""

    def __init__(self, share: float, call: float = 0.25) -> None:
        super().__init__(sparse=2.0, dense=1.0)
        self.share, self.call = share, call

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        found = super().costs(kernels)
        for place, kernel in enumerate(kernels):
            if isinstance(kernel.spec, StoredWeight):
                found[place] = self.call + (self.share if kernel.spec.size > WORD else 0.0)
        return found


def test_zeros_that_no_kernel_skips_are_left_out_of_memory() -> None:
    spec = CONV.replace(kernel=(1, 1), padding=(0, 0, 0, 0), in_channels=64)
    for share, pays in ((0.02, True), (0.09, True), (0.2, False)):
        found = TargetCosts(X86, DecodingBench(share)).sparse("a", spec, kept(spec, 0.5, 1))
        assert not found.pays and found.storing_pays == pays
        # The call's time is in the dense kernel's already.
        assert found.stored is not None and found.stored.cost.time == pytest.approx(1 + share)
        # A bit for each weight, and half of the weights.
        assert found.stored.cost.bytes / found.dense.bytes == pytest.approx(0.5 + 1 / 32, abs=0.03)
    full = TargetCosts(X86, DecodingBench(0.02)).sparse("a", spec, kept(spec, 0.95, 1))
    assert full.stored is None and not full.storing_pays


def test_forms_that_skip_nothing_are_no_reason_for_zeros() -> None:
    scattered = kept(CONV, 0.9, 1)  # of 16 outputs one has nearly every input
    for bench in (FakeBench(sparse=0.5, dense=1.0), None):
        found = TargetCosts(X86, bench).sparse("a", CONV, scattered)
        assert found.sparse is None or found.sparse.form.block < 16


def test_smaller_ones_may_be_a_little_slower() -> None:
    for ratio, pays in ((0.99, True), (1.05, True), (1.2, False)):
        costs = TargetCosts(X86, FakeBench(sparse=ratio, dense=1.0))
        found = costs.sparse("a", CONV, kept(CONV))
        assert found.pays == pays, ratio
        assert f"{ratio:.2f}x" in found.words and "measured" in found.words
    no_form = TargetCosts(X86).sparse("a", CONV, np.ones((1, 72, 32), bool))
    assert no_form.sparse is None and not no_form.pays


def test_kernels_are_of_the_integers_that_ship() -> None:
    costs = TargetCosts(X86, bench := FakeBench())
    costs.schemes = {"a": QuantizeConfig(), "only": QuantizeConfig(activations=None)}
    halves = [CONV.replace(out_channels=8), CONV.replace(in_channels=8, kernel=(1, 1))]
    for layer in ("a", "a_part1", "b", "only"):
        costs.totals([[LayerUse(layer, spec) for spec in chain] for chain in ([CONV], halves)])
    dtypes = [{(spec.data_dtype, spec.weight_dtype) for spec in asked} for asked in bench.asked]
    # `a_part1` is the same comparison as `a`, `only` the same as `b`.
    assert dtypes == [{("uint8", "int8")}, {("float32", "float32")}]


def test_alternatives_are_sums_over_their_kernels() -> None:
    costs = TargetCosts(X86, FakeBench(dense=3.0))
    both = [LayerUse("a", CONV), LayerUse("b", LINEAR, calls=3)]
    chains: list[list[LayerUse]] = [both[:1], both, []]
    found = costs.totals(chains)
    assert [total.time for total in found] == [3.0, 12.0, 0.0]
    # A weight is stored once, however often it is used.
    sizes = [4 * spec.reduction_size * spec.columns for spec in (CONV, LINEAR)]
    assert [total.bytes for total in found] == [sizes[0], sum(sizes), 0]


def test_without_a_bench_costs_are_predicted() -> None:
    costs = TargetCosts(X86)
    halved = CONV.replace(out_channels=16)
    whole, half = costs.totals([[LayerUse("a", CONV)], [LayerUse("a", halved)]])
    assert half.is_faster(whole) and half.is_smaller(whole)
    found = costs.sparse("a", CONV, kept(CONV))
    assert found.dense.unit == costs.unit == PREDICTED and found.pays
    assert not costs.used


def test_a_bench_that_fails_is_said_and_predicted() -> None:
    class Broken(NoBench):
        def costs(self, kernels: Sequence[Kernel]) -> list[float]:
            raise ArtefactError("no board")

    class Notes(Progress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, message: str) -> None:
            self.lines.append(message)

    notes = Notes()
    found = TargetCosts(X86, Broken(), progress=notes).sparse("a", CONV, kept(CONV))
    assert found.dense.unit == PREDICTED
    assert notes.lines == ["a: its cost is predicted: no board"]


def test_figures_are_kept_for_the_next_run(tmp_path: Path) -> None:
    first = TargetCosts(X86, bench := FakeBench(), cache=KernelCache(tmp_path))
    one, two = (first.sparse("a", CONV, kept(CONV)) for _ in range(2))
    assert one == two and len(bench.asked) == 1
    other = kept(CONV, share=0.2)
    again = TargetCosts(X86, fresh := FakeBench(), cache=KernelCache(tmp_path))
    assert again.sparse("b", CONV, kept(CONV)) == one and not fresh.asked
    again.sparse("b", CONV, other)
    assert len(fresh.asked) == 1  # another number of weights is another comparison
    known = TargetCosts(X86, None, known=again.used)
    assert known.sparse("c", CONV, kept(CONV)) == one  # from a recipe, where nothing runs


def test_blocks_are_those_of_the_kernels() -> None:
    costs = TargetCosts(X86)
    assert 16 in costs.blocks("a", CONV)
    assert costs.blocks("dw", CONV.replace(groups=8, out_channels=8)) is not None


def test_the_machine_at_hand_is_measured() -> None:
    host = get_target("host")
    bench = bench_of(host)
    assert isinstance(bench, LocalBench)
    few = Kernel(*packed(LINEAR))
    many = Kernel(*packed(LINEAR.replace(rows=256)))
    small, large = bench.costs([few, many])
    assert 0 < small < large


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is compared with; weights are its arguments."""
    built: list[int] = []
    schedule = schedules.schedule

    def counted(func: Any, target: Any) -> Any:
        built.append(1)
        return schedule(func, target)

    monkeypatch.setattr(schedules, "schedule", counted)
    bench = LocalBench(get_target("host"))
    first, other, third = (packed(LINEAR.replace(rows=rows)) for rows in (1, 2, 3))
    bench.costs([Kernel(*first), Kernel(*other)])
    assert len(built) == 2
    weight = (np.zeros_like(first[1][0]),)
    assert all(cost > 0 for cost in bench.costs([Kernel(first[0], weight), Kernel(*third)]))
    assert len(built) == 3
    # All weights that are alike are decoded by one function.
    shapes = (64, 64), (32, 128), (8, 16, 32)
    decoded = [encode(np.eye(64, dtype=np.float32).reshape(shape)) for shape in shapes]
    bench.costs([Kernel(stored, tuple(arrays)) for stored, arrays in decoded])
    assert len(built) == 5


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """May be called a single time."""
    calls = []

    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        assert len(calls) == 1
        return function(*arguments)

    return called


def test_instructions_are_counted_where_there_is_an_emulator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = get_target("cortex-m3")
    if missing_tools(board):
        pytest.skip("needs the cross compiler and QEMU of Cortex-M")
    bench = bench_of(board)
    assert bench is not None and bench.unit == COUNTED
    integer = LINEAR.replace(data_dtype="int8", weight_dtype="int8", acc_dtype="int32")
    # A layer of many rows is cut, and the count stands for all of them.
    rows = (1, 2, 1024)
    one, two, many = bench.costs([Kernel(*packed(integer.replace(rows=n))) for n in rows])
    assert one < two < 3 * one
    assert many == pytest.approx(512 * two, rel=0.2)
    kernels = [Kernel(*packed(integer.replace(rows=n))) for n in (2, 5)]
    monkeypatch.setattr("tvm_compress.bare.compile.compile_kernel", once(compile_kernel))
    assert bench.costs(kernels)[0] == two  # compiled before


def packed(spec: Any) -> tuple[Any, tuple[np.ndarray, ...]]:
    return spec, (np.ones(spec.weight_shape, spec.weight_storage_dtype),)


# --- through the flow ---------------------------------------------------------------------------


def network(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 32)
    return net.conv_relu("b", x, 32, kernel=1)


def recipe(**fields: Any) -> Recipe:
    config = SparsifyConfig(0.8, Block(16), "magnitude", reconstruct=False)
    return Recipe((Step("sparsify", config),), **fields)


def choices(module: tvm.IRModule, chosen: Recipe, monkeypatch: Any, bench: Any) -> tuple[Any, Any]:
    monkeypatch.setattr("tvm_compress.kernel_bench.bench_of", lambda _target: bench)
    job = load_job(module, chosen, "x86-64-v3", None)
    compressed = compress_job(job, Progress())
    return read_choices(compressed["main"], job.target.name), job.costs.used


def test_a_recipe_decides_again_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(network, (1, 16, 8, 8))
    monkeypatch.setattr(KernelCache, "get", lambda *_: None)
    monkeypatch.setattr(KernelCache, "put", lambda *_: None)
    found, used = choices(module, recipe(), monkeypatch, FakeBench(sparse=1.0))
    assert set(found) == {"a", "b"} and all(choice.form for choice in found.values())
    written = parse_recipe(dump_recipe(recipe().replace(costs=used)))
    again, same = choices(module, written, monkeypatch, NoBench())
    assert again == found and same == used
    slower, _ = choices(module, recipe(), monkeypatch, DecodingBench(0.2))
    assert not slower  # went back before any zero was written
    smaller, _ = choices(module, recipe(), monkeypatch, DecodingBench(0.05))
    assert {choice.form for choice in smaller.values()} == {STORED}
    insisted = Recipe(
        (Step("sparsify", SparsifyConfig(0.8, Block(16), "magnitude", reconstruct=False,
                                         insist=True)),)
    )  # fmt: skip
    kept_anyway, _ = choices(module, insisted, monkeypatch, FakeBench(sparse=9.0))
    assert {choice.form != "" for choice in kept_anyway.values()} == {True}
    assert all("insisted on" in choice.reason for choice in kept_anyway.values())


class NarrowBench(FakeBench):
    """Parts of the layer below: in bytes each is as slow as the layer, in floats a fifth of it."""

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        self.asked.append([kernel.spec for kernel in kernels])
        found = []
        for kernel in kernels:
            spec: Any = kernel.spec
            is_whole = spec.macs == 8 * 8 * 16 * 9 * 32
            found.append(10.0 if is_whole or spec.data_dtype != "float32" else 2.0)
        return found


def test_parts_are_compared_in_the_integers_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that gains in float32 and loses in int8 is a loss where the layer ships in int8."""
    split = Step("lowrank", LowRankConfig(rank=Rank(8), data_aware=False))
    module = build(lambda net, x: net.conv_relu("a", x, 32), (1, 16, 8, 8))
    monkeypatch.setattr("tvm_compress.kernel_bench.bench_of", lambda _target: NarrowBench())
    monkeypatch.setattr(KernelCache, "get", lambda *_: None)
    monkeypatch.setattr(KernelCache, "put", lambda *_: None)
    data = [{"x": array} for array in samples(module, count=4)]
    notes = []
    for steps in ((split,), (split, Step("quantize", QuantizeConfig()))):
        job = load_job(module, Recipe(steps), "x86-64-v3", data)
        notes.append(read_low_rank(compress_job(job, Progress()))["a"])
    assert notes[0] == "channels, rank 8 of 32"
    assert notes[1].startswith("whole: with rank 8 its parts take 2.00x the time (20 us instead")


def test_measuring_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(network, (1, 16, 8, 8))
    found, used = choices(module, recipe(measure=False), monkeypatch, NoBench())
    assert not used and {choice.unit for choice in found.values()} == {PREDICTED}


@pytest.mark.parametrize("busy_turns", [0, 40])
def test_kernels_are_timed_while_no_thread_waits_for_a_core(
    monkeypatch: pytest.MonkeyPatch, busy_turns: int
) -> None:
    """The second kernel alone is slowed down by others: the machine is theirs in its turns."""
    waited, turns = 0.0, 0

    def slowed(number: int) -> float:
        nonlocal waited, turns
        turns += 1
        if turns > busy_turns:
            return 2e-4
        waited += 1e-3 * number
        return 1.2e-3

    monkeypatch.setattr(kernel_bench, "_waited", lambda: waited)
    found = kernel_bench._in_turns([lambda _: 3e-4, slowed])
    assert found == pytest.approx([300.0, 200.0])
    assert turns < 2 * busy_turns + 40


def test_kernels_are_timed_on_a_machine_that_is_never_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1_000_000))
    monkeypatch.setattr(kernel_bench, "_waited", lambda: float(next(seconds)))
    monkeypatch.setattr(kernel_bench, "_PATIENCE_SECONDS", 0.01)
    assert kernel_bench._in_turns([lambda _: 3e-4, lambda _: 2e-4]) == pytest.approx([300, 200])


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no schedstat in /proc")
def test_waiting_for_a_core_only_grows() -> None:
    first = kernel_bench._waited()
    assert 0 <= first <= kernel_bench._waited()
