"""Scales that even out the weight ranges of two layers (Nagel et al. 2019, section 4.1).

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction". For f with f(s x) = s f(x), s > 0: W2 f(W1 x + b1) = (W2 S) f(S⁻¹ W1 x + S⁻¹ b1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_SCALE = 2.0**16  # keeps a nearly dead channel from overflowing its partner's weights
# Data that calibration has not seen go further: this much room is left below a clip.
CLIP_HEADROOM = 2.0
LARGEST_ACTIVATION_SCALE = 2.0**8  # a channel this much smaller than others lies within one step


def equalizing_scales(
    output_ranges: NDArray[np.float64], input_ranges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """s with range1 / s == range2 * s for each channel shared by two layers. [C]

    `output_ranges` are the largest weights of the first layer by output channel, `input_ranges`
    those of the second by input channel (equation 11). A channel that either ignores keeps s = 1.
    """
    used = (output_ranges > 0) & (input_ranges > 0)
    ratio = np.divide(output_ranges, input_ranges, out=np.ones_like(output_ranges), where=used)
    return np.clip(np.sqrt(ratio), 1.0 / LARGEST_SCALE, LARGEST_SCALE)


def activation_scales(
    ranges: NDArray[np.float64], strength: float, bound: float | None
) -> NDArray[np.float64]:
    """s >= 1 that brings each channel's range towards the largest one, or half of `bound`. [C]

    (largest / range) ** strength: SmoothQuant's equation 4 without the weights' part. A channel
    that is always zero keeps s = 1.
    """
    largest = ranges.max(initial=0.0) if bound is None else bound / CLIP_HEADROOM
    ratio = np.divide(largest, ranges, out=np.ones_like(ranges), where=ranges > 0)
    return np.clip(ratio**strength, 1.0, LARGEST_ACTIVATION_SCALE)
