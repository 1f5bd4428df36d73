"""Depthwise convolution with RISC-V's vectors: groups of eight registers of channels by their
weights, both widened to 16 bits (`vwmacc.vv`)."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ...targets import Target
from ..choice import Choice
from ..depthwise_kernel import DepthwiseKernel, depthwise_kernel_as
from ..fused import FusedFunction
from .dot import MOST_REGISTERS

# A group of sums, and half ones of weights and data: with a second output LLVM spills (measured).
_OUTPUTS = 1
# Says of its first argument that it changes with the second: a compiler that knew better would load
# and widen all weights in front of the loop over outputs, for which there are no registers.
_PINNED = "tvmc_pinned"


def depthwise_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> VectorDepthwiseKernel | None:
    """The depthwise anchor vectorised over channels; None: no form for it."""
    return depthwise_kernel_as(VectorDepthwiseKernel, fused, target, choice)


class VectorDepthwiseKernel(DepthwiseKernel):
    """One function being written."""

    name = "riscv.depthwise"

    def _lanes(self) -> int:
        return MOST_REGISTERS * self.target.vector_bits // 32

    def _outputs(self) -> int:
        return _OUTPUTS

    def _code(self) -> str:
        return f"""
define internal i32 @{_PINNED}(i32 %value, i32 %start) alwaysinline nounwind memory(none) {{
  %r = call i32 asm "", "=r,0,r"(i32 %value, i32 %start) nounwind memory(none)
  ret i32 %r
}}
"""

    def _channel_of_weights(self, channel: Any, start: Any) -> Any:
        pinned = tirx.call_pure_extern("int32", _PINNED, channel, start)
        return self.e.bind("channel_of_weights", pinned)

    def _operand(self) -> str:
        bytes_of_data = self.spec.data_dtype in ("int8", "uint8")
        is_narrow = bytes_of_data and self.spec.weight_dtype == "int8"
        return "int16" if is_narrow and not self.spec.weight_zero_point else self.compute
