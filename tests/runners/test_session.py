"""A C project as a model: conversion at its edges, many samples, its interface file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress.errors import ArtefactError, DataError
from tvm_compress.runners.session import INTERFACE, BoardSession, read_interface
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

SCALE, ZERO_POINT, OUT_SCALE, OUT_ZERO = 0.05, -3, 0.25, 100
# y = x + 1 in codes, with saturation; counts are copied as they are.
SOURCE = """
#include "net.h"
int net_run(const void *const *in, void *const *out, void *arena) {
    const int8_t *x = in[0];
    const int32_t *counts = in[1];
    uint8_t *y = out[0];
    int32_t *copied = out[1];
    (void)arena;
    for (int i = 0; i < 6; ++i) y[i] = (uint8_t)(x[i] + 128 < 255 ? x[i] + 129 : 255);
    for (int i = 0; i < 2; ++i) copied[i] = counts[i];
    return 0;
}
"""
HEADER = "#include <stdint.h>\nint net_run(const void *const *, void *const *, void *);\n"
MODEL_IO = """
#include "net.h"
#define MODEL_RUN net_run
#define MODEL_ARENA_BYTES 1
#define MODEL_INPUT_BYTES {6, 8}
#define MODEL_INPUT_BUFFER_BYTES 32
#define MODEL_OUTPUT_BYTES {6, 8}
#define MODEL_OUTPUT_BUFFER_BYTES 32
"""


def port(name: str, shape: list[int], dtype: str, scale: float | None = None, zero: int = 0) -> Any:
    return {
        "name": name,
        "shape": shape,
        "dtype": dtype,
        "scale": scale,
        "zero_point": zero,
        "converted": scale is not None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    value = {
        "name": "net",
        "form": "c",
        "arena_bytes": 1,
        "inputs": [port("x", [1, 6], "int8", SCALE, ZERO_POINT), port("counts", [2], "int32")],
        "outputs": [
            port("y", [1, 6], "uint8", OUT_SCALE, OUT_ZERO),
            port("copied", [2], "int32"),
        ],
        "calls": [{"symbol": "net_kernel", "layers": ["conv1"], "outputs": ["y"]}],
    }
    (tmp_path / INTERFACE).write_text(json.dumps(value))
    (tmp_path / "net.h").write_text(HEADER)
    (tmp_path / "net.c").write_text(SOURCE)
    (tmp_path / "net_constants.c").write_text("typedef int nothing;\n")
    (tmp_path / "net_kernels.c").write_text("typedef int nothing;\n")
    (tmp_path / "model_io.h").write_text(MODEL_IO)
    return tmp_path


def session(folder: Path, name: str) -> BoardSession:
    target = get_target(name)
    if missing_tools(target):
        pytest.skip(f"{name}: {', '.join(missing_tools(target))} not installed")
    return BoardSession(folder, target)


def feed(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 4, (1, 6)).astype(np.float32)
    # Ties and values beyond the range.
    x[0, :3] = np.float32(SCALE) * np.array([2.5, 3.5, 1e6], np.float32)
    return {"x": x, "counts": rng.integers(-(2**31), 2**31, 2, dtype=np.int32)}


def expected(arrays: dict[str, np.ndarray]) -> np.ndarray:
    codes = np.clip(np.round(arrays["x"] / np.float32(SCALE)) + ZERO_POINT, -128, 127)
    y = np.minimum(codes + 129, 255)
    return ((y - OUT_ZERO) * OUT_SCALE).astype(np.float32)


@pytest.mark.parametrize("name", ["host", "cortex-m4", "cortex-a53"])
def test_floats_in_and_out(name: str, folder: Path) -> None:
    board = session(folder, name)
    feeds = [feed(seed) for seed in range(40)]  # of more than one process
    results = list(board.run_all(feeds))
    assert len(results) == 40
    for arrays, outputs in zip(feeds, results, strict=True):
        assert outputs["y"].dtype == np.float32
        np.testing.assert_array_equal(outputs["y"], expected(arrays))
        np.testing.assert_array_equal(outputs["copied"], arrays["counts"])
    np.testing.assert_array_equal(board.run(feeds[7])["y"], results[7]["y"])


def test_counts_of_pieces(folder: Path) -> None:
    board = session(folder, "cortex-m4")
    results = board.count([feed(seed) for seed in range(20)])
    counts = [count for result in results for count in result.instructions or ()]
    assert len(counts) == 20 and all(10 < count < 1000 for count in counts)
    assert 0 < board.footprint.model_flash_bytes < 400


def test_inputs_that_do_not_fit(folder: Path) -> None:
    board = session(folder, "cortex-m4")
    with pytest.raises(DataError, match=r"'x' has shape \[6\]"):
        board.run({**feed(0), "x": np.zeros(6, np.float32)})
    with pytest.raises(DataError, match="'counts' is int64"):
        board.run({**feed(0), "counts": np.zeros(2, np.int64)})
    with pytest.raises(DataError, match="the model takes"):
        board.run({"x": np.zeros((1, 6), np.float32)})


@pytest.mark.parametrize(
    "change",
    [("net", "../net"), ('"dtype": "int8"', '"dtype": "int9"'), ('"scale": 0.05, ', ""), ("{", "")],
)
def test_a_damaged_interface_is_an_error(folder: Path, change: tuple[str, str]) -> None:
    path = folder / INTERFACE
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ArtefactError, match=r"interface.json: cannot be read"):
        read_interface(folder)
