"""Sparse layers of integers in plain loops, for whatever has no kernel of its own (portable C): a
position at a time, by the entries that are there instead of tests for those that are not."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..targets import Target
from .arm.epilogue import DspEpilogue
from .arm.sparse_staged import StagedKernel, StagedLoops
from .choice import Choice
from .fused import FusedFunction
from .layer_kernel import read_layer
from .sparse import sparse_operands
from .spec import SparseConv2dSpec

NAME = "sparse.portable"


def sparse_kernel(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> StagedKernel[DspEpilogue] | None:
    """The sparse layer with what follows it; None: no form for it."""
    layer = read_layer(
        fused, target, choice, (SparseConv2dSpec,), _takes, sparse_operands, DspEpilogue
    )
    return None if layer is None else _SparseKernel(layer, _PlainLoops, NAME)


def _takes(spec: SparseConv2dSpec) -> bool:
    is_narrow = spec.data_dtype in ("int8", "uint8", "int16") and spec.weight_dtype == "int8"
    return is_narrow and spec.acc_dtype == "int32" and not spec.by_channel


class _PlainLoops(StagedLoops):
    """One position; nothing of it is assembly."""

    def _outputs(self) -> tuple[int, ...]:
        return (self.block,)

    @property
    def entry_cost(self) -> float:
        return self.block


class _SparseKernel(StagedKernel[DspEpilogue]):
    """One function being written."""

    def _declare(self) -> None:
        self.sums = self.e.alloc(self.spec.block, "int32", "sums", registers=True)

    def _code(self) -> str:
        return ""

    def _stay_rolled(self) -> None:
        """That is the compiler's affair."""

    def _sum(self, block: Any, source: tirx.Buffer, at: Any, first: Any, count: Any) -> None:
        e, spec, group = self.e, self.spec, self.spec.group
        zero = tirx.const(0, "int32")
        with e.loop("c", spec.block) as c:
            channel = e.bind("o", tirx.min(block * spec.block + c, spec.out_channels - 1))
            indices = self.window.indices(zero, zero, zero, channel)
            e.store(self.sums, self.epilogue.initial(indices), c)
        with e.loop("group", tirx.div(count, group)) as number:
            entry = e.bind("entry", first + number * group)
            data = [
                e.bind(
                    f"x{i}",
                    source[at + self.operands.offsets[entry + i].astype("int32")].astype("int32"),
                )
                for i in range(group)
            ]
            with e.loop("c", spec.block) as c:
                weights = entry * spec.block + c * group
                total: Any = self.sums[c]
                for i, x in enumerate(data):
                    total += x * self.values[weights + i].astype("int32")
                e.store(self.sums, total, c)
