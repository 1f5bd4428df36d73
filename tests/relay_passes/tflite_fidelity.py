"""Compare a compiled `.tflite` with TensorFlow Lite's reference interpreter, byte for byte."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .tflite_builder import Reference, with_all_outputs


@dataclass(frozen=True)
class Comparison:
    """What was compared: bytes and elements that differ; names of the tensors that do."""

    inputs: int
    tensors: int
    bytes: int
    differing: int
    worst: tuple[str, ...]


def codes_of(values: np.ndarray, quantisation: tuple[float, int], dtype: type) -> np.ndarray:
    """Reals at a model's own input parameters."""
    scale, zero_point = quantisation
    info = np.iinfo(dtype)
    return np.clip(np.rint(values / scale) + zero_point, info.min, info.max).astype(dtype)


def compare(path: Path, inputs: Sequence[np.ndarray], scratch: Path, every: bool) -> Comparison:
    """Run `inputs` (reals or codes) of a one-input model through both; `every` intermediate or the
    outputs only."""
    from tvm_compress.build import build
    from tvm_compress.importers import load_model
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    content = path.read_bytes()
    reference = Reference(content)
    places = [detail["index"] for detail in reference.outputs]
    if every:
        content, places = with_all_outputs(content)
        path = scratch / path.name
        path.write_bytes(content)
    model = load_model(path)
    session = Session(
        build(model.module, get_target("host")).executable, model.inputs, model.outputs
    )
    detail = reference.inputs[0]
    bad: dict[str, int] = {}
    size = 0
    for values in inputs:
        codes = values
        if np.issubdtype(values.dtype, np.floating) and np.issubdtype(detail["dtype"], np.integer):
            codes = codes_of(values, detail["quantization"], detail["dtype"])
        codes = codes.reshape(detail["shape"]).astype(detail["dtype"])
        reference.run({detail["name"]: codes})
        results = session.run({model.inputs[0].name: codes})
        for place, (name, result) in zip(places, results.items(), strict=True):
            expected = reference.tensor(place)
            assert result.dtype == expected.dtype and result.shape == expected.shape, name
            size += expected.nbytes
            wrong = int(np.count_nonzero(result != expected))
            if wrong:
                bad[name] = bad.get(name, 0) + wrong
    return Comparison(len(inputs), len(places), size, sum(bad.values()), tuple(bad))


def _images(archive: Path, size: int) -> Iterator[np.ndarray]:
    """Photographs, RGB, 0..255."""
    from PIL import Image

    with np.load(archive) as data:
        blob, offsets = data["blob"], data["offsets"]
    for begin, end in itertools.pairwise(offsets):
        image = Image.open(io.BytesIO(blob[begin:end].tobytes())).convert("RGB")
        yield np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32)


def _cifar(assets: Path) -> Iterator[np.ndarray]:
    with np.load(assets / "data/cifar10_test_0_499.npz") as data:
        yield from data["x"].astype(np.float32)


def _keywords(assets: Path) -> Iterator[np.ndarray]:
    with np.load(assets / "data/speech_commands_mfcc_dev.npz") as data:
        yield from data["mlperf"]


def _people(assets: Path) -> Iterator[np.ndarray]:
    for image in _images(assets / "data/imagenet_nips17_even500_224_jpeg.npz", 96):
        yield image / 255


def _imagenet(assets: Path) -> Iterator[np.ndarray]:
    for image in _images(assets / "data/imagenet_nips17_even500_224_jpeg.npz", 224):
        yield (image - 127.5) / 127.5


def machine_frames(seed: int) -> Iterator[np.ndarray]:
    """No recordings here: frames of log-mel energies as a random walk around the input's range."""
    rng = np.random.default_rng(seed)
    while True:
        frame = np.cumsum(rng.normal(size=(5, 128)), axis=1)
        yield (-35.0 + 3 * frame + 10 * rng.normal()).astype(np.float32).reshape(-1)


# Model => its inputs, as reals.
MODELS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "kws_ref_model": _keywords,
    "pretrainedResnet_quant": _cifar,
    "vww_96_int8": _people,
    "mobilenet_v1_0.25_224_quant": _imagenet,
    "ad01_int8": lambda _assets: machine_frames(seed=0),
}
