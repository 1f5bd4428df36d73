"""The shipped network is what its README says it is, and its training script can make it again."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest


def correct(model: Path, images: np.ndarray, labels: np.ndarray) -> int:
    session = onnxruntime.InferenceSession(model)
    logits = [session.run(["logits"], {"image": image[None]})[0] for image in images]
    return int((np.concatenate(logits).argmax(1) == labels).sum())


def test_shipped_network_has_the_stated_accuracy(fashion_mnist: Path) -> None:
    with np.load(fashion_mnist / "test.npz") as data:
        images, labels = data["image"], data["labels"]
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == np.float32
    # README: 1,879. Another ONNX Runtime may round a tie of two logits differently.
    assert abs(correct(fashion_mnist / "model.onnx", images, labels) - 1879) <= 1


def test_calibration_images_carry_no_labels_and_are_no_test_images(fashion_mnist: Path) -> None:
    with np.load(fashion_mnist / "calibration.npz") as data:
        assert data.files == ["image"]
        calibration = data["image"]
    with np.load(fashion_mnist / "test.npz") as data:
        test = {image.tobytes() for image in data["image"]}
    assert calibration.shape == (512, 1, 28, 28)
    assert not any(image.tobytes() in test for image in calibration)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


def test_training_script_learns_and_writes_the_files(fashion_mnist: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    random = np.random.default_rng(0)
    for split, count in (("train", 1280), ("t10k", 500)):
        labels = random.integers(0, 10, count)
        # Ten classes that differ in brightness: one epoch is enough to do better than guessing.
        images = np.clip(
            labels[:, None, None] * 25 + random.integers(0, 20, (count, 28, 28)), 0, 255
        )
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels)

    out = tmp_path / "out"
    arguments = ["--data", tmp_path, "--out", out, "--epochs", "2", "--batch", "32"]
    done = subprocess.run(
        [sys.executable, fashion_mnist / "train.py", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with np.load(out / "calibration.npz") as data:
        assert data["image"].shape == (512, 1, 28, 28)
    with np.load(out / "test.npz") as data:
        assert correct(out / "model.onnx", data["image"], data["labels"]) > 100  # guessing: 50


def test_training_script_names_the_package_with_the_data(
    fashion_mnist: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    done = subprocess.run(
        [sys.executable, fashion_mnist / "train.py", "--data", tmp_path / "none"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("apt-get install dataset-fashion-mnist")
