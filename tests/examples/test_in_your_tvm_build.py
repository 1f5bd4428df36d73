"""The example script of a TVM user: int8 keeps its accuracy, and what it emits needs only TVM."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# TVM imports torch where it is installed, at several seconds; a user may well not have it.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # importing it would fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT_US = """
import sys
sys.modules["torch"] = sys.modules["tvm_compress"] = None
import numpy as np
import tvm
from tvm import relax
library, data = sys.argv[1:]
main = relax.VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())["main"]
with np.load(data) as test:
    images, labels = test["image"][:250], test["labels"][:250]
found = [int(main(tvm.runtime.tensor(image[None])).numpy().argmax()) for image in images]
print((np.array(found) == labels).mean())
"""


def run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.links
def test_script_gains_int8_and_its_library_runs_without_us(
    repository: Path, fashion_mnist: Path, tmp_path: Path
) -> None:
    script = repository / "examples" / "in_your_tvm_build.py"
    printed = run(sys.executable, "-c", WITHOUT_TORCH, script, "model_int8.so", cwd=tmp_path)
    found = re.search(r"float32 (0\.\d+), of int8 (0\.\d+)", printed)
    assert found is not None, printed
    of_float, of_int8 = map(float, found.groups())
    assert of_float == pytest.approx(0.952, abs=0.003)
    assert of_int8 == pytest.approx(of_float, abs=0.01)

    library, data = tmp_path / "model_int8.so", fashion_mnist / "test.npz"
    alone = run(sys.executable, "-c", WITHOUT_US, library, data, cwd=tmp_path)
    assert float(alone) == pytest.approx(of_int8, abs=1e-3)  # the script prints three digits
