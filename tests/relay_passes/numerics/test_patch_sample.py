"""Samples of patches: as many as asked, each patch with the same chance, outputs beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.moments import (
    MomentsObserver,
    PatchShape,
    extract_patches,
)
from tvm_compress.relay_passes.numerics.patch_sample import PatchSampler
from tvm_compress.relay_passes.numerics.statistics import LayerMoments, Statistics

SHAPE = PatchShape(
    kernel=(3, 3), strides=(2, 1), dilation=(1, 1), padding=((1, 1), (0, 1)), groups=2
)


def sampled(rows: int, count: int = 5) -> tuple[LayerMoments, np.ndarray, np.ndarray]:
    """(moments, all patches [G, P, K], all outputs [G, P, O])."""
    rng = np.random.default_rng(0)
    observer = MomentsObserver(SHAPE, True, rows)
    patches, outputs = [], []
    for _ in range(count):
        x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
        found = extract_patches(x, SHAPE)  # [G, N, h, w, 3, 3, C]
        y = rng.normal(size=(*found.shape[:4], 3)).astype(np.float32)
        observer.update(x, y)
        patches.append(found.reshape(2, -1, 18))
        outputs.append(y.reshape(2, -1, 3))
    return observer.result(), np.concatenate(patches, 1), np.concatenate(outputs, 1)


@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_patches_keep_their_outputs(rows: int) -> None:
    moments, patches, outputs = sampled(rows)
    sample = moments.sample
    assert sample is not None and sample.wanted is not None
    assert sample.inputs.shape == (2, min(rows, patches.shape[1]), 18)
    for row in range(sample.inputs.shape[1]):
        (at,) = np.flatnonzero((patches[0] == sample.inputs[0, row]).all(axis=1))
        np.testing.assert_array_equal(sample.inputs[:, row], patches[:, at])
        np.testing.assert_array_equal(sample.wanted[:, row], outputs[:, at])


def test_all_patches_have_the_same_chance() -> None:
    """Rows of a matmul's input, by their number, whichever update they came with."""
    counts = np.zeros(60)
    for seed in range(300):
        sampler = PatchSampler(20, seed)
        for part in np.split(np.arange(60, dtype=np.float32).reshape(1, 60, 1), [5, 40], axis=1):
            sampler.update(part, 0, None)
        result = sampler.result()
        assert result.wanted is None
        counts[result.inputs[0, :, 0].astype(int)] += 1
    assert counts.sum() == 20 * 300
    # Binomial: 100 of 300, deviation 8.2.
    assert np.abs(counts - 100).max() < 35
    with pytest.raises(ValueError, match="no values"):
        PatchSampler(3).result()


def test_kept_in_a_file(tmp_path: Path) -> None:
    moments, _, _ = sampled(11)
    Statistics(moments={"a": moments}, samples=5).save(tmp_path / "s.npz")
    found = Statistics.load(tmp_path / "s.npz").moments["a"].sample
    assert found is not None and moments.sample is not None
    np.testing.assert_array_equal(found.inputs, moments.sample.inputs)
    np.testing.assert_array_equal(found.wanted, moments.sample.wanted)
