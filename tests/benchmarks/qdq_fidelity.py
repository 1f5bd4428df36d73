"""Quantised ONNX models, imported and compiled, against ONNX Runtime on the same file.

    python tests/benchmarks/qdq_fidelity.py [--inputs 20] [--models cifar10_resnet20]
    [--runtime integers]

Each asset model is quantised by ONNX Runtime's own static quantiser (per channel, as QDQ and as
QOperator, s8s8 and u8s8), then run by both, with every quantised tensor as an output. A row gives
the tensors' elements and, twice, the share that is equal, the share within one step and the largest
difference in steps:

    whole network    as it runs. A difference at one tensor is an input of the next layers, so
                     that one element in a million can change half of a deep tensor
    each layer       every layer on ONNX Runtime's own inputs: what the layer itself does
                     differently. Layers with a difference are named, the worst first

then the same for the network's own outputs, the operators that ONNX Runtime computed in float
between quantisers, and those that we did. How ONNX Runtime runs a QDQ file is its own choice:

    default     as it comes. On x86 it computes int8 (s8s8) convolutions and products in float:
                the sums are rounded, and fall on the other side of half a step now and then
    integers    its integer kernels for int8 as well (session.qdqisint8allowed, its default on Arm)
    written     no optimisation: everything in float, as the file says

Exit status 1 when we leave an operator in float, or when less than 99.9 % of any layer's elements
lie within one step; with `--runtime integers` also when less than 99.9 % of a whole network's do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import TASKS, Task

if TYPE_CHECKING:
    from tvm_compress.runtime import Session

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
RUNTIMES = ("default", "integers", "written")


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

    @staticmethod
    def total(tallies: Iterable[Tally]) -> Tally:
        whole = Tally()
        for tally in tallies:
            whole.elements += tally.elements
            whole.equal += tally.equal
            whole.within_one += tally.within_one
            whole.largest = max(whole.largest, tally.largest)
        return whole

    @property
    def share_within_one(self) -> float:
        return self.within_one / max(self.elements, 1)

    def __str__(self) -> str:
        equal = self.equal / max(self.elements, 1)
        return f"{100 * equal:.5f} | {100 * self.share_within_one:.5f} | {self.largest:.0f}"


def as_single_layers(path: Path, out: Path, codes: dict[str, np.ndarray]) -> None:
    """Write the model cut at every 8-bit tensor: its readers get an input of the same name."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path)
    graph = model.graph
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name in codes:
                node.input[k] = given(name)
    del graph.output[:]
    for name, array in codes.items():
        kind = TensorProto.UINT8 if array.dtype == np.uint8 else TensorProto.INT8
        graph.input.append(helper.make_tensor_value_info(given(name), kind, array.shape))
        graph.output.append(helper.make_tensor_value_info(name, kind, array.shape))
    onnx.save(model, out)


def given(name: str) -> str:
    """The input that stands for a cut tensor."""
    return f"{name}.given"


def float_operators(path: Path) -> Counter[str]:
    """Operators of an optimised model that compute between a dequantiser and a quantiser."""
    import onnx

    reals: set[str] = set()
    found: Counter[str] = Counter()
    for node in onnx.load(path).graph.node:
        if node.op_type == "DequantizeLinear":
            reals.update(node.output)
        elif node.op_type != "QuantizeLinear" and reals.intersection(node.input):
            reals.update(node.output)
            found[node.op_type] += 1
    return found


def their_session(path: Path, runtime: str, optimised: Path) -> Any:
    """ONNX Runtime on the model at `path`; writes the graph that it runs to `optimised`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    if runtime == "integers":
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    elif runtime == "written":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def our_session(path: Path) -> Session:
    """The model at `path`, imported and compiled for this machine."""
    from tvm_compress.build import build
    from tvm_compress.importers import load_model
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    model = load_model(path)
    built = build(model.module, get_target("host"))
    return Session(built.executable, model.inputs, model.outputs)


@dataclass
class Comparison:
    """One quantised model in both."""

    network: dict[str, Tally]  # by tensor
    layers: dict[str, Tally]
    outputs: Tally
    their_floats: Counter[str]
    left_float: list[str]

    @property
    def is_close(self) -> bool:
        """Whether 99.9 % of every layer's elements lie within one step."""
        return all(tally.share_within_one >= 0.999 for tally in self.layers.values())

    def differing_layers(self, most: int = 3) -> str:
        """The layers that differ on their own, the worst first."""
        found = [(name, t) for name, t in self.layers.items() if t.equal < t.elements]
        found.sort(key=lambda item: item[1].equal / item[1].elements)
        named = [f"{name} ({t.elements - t.equal:,} of {t.elements:,})" for name, t in found[:most]]
        more = [f"and {len(found) - most} more"] if len(found) > most else []
        return "; ".join(named + more) or "none"


def compare(path: Path, inputs: Iterator[np.ndarray], runtime: str) -> Comparison:
    """Run the model at `path` in both and count the differences."""
    from tvm_compress.build import build
    from tvm_compress.importers import load_model
    from tvm_compress.targets import get_target

    plain = build(load_model(path).module, get_target("host"))
    wide, cut = path.with_name("wide.onnx"), path.with_name("cut.onnx")
    observed = with_intermediates(path, wide)
    theirs = their_session(wide, runtime, path.with_name("optimised.onnx"))
    input_name = theirs.get_inputs()[0].name
    names = [output.name for output in theirs.get_outputs()]
    network: defaultdict[str, Tally] = defaultdict(Tally)
    layers: defaultdict[str, Tally] = defaultdict(Tally)
    outputs = Tally()
    whole, single = our_session(wide), None
    for item in inputs:
        expected = dict(zip(names, theirs.run(None, {input_name: item}), strict=True))
        codes = {name: expected[name] for name in observed.codes}
        if single is None:
            as_single_layers(wide, cut, codes)
            single = our_session(cut)
        got = whole.run({input_name: item})
        own = single.run(
            {spec.name: item for spec in single.inputs if spec.name == input_name}
            | {given(name): array for name, array in codes.items()}
        )
        for name, array in codes.items():
            network[name].add(got[name], array)
            layers[name].add(own[name], array)
        for name, step in observed.steps.items():
            outputs.add(got[name], expected[name], step)
    left = [f"{entry['name']} ({entry['op']}: {entry['reason']})" for entry in plain.left_float]
    floats = float_operators(path.with_name("optimised.onnx"))
    return Comparison(network, layers, outputs, floats, left)


def main() -> int:
    """The table; 1 when a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--runtime", choices=RUNTIMES, default="default")
    parser.add_argument("--tensors", action="store_true", help="a line for every tensor")
    options = parser.parse_args()
    figures = "equal % | within 1 % | largest"
    print(
        f"model | format | kind | elements | whole network: {figures} | each layer: {figures}"
        f" | outputs: {figures} | layers that differ | float in ONNX Runtime | float in ours"
    )
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
            found = compare(path, itertools.islice(inputs, options.inputs), options.runtime)
        network, layers = Tally.total(found.network.values()), Tally.total(found.layers.values())
        floats = ", ".join(f"{count} {op}" for op, count in found.their_floats.items())
        print(name, form, kind, f"{network.elements:,}", network, layers, found.outputs,
              found.differing_layers(), floats or "none", "; ".join(found.left_float) or "none",
              sep=" | ", flush=True)  # fmt: skip
        if options.tensors:
            for tensor, tally in found.network.items():
                print(f"    {tensor} | {tally.elements:,} | {tally} | {found.layers[tensor]}")
        failed |= bool(found.left_float) or not found.is_close
        failed |= options.runtime == "integers" and network.share_within_one < 0.999
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
