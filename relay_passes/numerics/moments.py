"""First and second moments of a layer's input patches, streamed.

A layer computes y = W x for every patch x of its input: K = kernel positions * input channels of
the group. E[x] says what a change of W does to the mean output (bias correction); X·Xᵀ says what it
does to the squared error (Hubara et al. 2021, "Accurate Post Training Quantization with Small
Calibration Sets"; Frantar & Alistarh 2022, "Optimal Brain Compression", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .patch_sample import PatchSampler
from .statistics import LayerMoments, WantedOutputs

BLOCK_FLOATS = 1 << 22  # patches are laid out at most this many numbers (16 MiB) at a time


@dataclass(frozen=True)
class PatchShape:
    """How a layer cuts its input [N, C, *spatial] into patches.

    `kernel`, `strides`, `dilation`: one number for each spatial axis; `padding`: (before, after)
    for each. No spatial axes for a matmul. `groups` split the channels.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    groups: int = 1


def extract_patches(x: NDArray[np.float32], shape: PatchShape) -> NDArray[np.float32]:
    """[N, C, *spatial] => a view [groups, N, *positions, *kernel, C // groups] (im2col)."""
    axes = tuple(range(2, x.ndim))
    if axes:
        x = np.pad(x, ((0, 0), (0, 0), *shape.padding))
        extents = tuple((k - 1) * d + 1 for k, d in zip(shape.kernel, shape.dilation, strict=True))
        x = sliding_window_view(x, extents, axes)  # [N, C, *all positions, *extents]
        steps = [slice(None, None, s) for s in (*shape.strides, *shape.dilation)]
        x = x[(slice(None), slice(None), *steps)]  # [N, C, *positions, *kernel]
    channels = x.shape[1]
    x = x.reshape(x.shape[0], shape.groups, channels // shape.groups, *x.shape[2:])
    return np.moveaxis(np.moveaxis(x, 1, 0), 2, -1)


class MomentsObserver:
    """Sums of x and, when asked, of x xᵀ over all patches x, in float64, block by block; of x yᵀ
    as well where it is told which outputs y to give for them; and `rows` of the patches themselves.

    Memory: K (K * K, K * O) numbers for each group and one block of patches, whatever the samples.
    """

    def __init__(self, shape: PatchShape, with_second: bool, rows: int = 0) -> None:
        self._shape = shape
        self._sampler = PatchSampler(rows) if rows else None
        self._with_second = with_second
        self._sum: NDArray[np.float64] | None = None
        self._second: NDArray[np.float64] | None = None
        self._wanted: NDArray[np.float64] | None = None
        self._wanted_sum: NDArray[np.float64] | None = None
        self._count = 0

    def update(self, x: NDArray[np.float32], wanted: NDArray[np.float32] | None = None) -> None:
        """Take in the layer's input for one sample, and the outputs that it should have.

        [N, C, *spatial], [groups, N, *positions, O // groups]
        """
        patches = extract_patches(x, self._shape)
        spatial = len(self._shape.kernel)
        groups = patches.shape[0]
        if self._sampler is not None:
            self._sampler.update(patches, spatial, wanted)
        length = int(np.prod(patches.shape[2 + spatial :]))  # K
        if self._sum is None:
            self._sum = np.zeros((groups, length))
            if self._with_second:
                self._second = np.zeros((groups, length, length))
            if wanted is not None:
                self._wanted = np.zeros((groups, length, wanted.shape[-1]))
                self._wanted_sum = np.zeros((groups, wanted.shape[-1]))
        self._count += int(np.prod(patches.shape[1 : 2 + spatial]))
        for group in range(groups):
            # One sample at a time, and of images some rows at a time: [positions, *kernel, c]
            for index, sample in enumerate(patches[group] if spatial else patches[group][None]):
                row = max(1, sample[0].size)
                step = max(1, BLOCK_FLOATS // row)
                for start in range(0, sample.shape[0], step):
                    block = sample[start : start + step].reshape(-1, length)
                    self._add(group, block)
                    if wanted is not None:
                        outputs = wanted[group][index] if spatial else wanted[group]
                        part = outputs[start : start + step].reshape(len(block), -1)
                        self._add_wanted(group, block, part)

    def _add(self, group: int, block: NDArray[np.float32]) -> None:
        """[P, K]: float32 inside a block, float64 from block to block."""
        assert self._sum is not None
        self._sum[group] += block.sum(axis=0, dtype=np.float64)
        if self._second is not None:
            self._second[group] += block.T @ block

    def _add_wanted(
        self, group: int, block: NDArray[np.float32], outputs: NDArray[np.float32]
    ) -> None:
        assert self._wanted is not None and self._wanted_sum is not None
        self._wanted[group] += block.T @ outputs
        self._wanted_sum[group] += outputs.sum(axis=0, dtype=np.float64)

    def result(self) -> LayerMoments:
        """Raises `ValueError` when nothing was observed."""
        if self._sum is None:
            raise ValueError("no values were observed")
        second = None if self._second is None else self._second.copy()
        wanted = None
        if self._wanted is not None and self._wanted_sum is not None:
            wanted = WantedOutputs(self._wanted_sum / self._count, self._wanted.copy())
        sample = None if self._sampler is None else self._sampler.result()
        return LayerMoments(self._sum / self._count, second, self._count, wanted, sample)
