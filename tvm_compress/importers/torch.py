"""`torch.export` programs and `.pt2` files => graph form."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import INPUT_NAMES_ATTR, OUTPUT_NAMES_ATTR, REQUANTIZE_ATTR
from ..relay_passes.canonicalize.name_layers import rename
from ..relay_passes.ir import array_const, op_name
from . import names
from .failures import first_line
from .freeze import freeze_inputs
from .pt2 import vetted_bytes
from .shapes import Dim, resolve_shapes

try:
    import torch
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter
except ImportError as error:
    raise ModelError(
        f"importing a torch program needs the package {error.name!r}: "
        "pip install 'tvm-compress[torch]'"
    ) from error


def import_torch(
    source: Path | torch.export.ExportedProgram,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float | np.ndarray] | None,
) -> tvm.IRModule:
    """Relax module in graph form, not yet canonical. Raises `ModelError`."""
    program = _load(source) if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions()
    except Exception as error:
        raise ModelError(f"torch cannot decompose the program: {first_line(error)}") from error
    _check_values(program)
    importer = ExportedProgramImporter()
    importer.update_convert_map(_QUANTISED_OPS)
    _refuse_unsupported(program, importer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importer.from_exported_program(program, False, True, False, _QUANTISED_OPS)
    except Exception as error:
        raise ModelError(f"cannot import the program: {first_line(error)}") from error
    main = rename(module["main"], _labels(program, importer, module["main"]))
    main = _static(main, program, shapes)
    results = main.ret_ty.fields if isinstance(main.ret_ty, relax.TupleType) else [main.ret_ty]
    count = len(results)
    for attribute in [key for key, _ in main.attrs.items() if key != "global_symbol"]:
        main = main.without_attr(attribute)
    main = main.with_attr(INPUT_NAMES_ATTR, [param.name for param in main.params])
    outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    main = main.with_attr(OUTPUT_NAMES_ATTR, outputs)
    if any(_target_name(node).startswith("quantize_per") for node in program.graph.nodes):
        main = main.with_attr(REQUANTIZE_ATTR, "float32")
    module = module.clone()
    module.update_func(module.get_global_var("main"), main)
    return freeze_inputs(module, input_values)


def _load(path: Path) -> torch.export.ExportedProgram:
    content = vetted_bytes(path)
    _register_quantised_operators()
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise ModelError(
            f"{path}: torch {torch.__version__} cannot load this program ({first_line(error)}); "
            "save it again with this version's torch.export.save"
        ) from error
    finally:
        log.setLevel(level)


def _register_quantised_operators() -> None:
    """`torch.ops.quantized_decomposed` exists only once its definitions are imported."""
    import importlib

    for module in ("torchao.quantization.pt2e._decomposed", "torch.ao.quantization.fx._decomposed"):
        try:
            importlib.import_module(module)
        except ImportError:
            continue


def _check_values(program: torch.export.ExportedProgram) -> None:
    for name, tensor in program.state_dict.items():
        if torch.is_floating_point(tensor) and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"parameter {name!r} contains NaN or Inf; export the model again")


def _refuse_unsupported(
    program: torch.export.ExportedProgram, importer: ExportedProgramImporter
) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and _target_name(node) not in importer.convert_map:
            raise ModelError(
                f"operator {node.target} of node {node.name!r} is not supported; replace it in the "
                "module and export again"
            )


def _target_name(node: Any) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


# ---- layer names ---------------------------------------------------------------------------------


def _labels(
    program: torch.export.ExportedProgram,
    importer: ExportedProgramImporter,
    main: relax.Function,
) -> dict[tvm.ir.Var, str]:
    """Each variable's name from the module path of the node that made it."""
    values = {b.var.name: b for block in main.body.blocks for b in block.bindings}
    parameters = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }
    labels: dict[tvm.ir.Var, str] = {}
    for node in program.graph.nodes:
        made = importer.env.get(node)
        if node.op != "call_function" or not isinstance(made, tvm.ir.Var):
            continue
        pending = [made.name]
        while pending:
            binding = values.get(pending.pop())
            if binding is None or binding.var in labels or not hasattr(binding, "value"):
                continue
            operator = (op_name(binding.value) or "value").split(".")[-1]
            path = _module_path(node)
            if operator.startswith("conv") or operator == "matmul":
                weight = _weight(node, parameters)
                labels[binding.var] = names.layer_name(path, operator, weight)
            else:
                labels[binding.var] = names.value_name(path, operator, operator)
            pending.extend(
                argument.name
                for argument in getattr(binding.value, "args", [])
                if isinstance(argument, tvm.ir.Var)
            )
    return labels


def _module_path(node: Any) -> str:
    """`layer1/0/conv1` of the innermost `nn.Module` the node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    return re.sub(r"\.", "/", path)


def _weight(node: Any, parameters: Mapping[str, str]) -> str:
    """Name of the parameter that is an anchor's weight: the first one, through views of it."""
    for argument in reversed(list(node.args)) if "addmm" in str(node.target) else node.args[1:]:
        while hasattr(argument, "op"):
            if argument.op == "placeholder":
                if argument.name in parameters:
                    return parameters[argument.name]
                break
            inputs = [a for a in argument.args if hasattr(a, "op")]
            if len(inputs) != 1:
                break
            argument = inputs[0]
    return ""


# ---- shapes --------------------------------------------------------------------------------------


def _static(
    main: relax.Function,
    program: torch.export.ExportedProgram,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> relax.Function:
    declared: dict[str, list[Dim]] = {}
    variables: dict[str, Any] = {}
    for param in main.params:
        dims: list[Dim] = []
        for size in param.ty.shape.values:
            value = getattr(size, "value", None)
            if isinstance(value, int):
                dims.append(value)
            else:
                dims.append(str(size))
                variables[str(size)] = size
        declared[param.name] = dims
    static = resolve_shapes(declared, shapes)
    bound = {
        str(dim): size
        for name, dims in declared.items()
        for dim, size in zip(dims, static[name], strict=True)
        if isinstance(dim, str)
    }
    if not bound:
        return main
    limits = program.range_constraints
    for symbol, value_range in limits.items():
        size = bound.get(str(symbol))
        if size is not None and not (value_range.lower <= size <= value_range.upper):
            raise ModelError(
                f"dimension {symbol} was exported for sizes {value_range.lower} to "
                f"{value_range.upper}; pass one of these with --shape (got {size})"
            )
    return main.bind_symbolic_vars(bound)


# ---- quantised programs (PT2E) -------------------------------------------------------------------


def _scalar(node: Any, importer: ExportedProgramImporter, index: int, dtype: str) -> tvm.ir.Expr:
    value = node.args[index]
    if hasattr(value, "op"):
        return importer.env[value]
    return array_const(np.array(value, dtype))


def _quantize(node: Any, importer: ExportedProgramImporter) -> tvm.ir.Var:
    """quantized_decomposed.quantize_per_tensor(x, scale, zero_point, min, max, dtype)."""
    x = importer.env[node.args[0]]
    low, high, dtype = node.args[3], node.args[4], _dtype(node.args[5])
    return _quantized(
        importer,
        x,
        _scalar(node, importer, 1, "float32"),
        _zero(node, importer, 2),
        -1,
        low,
        high,
        dtype,
    )


def _dequantize(node: Any, importer: ExportedProgramImporter) -> tvm.ir.Var:
    """quantized_decomposed.dequantize_per_tensor(x, scale, zero_point, min, max, dtype)."""
    x = importer.env[node.args[0]]
    scale = _scalar(node, importer, 1, "float32")
    return importer.block_builder.emit(
        relax.op.dequantize(x, scale, _zero(node, importer, 2), -1, "float32")
    )


def _quantize_channels(node: Any, importer: ExportedProgramImporter) -> tvm.ir.Var:
    """quantized_decomposed.quantize_per_channel(x, scales, zero_points, axis, min, max, dtype)."""
    x, scale = (importer.env[argument] for argument in node.args[:2])
    axis, low, high, dtype = int(node.args[3]), node.args[4], node.args[5], _dtype(node.args[6])
    return _quantized(
        importer, x, _float(importer, scale), _zero(node, importer, 2), axis, low, high, dtype
    )


def _dequantize_channels(node: Any, importer: ExportedProgramImporter) -> tvm.ir.Var:
    """quantized_decomposed.dequantize_per_channel(x, scales, zeros, axis, min, max, dtype)."""
    x, scale = (importer.env[argument] for argument in node.args[:2])
    zero_point = (
        array_const(np.zeros((), "int32")) if node.args[2] is None else _zero(node, importer, 2)
    )
    return importer.block_builder.emit(
        relax.op.dequantize(x, _float(importer, scale), zero_point, int(node.args[3]), "float32")
    )


def _quantized(
    importer: ExportedProgramImporter,
    x: tvm.ir.Expr,
    scale: tvm.ir.Expr,
    zero_point: tvm.ir.Expr,
    axis: int,
    low: int,
    high: int,
    dtype: str,
) -> tvm.ir.Var:
    result = importer.block_builder.emit(relax.op.quantize(x, scale, zero_point, axis, dtype))
    limits = np.iinfo(dtype)
    if low > limits.min or high < limits.max:
        result = importer.block_builder.emit(relax.op.clip(result, low, high))
    return result


def _zero(node: Any, importer: ExportedProgramImporter, index: int) -> tvm.ir.Expr:
    zero_point = _scalar(node, importer, index, "int32")
    if str(zero_point.ty.dtype) != "int32":
        zero_point = importer.block_builder.emit(relax.op.astype(zero_point, "int32"))
    return zero_point


def _float(importer: ExportedProgramImporter, scale: tvm.ir.Expr) -> tvm.ir.Expr:
    if str(scale.ty.dtype) != "float32":
        scale = importer.block_builder.emit(relax.op.astype(scale, "float32"))
    return scale


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_QUANTISED_OPS = {
    "quantize_per_tensor.default": _quantize,
    "quantize_per_tensor.tensor": _quantize,
    "dequantize_per_tensor.default": _dequantize,
    "dequantize_per_tensor.tensor": _dequantize,
    "quantize_per_channel.default": _quantize_channels,
    "dequantize_per_channel.default": _dequantize_channels,
}
