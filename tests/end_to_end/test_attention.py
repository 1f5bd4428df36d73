"""A transformer block from `torch.export` runs in integers throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress import compress

torch = pytest.importorskip("torch")
POSITIONS, WIDTH, HEADS = 8, 16, 2


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Embedding, attention and perceptron with layer norms and residuals, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: Any) -> Any:
        x = self.embed(x)
        q, k, v = (
            part.reshape(1, POSITIONS, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(1, POSITIONS, WIDTH))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(x)


@pytest.mark.slow
def test_transformer_block(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    shape = (1, POSITIONS, WIDTH)
    program = torch.export.export(Block().eval(), (torch.zeros(shape),))
    samples = [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(32)]
    artefact = compress(program, recipe="int8", calibration=samples, out=tmp_path / "out")
    report = artefact.report
    assert all(check["passed"] for check in report["checks"])
    assert report["outputs"][0]["sqnr_db"] > 25
    assert report["stayed_float"] == []
