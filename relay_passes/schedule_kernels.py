"""Give every kernel of a module its scheduled form for the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm
from tvm import tirx

from .. import schedules

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..schedules import Choice
    from ..targets import Target


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass, for one target. Kernels that are scheduled already stay as they are.

    `choose` gives the tuned choice of a naive function, one of `schedules.search_space`, or None
    for the default.
    """

    def __init__(
        self, target: Target, choose: Callable[[tirx.PrimFunc], Choice | None] | None = None
    ) -> None:
        self.target = target
        self.choose = choose

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        scheduled = {}
        for global_var, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc):
                choice = None if self.choose is None else self.choose(function)
                function = schedule_kernel(function, self.target, choice)
            scheduled[global_var] = function
        return tvm.IRModule(scheduled, attrs=module.attrs)


def schedule_kernel(
    function: tirx.PrimFunc, target: Target, choice: Choice | None
) -> tirx.PrimFunc:
    """One kernel as it is compiled for the target."""
    attrs = function.attrs or {}
    if attrs.get("tirx.is_host_func") or attrs.get("tirx.is_scheduled"):
        return function
    return schedules.schedule(function, target, choice)
