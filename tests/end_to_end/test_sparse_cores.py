"""A small network with zeros, in int8, on microcontrollers: the integers of its own graph, in less
flash and fewer instructions than without zeros, as machine code and as portable C."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.onnx_files import save_onnx, save_samples
from tvm_compress.bare.emit import write_project
from tvm_compress.bare.session import ProjectSession
from tvm_compress.build import build, compile_project, lower
from tvm_compress.flow import Job, compress_job, load_job
from tvm_compress.progress import Progress
from tvm_compress.runners import footprint
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

from .test_every_core import require

RECIPE = "version: 1\nsteps:\n  - quantize: {layers: all, weights: int8, activations: int8}\n"
FEEDS = 2


def pruned(weight: np.ndarray, sparsity: float, random: np.random.Generator) -> np.ndarray:
    """Without blocks of 16 outputs by one input."""
    shape = (weight.shape[0] // 16, 1, *weight.shape[1:])
    return weight * (random.random(shape) >= sparsity).repeat(16, 1).reshape(weight.shape)


def network(sparsity: float, path: Path) -> Path:
    """3x3, a residual sum behind a second one, 1x1 and a linear layer."""
    random = np.random.default_rng(4)
    shapes = {
        "a_w": (32, 8, 3, 3), "b_w": (32, 32, 3, 3), "c_w": (48, 32, 1, 1), "fc_w": (16, 48),
    }  # fmt: skip
    arrays = {}
    for name, shape in shapes.items():
        weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        # All inputs of the last layer are read: channels that nobody reads would be left out.
        arrays[name] = weight if name == "fc_w" else pruned(weight, sparsity, random)
    arrays["b_b"] = random.standard_normal(32)
    nodes = [
        helper.make_node("Conv", ["image", "a_w"], ["a"], "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"], "a_relu"),
        helper.make_node("Conv", ["ar", "b_w", "b_b"], ["b"], "b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["ar", "b"], ["s"], "sum"),
        helper.make_node("Relu", ["s"], ["sr"], "sum_relu"),
        helper.make_node("Conv", ["sr", "c_w"], ["c"], "c"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc_w"], ["scores"], "fc", transB=1),
    ]
    save_samples(path, random, 16, 8, 13, 11)
    return save_onnx(path, nodes, arrays, (1, 8, 13, 11), "scores", (1, 16))


@cache
def compressed(sparsity: float) -> tuple[Job, Any]:
    """In int8 for Cortex-M4."""
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE)
        model = network(sparsity, recipe.with_name("network.onnx"))
        job = load_job(model, recipe, "cortex-m4", model.with_suffix(".npz"))
        return job, compress_job(job, Progress())


def cost(
    sparsity: float, core: str, folder: Path, form: str
) -> tuple[int, float, Mapping[str, float]]:
    """(bytes of flash, instructions, share of the weights that sparse layers store) of a program
    whose outputs are those of its graph on x86."""
    job, module = compressed(sparsity)
    inputs, outputs = job.model.inputs, job.model.outputs
    target = get_target(core)
    random = np.random.default_rng(5)
    feeds = [{"image": random.standard_normal((1, 8, 13, 11), np.float32)} for _ in range(FEEDS)]
    lowered = lower(module, target)
    project = compile_project(lowered, form).project
    write_project(project, "net", ([i.name for i in inputs], [o.name for o in outputs]), folder)
    session = ProjectSession(folder, target)
    result = session.run_codes([session.codes(feed) for feed in feeds], count=True)
    reference = Session(build(module, get_target("x86-64-v2")).executable, inputs, outputs)
    for found, feed in zip(result.outputs, feeds, strict=True):
        np.testing.assert_array_equal(session.reals(found)["scores"], reference.run(feed)["scores"])
    assert result.instructions is not None
    flash = footprint(session.program.elf, session.program.link_map).flash_bytes
    return flash, float(np.mean(result.instructions)), lowered.sparse_kernels


# Most of dense: flash, whose start-up code and tables stay, and instructions.
@pytest.mark.parametrize(
    ("core", "form", "flash", "instructions"),
    [("cortex-m4", "object", 0.7, 0.5), ("cortex-m4", "c", 0.7, 0.3)],
)
def test_less_flash_and_fewer_instructions(
    core: str, form: str, flash: float, instructions: float, tmp_path: Path
) -> None:
    require(core)
    dense = cost(0, core, tmp_path / "dense", form)
    sparse = cost(0.8, core, tmp_path / "sparse", form)
    assert not dense[2]
    assert len(sparse[2]) >= 3 and max(sparse[2].values()) < 0.4
    assert sparse[0] <= flash * dense[0], (sparse, dense)
    assert sparse[1] <= instructions * dense[1], (sparse, dense)
