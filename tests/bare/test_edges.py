"""What the header's conversions do is what the model's own quantiser does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.bare.emit import write_project
from tvm_compress.bare.session import ProjectSession
from tvm_compress.build import build, compile_project, lower
from tvm_compress.importers import load_model
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

from ..relay_passes.tflite_builder import Operator, Tensor
from ..relay_passes.tflite_builder import build as build_tflite
from .test_project import PORTABLE

pytest.importorskip("ai_edge_litert")

SCALE, ZERO = 0.25, 5


def doubler(folder: Path) -> Path:
    """A `.tflite` from floats to floats: quantise, add to itself, dequantise."""
    tensors = [
        Tensor("x", (1, 64), "float32"),
        Tensor("q", (1, 64), "int8", SCALE, ZERO),
        Tensor("s", (1, 64), "int8", 2 * SCALE, -9),
        Tensor("y", (1, 64), "float32"),
    ]
    operators = [
        Operator("QUANTIZE", ["x"], ["q"], {}, "QuantizeOptions", 2),
        Operator("ADD", ["q", "q"], ["s"], {}, "AddOptions", 2),
        Operator("DEQUANTIZE", ["s"], ["y"], {}, "DequantizeOptions", 3),
    ]
    path = folder / "doubler.tflite"
    path.write_bytes(build_tflite(tensors, operators, ["x"], ["y"]))
    return path


@pytest.mark.links
def test_ties_go_where_the_model_sends_them(tmp_path: Path) -> None:
    """TensorFlow Lite's QUANTIZE rounds half away from zero: in the header and in `run` too."""
    model = load_model(doubler(tmp_path))
    values = np.concatenate([(np.arange(48) - 24.5) * SCALE, np.linspace(-40, 40, 16)])
    x = values.astype(np.float32)[None]
    built = build(model.module, get_target("host"))
    expected = Session(built.executable, model.inputs, model.outputs).run({"x": x})["y"]

    folder = tmp_path / "deploy"
    folder.mkdir()
    project = compile_project(lower(model.module, PORTABLE), "c").project
    write_project(project, "doubler", (["x"], ["y"]), folder)
    found = ProjectSession(folder, get_target("host")).run({"x": x})["y"]
    np.testing.assert_array_equal(found, expected)

    source = tmp_path / "codes.c"
    source.write_text(
        '#include "doubler.h"\nint code(float x) { return doubler_quantize_input_0(x); }\n'
    )
    library = tmp_path / "codes.so"
    compiler = shutil.which("gcc") or shutil.which("cc") or "cc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", f"-I{folder}", source, "-o", library], check=True
    )
    code = ctypes.CDLL(str(library)).code
    code.argtypes = [ctypes.c_float]
    steps = x[0].astype(np.float64) / SCALE
    away = np.sign(steps) * np.floor(np.abs(steps) + 0.5)
    wanted = np.clip(away + ZERO, -128, 127).astype(int)
    assert [code(float(value)) for value in x[0]] == list(wanted)
    assert list(wanted) != list(np.clip(np.rint(steps) + ZERO, -128, 127).astype(int))
