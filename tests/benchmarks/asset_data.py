"""The asset models with their data, preprocessed as each model was trained; see the assets'
catalogue."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

ASSETS = Path(
    os.environ.get("TVM_COMPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets")
)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Task:
    """One model and the data that say something about it.

    `calibration` and each of `tests` yield model inputs [1, ...] float32; tests come with labels.
    Where there is one set only, every `shared`th input of the test set, without label, calibrates.
    """

    model: str
    calibration: Callable[[], Iterator[np.ndarray]]
    tests: dict[str, Callable[[], tuple[Iterator[np.ndarray], np.ndarray]]]
    shared: int | None = None

    @property
    def path(self) -> Path:
        return ASSETS / "onnx" / f"{self.model}.onnx"


def _jpegs(name: str) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Images uint8 HWC and labels of a JPEG collection."""
    from PIL import Image

    with np.load(ASSETS / "data" / name) as archive:
        blob, offsets, labels = archive["blob"], archive["offsets"], archive["y"].astype(np.int64)

    def images() -> Iterator[np.ndarray]:
        for begin, end in pairwise(offsets):
            yield np.asarray(Image.open(io.BytesIO(blob[begin:end].tobytes())).convert("RGB"))

    return images(), labels


def _nchw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.astype(np.float32).transpose(2, 0, 1)[None])


def _cifar_normalised(image: np.ndarray) -> np.ndarray:
    return _nchw((image.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD)


def _cifar_binary(image: np.ndarray) -> np.ndarray:
    return _nchw(np.round((image.astype(np.float32) / 255 * 2 - 1) * 128) / 128)


def _efficientnet(image: np.ndarray) -> np.ndarray:
    return _nchw((image.astype(np.float32) - 127) / 128)


def _mobilenet(image: np.ndarray) -> np.ndarray:
    return ((image.astype(np.float32) - 127.5) / 127.5)[None]


def _squeezenet(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    resized = np.asarray(Image.fromarray(image).resize((227, 227), Image.Resampling.BILINEAR))
    return _nchw(resized[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32))


Preprocess = Callable[[np.ndarray], np.ndarray]


def _cifar(model: str, preprocess: Preprocess) -> Task:
    """Calibrated on training images; scored on 500 lossless and 4,500 JPEG test images."""

    def calibration() -> Iterator[np.ndarray]:
        with np.load(ASSETS / "data" / "cifar10_train_first8000.npz") as archive:
            yield from map(preprocess, archive["x"][:512])

    def lossless() -> tuple[Iterator[np.ndarray], np.ndarray]:
        with np.load(ASSETS / "data" / "cifar10_test_0_499.npz") as archive:
            return map(preprocess, archive["x"]), archive["y"].astype(np.int64)

    def jpeg() -> tuple[Iterator[np.ndarray], np.ndarray]:
        images, labels = _jpegs("cifar10_test_jpeg_4500.npz")
        return map(preprocess, images), labels

    return Task(model, calibration, {"CIFAR-10 lossless": lossless, "CIFAR-10 JPEG": jpeg})


def _imagenet(model: str, preprocess: Preprocess, first_class: int = 0) -> Task:
    """There is one set of 500 images: 100 of them, without labels, calibrate."""
    name = "imagenet_nips17_even500_224_jpeg.npz"

    shared = 5

    def calibration() -> Iterator[np.ndarray]:
        images, _ = _jpegs(name)
        yield from (preprocess(image) for k, image in enumerate(images) if k % shared == 0)

    def test() -> tuple[Iterator[np.ndarray], np.ndarray]:
        images, labels = _jpegs(name)
        return map(preprocess, images), labels + first_class

    return Task(model, calibration, {"NIPS17": test}, shared)


def _keywords(model: str, features: str, labels: str, shape: tuple[int, ...]) -> Task:
    """There is one set of 2,738 clips: every 11th, without labels, calibrates."""
    shared = 11

    def load() -> tuple[np.ndarray, np.ndarray]:
        with np.load(ASSETS / "data" / "speech_commands_mfcc_dev.npz") as archive:
            return archive[features].reshape(-1, *shape), archive[labels].astype(np.int64)

    def calibration() -> Iterator[np.ndarray]:
        return iter(load()[0][::shared, None])

    def test() -> tuple[Iterator[np.ndarray], np.ndarray]:
        inputs, classes = load()
        return iter(inputs[:, None]), classes

    def squeezed(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return (item.reshape(1, *shape) for item in items)

    return Task(
        model,
        lambda: squeezed(calibration()),
        {"Speech Commands": lambda: (squeezed(test()[0]), test()[1])},
        shared,
    )


TASKS: tuple[Task, ...] = (
    _cifar("mlperf_ic_resnet8", _nchw),
    _cifar("cifar10_resnet20", _cifar_normalised),
    _cifar("cifar10_resnet56", _cifar_normalised),
    _cifar("cifar10_bnn_cnv_w1a1", _cifar_binary),
    _keywords("mlperf_kws_dscnn", "mlperf", "y_mlperf", (1, 49, 10)),
    _keywords("arm_kws_DS_CNN_S", "arm_640_320", "y_arm", (49, 10)),
    _keywords("arm_kws_DNN_S", "arm_640_640", "y_arm", (25, 10)),
    _keywords("arm_kws_GRU_S", "arm_640_640", "y_arm", (25, 10)),
    _keywords("arm_kws_CRNN_S", "arm_640_320", "y_arm", (49, 10)),
    _imagenet("imagenet_mobilenetv1_025_224", _mobilenet, first_class=1),
    _imagenet("imagenet_squeezenet1_1", _squeezenet),
    _imagenet("imagenet_efficientnet_lite0", _efficientnet),
)
