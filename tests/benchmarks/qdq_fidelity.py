"""Quantised ONNX models, imported and compiled, against ONNX Runtime on the same file.

    python tests/benchmarks/qdq_fidelity.py [--inputs 20] [--models cifar10_resnet20]
    [--unoptimised]

Each asset model is quantised by ONNX Runtime's own static quantiser (per channel, as QDQ and as
QOperator, s8s8 and u8s8), then run by both. Every quantised tensor is made an output, so a row says
for all tensors of all inputs: elements, share that is equal, share within one step, largest
difference in steps; and the same for the model's own outputs. A difference at one tensor is an
input of the next layers, so differences grow with depth.

ONNX Runtime's graph optimisations turn the layers of either format into its integer kernels. With
`--unoptimised` it computes QDQ as written, in float between the quantisers: float sums of products
then fall on the other side of half a step now and then, and such a difference spreads through the
network. Exit status 1 when an operator of ours is left float, or when less than 99.9 % lie within
one step.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import TASKS, Task

MODELS = (
    "cifar10_resnet20",
    "mlperf_kws_dscnn",
    "imagenet_mobilenetv1_025_224",
    "imagenet_squeezenet1_1",
    "imagenet_efficientnet_lite0",
)
FORMATS = ("QDQ", "QOperator")
KINDS = ("s8s8", "u8s8")
CALIBRATION_INPUTS = 32


def quantise(task: Task, path: Path, form: str, kind: str) -> None:
    """Write the statically quantised model to `path`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.items = (
                {name: item} for item in itertools.islice(task.calibration(), CALIBRATION_INPUTS)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(task.path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(input_name(prepared)),
        quant_format=getattr(QuantFormat, form),
        activation_type=QuantType.QUInt8 if kind == "u8s8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def input_name(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


@dataclass
class Observed:
    """The quantised tensors of a model: name => step in units of its elements."""

    codes: list[str] = field(default_factory=list)
    steps: dict[str, float] = field(default_factory=dict)  # the model's own float outputs


def with_intermediates(path: Path, out: Path) -> Observed:
    """Write the model with every 8-bit tensor as an output, and say which these are."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    observed = Observed()
    own = {value.name for value in graph.output}
    for node in graph.node:
        result = node.output[0]
        zero_point = _zero_point(node)
        if node.op_type == "DequantizeLinear" and result in own:
            observed.steps[result] = float(constants[node.input[1]].reshape(-1)[0])
        if zero_point is None or result in own:
            continue
        dtype = constants[zero_point].dtype
        observed.codes.append(result)
        kind = TensorProto.UINT8 if dtype == np.uint8 else TensorProto.INT8
        graph.output.append(helper.make_tensor_value_info(result, kind, None))
    shaped = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v for v in shaped.graph.value_info}
    for value in graph.output:
        if value.name in known and value.name in observed.codes:
            value.CopyFrom(known[value.name])
    onnx.save(model, out)
    return observed


def _zero_point(node: Any) -> str | None:
    """Name of the zero point of a node whose result is 8-bit codes."""
    if node.op_type == "QuantizeLinear":
        return str(node.input[2])
    index = {"QLinearConv": 7, "QLinearMatMul": 7, "QGemm": 8, "QLinearAdd": 7, "QLinearMul": 7}
    if node.op_type in index and len(node.input) > index[node.op_type]:
        return str(node.input[index[node.op_type]])
    if node.op_type in ("QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearSoftmax"):
        return str(node.input[4])
    return str(node.input[1]) if node.op_type == "QLinearConcat" else None


@dataclass
class Tally:
    """Differences in steps, over any number of tensors."""

    elements: int = 0
    equal: int = 0
    within_one: int = 0
    largest: float = 0.0

    def add(self, ours: np.ndarray, theirs: np.ndarray, step: float = 1.0) -> None:
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) / step
        self.elements += difference.size
        self.equal += int((difference < 0.5).sum())
        self.within_one += int((difference < 1.001).sum())
        self.largest = max(self.largest, float(difference.max(initial=0)))

    def __str__(self) -> str:
        share = [100 * part / max(self.elements, 1) for part in (self.equal, self.within_one)]
        return f"{self.elements:,} | {share[0]:.4f} | {share[1]:.4f} | {self.largest:.0f}"


def compare(path: Path, inputs: Iterator[np.ndarray], optimised: bool) -> dict[str, Any]:
    """Run the model at `path` in both and count the differences."""
    import onnxruntime as ort

    from tvm_compress.build import build
    from tvm_compress.importers import load_model
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    wide = path.with_name("wide.onnx")
    observed = with_intermediates(path, wide)
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    theirs = ort.InferenceSession(str(wide), options, providers=["CPUExecutionProvider"])
    plain = build(load_model(path).module, get_target("host"))
    model = load_model(wide)
    built = build(model.module, get_target("host"))
    ours = Session(built.executable, model.inputs, model.outputs)
    names = [output.name for output in theirs.get_outputs()]
    everything, outputs = Tally(), Tally()
    worst: dict[str, Tally] = {}
    for item in inputs:
        expected = dict(
            zip(names, theirs.run(None, {theirs.get_inputs()[0].name: item}), strict=True)
        )
        got = ours.run({model.inputs[0].name: item})
        for name in observed.codes:
            everything.add(got[name], expected[name])
            worst.setdefault(name, Tally()).add(got[name], expected[name])
        for name, step in observed.steps.items():
            outputs.add(got[name], expected[name], step)
    return {
        "everything": everything,
        "outputs": outputs,
        "worst": worst,
        "left_float": plain.left_float,
        "tensors": len(observed.codes),
    }


def main() -> int:
    """The table; 1 when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--unoptimised", action="store_true")
    parser.add_argument("--tensors", action="store_true", help="a line for every tensor")
    options = parser.parse_args()
    print("model | format | kind | tensors | elements | equal % | within 1 % | largest"
          " | output elements | equal % | within 1 % | largest | left float")  # fmt: skip
    failed = False
    tasks = {task.model: task for task in TASKS}
    for name, form, kind in itertools.product(
        options.models.split(","), options.formats.split(","), options.kinds.split(",")
    ):
        task = tasks[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantised.onnx"
            quantise(task, path, form, kind)
            inputs, _ = next(iter(task.tests.values()))()
            found = compare(path, itertools.islice(inputs, options.inputs), not options.unoptimised)
        left = [
            f"{entry['name']} ({entry['op']}: {entry['reason']})" for entry in found["left_float"]
        ]
        print(name, form, kind, found["tensors"], found["everything"], found["outputs"],
              "; ".join(left) or "none", sep=" | ", flush=True)  # fmt: skip
        if options.tensors:
            for tensor, tally in found["worst"].items():
                print(f"    {tensor} | {tally}")
        tally = found["everything"]
        failed |= bool(left) or tally.within_one < 0.999 * tally.elements
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
