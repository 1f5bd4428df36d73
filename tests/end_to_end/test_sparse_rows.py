"""A recurrent layer of ONNX in int8 with 80 % zeros in blocks of 16: all products of one row of all
steps reach the sparse kernels, and give the integers of dense ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
import yaml
from onnx import helper

from tests.onnx_files import save_onnx
from tests.schedules.kernels import ICE_LAKE
from tvm_compress.build import build, lower
from tvm_compress.flow import compress_module
from tvm_compress.importers import load_model
from tvm_compress.recipe import parse_recipe, shipped_recipes
from tvm_compress.runtime import Session
from tvm_compress.schedules import SCHEDULE_ATTR, SparseConv2dSpec, SparseRowsSpec, schedule
from tvm_compress.schedules.fused import analyse
from tvm_compress.targets import Target, get_target

STEPS, INPUTS, HIDDEN = 2, 40, 32


def recurrent(path: Path) -> Path:
    """A layer of gated units; outputs of the last step."""
    random, gates = np.random.default_rng(3), 3

    def pruned(inputs: int) -> np.ndarray:
        kept = random.random((gates * HIDDEN // 16, inputs)) < 0.2
        weight = random.standard_normal((1, gates * HIDDEN, inputs)) / np.sqrt(0.2 * inputs)
        return weight * kept.repeat(16, axis=0)

    constants = {"w": pruned(INPUTS), "r": pruned(HIDDEN)}
    node = helper.make_node("GRU", ["image", "w", "r"], ["", "h"], "cell", hidden_size=HIDDEN)
    return save_onnx(path, [node], constants, (STEPS, 1, INPUTS), "h", (1, 1, HIDDEN))


def test_loops_reach_the_kernels(tmp_path: Path) -> None:
    model = load_model(recurrent(tmp_path / "model.onnx"))
    random = np.random.default_rng(0)
    samples = [{"image": random.standard_normal((STEPS, 1, INPUTS), np.float32)} for _ in range(4)]
    steps = yaml.safe_load(shipped_recipes()["int8"].read_text())["steps"]
    recipe = parse_recipe(yaml.safe_dump({"version": 1, "steps": steps}))
    # Its kernels of bytes skip no zeros: nothing is decided for the others.
    plain = get_target("x86-64-v2")
    module = compress_module(model.module, recipe, plain.name, samples)[0]

    def outputs(target: Target) -> np.ndarray:
        program = build(module, target)
        # The first step's products with a state of zeros are no integer ones.
        integers = {layer for layer in program.sparse_kernels if not layer.endswith("_t0")}
        if target is plain:
            assert not integers
        else:
            # Products with the inputs of all steps are one.
            assert len(integers) >= STEPS and max(program.sparse_kernels.values()) < 0.4
            assert sparse_schedules(lower(module, target).module, target) == {"x86.sparse_rows"}
        if not target.runs_here():
            pytest.skip(f"{target.name} does not run here")
        library = tmp_path / f"{target.name}.so"
        program.export(library)
        session = Session(library, model.inputs, model.outputs)
        return np.stack([session.run(sample)["h"] for sample in samples])

    wanted = outputs(plain)
    assert np.unique(wanted).size > 20
    # What is float behind the integers is rounded as each target multiplies and adds.
    np.testing.assert_allclose(outputs(ICE_LAKE), wanted, rtol=0, atol=1e-6)


def sparse_schedules(module: tvm.IRModule, target: Target) -> set[str]:
    """Templates that write the module's sparse kernels."""
    found = set()
    for function in module.functions.values():
        fused = analyse(function) if isinstance(function, tvm.tirx.PrimFunc) else None
        if fused is None or fused.anchor is None:
            continue
        if isinstance(fused.anchor.spec, (SparseConv2dSpec, SparseRowsSpec)):
            found.add(str(schedule(function, target).attrs[SCHEDULE_ATTR]))
    return found
