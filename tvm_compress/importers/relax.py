"""A Relax module, in memory or saved as JSON => graph form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import INPUT_NAMES_ATTR
from ..relay_passes.ir import constant, op_name
from .freeze import freeze_inputs
from .shapes import Dim, resolve_shapes

MAX_FILE_BYTES = 2**32


def import_relax(
    source: Path | tvm.IRModule,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float | np.ndarray] | None,
) -> tvm.IRModule:
    """The module, checked: one function `main` of tensors with weights as constants."""
    module = _read(source) if isinstance(source, Path) else source
    if "main" not in [global_var.name_hint for global_var in module.get_global_vars()]:
        raise ModelError("the module has no function 'main'")
    main = module["main"]
    if not isinstance(main, relax.Function):
        raise ModelError("'main' is not a Relax function")
    declared: dict[str, list[Dim]] = {}
    for param in main.params:
        sizes = getattr(getattr(param.ty, "shape", None), "values", None)
        if not isinstance(param.ty, relax.TensorType) or sizes is None:
            raise ModelError(f"parameter {param.name!r} of main is no tensor of known rank")
        values = [getattr(size, "value", None) for size in sizes]
        declared[param.name] = [
            value if isinstance(value, int) else str(size)
            for value, size in zip(values, sizes, strict=True)
        ]
    _check_values(main)
    static = resolve_shapes(declared, shapes)
    bound = {
        dim: size
        for name, dims in declared.items()
        for dim, size in zip(dims, static[name], strict=True)
        if isinstance(dim, str)
    }
    if bound:
        main = main.bind_symbolic_vars(bound)
    if INPUT_NAMES_ATTR not in (main.attrs or {}):
        main = main.with_attr(INPUT_NAMES_ATTR, list(declared))
    module = module.clone()
    module.update_func(module.get_global_var("main"), main)
    return freeze_inputs(module, input_values)


def _read(path: Path) -> tvm.IRModule:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        module = tvm.ir.load_json(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 - TVM raises many kinds, all mean the same
        line = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ModelError(
            f"{path}: not a Relax module saved with tvm.ir.save_json ({line})"
        ) from None
    if not isinstance(module, tvm.IRModule):
        raise ModelError(f"{path}: holds a {type(module).__name__}, not a Relax module")
    return module


def _check_values(main: relax.Function) -> None:
    for block in main.body.blocks:
        for binding in block.bindings:
            for argument in getattr(binding.value, "args", []):
                array = constant(argument)
                if array is None or array.dtype.kind != "f" or not array.ndim:
                    continue
                if np.isnan(array).any():
                    raise ModelError(
                        f"a constant of {binding.var.name!r} "
                        f"({op_name(binding.value)}) contains NaN"
                    )
