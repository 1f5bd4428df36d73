"""A .pt2 file, calibrated with a folder of images, through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..command_line import tvm_compress

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'torch')")

RECIPE = """\
version: 1
preprocessing: {resize: 18, crop: 16, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
steps:
  - quantize: {layers: all, weights: int8, activations: int8}
"""


def test_pt2_and_folder_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(16),
        torch.nn.Flatten(), torch.nn.Linear(8, 5),
    ).eval()  # fmt: skip
    program = torch.export.export(network, (torch.zeros(1, 3, 16, 16),))
    torch.export.save(program, tmp_path / "net.pt2")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")

    out = tmp_path / "made" / "out"
    result = tvm_compress("compress", tmp_path / "net.pt2", "--recipe", tmp_path / "recipe.yaml",
                          "--calib", images, "-o", out, "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert [row["scheme"] for row in result.json["layers"]] == ["int8/channel × int8"] * 2
    assert result.json["outputs"][0]["sqnr_db"] > 30
    checked = tvm_compress("verify", out, "--eval", images, "--json")
    assert checked.status == 0 and checked.json["exactness"]["differing"] == []
