"""Every variable gets a unique, readable name; a layer's anchor keeps its source's name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import tvm
from tvm import relax
from tvm.ir import Expr

from ..ir import op_name, variable_beside
from .anchors import is_anchor
from .rewrite import Rewriter, Var, rewrite_module

# What block builders call a value nobody named.
_ANONYMOUS = re.compile(r"(lv|gv|v|alloc|branch|var)\d*")


@tvm.transform.module_pass(opt_level=0, name="NameLayers")
class NameLayers:
    """Rename variables: unique, letters/digits/`_`; `conv2d_3` for a layer without a name.

    Anchors choose first, so that a layer's name does not depend on what surrounds it. Applying the
    pass again changes nothing.
    """

    def transform_module(
        self, module: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        return rewrite_module(module, _NameLayers)


def rename(function: relax.Function, names: Mapping[Var, str]) -> relax.Function:
    """The function with the given variables under new names."""
    return _Rename(function, names).run()


class _Rename(Rewriter):
    def __init__(self, function: relax.Function, names: Mapping[Var, str]) -> None:
        super().__init__(function)
        self._names = dict(names)

    def rewrite(self, var: Var, value: Expr) -> Expr | None:
        name = self._names.get(var)
        if name is None or name == var.name:
            return None
        renamed = variable_beside(var, name, value.ty)
        self._bind(renamed, value)
        return renamed


class _NameLayers(_Rename):
    def __init__(self, function: relax.Function) -> None:
        super().__init__(function, {})
        taken: dict[str, int] = {}
        for param in function.params:
            taken[param.name] = 1
        bound = list(_bindings(function.body))
        counters: dict[str, int] = {}
        for anchors in (True, False):
            for var, value in bound:
                if is_anchor(value) is anchors:
                    self._names[var] = _unique(_wanted(var, value, counters), taken)


def _bindings(seq: relax.SeqExpr) -> list[tuple[Var, Expr]]:
    found = []
    for block in seq.blocks:
        for binding in block.bindings:
            found.append((binding.var, binding.value))
            if isinstance(binding.value, relax.If):
                found.extend(_bindings(binding.value.true_branch))
                found.extend(_bindings(binding.value.false_branch))
    return found


def _wanted(var: Var, value: Expr, counters: dict[str, int]) -> str:
    name = re.sub(r"_+", "_", re.sub(r"[^0-9A-Za-z]", "_", var.name)).strip("_")
    if name and not _ANONYMOUS.fullmatch(name):
        return name if name[0].isalpha() else f"n{name}"
    operator = (op_name(value) or "value").split(".")[-1]
    index = counters.get(operator, 0)
    counters[operator] = index + 1
    return f"{operator}_{index}"


def _unique(name: str, taken: dict[str, int]) -> str:
    candidate = name
    while candidate in taken:
        taken[name] = taken.get(name, 1) + 1
        candidate = f"{name}_{taken[name]}"
    taken[candidate] = 1
    return candidate
