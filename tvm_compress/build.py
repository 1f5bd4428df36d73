"""Compile a module in graph or kernel form for a target, through the one ordered pass list."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm
    from tvm import relax

    from .targets import Target


def compile_module(module: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """Graph form (or kernel form) => executable with scheduled kernels for `target`."""
    import tvm

    return tvm.compile(module, target=target.tvm_target)
