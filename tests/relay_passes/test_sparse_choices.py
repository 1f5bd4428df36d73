"""Which layers ship without their zeros: decided once, noted, and followed when weights are
packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.build import Lowered, compile_lowered, lower
from tvm_compress.relay_passes.costs import MEASURED, Comparison, Cost, Decoder, Sparse, Stored
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.layer_spec import LayerSpec, layer_spec
from tvm_compress.relay_passes.numerics.statistics import Statistics
from tvm_compress.relay_passes.sparse_choices import ChooseSparse, kept_weights, read_choices
from tvm_compress.relay_passes.sparsify import Sparsify, read_sparsified
from tvm_compress.relay_passes.sparsify_config import SparsifyConfig
from tvm_compress.schedules import Conv2dSpec, MatmulSpec
from tvm_compress.schedules.sparse_form import SparseForm
from tvm_compress.schedules.stored_weight import STORED
from tvm_compress.targets import get_target

from .floats import Net, build, quantize

X86 = get_target("x86-64-v3")
OUTPUTS = 32


class FakeCosts:
    """One figure for all sparse kernels; remembers what was asked."""

    unit = MEASURED

    def __init__(self, cost: float, bytes_: int = 100, stored: float = 2.0, code: int = 10) -> None:
        self.cost, self.bytes = cost, bytes_
        self.stored = Stored(Cost(stored, 150, MEASURED), Decoder("any", code))
        self.form = SparseForm(16, 1.0)
        self.asked: dict[str, tuple[LayerSpec, np.ndarray]] = {}

    def sparse(self, layer: str, spec: LayerSpec, kept: np.ndarray) -> Comparison:
        self.asked[layer] = spec, kept
        sparse = Sparse(self.form, Cost(self.cost, self.bytes, MEASURED))
        return Comparison(Cost(1.0, 200, MEASURED), sparse, self.stored)

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        return (16,)


class PrunedNet(Net):
    """Blocks of 16 outputs share the tenth of the inputs that they read."""

    def array(self, *shape: int, spread: float = 1.0) -> Any:
        array = self.rng.normal(0, spread, shape).astype(np.float32)
        if len(shape) == 4 and shape[0] == OUTPUTS:
            rest = array.reshape(OUTPUTS // 16, 16, -1)
            rest *= self.rng.random((len(rest), 1, rest.shape[2])) < 0.1
        return relax.const(array)


def pruned() -> tvm.IRModule:
    def body(net: Net, x: relax.Var) -> relax.Var:
        net = PrunedNet(net.builder, 0)
        x = net.conv_relu("a", x, OUTPUTS)
        x = net.conv_relu("b", x, OUTPUTS, kernel=1)
        return net.conv_relu("full", x, 24, kernel=1)

    return build(body, (1, 16, 6, 6))


def chosen(module: tvm.IRModule, costs: FakeCosts, insisted: Sequence[str] = ()) -> tvm.IRModule:
    return tvm.transform.Sequential([ChooseSparse(X86.name, costs, insisted)])(module)


@pytest.mark.parametrize(
    ("cost", "stored", "insisted", "sparse", "reason"),
    [
        (0.5, 100, (), True, ""),
        (1.08, 100, (), True, ""),  # smaller, and hardly slower
        (1.08, 300, (), False, "takes 1.08x the time"),
        (1.5, 100, (), False, "takes 1.50x the time"),
        (1.5, 100, ("a", "b"), True, "insisted on"),
    ],
)
def test_kernels_follow_the_choice(
    cost: float, stored: int, insisted: tuple[str, ...], sparse: bool, reason: str
) -> None:
    module = chosen(pruned(), FakeCosts(cost, bytes_=stored), insisted)
    choices = read_choices(module["main"], X86.name)
    assert set(choices) == {"a", "b"}
    for choice in choices.values():
        assert (choice.form == "16x1") == sparse and (choice.form == "") != sparse
        assert reason in choice.reason and bool(choice.reason) == bool(reason)
        assert (choice.cost, choice.dense_cost, choice.unit) == (cost, 1.0, MEASURED)
    assert set(lower(module, X86).sparse_kernels) == ({"a", "b"} if sparse else set())
    # Nobody decided for other targets.
    assert set(lower(module, get_target("x86-64-v4")).sparse_kernels) == {"a", "b"}


@pytest.mark.parametrize("is_integer", [False, True])
def test_weights_without_zeros_compute_the_same(is_integer: bool) -> None:
    """Layers that run dense and are stored without their zeros: smaller, and not a bit else."""
    module = quantize(pruned()) if is_integer else pruned()
    stored = chosen(module, FakeCosts(1.5, stored=1.05))
    choices = read_choices(stored["main"], X86.name)
    assert {choice.form for choice in choices.values()} == {STORED}
    assert {choice.cost for choice in choices.values()} == {1.05}
    dense = chosen(module, FakeCosts(1.5))
    smaller, larger = (lower(one, X86) for one in (stored, dense))
    assert set(smaller.decoded_per_call) == {"a", "b"} and not larger.decoded_per_call
    assert not smaller.sparse_kernels
    sizes = [weight_bytes(one, ("a", "b")) for one in (smaller, larger)]
    assert sizes[0] < (0.4 if is_integer else 0.7) * sizes[1]  # Winograd's transform fills zeros
    if X86.runs_here():
        array = np.random.default_rng(0).normal(size=(1, 16, 6, 6)).astype(np.float32)
        results = []
        for one in (smaller, larger):
            machine = relax.VirtualMachine(compile_lowered(one).executable, tvm.cpu())
            results.append(machine["main"](tvm.runtime.tensor(array)).numpy())
        assert np.array_equal(*results) and results[0].any()


@pytest.mark.parametrize(
    ("cost", "bytes_", "stored", "best"),
    [
        (0.9, 190, 1.0, "sparse"),  # clearly faster
        (1.0, 190, 1.05, "stored"),  # as fast, and the other one smaller
        (1.0, 140, 1.05, "sparse"),
        (1.0, 140, 1.2, "sparse"),
        (1.5, 140, 1.05, "stored"),
        (1.5, 140, 1.2, "dense"),
    ],
)
def test_speed_first_then_bytes(cost: float, bytes_: int, stored: float, best: str) -> None:
    costs = FakeCosts(cost, bytes_=bytes_, stored=stored)
    module = chosen(pruned(), costs)
    form = {"sparse": "16x1", "stored": STORED, "dense": ""}[best]
    assert {choice.form for choice in read_choices(module["main"], X86.name).values()} == {form}
    # And the step that makes the zeros leaves them where one form pays.
    scheme = SparsifyConfig(0.5, criterion="magnitude", reconstruct=False)
    module = build(lambda net, x: net.conv_relu("a", x, 32), (1, 16, 6, 6))
    step = Sparsify({"a": scheme}, Statistics(), costs)
    (note,) = read_sparsified(tvm.transform.Sequential([step])(module)).values()
    assert note.startswith("dense") == (best == "dense"), note


def test_code_that_decodes_is_counted_once() -> None:
    """Two layers save 50 bytes each by one function."""
    for code, form in ((99, STORED), (100, "")):
        choices = read_choices(chosen(pruned(), FakeCosts(1.5, stored=1.05, code=code))["main"],
                               X86.name)  # fmt: skip
        assert {choice.form for choice in choices.values()} == {form}
    for choice in choices.values():
        assert choice.reason.endswith(
            "; decoding per call would save 100 bytes in all such layers, and its code takes 100"
        )
    # A sparse kernel that pays too is as good as before.
    choices = read_choices(chosen(pruned(), FakeCosts(1.0, 190, 1.05, 100))["main"], X86.name)
    assert {choice.form for choice in choices.values()} == {"16x1"}
    assert not any(choice.reason for choice in choices.values())


@pytest.mark.parametrize(
    ("cost", "bytes_", "rule"),
    [
        (0.97, 200, "as many bytes; one that is not smaller has to win by 5 %"),
        (1.2, 100, "50 % fewer bytes (100 instead of 200); a smaller one may take 1.1x"),
    ],
)
def test_reasons_name_the_rule(cost: float, bytes_: int, rule: str) -> None:
    costs = FakeCosts(cost, bytes_)
    time = f"{cost:.2f}x the time ({cost:.3g} us instead of 1, measured)"
    decoded = "; decoded per call it takes 2.00x the time (2 us instead of 1, measured)"
    for choice in read_choices(chosen(pruned(), costs)["main"], X86.name).values():
        assert choice.reason == f"kernel 16x1 takes {time} and {rule}{decoded}"
    scheme = SparsifyConfig(0.5, criterion="magnitude", reconstruct=False)
    module = build(lambda net, x: net.conv_relu("a", x, 32), (1, 16, 6, 6))
    step = Sparsify({"a": scheme}, Statistics(), costs)
    (note,) = read_sparsified(tvm.transform.Sequential([step])(module)).values()
    assert (
        note
        == f"dense: zeros (blocks 16x1) gain nothing: kernel 16x1 takes {time} and {rule}{decoded}"
    )


def weight_bytes(lowered: Lowered, layers: Sequence[str]) -> int:
    """Values and indices."""
    return sum(
        item.bytes
        for item in lowered.constants
        if item.layer in layers and item.role in ("weights", "indices")
    )


def test_nobody_is_asked_about_layers_without_zeros() -> None:
    costs = FakeCosts(0.5)
    module = build(lambda net, x: net.conv_relu("a", x, 8))
    assert chosen(module, costs).same_as(module) and not costs.asked


def test_integers_are_asked_about_as_they_are_stored() -> None:
    module = pruned()
    floats, integers = FakeCosts(0.5), FakeCosts(0.5)
    chosen(module, floats)
    chosen(quantize(module), integers)
    for name in ("a", "b"):
        spec, kept = floats.asked[name]
        stored, same = integers.asked[name]
        assert stored == spec.replace(data_dtype="int8", weight_dtype="int8", acc_dtype="int32")
        assert kept.sum() >= same.sum() > 0.9 * kept.sum()  # small ones round to zero


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 2])
def test_specs_and_zeros_of_convolutions(layout: str, groups: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 4 // groups, 3, 2)).astype(np.float32)
    weight[1, 0, 2, 1] = 0
    shape = {"NCHW": (2, 4, 9, 7), "NHWC": (2, 9, 7, 4)}[layout]
    kernel = {"NCHW": "OIHW", "NHWC": "HWIO"}[layout]
    stored = weight if layout == "NCHW" else weight.transpose(2, 3, 1, 0)

    def body(net: Net, x: relax.Var) -> relax.Var:
        return net("c", op.nn.conv2d(
            x, relax.const(np.ascontiguousarray(stored)), strides=(2, 1), padding=(1, 0, 2, 1),
            dilation=(1, 2), groups=groups, data_layout=layout, kernel_layout=kernel,
        ))  # fmt: skip

    module = build(body, shape)
    graph = Graph(module["main"])
    (call,) = (value for variable, value in graph.values.items() if variable.name == "c")
    spec = layer_spec(call)
    assert spec == Conv2dSpec(
        batch=2, height=9, width=7, in_channels=4, out_channels=6, kernel=(3, 2), strides=(2, 1),
        padding=(1, 0, 2, 1), dilation=(1, 2), groups=groups,
    )  # fmt: skip
    kept = kept_weights(graph, call)
    assert kept is not None and kept.shape == (groups, 6 * 4 // groups, 6 // groups)
    # [kernel row 2, column 1, input 0], output 1 of the first group.
    assert not kept[0, (2 * 2 + 1) * (4 // groups), 1] and kept.sum() == kept.size - 1


def test_specs_of_linear_layers_and_of_others() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        x = net.linear("fc", x, 5)
        x = net("batched", op.matmul(x, net.array(3, 5, 4)))
        return net("line", op.nn.conv1d(x, net.array(7, 2, 3), padding=(1, 1)))

    module = build(body, (3, 2, 6))
    calls = {variable.name: call for variable, call in Graph(module["main"]).values.items()}
    assert layer_spec(calls["fc"]) == MatmulSpec(rows=6, in_features=6, out_features=5)
    assert layer_spec(calls["batched"]) is None
    assert layer_spec(calls["line"]) == Conv2dSpec(
        batch=3, height=1, width=4, in_channels=2, out_channels=7, kernel=(1, 3),
        padding=(0, 1, 0, 1),
    )  # fmt: skip
