"""Relax modules in memory and saved as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.errors import ModelError
from tvm_compress.importers import load_model

Run = Callable[..., dict[str, np.ndarray]]
WEIGHT = np.random.default_rng(5).normal(size=(4, 3)).astype("float32")


def module(batch: int | str = 2, weight: np.ndarray = WEIGHT) -> tvm.IRModule:
    size = tvm.tirx.Var(batch, "int64") if isinstance(batch, str) else batch
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((size, 4), "float32"))
    k = relax.Var("k", relax.TensorType((), "float32"))
    with builder.function("main", [x, k]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight)))
            out = builder.emit_output(relax.op.multiply(y, k))
        builder.emit_func_output(out)
    return builder.get()


def test_module(run: Run) -> None:
    model = load_model(module())
    assert [spec.name for spec in model.inputs] == ["x", "k"]
    assert model.source_format == "relax"
    names = [b.var.name for b in model.module["main"].body.blocks[0].bindings]
    assert names == ["matmul_0", "multiply_0"]
    x, k = np.ones((2, 4), "float32"), np.array(3, "float32")
    np.testing.assert_allclose(run(model, {"x": x, "k": k})["output"], x @ WEIGHT * 3, rtol=1e-5)


def test_symbolic_batch_and_frozen_input(run: Run) -> None:
    model = load_model(module("n"), shapes={"x": (5, 4)}, input_values={"k": 2.0})
    assert [(spec.name, spec.shape) for spec in model.inputs] == [("x", (5, 4))]
    x = np.ones((5, 4), "float32")
    np.testing.assert_allclose(run(model, {"x": x})["output"], x @ WEIGHT * 2, rtol=1e-5)
    assert len(model.module["main"].body.blocks[0].bindings) == 1  # the factor is in the weight
    assert load_model(module("n")).inputs[0].shape == (1, 4)


def test_saved_module(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "net.json"
    path.write_text(tvm.ir.save_json(load_model(module()).module))
    model = load_model(path)
    assert model.name == "net"
    assert [spec.name for spec in model.inputs] == ["x", "k"]


def test_importing_again_changes_nothing() -> None:
    once = load_model(module()).module
    tvm.ir.assert_structural_equal(once, load_model(once).module)


def test_input_is_not_changed() -> None:
    before = module("n")
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    load_model(before, input_values={"k": 2.0})
    tvm.ir.assert_structural_equal(before, copy)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"root": 1}', "\x00\x01"])
def test_garbage(content: str, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"net\.json: "):
        load_model(path)


def test_bad_modules() -> None:
    with pytest.raises(ModelError, match="has no function 'main'"):
        load_model(tvm.IRModule({}))
    with pytest.raises(ModelError, match="contains NaN"):
        load_model(module(weight=np.full((4, 3), np.nan, "float32")))
    with pytest.raises(ModelError, match=r"no input 'kk'; did you mean 'k'"):
        load_model(module(), input_values={"kk": 1.0})
    with pytest.raises(ModelError, match=r"given for input 'k' has shape \[2\]"):
        load_model(module(), input_values={"k": np.ones(2)})
