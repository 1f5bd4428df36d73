"""What a project's README says, done as it says."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.bare.build import C_FLAGS
from tvm_compress.bare.emit import write_project
from tvm_compress.bare.readme import readme
from tvm_compress.build import compile_project, lower
from tvm_compress.flow import compress_job, load_job
from tvm_compress.progress import Progress
from tvm_compress.targets import get_target

from ..command_line import tiny_data, tiny_onnx

M4 = get_target("cortex-m4")


def packed(folder: Path, form: str, x: np.ndarray) -> bytes:
    """`input.bin`, by the Python of the README beside `interface.json` in `folder`."""
    text = readme("tiny", M4, form)
    script = textwrap.dedent(text[text.index("    import json") :].split("\n\n")[0])
    np.save(folder / "x.npy", x)
    script = f"import numpy\nx = numpy.load('x.npy')\n{script}"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return (folder / "input.bin").read_bytes()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_samples_are_packed_by_the_dtype_of_the_input(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(dtype)
    zero = {"int8": -3, "uint8": 128, "int16": 0}[dtype]
    port = {"dtype": dtype, "scale": 0.5, "zero_point": zero}
    (tmp_path / "interface.json").write_text(json.dumps({"inputs": [port]}))
    x = np.array([[-1e6, -1.0, 20.0, 1e6]], np.float32)
    codes = np.frombuffer(packed(tmp_path, "object", x), dtype)
    assert codes.tolist() == [limits.min, zero - 2, zero + 40, limits.max]


def test_an_input_of_16_bits(tmp_path: Path) -> None:
    """A project whose input is int16: the codes are those that its own quantiser gives."""
    data = tiny_data(tmp_path / "calibration.npz")
    job = load_job(tiny_onnx(tmp_path / "tiny.onnx"), "int16x8", "host", data)
    built = compile_project(lower(compress_job(job, Progress()), M4)).project
    (tmp_path / "project").mkdir()
    write_project(built, "tiny", (["image"], ["scores"]), tmp_path / "project")
    (edge,) = built.inputs
    assert edge.dtype == "int16" and edge.scale is not None
    images = np.load(data)["image"]
    codes = np.frombuffer(packed(tmp_path / "project", built.form, images), np.int16)
    wanted = images.ravel() / edge.scale + edge.zero_point
    assert codes.max() > 127
    np.testing.assert_allclose(codes, np.clip(wanted, -32768, 32767), atol=0.51)


def test_flags_for_who_compiles_by_hand() -> None:
    """Kernels in C need more than the CPU; those that are compiled need nothing."""
    cpu = " ".join(M4.compiler_flags)
    assert f"Flags: `{cpu}`." in readme("tiny", M4, "object")
    assert f"Flags: `{cpu} {' '.join(C_FLAGS)}`." in readme("tiny", M4, "c")
