"""For tests: run the command line in this process, and a network small enough to compile often."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from onnx import helper

from tests.onnx_files import save_onnx
from tvm_compress.cli import main

CLASSES = 4


@dataclass(frozen=True)
class Result:
    """What one command gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The error: the last line of standard error, and the only one that begins so."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


def tvm_compress(*arguments: object) -> Result:
    """`tvm-compress ARGUMENTS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    with (
        patch.object(sys, "argv", ["tvm-compress", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    return Result(status, out.getvalue(), err.getvalue())


def tiny_onnx(
    path: Path,
    *,
    side: int | str = 8,
    extra: tuple[onnx.NodeProto, ...] = (),
    weight: np.ndarray | None = None,
) -> Path:
    """conv 3x3 (1 -> 8), ReLU, max-pool, fully connected: image [1, 1, 8, 8] -> scores [1, 4].

    `extra` nodes stand behind the scores and write `out`; `weight` replaces the convolution's.
    """
    random = np.random.default_rng(7)
    kernel = random.standard_normal((8, 1, 3, 3)) if weight is None else weight
    arrays = {
        "conv_w": kernel,
        "conv_b": random.standard_normal(8),
        "fc_w": random.standard_normal((CLASSES, 128)) / 8,
        "fc_b": random.standard_normal(CLASSES),
    }
    last = "out" if extra else "scores"
    nodes = [
        helper.make_node("Conv", ["image", "conv_w", "conv_b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc_w", "fc_b"], ["scores"], "fc", transB=1),
        *extra,
    ]
    return save_onnx(path, nodes, arrays, (1, 1, side, side), last, (1, CLASSES))


def tiny_data(path: Path, count: int = 40, labels: np.ndarray | None = None) -> Path:
    """Random images for `tiny_onnx`."""
    images = np.random.default_rng(3).standard_normal((count, 1, 8, 8)).astype(np.float32)
    if labels is None:
        np.savez(path, image=images)
    else:
        np.savez(path, image=images, labels=labels)
    return path
