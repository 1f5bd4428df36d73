"""Quantise `main` and every branch of an `If`: each branch is a graph of its own.

A branch takes floats and returns floats; its integer domain begins and ends inside. Its ranges come
from the calibration samples that took it, so a branch that none took keeps float activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import tvm

from .branches import as_main, functions_in_order, on_function
from .graph import Graph
from .numerics.statistics import Statistics
from .observations import Observations
from .op_kinds import ANCHORS
from .placement import LeftFloat
from .quantize import LEFT_FLOAT_ATTR, Quantize
from .quantize import observe as observe_main
from .quantize_config import QuantizeConfig

Schemes = Mapping[str, QuantizeConfig]
NOT_TAKEN = "in a branch of an If that no calibration sample took"


@tvm.transform.module_pass(opt_level=0, name="QuantizeBranches")
class QuantizeBranches:
    """`Quantize(schemes, statistics)` on `main` and on the functions of its branches."""

    def __init__(self, schemes: Schemes, statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        branches = functions_in_order(module)[1:]
        apart: set[str] = set()
        for branch in branches:
            schemes = _inside(module, branch, self.schemes)
            apart |= set(schemes)
            if schemes:
                module = self._quantized(module, branch, schemes)
        rest = {name: config for name, config in self.schemes.items() if name not in apart}
        return self._pass(rest)(module)

    def _pass(self, schemes: Schemes) -> tvm.transform.Pass:
        return tvm.transform.Sequential([Quantize(schemes, self.statistics)])

    def _quantized(
        self, module: tvm.IRModule, branch: tvm.ir.GlobalVar, schemes: Schemes
    ) -> tvm.IRModule:
        wanted = observe_main(as_main(module, branch), schemes).tensors
        left: list[LeftFloat] = []
        if any(name not in self.statistics for name in wanted):
            ops = {variable.name: graph.op(variable) for graph in [Graph(module[branch])]
                   for variable in graph.values}  # fmt: skip
            left = [
                LeftFloat(name, ANCHORS[ops[name] or ""], NOT_TAKEN)
                for name, config in schemes.items()
                if not config.is_weight_only
            ]
            schemes = {name: config for name, config in schemes.items() if config.is_weight_only}
        module = on_function(module, branch, self._pass(schemes))
        if left:
            function = module[branch]
            records = json.loads(str(function.attrs[LEFT_FLOAT_ATTR])) + [vars(x) for x in left]
            function = function.with_attr(LEFT_FLOAT_ATTR, json.dumps(records))
            module = module.clone()
            module.update_func(branch, function)
        return module


def observe(module: tvm.IRModule, schemes: Schemes) -> Observations:
    """The tensors whose ranges `QuantizeBranches(schemes, ...)` needs, in all functions."""
    wanted = Observations()
    for global_var in functions_in_order(module):
        wanted = wanted | observe_main(as_main(module, global_var), schemes)
    return wanted


def _inside(module: tvm.IRModule, branch: tvm.ir.GlobalVar, schemes: Schemes) -> Schemes:
    names = {variable.name for variable in Graph(module[branch]).values}
    return {name: config for name, config in schemes.items() if name in names}
