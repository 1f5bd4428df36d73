"""One recipe, six targets: the same integers on all; what a board costs is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.bare.emit import write_project
from tvm_compress.bare.session import ProjectSession
from tvm_compress.build import build, compile_project, lower
from tvm_compress.flow import compress_job, load_job
from tvm_compress.importers import load_model
from tvm_compress.progress import Progress
from tvm_compress.runtime import Session
from tvm_compress.sections import undefined_symbols
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from ..command_line import tiny_data, tiny_onnx, tvm_compress
from ..relay_passes.tflite_builder import Operator, Tensor
from ..relay_passes.tflite_builder import build as build_tflite

BOARDS = (
    "armv8.2-dotprod", "armv8.2-i8mm", "cortex-a72", "armv7-neon", "cortex-m4", "cortex-m7",
    "cortex-m55", "riscv64gc",
)  # fmt: skip


def require(name: str) -> None:
    missing = missing_tools(get_target(name))
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")


class World:
    """A network compressed once, samples, and what x86 makes of them."""

    def __init__(self, folder: Path) -> None:
        data = tiny_data(folder / "data.npz")
        self.job = load_job(tiny_onnx(folder / "tiny.onnx"), "int8", "host", data)
        self.module = compress_job(self.job, Progress())
        arrays = np.load(data)
        count = min(12, len(next(iter(arrays.values()))))
        self.feeds = [
            {name: array[index][None] for name, array in arrays.items()} for index in range(count)
        ]
        built = build(self.module, get_target("x86-64-v2"))
        session = Session(built.executable, self.job.model.inputs, self.job.model.outputs)
        self.expected = [session.run(feed) for feed in self.feeds]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", BOARDS)
def test_the_same_integers_as_x86(name: str, world: World, tmp_path: Path) -> None:
    require(name)
    target = get_target(name)
    project = compile_project(lower(world.module, target)).project
    model = world.job.model
    sources = ([spec.name for spec in model.inputs], [spec.name for spec in model.outputs])
    write_project(project, "tiny", sources, tmp_path)
    board = ProjectSession(tmp_path, target)
    found = board.run_all(world.feeds)
    assert len(found) == len(world.expected)
    assert len({outputs[sources[1][0]].tobytes() for outputs in found}) > 1
    for wanted, outputs in zip(world.expected, found, strict=True):
        for key, array in wanted.items():
            np.testing.assert_array_equal(outputs[key], array)


def linear_of_words(path: Path) -> Path:
    """A `.tflite` linear layer with 16-bit activations."""
    random = np.random.default_rng(4)
    weights, bias = random.integers(-127, 128, (7, 40)), random.integers(-9000, 9000, 7)
    tensors = [
        Tensor("x", (3, 40), "int16", 1.7e-4),
        Tensor("w", (7, 40), "int8", 0.013, data=weights),
        Tensor("b", (7,), "int64", 1.7e-4 * 0.013, data=bias),
        Tensor("y", (3, 7), "int16", 9.1e-4),
    ]
    layer = Operator("FULLY_CONNECTED", ["x", "w", "b"], ["y"], {}, "FullyConnectedOptions", 8)
    path.write_bytes(build_tflite(tensors, [layer], ["x"], ["y"]))
    return path


@pytest.mark.parametrize("name", ["cortex-m4", "cortex-m55", "armv7-neon"])
def test_float64_without_an_fpu_for_it(name: str, tmp_path: Path) -> None:
    """TFLite requantises 16-bit linear layers in float64, which a Cortex-M4 calls a library for."""
    pytest.importorskip("ai_edge_litert")
    require(name)
    model = load_model(linear_of_words(tmp_path / "words.tflite"))
    target = get_target(name)
    project = compile_project(lower(model.module, target)).project
    write_project(project, "words", (["x"], ["y"]), tmp_path)
    random = np.random.default_rng(2)
    feeds = [{"x": random.integers(-32768, 32768, (3, 40)).astype(np.int16)} for _ in range(20)]
    host = build(model.module, get_target("x86-64-v2"))
    session = Session(host.executable, model.inputs, model.outputs)
    for feed, found in zip(feeds, ProjectSession(tmp_path, target).run_all(feeds), strict=True):
        wanted = session.run(feed)["y"]
        assert len(set(wanted.ravel())) > 2
        np.testing.assert_array_equal(found["y"], wanted)
    if name == "cortex-m4":
        asked = [n for k in project.kernels for n in undefined_symbols(k.code, k.symbol)]
        assert "__aeabi_dmul" in asked


def test_benchmark_of_a_board(tmp_path: Path) -> None:
    """Instructions by layer and accuracy on the board; other runtimes are refused."""
    require("cortex-m4")
    model, data = tiny_onnx(tmp_path / "tiny.onnx"), tiny_data(tmp_path / "data.npz")
    out = tmp_path / "out"
    result = tvm_compress("compress", model, "--calib", data, "--target", "cortex-m4", "-o", out)
    assert result.status == 0, result.err
    result = tvm_compress("benchmark", out, "--json")
    assert result.status == 0, result.err
    measured = result.json
    counted, functions = measured["instructions"], measured["functions"]
    assert 0 < counted["least"] <= counted["median"] <= counted["most"]
    total = sum(row["instructions"] for row in functions)
    assert total == pytest.approx(counted["median"], rel=0.01)
    assert sum(row["share"] for row in functions) == pytest.approx(1.0)
    assert {layer for row in functions for layer in row["layers"]}
    code = json.loads((out / "report.json").read_text())["after"]["bytes"]["code"]
    # Kernels with what they read, but not the program around them.
    assert code / 2 < measured["memory"]["model_flash_bytes"] < measured["memory"]["flash_bytes"]
    assert 0 < measured["stack_bytes"] < 8192 and measured["arena_bytes"] > 0
    assert "mps2-an386" in measured["machine"]
    shown = tvm_compress("benchmark", out)
    assert "instructions" in shown.out and "no cycles" in " ".join(shown.out.split())
    refused = tvm_compress("benchmark", out, "--against", "onnxruntime", "--model", model)
    assert refused.status == 2 and "compress for 'host'" in refused.err


def test_a_board_file(tmp_path: Path) -> None:
    """Its memory is checked, and the artefact runs without the file."""
    require("cortex-m4")
    model, data = tiny_onnx(tmp_path / "tiny.onnx"), tiny_data(tmp_path / "data.npz")
    board = tmp_path / "lamp.yaml"
    board.write_text("version: 1\ncpu: cortex-m4\nflash_bytes: 200000\nram_bytes: 100000\n")
    arguments = ("compress", model, "--calib", data, "--target", board, "-o", tmp_path / "out")
    result = tvm_compress(*arguments)
    assert result.status == 0, result.err
    board.write_text(board.read_text().replace("200000", "1000"))
    refused = tvm_compress(*arguments, "--force")
    assert refused.status == 2 and "lamp" in refused.err and "flash" in refused.err
    board.write_text(board.read_text().replace("ram_bytes: 100000", "ram_bytes: 100"))
    board.write_text(board.read_text().replace("flash_bytes: 1000", "flash_bytes: 200000"))
    refused = tvm_compress(*arguments, "--force")
    assert refused.status == 2 and "more than the 100 there are" in refused.err
    assert "the peak is at" in refused.err and len(refused.err.strip().splitlines()) == 1
    board.unlink()
    result = tvm_compress("run", tmp_path / "out", "--input", data, "-o", tmp_path / "y.npz")
    assert result.status == 0, result.err
