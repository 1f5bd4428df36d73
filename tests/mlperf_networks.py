"""MLPerf Tiny's four networks on emulated boards, compared byte for byte with what they should be.

The `.tflite` models with TensorFlow Lite's reference kernels (LiteRT, `BUILTIN_REF`); the float
models, quantised by recipe int8, with the unscheduled kernels of their own graph on x86.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tvm_compress import compress
from tvm_compress.artefact import Artefact
from tvm_compress.measures import wilson
from tvm_compress.verification import reference_session

from .relay_passes.tflite_builder import Reference
from .relay_passes.tflite_fidelity import MODELS, codes_of, machine_frames

SOURCES = ("tflite", "onnx")
CORES = ("cortex-m4", "cortex-m7", "cortex-m55")


@dataclass(frozen=True)
class Network:
    """`tflite` and `onnx` are files of the assets. `samples` says what the inputs are, `inputs` how
    many there are. `shape` is the ONNX model's input; `labels`, (file, array) of the assets' data;
    `quality` the benchmark's least top-1."""

    tflite: str
    onnx: str
    samples: str
    inputs: int
    shape: tuple[int, ...]
    labels: tuple[str, str] | None = None
    quality: float | None = None


NETWORKS = {
    "image": Network(
        "pretrainedResnet_quant", "mlperf_ic_resnet8", "CIFAR-10 test", 500, (1, 3, 32, 32),
        ("cifar10_test_0_499.npz", "y"), 0.85,
    ),
    "keyword": Network(
        "kws_ref_model", "mlperf_kws_dscnn", "Speech Commands MFCC", 2738, (1, 1, 49, 10),
        ("speech_commands_mfcc_dev.npz", "y_mlperf"), 0.90,
    ),
    "person": Network(
        "vww_96_int8", "mlperf_vww_mobilenetv1_025", "NIPS17 photographs, 96x96", 500,
        (1, 3, 96, 96),
    ),
    "anomaly": Network(
        "ad01_int8", "mlperf_ad_autoencoder", "random walks like log-mel frames", 500, (1, 640),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """`right` of `inputs` answers have the label; None: there are no labels. `agreeing`: answers of
    the same class as the float network's (None where the output has no classes)."""

    inputs: int
    bytes: int
    differing: int
    right: int | None
    agreeing: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the accuracy."""
        return None if self.right is None else wilson(self.right, self.inputs)


def reals(network: Network, assets: Path, count: int) -> list[np.ndarray]:
    """Inputs of the `.tflite` model before they are quantised, evenly spaced over all."""
    step = max(network.inputs // count, 1)
    return list(islice(MODELS[network.tflite](assets), 0, min(count * step, network.inputs), step))


def labels(network: Network, assets: Path, count: int) -> np.ndarray | None:
    """Classes of `reals`."""
    if network.labels is None:
        return None
    file, array = network.labels
    step = max(network.inputs // count, 1)
    with np.load(assets / "data" / file) as data:
        return data[array][: count * step : step].astype(np.int64)


def calibration(network: Network, assets: Path) -> Iterator[np.ndarray]:
    """Training images for CIFAR-10 and walks of another seed; elsewhere a part of the inputs."""
    if network.tflite == "pretrainedResnet_quant":
        with np.load(assets / "data" / "cifar10_train_first8000.npz") as data:
            yield from data["x"][:512].astype(np.float32)
    elif network.tflite == "ad01_int8":
        yield from islice(machine_frames(seed=1), 256)
    else:
        yield from reals(network, assets, 250)


def as_onnx(network: Network, values: np.ndarray) -> np.ndarray:
    """The same input for the ONNX model: channels first."""
    if len(network.shape) == 4 and network.shape[1] == 3:
        values = np.asarray(values).transpose(2, 0, 1)
    return np.ascontiguousarray(values, np.float32).reshape(network.shape)


def artefact_for(
    network: Network, source: str, core: str, assets: Path, out: Path, recipe: str | Path = "int8"
) -> Artefact:
    """What `tvm-compress compress` makes of a model for a core."""
    if source == "tflite":
        path = assets / "tflite" / f"{network.tflite}.tflite"
        return compress(path, recipe=recipe, target=core, out=out)
    path = assets / "onnx" / f"{network.onnx}.onnx"
    name = _input_name(path)
    feeds = [{name: as_onnx(network, values)} for values in calibration(network, assets)]
    return compress(path, recipe=recipe, target=core, calibration=feeds, out=out)


def _input_name(path: Path) -> str:
    from tvm_compress.importers import load_model

    return load_model(path).inputs[0].name


def compare(
    network: Network, source: str, artefact: Artefact, assets: Path, count: int
) -> Comparison:
    """Run `count` inputs on the artefact's board and compare all of their bytes."""
    inputs = reals(network, assets, count)
    if source == "tflite":
        codes, expected = tflite_bytes(network, assets, inputs)
    else:
        codes, expected = _own_reference(network, artefact, inputs)
    results = artefact.project().run_codes(codes).outputs
    found = [next(iter(outputs.values())) for outputs in results]
    differing = size = 0
    for result, wanted in zip(found, expected, strict=True):
        assert result.dtype == wanted.dtype and result.shape == wanted.shape
        size += wanted.nbytes
        differing += int(np.count_nonzero(result != wanted))
    classes = [int(result.ravel().argmax()) for result in found]
    known = labels(network, assets, count)
    right = None if known is None else int(np.sum(np.array(classes) == known[: len(classes)]))
    agreeing = None
    if network.tflite != "ad01_int8":
        agreeing = int(np.sum(np.array(classes) == _float_classes(network, assets, inputs)))
    return Comparison(len(found), size, differing, right, agreeing)


_Codes = list[dict[str, np.ndarray]]


def tflite_bytes(
    network: Network, assets: Path, inputs: Sequence[np.ndarray]
) -> tuple[_Codes, list[np.ndarray]]:
    """Inputs as codes, and what TensorFlow Lite's reference kernels make of them."""
    reference = Reference((assets / "tflite" / f"{network.tflite}.tflite").read_bytes())
    detail = reference.inputs[0]
    codes, expected = [], []
    for values in inputs:
        code = codes_of(values, detail["quantization"], detail["dtype"]).reshape(detail["shape"])
        codes.append({detail["name"]: code})
        expected.append(next(iter(reference.run(codes[-1]).values())).copy())
    return codes, expected


def _own_reference(
    network: Network, artefact: Artefact, inputs: Sequence[np.ndarray]
) -> tuple[_Codes, list[np.ndarray]]:
    project, reference = artefact.project(), reference_session(artefact)
    name, output = artefact.inputs[0].name, artefact.outputs[0].name
    codes = [project.codes({name: as_onnx(network, values)}) for values in inputs]
    return codes, [reference.run(code)[output] for code in codes]


def _float_classes(network: Network, assets: Path, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Answers of the float ONNX model."""
    import onnxruntime

    path = assets / "onnx" / f"{network.onnx}.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    run: Callable[[np.ndarray], np.ndarray] = lambda x: session.run(None, {name: x})[0]  # noqa: E731
    return np.array([int(run(as_onnx(network, values)).argmax()) for values in inputs])
