"""Range methods, on distributions whose best range is known."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.affine import (
    choose_parameters,
    dequantize_affine,
    quantize_affine,
)
from tvm_compress.relay_passes.numerics.noise import PER_OCTAVE
from tvm_compress.relay_passes.numerics.observers import TensorObserver
from tvm_compress.relay_passes.numerics.ranges import (
    Entropy,
    MinMax,
    MovingAverage,
    Mse,
    Percentile,
    RangeMethod,
    Sqnr,
    choose_range,
)
from tvm_compress.relay_passes.numerics.statistics import TensorStatistics

METHODS: list[RangeMethod] = [MinMax(), MovingAverage(), Percentile(), Entropy(), Mse(), Sqnr()]


def observe(*samples: np.ndarray) -> TensorStatistics:
    observer = TensorObserver()
    for sample in samples:
        observer.update(sample.astype(np.float32))
    return observer.result()


def with_outlier(one_sided: bool) -> np.ndarray:
    x = np.random.default_rng(0).normal(0, 1, 20000)
    if one_sided:
        x = np.maximum(x, 0)
    x[0] = 40.0
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_range_holds_zero_and_lies_inside_the_extremes(
    method: RangeMethod, one_sided: bool, symmetric: bool
) -> None:
    statistics = observe(with_outlier(one_sided))
    low, high = choose_range(statistics, method, "int8", symmetric)
    assert statistics.low <= low <= 0.0 < high <= statistics.high
    assert (low == 0.0) == one_sided


@pytest.mark.parametrize("method", [Percentile(99.9), Entropy()])
def test_outliers_are_clipped(method: RangeMethod) -> None:
    _, high = choose_range(observe(with_outlier(False)), method, "int8", False)
    assert 2.5 < high < 15.0


def squared_error(x: np.ndarray, low: float, high: float) -> float:
    parameters = choose_parameters(low, high, "int8", symmetric=False)
    x = x.astype(np.float32)
    return float(((dequantize_affine(quantize_affine(x, parameters), parameters) - x) ** 2).sum())


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("method", [Mse(), Sqnr()])
def test_error_is_near_the_best_of_a_brute_force_search(
    method: RangeMethod, one_sided: bool
) -> None:
    x = np.random.default_rng(1).laplace(0, 1, 50000)
    if one_sided:
        x = np.maximum(x, 0)
    low, high = choose_range(observe(x), method, "int8", False)
    lows = [0.0] if one_sided else list(np.linspace(0.3, 1.0, 12) * x.min())
    best = min(squared_error(x, a, b) for a in lows for b in np.linspace(0.3, 1.0, 30) * x.max())
    assert squared_error(x, low, high) < 1.1 * best


def test_a_few_loud_samples_are_clipped_when_all_others_gain() -> None:
    rng = np.random.default_rng(4)
    samples = [rng.normal(0, 1, 2000) for _ in range(18)] + [rng.normal(0, 20, 2000)] * 2
    statistics = observe(*samples)
    _, by_ratio = choose_range(statistics, Sqnr(), "int8", False)
    _, by_error = choose_range(statistics, Mse(), "int8", False)
    assert 3.0 < by_ratio < 12.0
    assert by_error > 30.0


def test_sqnr_equals_the_noise_computed_sample_by_sample() -> None:
    rng = np.random.default_rng(5)
    samples = [rng.normal(0, scale, 3000) for scale in (1.0, 1.0, 4.0)]
    noise = observe(*samples).noise
    ends = noise.ends
    assert ends[0] == 0.0
    np.testing.assert_allclose(ends[2:] / ends[1:-1], 2 ** (1 / PER_OCTAVE))
    for i, j in ((40, 50), (66, 60), (72, 72)):
        expected = 0.0
        for x in samples:
            clipped = ((x - np.clip(x, -ends[i], ends[j])) ** 2).sum()
            step = (ends[i] + ends[j]) / 255
            expected += 10 * np.log10((clipped + x.size * step**2 / 12) / (x**2).sum())
        assert noise.decibels[0, i, j] == pytest.approx(expected, abs=0.05)


def test_16_bit_grids_keep_the_extremes() -> None:
    statistics = observe(with_outlier(False))
    low, high = choose_range(statistics, Mse(), "int16", True)
    assert (low, high) == (statistics.low, statistics.high)


def test_moving_average_follows_the_samples() -> None:
    samples = [np.asarray([-1.0, 1.0]) * scale for scale in (1, 1, 1, 5)]
    low, high = choose_range(observe(*samples), MovingAverage(), "int8", False)
    weights = 0.99 ** np.arange(3, -1, -1)
    expected = (weights * [1, 1, 1, 5]).sum() / weights.sum()
    assert high == pytest.approx(expected)
    assert low == pytest.approx(-expected)


def test_percentile_matches_numpy_to_a_bin() -> None:
    x = np.random.default_rng(3).normal(0, 1, 40000)
    statistics = observe(x)
    low, high = choose_range(statistics, Percentile(99.0), "int8", False)
    width = statistics.histogram.width[0]
    assert abs(high - np.percentile(x, 99.5)) < 3 * width
    assert abs(low - np.percentile(x, 0.5)) < 3 * width


@pytest.mark.parametrize("method", METHODS)
def test_all_zero_tensor_has_an_empty_range(method: RangeMethod) -> None:
    assert choose_range(observe(np.zeros(10)), method, "int8", False) == (0.0, 0.0)


def test_percentile_is_checked() -> None:
    with pytest.raises(ValueError, match="percentile 10"):
        Percentile(10)
