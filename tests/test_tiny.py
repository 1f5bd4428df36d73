"""Does it work at all? The shipped network through the Python API, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tvm_compress


@pytest.mark.parametrize("name", tvm_compress.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(tvm_compress, name) is not None


@pytest.mark.links
def test_int8_of_the_shipped_network(fashion_mnist: Path, tmp_path: Path) -> None:
    with np.load(fashion_mnist / "test.npz") as data:
        images, labels = data["image"][:200], data["labels"][:200]
    with np.load(fashion_mnist / "calibration.npz") as data:
        np.savez(tmp_path / "calibration.npz", image=data["image"][:64])
    np.savez(tmp_path / "test.npz", image=images, labels=labels)

    artefact = tvm_compress.compress(
        fashion_mnist / "model.onnx",
        recipe="int8",
        target="host",
        calibration=tmp_path / "calibration.npz",
        evaluate=tmp_path / "test.npz",
        out=tmp_path / "out",
    )

    assert [check["name"] for check in artefact.report["checks"] if not check["passed"]] == []
    session = tvm_compress.Artefact.open(tmp_path / "out").session()
    found = [session.run({"image": image[None]})["logits"].argmax() for image in images]
    correct = int((np.array(found) == labels).sum())
    # The float network is right on 189 of these 200.
    assert 185 <= correct <= 193
