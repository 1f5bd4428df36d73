"""Signal to noise, intervals and paired tests against independent formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tvm_compress.measures import ErrorSums, paired_difference, wilson


def test_sums_over_pieces_equal_the_whole() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((7, 5))
    y = x + 0.1 * random.standard_normal((7, 5))
    sums = ErrorSums()
    for one, other in zip(x, y, strict=True):
        sums.add(one, other)
    expected = 10 * np.log10(np.sum(x**2) / np.sum((x - y) ** 2))
    assert sums.sqnr_db == pytest.approx(expected)
    cosine = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert sums.cosine == pytest.approx(cosine)
    assert sums.max_abs_error == pytest.approx(np.abs(x - y).max())


def test_ten_percent_noise_is_twenty_decibel() -> None:
    sums = ErrorSums()
    sums.add(np.ones(4), np.full(4, 1.1))
    assert sums.sqnr_db == pytest.approx(20.0)


def test_identical_and_empty_have_no_ratio() -> None:
    sums = ErrorSums()
    sums.add(np.ones(3), np.ones(3))
    assert sums.sqnr_db is None and sums.max_abs_error == 0.0
    assert sums.cosine == pytest.approx(1.0)
    assert ErrorSums().sqnr_db is None and ErrorSums().cosine is None


def test_equal_infinities_are_no_difference_and_others_are_a_huge_one() -> None:
    x = np.array([1.0, -np.inf, 2.0, np.nan])
    sums = ErrorSums()
    sums.add(x, x + np.array([0.1, 0, 0, 0]))
    assert sums.max_abs_error == pytest.approx(0.1)
    assert sums.sqnr_db == pytest.approx(10 * np.log10(5 / 0.01))
    sums.add(x, np.array([1.0, -np.inf, np.inf, np.nan]))
    assert sums.max_abs_error >= 1e300
    assert sums.sqnr_db is not None and np.isfinite(sums.sqnr_db) and sums.sqnr_db < -1000


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (455, 500), (1, 1), (917, 1000)])
def test_wilson_equals_scipy(right: int, count: int) -> None:
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (4, 4), (5, 0), (3, 9), (120, 90), (4000, 4100)]
)
def test_mcnemar_is_the_binomial_test_with_half_of_the_tie(first: int, second: int) -> None:
    found = paired_difference(first, second, 10_000).p_value
    count, smaller = first + second, min(first, second)
    expected = 1.0
    if first != second:
        expected = stats.binomtest(smaller, count).pvalue - stats.binom.pmf(smaller, count, 0.5)
    assert found == pytest.approx(expected, rel=1e-6)


def test_paired_interval_covers_the_truth() -> None:
    """Over all outcomes of 60 samples with known odds, 95 % intervals must hold the difference."""
    count, p_first, p_second = 60, 0.08, 0.04
    covered = total = 0.0
    for first, second in itertools.product(range(25), range(20)):
        chance = float(
            stats.multinomial.pmf(
                [first, second, count - first - second], count, [p_first, p_second, 0.88]
            )
        )
        found = paired_difference(first, second, count)
        total += chance
        covered += chance * (found.low <= p_first - p_second <= found.high)
    assert total > 0.999
    assert 0.94 < covered / total < 0.99


def test_drop_has_the_sign_of_a_loss() -> None:
    found = paired_difference(30, 10, 1000)
    assert found.drop == pytest.approx(0.02)
    assert 0 < found.low < 0.02 < found.high
