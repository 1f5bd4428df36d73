"""Constants of a rescaled sum that give QLinearAdd for every pair of codes."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_compress.relay_passes.numerics.qlinear_add import matching_constants, qlinear_add
from tvm_compress.relay_passes.numerics.requantize import plan_sum, requantize_sum

CODES = np.arange(256)
BOUNDS = (0, 255)


@pytest.mark.parametrize("seed", range(8))
def test_every_pair_of_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = [float(np.float32(s)) for s in np.exp(rng.uniform(-4, -2.5, 3))]
    zeros = [int(zero) for zero in rng.integers(0, 256, 3)]
    wanted = qlinear_add(CODES[:, None], CODES, scales, zeros, BOUNDS)
    real = (CODES - zeros[0])[:, None] * scales[0] + (CODES - zeros[1]) * scales[1]
    exact = np.clip(np.rint(real / scales[2]) + zeros[2], *BOUNDS)
    far_from_half = np.abs(np.abs(real / scales[2] % 1) - 0.5) > 1e-4
    np.testing.assert_array_equal(wanted[far_from_half], exact[far_from_half])

    found = _constants(wanted, scales, zeros)
    assert found is not None
    bits, clamps, multipliers, offset = found
    got = requantize_sum(
        [
            (CODES[:, None].astype(np.int32), np.int32(-zeros[0]), multipliers[0] / 2.0**bits),
            (CODES.astype(np.int32), np.int32(-zeros[1]), multipliers[1] / 2.0**bits),
        ],
        zeros[2], BOUNDS, "uint8", bits, offset / 2.0**bits, clamps,
    )  # fmt: skip
    np.testing.assert_array_equal(got, wanted)


def test_no_constants_nearby() -> None:
    scales, zeros = (0.031, 0.047, 0.062), (100, 120, 90)
    wanted = qlinear_add(CODES[:, None], CODES, scales, zeros, BOUNDS)
    wanted[100, 120] += 2
    assert _constants(wanted, scales, zeros) is None


def _constants(
    wanted: np.ndarray, scales: list[float] | tuple[float, ...], zeros: list[int] | tuple[int, ...]
) -> tuple[int, list[tuple[int, int]], tuple[np.float32, np.float32], int] | None:
    limits = [
        scale * max(zero, 255 - zero) / scales[2]
        for scale, zero in zip(scales[:2], zeros[:2], strict=True)
    ]
    plan = plan_sum(limits, 0.0, 255)
    assert plan is not None
    bits = plan[0]
    clamps = [(-round(limit * 2.0**bits), round(limit * 2.0**bits)) for limit in plan[1]]
    found = matching_constants(
        wanted - zeros[2],
        [CODES - zero for zero in zeros[:2]],
        [np.float32(scale / scales[2] * 2.0**bits) for scale in scales[:2]],
        clamps, (-zeros[2], 255 - zeros[2]), bits,
    )  # fmt: skip
    return None if found is None else (bits, clamps, *found)
