"""The streaming histogram counts every value once, whatever order the samples come in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.relay_passes.numerics.histogram import StreamingHistogram

SAMPLES = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(SAMPLES)
def test_counts_equal_a_histogram_of_all_values_at_the_final_width(
    samples: list[list[float]],
) -> None:
    streaming = StreamingHistogram(bins=64)
    for sample in samples:
        streaming.update(np.asarray([sample], np.float32))
    result = streaming.result()
    values = np.concatenate([np.asarray(sample, np.float32) for sample in samples])
    assert result.counts.sum() == values.size
    if result.width[0] > 0:
        index = np.floor(values.astype(np.float64) / result.width[0]).astype(int) + 32
        expected = np.bincount(index, minlength=64)
        np.testing.assert_array_equal(result.counts[0], expected)
    else:
        assert not values.any()
        assert result.counts[0, 32] == values.size


def test_channels_have_their_own_widths() -> None:
    x = np.random.default_rng(0).normal(0, 1, (3, 1000)).astype(np.float32)
    x[1] *= 1000
    x[2] = 0
    together = StreamingHistogram(channels=3, bins=128)
    together.update(x[:, :500])
    together.update(x[:, 500:])
    result = together.result()
    for channel in range(3):
        alone = StreamingHistogram(bins=128)
        alone.update(x[channel : channel + 1, :500])
        alone.update(x[channel : channel + 1, 500:])
        np.testing.assert_array_equal(result.counts[channel], alone.result().counts[0])
        assert result.width[channel] == alone.result().width[0]
    assert result.width[2] == 0


def test_range_grows_by_merging_and_uses_at_least_a_quarter_of_the_bins() -> None:
    streaming = StreamingHistogram(bins=1024)
    for scale in (1e-3, 1.0, 3.0, 1e4):
        streaming.update(np.linspace(0, scale, 100, dtype=np.float32)[None])
        result = streaming.result()
        used = np.flatnonzero(result.counts[0])
        assert used[-1] - 512 >= 1024 // 4 - 1
    assert result.counts.sum() == 400


def test_bins_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="bins 10"):
        StreamingHistogram(bins=10)
