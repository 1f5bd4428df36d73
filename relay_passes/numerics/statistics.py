"""What calibration gathered, as a value: ranges and histograms by tensor, moments by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .histogram import Histogram
from .noise import RangeNoise


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Per channel along `axis`, over samples and positions. Each array: float64 [C]."""

    axis: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """One tensor over all samples.

    `low`/`high` are the extremes; `average_low`/`average_high` the moving average of each sample's
    extremes; the histogram counts every value; `noise` compares candidate ranges by sample.
    """

    low: float
    high: float
    average_low: float
    average_high: float
    histogram: Histogram
    noise: RangeNoise


@dataclass(frozen=True, eq=False)
class WantedOutputs:
    """What a layer should give for its input patches x, where that is not what it gives: y, mean
    float64 [G, N], and the sum of x yᵀ over all patches, float64 [G, K, N]."""

    mean: NDArray[np.float64]
    second: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PatchSample:
    """Some input patches x, float32 [G, P, K], and what the layer should give for them where that
    is not what it gives, [G, P, N]."""

    inputs: NDArray[np.float32]
    wanted: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Moments of a layer's input patches x (length K = kernel positions * input channels).

    `mean` is E[x], float64 [G, K] (G groups); `second` is the sum of x xᵀ over `count` patches,
    float64 [G, K, K], or `None` where it was not asked for.
    """

    mean: NDArray[np.float64]
    second: NDArray[np.float64] | None
    count: int
    wanted: WantedOutputs | None = None
    sample: PatchSample | None = None


@dataclass(frozen=True, eq=False)
class ChannelGradients:
    """What a labelled loss L (cross-entropy of a sample) makes of a tensor's channels along `axis`.

    Means over samples, float64 [C]: `signed`, `absolute` and `squared` are of s, |s| and s², s the
    sum over `positions` of a·dL/da; `gradient_squared` is of the sum over positions of (dL/da)².
    """

    axis: int
    positions: int
    signed: NDArray[np.float64]
    absolute: NDArray[np.float64]
    squared: NDArray[np.float64]
    gradient_squared: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, TensorStatistics]):
    """Tensor name => statistics of `samples` samples; `channels` and `gradients` by tensor,
    `moments` by layer."""

    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    channels: Mapping[str, ChannelStatistics] = field(default_factory=dict)
    moments: Mapping[str, LayerMoments] = field(default_factory=dict)
    samples: int = 0
    gradients: Mapping[str, ChannelGradients] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TensorStatistics:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def save(self, path: Path) -> None:
        """Write one .npz; plain arrays, no pickle."""
        arrays: dict[str, NDArray] = {"samples": np.asarray(self.samples)}
        arrays["tensors"] = np.asarray(list(self.tensors), np.str_)
        arrays["channels"] = np.asarray(list(self.channels), np.str_)
        arrays["layers"] = np.asarray(list(self.moments), np.str_)
        for index, tensor in enumerate(self.tensors.values()):
            prefix = f"tensor{index}"
            arrays[f"{prefix}.ranges"] = np.asarray(
                [tensor.low, tensor.high, tensor.average_low, tensor.average_high]
            )
            arrays[f"{prefix}.counts"] = tensor.histogram.counts
            arrays[f"{prefix}.width"] = tensor.histogram.width
            arrays[f"{prefix}.noise_ends"] = tensor.noise.ends
            arrays[f"{prefix}.noise_decibels"] = tensor.noise.decibels
        for index, channels in enumerate(self.channels.values()):
            for item in fields(ChannelStatistics):
                value = getattr(channels, item.name)
                arrays[f"channels{index}.{item.name}"] = np.asarray(value)
        arrays["gradients"] = np.asarray(list(self.gradients), np.str_)
        for index, gradients in enumerate(self.gradients.values()):
            for item in fields(ChannelGradients):
                arrays[f"gradients{index}.{item.name}"] = np.asarray(getattr(gradients, item.name))
        for index, moments in enumerate(self.moments.values()):
            prefix = f"layer{index}"
            arrays[f"{prefix}.mean"] = moments.mean
            arrays[f"{prefix}.count"] = np.asarray(moments.count)
            if moments.second is not None:
                arrays[f"{prefix}.second"] = moments.second
            if moments.wanted is not None:
                arrays[f"{prefix}.wanted"] = moments.wanted.second
                arrays[f"{prefix}.wanted_mean"] = moments.wanted.mean
            if moments.sample is not None:
                arrays[f"{prefix}.sample"] = moments.sample.inputs
                if moments.sample.wanted is not None:
                    arrays[f"{prefix}.sample_wanted"] = moments.sample.wanted
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)  # sums of floats hardly shrink

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read what `save` wrote. Raises `ValueError` when the file is not such a file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _read(arrays)
        except (KeyError, OSError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path}: not a statistics file: {error}") from None


def _read(arrays: Mapping[str, NDArray]) -> Statistics:
    tensors: dict[str, TensorStatistics] = {}
    for index, name in enumerate(arrays["tensors"].tolist()):
        prefix = f"tensor{index}"
        low, high, average_low, average_high = arrays[f"{prefix}.ranges"].tolist()
        histogram = Histogram(*(arrays[f"{prefix}.{k}"] for k in ("counts", "width")))
        noise = RangeNoise(arrays[f"{prefix}.noise_ends"], arrays[f"{prefix}.noise_decibels"])
        tensors[name] = TensorStatistics(low, high, average_low, average_high, histogram, noise)
    channels: dict[str, ChannelStatistics] = {}
    for index, name in enumerate(arrays["channels"].tolist()):
        parts = [arrays[f"channels{index}.{item}"] for item in ("low", "high", "mean")]
        channels[name] = ChannelStatistics(int(arrays[f"channels{index}.axis"]), *parts)
    moments: dict[str, LayerMoments] = {}
    for index, name in enumerate(arrays["layers"].tolist()):
        prefix = f"layer{index}"
        second = arrays.get(f"{prefix}.second")
        wanted = None
        if f"{prefix}.wanted" in arrays:
            wanted = WantedOutputs(arrays[f"{prefix}.wanted_mean"], arrays[f"{prefix}.wanted"])
        sample = None
        if f"{prefix}.sample" in arrays:
            sample = PatchSample(arrays[f"{prefix}.sample"], arrays.get(f"{prefix}.sample_wanted"))
        moments[name] = LayerMoments(
            arrays[f"{prefix}.mean"], second, int(arrays[f"{prefix}.count"]), wanted, sample
        )
    gradients: dict[str, ChannelGradients] = {}
    for index, name in enumerate(arrays["gradients"].tolist()):
        axis, positions, *parts = (
            arrays[f"gradients{index}.{item.name}"] for item in fields(ChannelGradients)
        )
        gradients[name] = ChannelGradients(int(axis), int(positions), *parts)
    return Statistics(tensors, channels, moments, int(arrays["samples"]), gradients)
