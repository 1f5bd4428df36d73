"""Other runtimes on the same model: float as delivered, and int8 as each of them quantises best.

They are optional (`pip install tvm-compress[peers]`) and imported when asked for. A `Peer` is a
model that is loaded and ready; `bind` gives a function for timing that copies nothing it need not.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, ModelError

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Peer:
    """A model in another runtime. `run`: arrays by name in, arrays in the model's order out."""

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Arrays], list[np.ndarray]]
    bind: Callable[[Arrays], Callable[[], object]]


# --- float, and models that came quantised --------------------------------------------------------


def load_onnxruntime(model: Path, threads: int) -> Peer:
    """`model`: an ONNX file."""
    ort = _import("onnxruntime")
    _require(model, "onnxruntime", ".onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ModelError(f"{model}: onnxruntime cannot load it: {_first_line(error)}") from error
    names = tuple(item.name for item in session.get_inputs())

    def run(feed: Arrays) -> list[np.ndarray]:
        return session.run(None, _pick(feed, names, model))

    def bind(feed: Arrays) -> Callable[[], object]:
        binding = session.io_binding()
        for name, array in _pick(feed, names, model).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for item in session.get_outputs():
            binding.bind_output(item.name)
        return lambda: session.run_with_iobinding(binding)

    return Peer("onnxruntime", names, run, bind)


def load_openvino(model: Path | Any, threads: int) -> Peer:
    """`model`: an ONNX or TFLite file, or OpenVINO's own form of a model."""
    ov = _import("openvino")
    if isinstance(model, Path):
        _require(model, "openvino", ".onnx", ".tflite", ".xml")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # By itself it would compute in bfloat16 where the CPU has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        compiled = ov.Core().compile_model(
            str(model) if isinstance(model, Path) else model, "CPU", options
        )
    except RuntimeError as error:
        raise ModelError(f"{model}: openvino cannot load it: {_first_line(error)}") from error
    names = tuple(item.any_name for item in compiled.inputs)

    def bind(feed: Arrays) -> Callable[[], object]:
        request = compiled.create_infer_request()
        for name, array in _pick(feed, names, model).items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=False))
        return lambda: request.infer(share_outputs=True)

    def run(feed: Arrays) -> list[np.ndarray]:
        results = compiled.create_infer_request().infer(_pick(feed, names, model))
        return [np.array(results[item]) for item in compiled.outputs]

    return Peer("openvino", names, run, bind)


def load_litert(model: Path, threads: int) -> Peer:
    """`model`: a TFLite file; XNNPACK runs what it can.

    Inputs and outputs that the file holds as codes are given and returned as real numbers.
    """
    package = _import("ai_edge_litert.interpreter", "ai-edge-litert")
    _require(model, "litert", ".tflite")
    try:
        interpreter = package.Interpreter(str(model), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{model}: litert cannot load it: {_first_line(error)}") from error
    details = interpreter.get_input_details()
    names = tuple(item["name"] for item in details)

    def bind(feed: Arrays) -> Callable[[], object]:
        arrays = _pick(feed, names, model)
        for item in details:
            interpreter.set_tensor(item["index"], _codes(arrays[item["name"]], item))
        return interpreter.invoke

    def run(feed: Arrays) -> list[np.ndarray]:
        bind(feed)()
        return [
            _reals(interpreter.get_tensor(item["index"]), item)
            for item in interpreter.get_output_details()
        ]

    return Peer("litert", names, run, bind)


def _codes(array: np.ndarray, item: Mapping[str, Any]) -> np.ndarray:
    """`array` as the tensor `item` stores it."""
    dtype = np.dtype(item["dtype"])
    scale, zero_point = item["quantization"]
    if array.dtype == dtype or not scale:
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    codes = np.clip(np.rint(array / scale) + zero_point, limits.min, limits.max)
    return codes.astype(dtype)


def _reals(array: np.ndarray, item: Mapping[str, Any]) -> np.ndarray:
    """Inverse of `_codes`, but for rounding."""
    scale, zero_point = item["quantization"]
    if not scale:
        return array
    return ((array.astype(np.float32) - zero_point) * np.float32(scale)).astype(np.float32)


LOADERS: dict[str, Callable[[Path, int], Peer]] = {
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "litert": load_litert,
}


# Files each of them reads.
READS = {
    "onnxruntime": (".onnx",),
    "openvino": (".onnx", ".tflite", ".xml"),
    "litert": (".tflite",),
}


# --- int8 -----------------------------------------------------------------------------------------


def quantize(
    name: str, model: Path, samples: Sequence[Arrays], folder: Path, *, has_vnni: bool
) -> dict[str, Path]:
    """`{side: file}` of the int8 forms of an ONNX model that runtime `name` has tools for."""
    transformer = _is_transformer(model)
    if name == "onnxruntime":
        files = quantize_for_onnxruntime(
            model, samples, folder, has_vnni=has_vnni, transformer=transformer
        )
        return {f"onnxruntime int8 {form}": file for form, file in files.items()}
    if name == "openvino":
        file = quantize_for_openvino(model, samples, folder / "nncf.xml", transformer=transformer)
        return {"openvino int8": file}
    return {}


def _is_transformer(model: Path) -> bool:
    """Whether attention is what the model is made of: softmax between products, no convolution."""
    import onnx

    kinds = {node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node}
    return {"Softmax", "MatMul"} <= kinds and "Conv" not in kinds


def quantize_for_onnxruntime(
    model: Path, samples: Sequence[Arrays], folder: Path, *, has_vnni: bool, transformer: bool
) -> dict[str, Path]:
    """Static QDQ, int8 weights per channel, with activations of either sign: `{form: ONNX file}`.

    Without VNNI the weights get 7 bits: its kernels would saturate, and 7 bits are the remedy that
    its documentation names. Which form is faster depends on the model, so time both.
    """
    _import("onnxruntime")
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        """Hands out `samples` once."""

        def __init__(self) -> None:
            self.left: Iterator[Arrays] = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.left, None)
            return None if sample is None else dict(sample)

    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / "prepared.onnx"
    # Its symbolic shapes stumble over transformers; static shapes need none.
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    files = {}
    for form, activations in (("u8s8", q.QuantType.QUInt8), ("s8s8", q.QuantType.QInt8)):
        files[form] = folder / f"{form}.onnx"
        q.quantize_static(
            str(prepared),
            str(files[form]),
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not has_vnni,
            activation_type=activations,
            weight_type=q.QuantType.QInt8,
            # For transformers its guide quantises the products only: with the other operators
            # in int8 they are slower (layer norm and GELU lose their fused kernels).
            op_types_to_quantize=["MatMul", "Gemm"] if transformer else None,
        )
    return files


def quantize_for_openvino(
    model: Path, samples: Sequence[Arrays], file: Path, *, transformer: bool
) -> Path:
    """NNCF's post-training quantisation for CPUs; writes OpenVINO's `.xml` (and `.bin`)."""
    # It writes its progress to standard output, which belongs to our caller.
    with redirect_stdout(sys.stderr):
        nncf, ov = _import("nncf"), _import("openvino")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        quantized = nncf.quantize(
            ov.Core().read_model(str(model)),
            nncf.Dataset([dict(sample) for sample in samples]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(samples),
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    ov.save_model(quantized, str(file), compress_to_fp16=False)
    return file


# --- shared ---------------------------------------------------------------------------------------


def _import(name: str, package: str | None = None) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ModelError(
            f"the package {package or name} is not installed; pip install tvm-compress[peers]"
        ) from None


def _require(model: Path, runtime: str, *suffixes: str) -> None:
    if not model.is_file():
        raise ModelError(f"{model}: no such model file")
    if model.suffix not in suffixes:
        raise ModelError(f"{model}: {runtime} reads {' or '.join(suffixes)} files")


def _pick(feed: Arrays, names: Sequence[str], model: object) -> dict[str, np.ndarray]:
    for name in names:
        if name not in feed:
            raise DataError(f"{model}: its input {name!r} is not an input of the artefact")
    return {name: feed[name] for name in names}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
