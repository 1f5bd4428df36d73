"""Calibration streams: its statistics equal NumPy's over all samples, and its memory stays flat."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.calibrate import calibrate
from tvm_compress.errors import DataError, RecipeError
from tvm_compress.model import Model, model_from_module
from tvm_compress.relay_passes.observations import Observations
from tvm_compress.targets import get_target

WEIGHT = np.random.default_rng(0).normal(0, 0.3, (6, 4, 3, 3)).astype(np.float32)


def small_model(size: int = 8) -> Model:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 4, size, size], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.conv2d(x, relax.const(WEIGHT), padding=1), name_hint="a")
            z = builder.emit(op.nn.relu(y), name_hint="a_relu")
            out = builder.emit_output(op.mean(z, [2, 3]), name_hint="pool")
        builder.emit_func_output(out)
    return model_from_module(builder.finalize(), "small", "relax")


def stream(count: int, size: int = 8, seed: int = 1) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"x": rng.normal(0, 1, (1, 4, size, size)).astype(np.float32)}


def reference(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("nchwyx,ocyx->nohw", windows, WEIGHT)


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


ALL = Observations(
    tensors=frozenset({"x", "a_relu", "pool"}),
    channels={"a": 1},
    second_moments=frozenset({"a"}),
)


def test_statistics_equal_numpy_over_all_samples(model: Model) -> None:
    statistics = calibrate(model, stream(12), ALL, target=get_target("host"))
    x = np.concatenate([sample["x"] for sample in stream(12)])
    y = reference(x)
    assert statistics.samples == 12
    assert set(statistics) == {"x", "a_relu", "pool"}
    assert (statistics["x"].low, statistics["x"].high) == (x.min(), x.max())
    assert statistics["a_relu"].low == 0.0
    assert statistics["a_relu"].high == pytest.approx(y.max(), rel=1e-5)
    assert statistics["pool"].high == pytest.approx(
        np.maximum(y, 0).mean(axis=(2, 3)).max(), rel=1e-4
    )
    channels = statistics.channels["a"]
    np.testing.assert_allclose(channels.mean, y.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(channels.low, y.min(axis=(0, 2, 3)), rtol=1e-4)
    moments = statistics.moments["a"]
    assert moments.second is not None
    rows = WEIGHT.transpose(0, 2, 3, 1).reshape(6, -1).astype(np.float64)
    # Σ (w·x)² over all positions, from X·Xᵀ
    energy = np.einsum("ok,kl,ol->o", rows, moments.second[0], rows)
    np.testing.assert_allclose(energy, (y.astype(np.float64) ** 2).sum(axis=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(rows @ moments.mean[0], channels.mean, rtol=1e-3, atol=1e-5)


def test_the_same_samples_give_the_same_statistics(model: Model) -> None:
    runs = [calibrate(model, stream(5), ALL, target=get_target("host")) for _ in range(2)]
    for name, tensor in runs[0].items():
        other = runs[1][name]
        np.testing.assert_array_equal(tensor.histogram.counts, other.histogram.counts)
        np.testing.assert_array_equal(tensor.noise.decibels, other.noise.decibels)
        assert tensor.average_high == other.average_high
    np.testing.assert_array_equal(runs[0].moments["a"].second, runs[1].moments["a"].second)


def test_memory_does_not_grow_with_samples() -> None:
    """One sample is 16 KiB and its tensors 60 KiB: kept, 600 more would take over 35 MiB."""
    model, target = small_model(32), get_target("host")
    peaks, resident = [], []
    for count in (50, 50, 650):  # the first round pays for what is allocated once
        tracemalloc.start()
        calibrate(model, stream(count, 32), ALL, target=target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        resident.append(psutil.Process().memory_info().rss)
    assert peaks[2] < peaks[1] * 1.05 + 2**18
    assert resident[2] - resident[1] < 24 * 2**20


def test_progress_sees_every_sample(model: Model) -> None:
    from tvm_compress.progress import Progress

    seen: list[tuple[str, int]] = []

    class Recorder(Progress):
        def track(self, items, label, total, unit="samples"):  # type: ignore[no-untyped-def]
            for item in items:
                yield item
                seen.append((label, total))

    samples = list(stream(3))
    observations = Observations(frozenset({"x"}))
    calibrate(model, samples, observations, target=get_target("host"), progress=Recorder())
    assert seen == [("calibrate", 3)] * 3


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "an infinite value")])
def test_bad_input_values_are_named(model: Model, value: float, kind: str) -> None:
    samples = list(stream(3))
    samples[1]["x"][0, 0, 2, 2] = value
    with pytest.raises(DataError, match=f"input 'x' has {kind} in calibration sample 1"):
        calibrate(model, samples, ALL, target=get_target("host"))


def test_bad_activations_are_named() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 3], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.log(x), name_hint="logarithm")
            out = builder.emit_output(op.matmul(y, relax.const(np.ones((3, 2), np.float32))))
        builder.emit_func_output(out)
    model = model_from_module(builder.finalize(), "log", "relax")
    samples = [{"x": np.full((1, 3), value, np.float32)} for value in (1.0, -1.0)]
    with pytest.raises(DataError, match="tensor 'logarithm' has NaN for calibration sample 1"):
        calibrate(
            model,
            samples,
            Observations(frozenset({"logarithm"})),
            target=get_target("host"),
        )


def test_no_samples_and_unknown_names(model: Model) -> None:
    with pytest.raises(DataError, match="there are no calibration samples"):
        calibrate(model, [], Observations(frozenset({"x"})), target=get_target("host"))
    with pytest.raises(RecipeError, match="no tensor 'nothing' to calibrate"):
        calibrate(model, stream(1), Observations(frozenset({"nothing"})), target=get_target("host"))


def test_branches_can_be_calibrated_around() -> None:
    """An `If` in the graph: what lies in front of it and behind it can be observed."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 3], "float32"))
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    doubled, chosen = relax.Var("doubled", x.ty), relax.Var("chosen", x.ty)
    inner, result = relax.Var("inner", x.ty), relax.Var("result", x.ty)
    branch = relax.SeqExpr(
        [relax.BindingBlock([relax.VarBinding(inner, op.negative(doubled))])], inner
    )
    block = relax.BindingBlock(
        [
            relax.VarBinding(doubled, op.add(x, x)),
            relax.VarBinding(chosen, relax.If(flag, branch, doubled)),
            relax.VarBinding(result, op.abs(chosen)),
        ]
    )
    main = relax.Function([x, flag], relax.SeqExpr([block], result), x.ty)
    module = relax.transform.Normalize()(tvm.IRModule({"main": main}))
    del builder
    model = model_from_module(module, "branches", "relax")
    samples = [
        {"x": np.asarray([[1, 2, 3]], np.float32), "flag": np.asarray(flag)}
        for flag in (True, False)
    ]
    wanted = Observations(frozenset({"doubled", "chosen", "result"}))
    statistics = calibrate(model, samples, wanted, target=get_target("host"))
    assert (statistics["chosen"].low, statistics["chosen"].high) == (-6.0, 6.0)
    assert statistics["result"].low == 2.0
