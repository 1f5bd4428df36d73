"""One door for all sources: `load_model`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..model import Model, model_from_module
from .failures import first_line

if TYPE_CHECKING:
    import numpy as np
    import tvm

SUFFIXES = {".onnx": "onnx", ".tflite": "tflite", ".pt2": "torch", ".json": "relax"}
_TORCH = (
    "it holds Python objects or weights without their network; load it in PyTorch and write a .pt2 "
    "with torch.export.save(torch.export.export(model.eval(), (example_input,)), 'model.pt2')"
)
_TENSORFLOW = (
    "write a .tflite with tf.lite.TFLiteConverter (from_keras_model, from_saved_model), or an "
    ".onnx with tf2onnx"
)
# How to make a file that is read of one that is not.
MADE_BY = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".safetensors"), _TORCH),
    **dict.fromkeys((".h5", ".keras", ".pb"), _TENSORFLOW),
}


def load_model(
    source: Any,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_values: Mapping[str, float | np.ndarray] | None = None,
    name: str | None = None,
) -> Model:
    """A network as a `Model` in graph form.

    `source` is a path (`.onnx`, `.tflite`, `.pt2`, `.json` = Relax saved with `tvm.ir.save_json`)
    or an object in memory: `onnx.ModelProto`, `torch.export.ExportedProgram`, `tvm.IRModule`.
    `shapes` gives dynamic inputs their size; a first dimension that is the only unknown one becomes
    1. `input_values` freezes inputs to constants, which then fold away. `name` defaults to the file
    name. Raises `ModelError` with one line: what is wrong, where, what to do.
    """
    from ..relay_passes.canonicalize import canonicalize

    kind, source = _kind(source)
    where = f"{source}: " if isinstance(source, Path) else ""
    if name is None:
        name = source.stem if isinstance(source, Path) else "model"
    try:
        module = _import(kind, source, shapes, input_values)
        return model_from_module(canonicalize()(module), name, kind)
    except ModelError as error:
        if str(error).startswith(where):
            raise
        raise ModelError(f"{where}{error}") from error.__cause__
    except Exception as error:  # a damaged file may fail anywhere in the front ends
        raise ModelError(
            f"{where}the model is damaged or uses something that is not supported "
            f"({first_line(error)})"
        ) from error


def _kind(source: Any) -> tuple[str, Any]:
    if isinstance(source, str | Path):
        path = Path(source)
        kind = SUFFIXES.get(path.suffix.lower())
        if not path.exists():
            raise ModelError(f"{path}: no such file")
        if kind is None:
            how = MADE_BY.get(path.suffix.lower(), f"use one of {', '.join(SUFFIXES)}")
            raise ModelError(
                f"{path}: unknown model format {path.suffix or '(no extension)'!r}; {how}"
            )
        if not path.is_file():
            raise ModelError(f"{path}: is not a file")
        return kind, path
    for kind, module_name, class_name in (
        ("onnx", "onnx", "ModelProto"),
        ("torch", "torch.export", "ExportedProgram"),
        ("relax", "tvm.ir", "IRModule"),
    ):
        for base in type(source).__mro__:
            if base.__name__ == class_name and base.__module__.startswith(
                module_name.split(".")[0]
            ):
                return kind, source
    raise ModelError(
        f"cannot import a {type(source).__name__}; pass a path, an onnx.ModelProto, "
        "a torch.export.ExportedProgram or a tvm.IRModule"
    )


def _import(
    kind: str,
    source: Any,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float | np.ndarray] | None,
) -> tvm.IRModule:
    if kind == "onnx":
        from .onnx import import_onnx

        return import_onnx(source, shapes, input_values)
    if kind == "tflite":
        from .tflite import import_tflite

        return import_tflite(source, shapes, input_values)
    if kind == "torch":
        from .torch import import_torch

        return import_torch(source, shapes, input_values)
    from .relax import import_relax

    return import_relax(source, shapes, input_values)
