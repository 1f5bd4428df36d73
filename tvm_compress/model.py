"""The value that the flow passes along: a Relax module and what its inputs and outputs are called."""

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
