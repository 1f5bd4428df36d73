"""MLPerf Tiny's networks on emulated boards give TensorFlow Lite's bytes.

A few inputs here; all networks, cores and inputs in `tests/benchmarks/mlperf_tiny_exact.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.bare.emit import write_project
from tvm_compress.bare.session import ProjectSession
from tvm_compress.build import compile_project, lower
from tvm_compress.importers import load_model
from tvm_compress.sections import undefined_symbols
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

from ..command_line import tvm_compress

pytest.importorskip("ai_edge_litert")

from ..mlperf_networks import NETWORKS, labels, reals, tflite_bytes


def require(core: str) -> None:
    missing = missing_tools(get_target(core))
    if missing:
        pytest.skip(f"{core}: {', '.join(missing)} not installed")


@pytest.mark.parametrize(
    ("name", "core", "count"),
    [
        ("anomaly", "cortex-m4", 100),
        ("keyword", "cortex-m4", 100),
        ("keyword", "cortex-m55", 20),
        ("image", "cortex-m7", 4),
        ("person", "cortex-m4", 2),
    ],
)
def test_a_board_gives_the_interpreters_bytes(
    name: str, core: str, count: int, asset: Callable[[str], Path], assets: Path, tmp_path: Path
) -> None:
    require(core)
    network = NETWORKS[name]
    if name == "person":
        pytest.importorskip("PIL")
    model = load_model(asset(f"tflite/{network.tflite}.tflite"))
    target = get_target(core)
    project = compile_project(lower(model.module, target)).project
    helpers = {
        n for kernel in project.kernels for n in undefined_symbols(kernel.code, kernel.symbol)
    }
    assert not {n for n in helpers if n.startswith("__aeabi_d")}, "float64 in software"
    sources = ([spec.name for spec in model.inputs], [spec.name for spec in model.outputs])
    write_project(project, name, sources, tmp_path)
    codes, expected = tflite_bytes(network, assets, reals(network, assets, count))
    results = ProjectSession(tmp_path, target).run_codes(codes).outputs
    assert len(results) == count
    for outputs, wanted in zip(results, expected, strict=True):
        (found,) = outputs.values()
        np.testing.assert_array_equal(found, wanted)
    assert len({wanted.tobytes() for wanted in expected}) > count // 2


@pytest.mark.slow
def test_a_tflite_file_from_the_command_line(
    asset: Callable[[str], Path], assets: Path, tmp_path: Path
) -> None:
    """`compress`, `verify`, `run` and `benchmark` of the keyword network on a Cortex-M4."""
    require("cortex-m4")
    network, count = NETWORKS["keyword"], 40
    model, out = asset("tflite/kws_ref_model.tflite"), tmp_path / "out"
    codes, expected = tflite_bytes(network, assets, reals(network, assets, count))
    (name,) = codes[0]
    data = tmp_path / "eval.npz"
    classes = labels(network, assets, count)
    assert classes is not None
    np.savez(data, **{name: np.concatenate([code[name] for code in codes]), "labels": classes})

    made = tvm_compress("compress", model, "--target", "cortex-m4", "-o", out, "--json")
    assert made.status == 0, made.err
    verified = tvm_compress("verify", out, "--eval", data, "--json")
    assert verified.status == 0, verified.err
    accuracy = verified.json["accuracy"]
    right = [int(wanted.argmax()) == label for wanted, label in zip(expected, classes, strict=True)]
    assert accuracy["after"] == accuracy["before"] == np.mean(right) > 0.8
    answers = tmp_path / "answers.npz"
    assert tvm_compress("run", out, "--input", data, "-o", answers).status == 0
    with np.load(answers) as arrays:
        (found,) = (arrays[key] for key in arrays.files)
    np.testing.assert_array_equal(found, np.concatenate(expected))
    counted = tvm_compress("benchmark", out, "--json")
    assert counted.status == 0, counted.err
    assert 0 < counted.json["instructions"]["median"] < 50_000_000
    interface: Mapping[str, object] = json.loads((out / "deploy" / "interface.json").read_text())
    assert interface["library_functions"] == []
