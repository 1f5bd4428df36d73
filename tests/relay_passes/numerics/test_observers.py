"""Observers and statistics: against NumPy over all samples at once, and through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.gradient_saliency import GradientObserver
from tvm_compress.relay_passes.numerics.moments import MomentsObserver, PatchShape, extract_patches
from tvm_compress.relay_passes.numerics.observers import ChannelObserver, TensorObserver
from tvm_compress.relay_passes.numerics.statistics import Statistics

RNG = np.random.default_rng(0)


def test_extremes_and_channels_equal_numpy_over_all_samples() -> None:
    samples = RNG.normal(0, 1, (7, 2, 5, 3)).astype(np.float32)
    observer, by_channel = TensorObserver(), ChannelObserver(1)
    for sample in samples:
        observer.update(sample)
        by_channel.update(sample)
    result, channels = observer.result(), by_channel.result()
    assert (result.low, result.high) == (samples.min(), samples.max())
    assert result.histogram.counts.sum() == samples.size
    np.testing.assert_array_equal(channels.low, samples.min(axis=(0, 1, 3)))
    np.testing.assert_array_equal(channels.high, samples.max(axis=(0, 1, 3)))
    np.testing.assert_allclose(channels.mean, samples.mean(axis=(0, 1, 3)), rtol=1e-5)


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_values_that_are_not_finite_are_refused(value: float, kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        TensorObserver().update(np.asarray([1.0, value], np.float32))
    for observer in (TensorObserver(), ChannelObserver(0)):
        with pytest.raises(ValueError, match="no values"):
            observer.result()


def naive_patches(x: np.ndarray, shape: PatchShape) -> np.ndarray:
    """[groups, positions, K] with loops."""
    padded = np.pad(x, ((0, 0), (0, 0), *shape.padding))
    (kh, kw), (sh, sw), (dh, dw) = shape.kernel, shape.strides, shape.dilation
    rows = (padded.shape[2] - (kh - 1) * dh - 1) // sh + 1
    columns = (padded.shape[3] - (kw - 1) * dw - 1) // sw + 1
    channels = x.shape[1] // shape.groups
    found = np.zeros((shape.groups, x.shape[0] * rows * columns, kh * kw * channels))
    for group in range(shape.groups):
        position = 0
        for n in range(x.shape[0]):
            for r in range(rows):
                for c in range(columns):
                    patch = [
                        padded[n, group * channels + k, r * sh + i * dh, c * sw + j * dw]
                        for i in range(kh)
                        for j in range(kw)
                        for k in range(channels)
                    ]
                    found[group, position] = patch
                    position += 1
    return found


SHAPES = [
    PatchShape((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    PatchShape((1, 1), (2, 2), (1, 1), ((0, 0), (0, 0))),
    PatchShape((3, 2), (2, 1), (2, 3), ((2, 1), (0, 3))),
    PatchShape((3, 3), (1, 2), (1, 1), ((0, 0), (1, 0)), groups=2),
    PatchShape((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_second", [False, True])
def test_moments_of_patches(shape: PatchShape, with_second: bool) -> None:
    samples = RNG.normal(0.5, 1, (3, 2, 4, 6, 7)).astype(np.float32)
    observer = MomentsObserver(shape, with_second)
    for sample in samples:
        observer.update(sample)
    result = observer.result()
    patches = np.concatenate([naive_patches(sample, shape) for sample in samples], axis=1)
    assert result.count == patches.shape[1]
    np.testing.assert_allclose(result.mean, patches.mean(axis=1), rtol=1e-5, atol=1e-6)
    if with_second:
        expected = np.einsum("gpk,gpl->gkl", patches, patches)
        np.testing.assert_allclose(result.second, expected, rtol=1e-4, atol=1e-4)
    else:
        assert result.second is None


def test_moments_of_rows_and_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(0, 1, (50, 6)).astype(np.float32)
    monkeypatch.setattr("tvm_compress.relay_passes.numerics.moments.BLOCK_FLOATS", 20)
    observer = MomentsObserver(PatchShape(), with_second=True)
    observer.update(rows)
    result = observer.result()
    assert result.second is not None
    np.testing.assert_allclose(result.second[0], rows.T @ rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.mean[0], rows.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_patches_of_one_dimension() -> None:
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    patches = extract_patches(x, PatchShape((2,), (1,), (1,), ((0, 0),)))
    assert patches.shape == (1, 1, 3, 2, 2)
    np.testing.assert_array_equal(patches[0, 0, 1], [[1, 5], [2, 6]])


def test_statistics_come_back_from_a_file(tmp_path: Path) -> None:
    observer, by_channel = TensorObserver(), ChannelObserver(0)
    by_channel.update(np.ones((3, 4), np.float32))
    observer.update(RNG.normal(0, 1, (3, 4)).astype(np.float32))
    plain = TensorObserver()
    plain.update(np.zeros((2, 2), np.float32))
    moments = MomentsObserver(PatchShape(), with_second=True)
    moments.update(RNG.normal(0, 1, (9, 3)).astype(np.float32))
    first = MomentsObserver(PatchShape(), with_second=False)
    first.update(np.ones((2, 2), np.float32))
    gradients = GradientObserver(1)
    gradients.update(np.ones((1, 3, 2, 2), np.float32), np.ones((1, 3, 2, 2), np.float32))
    saved = Statistics(
        {"conv/1:0": observer.result(), "z": plain.result()},
        {"conv/1:0": by_channel.result()},
        {"fc": moments.result(), "b": first.result()},
        5,
        {"relu": gradients.result()},
    )
    saved.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert list(loaded) == list(saved)
    assert loaded.samples == 5
    for name, tensor in saved.items():
        other = loaded[name]
        assert (other.low, other.high, other.average_low, other.average_high) == (
            *(tensor.low, tensor.high, tensor.average_low, tensor.average_high),
        )
        for part in ("counts", "width"):
            np.testing.assert_array_equal(
                getattr(other.histogram, part), getattr(tensor.histogram, part)
            )
        np.testing.assert_array_equal(other.noise.decibels, tensor.noise.decibels)
        np.testing.assert_array_equal(other.noise.ends, tensor.noise.ends)
    channels, expected = loaded.channels["conv/1:0"], saved.channels["conv/1:0"]
    assert channels.axis == 0
    np.testing.assert_array_equal(channels.mean, expected.mean)
    assert list(loaded.channels) == ["conv/1:0"]
    assert (loaded.gradients["relu"].axis, loaded.gradients["relu"].positions) == (1, 4)
    np.testing.assert_array_equal(loaded.gradients["relu"].squared, [16.0] * 3)
    np.testing.assert_array_equal(loaded.moments["fc"].second, saved.moments["fc"].second)
    assert loaded.moments["b"].second is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04N."])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a statistics file"):
        Statistics.load(path)
