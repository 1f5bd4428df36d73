"""Scheduled kernels => an object file. The one place where machine code is made for what ships."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm
    from tvm import ir, tirx

_IS_ENTRY = "tirx.is_entry_func"


def compile_object(
    functions: Mapping[ir.GlobalVar, tirx.PrimFunc], target: tvm.target.Target
) -> bytes:
    """The object file that defines `functions` under the names of their variables.

    It depends on its arguments alone: the same ones give the same bytes, whatever else is compiled,
    in any thread. Code generation runs without Python's lock, so threads are as good as processes.
    """
    import tvm

    module = tvm.IRModule(
        {var: func.with_attr("global_symbol", var.name_hint) for var, func in functions.items()}
    )
    lower, finish_host, _ = tvm.tirx.get_default_tir_pipeline(target)
    # A thread of its own has neither a target nor a pass context; the latter is the default one.
    with target, tvm.transform.PassContext():
        module = tvm.tirx.transform.BindTarget(target.with_host(target))(module)
        module = lower(module)
        for var, func in module.functions_items():
            # A module of one function has an entry point, which would be the library's `main`.
            if _IS_ENTRY in func.attrs:
                module[var] = func.without_attr(_IS_ENTRY)
        module = finish_host()(module)
        library = tvm.get_global_func(f"target.build.{target.kind.name}")(module, target)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        library.write_to_file(str(path))
        return path.read_bytes()
