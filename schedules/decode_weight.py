"""Codes of a weight-only layer => its float weight, in the layout the float kernel reads.

    decoded = (codes - zero points) * scales        before every call of the layer

For layers whose codes no kernel of the target reads. Codes and scales are stored in the order of
the decoded weight, so that all of them are read in vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .prim import OPAQUE, make_prim_func
from .spec import WeightedSpec
from .weights import pack_codes, weight_codes, weight_placeholders, weight_value

if TYPE_CHECKING:
    from tvm import te, tirx


@dataclass(frozen=True)
class DecodedWeight:
    """A layer's `spec` with a float weight, and the parts that `codes` describes it by."""

    spec: WeightedSpec
    codes: WeightedSpec
    parts: tuple[np.ndarray, ...]
    """Codes, and group-wise scales and zero points."""

    def prim_func(self) -> tirx.PrimFunc:
        """The naive decoding kernel: parts => weight. Nothing may be fused with it."""
        inputs, output = describe(self.codes)
        roles = ["weights", "scales", "scales"][: len(inputs)]
        codes = self.codes
        parameters = {
            "weight_dtype": codes.weight_dtype,
            "weight_layout": codes.weight_layout,
            "weight_shape": codes.weight_shape,
            "weight_zero_point": codes.weight_zero_point,
            "group_size": codes.group_size,
            "group_zero_points": codes.group_zero_points,
        }
        return make_prim_func("decode_weight", inputs, output, roles, OPAQUE, parameters)


def split(spec: WeightedSpec, parts: list[np.ndarray], decoded: WeightedSpec) -> DecodedWeight:
    """The parts of a weight in the plain layout, reordered for `decoded`, its float counterpart."""
    if decoded.packed_layout is None:
        return DecodedWeight(decoded, spec, tuple(parts))
    codes = spec.replace(weight_layout=decoded.weight_layout)
    weight = pack_codes(spec, weight_codes(spec, parts[0]), decoded.weight_layout)
    return DecodedWeight(decoded, codes, (weight, *(_blocks(codes, p) for p in parts[1:])))


def describe(spec: WeightedSpec) -> tuple[list[te.Tensor], te.Tensor]:
    """TE description: arguments (codes, [scales, [zero points]]) and the decoded weight."""
    from tvm import te

    weight, *groups = weight_placeholders(spec)
    packed = spec.packed_layout
    if packed is None:
        # [kh, kw, ic, oc] or [K, N]
        shape = spec.plain_weight_shape

        def plain(*index: tirx.Var) -> tirx.PrimExpr:
            *tap, channel, column = index
            return weight_value(spec, [weight, *groups], tuple(tap), channel, column)

        return [weight, *groups], te.compute(shape, plain, name="decoded")
    if packed.group != 1:
        raise ValueError(f"{spec.weight_layout}: float kernels read one position a step")
    blocks = -(-spec.columns // packed.width)
    groups = [
        te.placeholder(
            (int(t.shape[0]), spec.groups_of_channels, blocks, packed.width), t.dtype, name=t.name
        )
        for t in groups
    ]

    def value(
        group: tirx.Var, block: tirx.Var, step: tirx.Var, column: tirx.Var, lane: tirx.Var
    ) -> tirx.PrimExpr:
        from tvm import tirx

        if spec.weight_dtype == "int4":
            # To the top of a word and back: one shift each way for a whole vector, either nibble.
            word = weight[group, block, step // 2, column, lane].astype("int32")
            high = tirx.shift_left(word, 28 - step % 2 * 4)
            code = tirx.shift_right(high, tirx.const(28, "int32"))
        else:
            code = weight[group, block, step, column, lane]
        result = code.astype("float32")
        if spec.weight_zero_point:
            result = result - tirx.const(spec.weight_zero_point, "float32")
        if spec.group_size:
            place = (step // spec.group_size, group, block, column)
            if spec.group_zero_points:
                result = result - groups[1][place].astype("float32")
            result = result * groups[0][place]
        return result

    steps = packed.steps(spec.reduction)
    shape = (spec.groups_of_channels, blocks, steps, packed.width, 1)
    return [weight, *groups], te.compute(shape, value, name="decoded")


def _blocks(spec: WeightedSpec, array: np.ndarray) -> np.ndarray:
    """[K / g, N] => [K / g, groups, blocks, width], zero-filled: a scale of 0 makes padding 0."""
    packed = spec.packed_layout
    assert packed is not None
    blocks = -(-spec.columns // packed.width)
    full = np.zeros((len(array), spec.groups_of_channels, blocks * packed.width), array.dtype)
    full[:, :, : spec.columns] = array.reshape(len(array), spec.groups_of_channels, spec.columns)
    return full.reshape(len(array), spec.groups_of_channels, blocks, packed.width)
