"""A TVM script of your own gains int8.

    python examples/in_your_tvm_build.py [model_int8.so]

The model, the calibration samples and the way you compile stay yours; the five marked lines are all
that tvm-compress adds. The compiled module is an ordinary TVM library: it runs without
tvm-compress.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

import tvm_compress.pipeline  # 1: registers the pipeline with Relax
from tvm_compress.targets import get_target  # 2

HERE = Path(__file__).resolve().parent / "fashion_mnist"

module = from_onnx(onnx.load(str(HERE / "model.onnx")), keep_params_in_input=False)
input_name = module["main"].params[0].name
samples = np.load(HERE / "calibration.npz")[input_name]
test = np.load(HERE / "test.npz")


def accuracy(executable: relax.VMExecutable, count: int = 250) -> float:
    """Share of `count` test images whose class is found."""
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    images, labels = test[input_name][:count].astype("float32"), test["labels"][:count]
    found = [int(main(tvm.runtime.tensor(image[None])).numpy().argmax()) for image in images]
    return float(np.mean(np.array(found) == labels))


float_executable = tvm.compile(module, "llvm")

calibration = [{input_name: sample[None].astype("float32")} for sample in samples[:128]]  # 3
pipeline = relax.get_pipeline("tvm_compress", recipe="int8", calibration=calibration)  # 4
int8_executable = tvm.compile(module, get_target("host").tvm_target(), relax_pipeline=pipeline)  # 5

if sys.argv[1:]:
    int8_executable.export_library(sys.argv[1])
print(
    f"accuracy of float32 {accuracy(float_executable):.3f}, of int8 {accuracy(int8_executable):.3f}"
)
