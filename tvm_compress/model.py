"""The value that the flow passes along: a Relax module and its inputs' and outputs' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm

INPUT_NAMES_ATTR = "tvm_compress.input_names"
OUTPUT_NAMES_ATTR = "tvm_compress.output_names"
REQUANTIZE_ATTR = "tvm_compress.requantize"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input or output, as the source calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Model:
    """A network in graph form: Relax `main`, weights as constants, batch-norm folded.

    `module` carries the names of `inputs` and `outputs` as attributes of `main`
    (`tvm_compress.input_names`, `tvm_compress.output_names`), so that a plain TVM pass keeps them.
    """

    name: str
    module: tvm.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source_format: str  # "onnx" | "tflite" | "torch" | "relax"


def model_from_module(module: tvm.IRModule, name: str, source_format: str) -> Model:
    """The `Model` around a module in graph form: specs from `main` and its name attributes."""
    from .errors import ModelError
    from .relay_passes.ir import dtype_of, shape_of

    main = module["main"]
    attributes = main.attrs or {}
    results = list(main.ret_ty.fields) if hasattr(main.ret_ty, "fields") else [main.ret_ty]
    input_names = attributes.get(INPUT_NAMES_ATTR) or [p.name for p in main.params]
    output_names = attributes.get(OUTPUT_NAMES_ATTR) or _default_outputs(len(results))
    inputs, outputs = [], []
    for label, param in zip(input_names, main.params, strict=True):
        shape = shape_of(param)
        if shape is None:
            raise ModelError(f"input {str(label)!r} has no static shape")
        inputs.append(TensorSpec(str(label), shape, dtype_of(param)))
    for label, result in zip(output_names, results, strict=True):
        dims = getattr(getattr(result, "shape", None), "values", None)
        if dims is None or any(not isinstance(getattr(d, "value", None), int) for d in dims):
            raise ModelError(f"output {str(label)!r} has no static shape")
        outputs.append(TensorSpec(str(label), tuple(int(d) for d in dims), str(result.dtype)))
    return Model(name, module, tuple(inputs), tuple(outputs), source_format)


def _default_outputs(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
