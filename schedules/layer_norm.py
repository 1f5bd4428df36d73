"""Integer layer normalisation over the last axis: exact integer moments, one reciprocal square
root."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from .prim import OPAQUE, make_prim_func

# The scaled value keeps this many fraction bits until the integer beta is added.
FRACTION_BITS = 12
LIMIT = 2**29


def layer_norm(
    shape: Sequence[int],
    dtype: str,
    epsilon_codes: float,
    zero_point: int,
    bounds: tuple[int, int],
    out_dtype: str,
) -> tirx.PrimFunc:
    """(codes, gamma float32 [C], beta int32 [C]) -> codes of (x - mean) / sqrt(var + eps) * gamma +
    beta.

    The input's zero point cancels. With n = C: n*q - Σq and n*Σq² - (Σq)² are exact integers;
    epsilon_codes = n² eps / s_x². gamma holds gamma / s_y * 2^FRACTION_BITS, beta holds
    round(beta / s_y * 2^FRACTION_BITS). Floats are only converted, multiplied, divided and
    square-rooted (all correctly rounded; the one float addition follows no multiplication).
    """
    *outer_shape, channels = shape
    x = te.placeholder(shape, dtype, name="x")
    gamma = te.placeholder((channels,), "float32", name="gamma")
    beta = te.placeholder((channels,), "int32", name="beta")
    k1, k2 = te.reduce_axis((0, channels), "k1"), te.reduce_axis((0, channels), "k2")
    first = te.compute(
        outer_shape, lambda *i: te.sum(x[(*i, k1)].astype("int64"), axis=k1), name="first"
    )
    second = te.compute(
        outer_shape,
        lambda *i: te.sum(x[(*i, k2)].astype("int64") * x[(*i, k2)].astype("int64"), axis=k2),
        name="second",
    )
    count = tirx.const(channels, "int64")
    deviation = te.compute(
        outer_shape,
        lambda *i: tirx.sqrt(
            (second[i] * count - first[i] * first[i]).astype("float32")
            + tirx.const(epsilon_codes, "float32")
        ),
        name="deviation",
    )

    def normalise(*i: tirx.Var) -> tirx.PrimExpr:
        row = i[:-1]
        centred = (x[i].astype("int64") * count - first[row]).astype("float32")
        scaled = tirx.nearbyint(centred / deviation[row] * gamma[i[-1]])
        limit = tirx.const(float(LIMIT), "float32")
        scaled = te.max(te.min(scaled, limit), tirx.const(-float(LIMIT), "float32"))
        fixed = scaled.astype("int32") + beta[i[-1]] + tirx.const(1 << (FRACTION_BITS - 1), "int32")
        code = (fixed >> tirx.const(FRACTION_BITS, "int32")) + tirx.const(zero_point, "int32")
        low, high = (tirx.const(bound, "int32") for bound in bounds)
        return te.max(te.min(code, high), low).astype(out_dtype)

    out = te.compute(shape, normalise, name="layer_norm")
    roles = ["data", "scales", "bias"]
    return make_prim_func("layer_norm", [x, gamma, beta], out, roles, OPAQUE)
