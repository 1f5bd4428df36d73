"""The whole flow on a tiny network through the command line: artefact, checks, interrupts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from tvm_compress import compress, peers
from tvm_compress.artefact import MANIFEST, Artefact, describe_files
from tvm_compress.benchmarking import peer_samples
from tvm_compress.progress import Progress
from tvm_compress.report.rows import report_schema

from ..command_line import CLASSES, tiny_data, tiny_onnx, tvm_compress


class World:
    """A model, data labelled by the float model itself, and the artefact of the recipe int8."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_onnx(folder / "tiny.onnx")
        self.calibration = tiny_data(folder / "calibration.npz")
        session = onnxruntime.InferenceSession(self.model)
        self.images = np.load(tiny_data(folder / "x.npz", 60))["image"]
        self.scores = np.concatenate(
            [session.run(None, {"image": image[None]})[0] for image in self.images]
        )
        self.test = folder / "test.npz"
        np.savez(self.test, image=self.images, labels=self.scores.argmax(1))
        self.out = folder / "out"
        self.result = self.compress("--eval", self.test, "--json")

    def compress(self, *more: object, out: Path | None = None) -> Any:
        return tvm_compress(
            "compress", self.model, "--recipe", self.recipe, "--calib", self.calibration,
            "-o", out or self.out, "--threads", "1", *more,
        )  # fmt: skip

    recipe: object = "int8"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("flow"))


# --- the artefact -------------------------------------------------------------------------------


def test_compress_succeeds_and_prints_only_the_report(world: World) -> None:
    assert world.result.status == 0, world.result.err
    report = world.result.json
    jsonschema.validate(report, report_schema())
    assert report == json.loads((world.out / "report.json").read_text())
    assert {check["name"] for check in report["checks"]} >= {"exact integers", "accuracy"}


def test_folder_holds_what_the_design_says(world: World) -> None:
    names = {path.name for path in world.out.iterdir()}
    assert names == {
        "recipe.yaml", "deploy", "reference", "report.json", "report.html", MANIFEST, ".work",
    }  # fmt: skip
    assert [path.name for path in (world.out / "deploy").iterdir()] == ["model.so"]
    manifest = json.loads((world.out / MANIFEST).read_text())
    assert manifest["target"]["name"] == "host"
    assert manifest["versions"]["apache-tvm"] == "0.27.0.post1"
    assert manifest["calibration"]["samples"] == 40
    assert str(world.folder) not in (world.out / MANIFEST).read_text()


def test_bytes_in_the_report_are_those_of_the_emitted_library(world: World) -> None:
    report = world.result.json
    for side, file in (("before", "reference/original.so"), ("after", "deploy/model.so")):
        parts = dict(report[side]["bytes"])
        total = parts.pop("total")
        assert total == (world.out / file).stat().st_size
        assert sum(parts.values()) == total and min(parts.values()) >= 0
    weights = 8 * 9 + CLASSES * 128
    assert report["before"]["bytes"]["weights"] >= 4 * weights
    assert weights <= report["after"]["bytes"]["weights"] < 2 * weights  # int8 and padding


def test_every_layer_has_scheme_error_and_time(world: World) -> None:
    rows = {row["name"]: row for row in world.result.json["layers"]}
    assert set(rows) == {"conv", "fc"}
    for row in rows.values():
        assert row["scheme"] == "int8/channel × int8"
        assert row["sqnr_db"] > 20 and row["time_after_us"] > 0 and row["kernels"]
    assert world.result.json["worst_layer"] in rows


def test_own_error_is_the_one_without_those_of_earlier_layers(world: World, tmp_path: Path) -> None:
    fc = "{quantize: {layers: fc, weights: int8, activations: int8, calibrate: min_max}}"
    conv = "{quantize: {layers: conv, weights: int4, activations: none}}"
    found = {}
    for name, steps in (("both", [conv, fc]), ("fc_alone", [fc])):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"version: 1\nsteps: [{', '.join(steps)}]\n")
        result = world.compress("--recipe", recipe, "--json", out=tmp_path / name)
        assert result.status == 0, result.err
        found[name] = {row["name"]: row for row in result.json["layers"]}
        if name == "both":
            assert result.json["worst_layer"] == "conv"
    both, alone = found["both"]["fc"], found["fc_alone"]["fc"]
    assert both["sqnr_db"] < both["own_sqnr_db"] - 10
    assert both["own_sqnr_db"] == pytest.approx(alone["sqnr_db"], abs=0.5)
    assert alone["own_sqnr_db"] == pytest.approx(alone["sqnr_db"], abs=1e-6)


def test_model_that_came_quantised_is_not_called_float_nor_built_twice(
    world: World, tmp_path: Path
) -> None:
    model = tmp_path / "quantised.onnx"
    feeds = iter([{"image": image[None]} for image in world.images])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    quantize_static(world.model, model, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    result = tvm_compress("compress", model, "--recipe", "int8", "--calib", world.calibration,
                          "-o", tmp_path / "out", "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert result.json["original"] == "source, as imported"
    assert "build original" not in [step["name"] for step in result.json["steps"]]
    assert result.json["outputs"][0]["sqnr_db"] is None  # equal
    shown = tvm_compress("report", tmp_path / "out")
    assert "float original" not in shown.out and "source, as imported" in shown.out


def test_run_writes_outputs_by_name(world: World, tmp_path: Path) -> None:
    result = tvm_compress("run", world.out, "--input", world.test, "-o", tmp_path / "y.npz",
                          "--json")  # fmt: skip
    assert result.status == 0, result.err
    assert result.json == {"samples": 60, "outputs": {"scores": [60, CLASSES]}}
    scores = np.load(tmp_path / "y.npz")["scores"]
    noise = np.sum((scores - world.scores) ** 2) / np.sum(world.scores**2)
    assert noise < 10 ** (-25 / 10)
    assert [p.name for p in tmp_path.iterdir()] == ["y.npz"]


def test_run_refuses_data_that_does_not_fit(world: World, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", img=world.images)
    result = tvm_compress("run", world.out, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert result.status == 2 and "'image'" in result.error
    assert not (tmp_path / "y.npz").exists()


def test_verify_measures_exactness_fidelity_and_accuracy(world: World) -> None:
    result = tvm_compress("verify", world.out, "--eval", world.test, "--per-layer", "--json")
    assert result.status == 0, result.err
    found = result.json
    assert found["exactness"]["differing"] == [] and found["exactness"]["tensors"] >= 2
    assert {"conv", "fc"} <= {layer for row in found["tensors"] for layer in row["layers"]}
    accuracy = found["accuracy"]
    assert (accuracy["samples"], accuracy["before"]) == (60, 1.0)  # labelled by the float model
    labels = world.scores.argmax(1)
    scores = _scores_of(world.out, world.images)
    assert accuracy["after"] == pytest.approx(np.mean(scores.argmax(1) == labels))


def test_codes_rounded_from_floats_are_told_apart(world: World, tmp_path: Path) -> None:
    """A float layer's sums depend on the order of additions: what is rounded from them may differ
    by a step, what is computed from those codes may not."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nsteps:\n  - quantize: {layers: fc}\n")
    out = tmp_path / "out"
    result = tvm_compress(
        "compress", world.model, "--recipe", recipe, "--calib", world.calibration, "-o", out,
    )  # fmt: skip
    assert result.status == 0, result.err
    taps = Artefact.open(out).kernels["taps"]
    assert [tap["from_floats"] for tap in taps].count(True) == 1
    assert not any(tap["from_floats"] for tap in Artefact.open(world.out).kernels["taps"])
    report = json.loads((out / "report.json").read_text())
    assert report["exactness"]["differing"] == [] and report["exactness"]["rounded"] <= 8


def _scores_of(out: Path, images: np.ndarray) -> np.ndarray:
    session = Artefact.open(out).session()
    return np.concatenate([session.run({"image": image[None]})["scores"] for image in images])


def test_verify_without_data_uses_the_probes(world: World) -> None:
    result = tvm_compress("verify", world.out)
    assert result.status == 0
    assert "8 inputs" in result.out


def test_benchmark_times_both_sides_and_onnxruntime(world: World) -> None:
    result = tvm_compress(
        "benchmark", world.out, "--against", "onnxruntime", "--model", world.model,
        "--seconds", "0.2", "--threads", "1", "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert set(result.json["latencies"]) == {"compressed", "original", "onnxruntime"}
    for latency in result.json["latencies"].values():
        assert 0 < latency["min_us"] <= latency["p10_us"] <= latency["median_us"]
        assert latency["median_us"] <= latency["p90_us"] and latency["runs"] >= 10
    assert result.json["device"]["threads"] == 1
    assert "float original" in tvm_compress("benchmark", world.out, "--seconds", "0.1").out


def test_benchmark_against_the_int8_forms_of_other_runtimes(world: World) -> None:
    """As delivered and as their own tools quantise it; the outputs are compared first."""
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    result = tvm_compress(
        "benchmark", world.out, "--against", "onnxruntime,openvino", "--model", world.model,
        "--calib", world.calibration, "--eval", world.test, "--seconds", "0.1", "--threads", "1",
        "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "calibrated with it" not in result.err
    others = {
        "onnxruntime", "onnxruntime int8 u8s8", "onnxruntime int8 s8s8", "openvino",
        "openvino int8",
    }  # fmt: skip
    assert set(result.json["latencies"]) == {"compressed", "original", *others}
    agreement = result.json["agreement_db"]
    assert set(agreement) == others
    assert min(agreement["onnxruntime"], agreement["openvino"]) > 80
    assert all(10 < agreement[name] < 80 for name in others if "int8" in name)
    accuracies = result.json["accuracies"]
    assert set(accuracies) == {"compressed", "original", *others}
    assert {row["samples"] for row in accuracies.values()} == {60}
    # The labels are what the float model says.
    assert accuracies["original"]["accuracy"] == accuracies["onnxruntime"]["accuracy"] == 1
    reported = world.result.json["accuracy"]
    assert accuracies["compressed"]["accuracy"] == reported["after"]
    for side in ("original", "onnxruntime"):
        assert accuracies[side]["ahead"] == pytest.approx(reported["drop"])
        assert accuracies[side]["ahead_low"] == pytest.approx(reported["drop_low"])


def test_benchmark_scores_other_runtimes_on_the_same_data(world: World, tmp_path: Path) -> None:
    """On the terminal, with other data for calibration, and labels that are half wrong."""
    pytest.importorskip("onnxruntime")
    labels = world.scores.argmax(1)
    labels[::2] = (labels[::2] + 1) % CLASSES
    half = tmp_path / "half.npz"
    np.savez(half, image=world.images, labels=labels)
    arguments = [
        "benchmark", world.out, "--against", "onnxruntime", "--model", world.model,
        "--seconds", "0.1", "--calib",
    ]  # fmt: skip
    result = tvm_compress(*arguments, tiny_data(tmp_path / "other.npz", 30), "--eval", half)
    assert result.status == 0, result.err
    assert "other runtimes are calibrated with it" in result.err
    line = next(x for x in result.out.splitlines() if "onnxruntime " in x and ".." in x)
    assert "50.00" in line
    assert "the same 60 samples" in result.out
    bare = tvm_compress(*arguments, world.calibration, "--eval", world.calibration)
    assert bare.status == 2
    assert "no labels" in bare.error


def test_other_runtimes_are_calibrated_with_what_compress_takes(tmp_path: Path) -> None:
    """As many samples, the same ones, preprocessed as the recipe says."""
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\nsteps:\n  - quantize: {layers: all, weights: int8, activations: int8}\n"
        "calibration: {samples: 8}\n"
        "preprocessing: {channels: gray, divide_by: 51, mean: [2], std: [0.25]}\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    data, model = tmp_path / "data.npz", tiny_onnx(tmp_path / "tiny.onnx")
    np.savez(data, image=pixels)
    artefact = compress(model, recipe=recipe, calibration=data, out=tmp_path / "out", threads=1)
    taken = (pixels[::5].transpose(0, 3, 1, 2).astype(np.float32) / 51 - 2) / 0.25
    samples = peer_samples(artefact, data, Progress())
    np.testing.assert_allclose(np.concatenate([s["image"] for s in samples]), taken, rtol=1e-6)

    files = {
        name: peers.quantize(name, model, samples, tmp_path / name, has_vnni=True)
        for name in ("onnxruntime", "openvino")
    }
    low, high = float(taken.min()), float(taken.max())
    graph = onnx.load(files["onnxruntime"]["onnxruntime int8 u8s8"]).graph
    scale = next(x for x in graph.initializer if x.name == "image_scale")
    assert float(numpy_helper.to_array(scale)) == pytest.approx((high - low) / 255, rel=1e-5)
    read = openvino.Core().read_model(str(files["openvino"]["openvino int8"]))
    fake = next(
        op for op in read.get_ops()
        if op.get_type_name() == "FakeQuantize"
        and op.input_value(0).get_node().get_type_name() == "Parameter"
    )  # fmt: skip
    ends = [float(fake.input_value(i).get_node().get_data().ravel()[0]) for i in (1, 2)]
    # Symmetric, as far as each sample goes on average.
    reach = float(np.abs(taken).max(axis=(1, 2, 3)).mean())
    assert max(map(abs, ends)) == pytest.approx(reach, rel=0.01)


def test_benchmark_refuses_another_model(world: World, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    other = tiny_onnx(tmp_path / "other.onnx", weight=np.ones((8, 1, 3, 3)))
    arguments = ["benchmark", world.out, "--against", "onnxruntime", "--seconds", "0.1", "--model"]
    result = tvm_compress(*arguments, other)
    assert result.status == 1
    assert "its outputs differ from the original's" in result.err
    missing = tvm_compress(*arguments, tmp_path / "model.tflite")
    assert missing.status == 2
    assert "reads .onnx files" in missing.err


def test_report_on_the_terminal_and_as_page(world: World) -> None:
    text = tvm_compress("report", world.out).out
    for part in ("tiny", "conv", "int8/channel", "latency (median)", "exact integers"):
        assert part in text
    assert tvm_compress("report", world.out, "--json").json == world.result.json
    assert "tiny" in (world.out / "report.html").read_text()


def test_resolved_recipe_alone_reproduces_the_artefact(world: World, tmp_path: Path) -> None:
    shutil.copy(world.out / "recipe.yaml", tmp_path / "r.yaml")
    result = tvm_compress("compress", world.model, "--recipe", tmp_path / "r.yaml",
                          "--calib", world.calibration, "-o", tmp_path / "again")  # fmt: skip
    assert result.status == 0, result.err
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (
        world.out / "recipe.yaml"
    ).read_text()
    first, again = (_scores_of(out, world.images[:10]) for out in (world.out, tmp_path / "again"))
    assert np.array_equal(first, again)


def test_the_same_command_again_takes_everything_over(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    result = world.compress("--json", out=out)
    assert result.status == 0, result.err
    cached = {step["name"] for step in result.json["steps"] if step["cached"]}
    built = {"lower compressed", "build compressed", "lower original", "build original"}
    assert cached == {"calibrate", "build reference", *built}


# --- checks that fail ---------------------------------------------------------------------------


def test_accuracy_below_the_goal_is_status_1(world: World, tmp_path: Path) -> None:
    recipe = tmp_path / "harsh.yaml"
    recipe.write_text(
        "version: 1\nsteps:\n  - quantize: {weights: int4, activations: none}\n"
        "goals: {max_drop: 0}\n"
    )
    result = tvm_compress("compress", world.model, "--recipe", recipe, "--eval", world.test,
                          "-o", tmp_path / "out")  # fmt: skip
    assert result.status == 1
    assert result.error.startswith("accuracy: top-1 drop") and "n = 60" in result.error
    again = tvm_compress("verify", tmp_path / "out", "--eval", world.test)
    assert again.status == 1 and "the recipe allows 0" in again.error
    assert tvm_compress("verify", tmp_path / "out").status == 0  # nothing measured, nothing failed


def test_library_with_other_integers_is_status_1(world: World, tmp_path: Path) -> None:
    """A library with one weight changed, and hashes to match: only running it can tell."""
    other = tiny_onnx(tmp_path / "tiny.onnx", weight=np.ones((8, 1, 3, 3)))
    result = tvm_compress("compress", other, "--calib", world.calibration, "-o", tmp_path / "o",
                          "--threads", "1")  # fmt: skip
    assert result.status == 0, result.err
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    shutil.copy(tmp_path / "o" / "deploy" / "model.so", out / "deploy" / "model.so")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["deploy/model.so"] = describe_files(out)["deploy/model.so"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    result = tvm_compress("verify", out)
    assert result.status == 1
    assert "differ from the reference" in result.error and "conv" in result.error


def test_damaged_library_is_refused_before_it_is_loaded(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    with (out / "deploy" / "model.so").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff")
    for verb in ("verify", "benchmark", "report"):
        result = tvm_compress(verb, out)
        assert result.status == 2 and "damaged" in result.error


# --- interrupts ---------------------------------------------------------------------------------


def _start(world: World, repository: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tvm_compress.cli", "compress", world.model, "--recipe", "int8",
        "--calib", world.calibration, "-o", out, "--json",
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _wait_for(process: subprocess.Popen[str], out: Path, step: str) -> None:
    """Until the cache of `step` is finished."""
    deadline = time.monotonic() + 300
    while not [p for p in out.glob(f".work/cache/{step}-*") if p.suffix != ".part"]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_keeps_the_old_artefact_and_goes_on(
    world: World, repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    shutil.rmtree(out / ".work")
    process = _start(world, repository, out)
    _wait_for(process, out, "calibrate")
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted; the same command goes on from here"
        assert "Traceback" not in errors
        assert printed == ""
    else:
        assert process.returncode == -signal.SIGKILL
    assert Artefact.open(out).report == world.result.json  # the previous artefact, whole
    resumed = _start(world, repository, out)
    printed, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    steps = json.loads(printed)["steps"]
    assert "calibrate" in {step["name"] for step in steps if step["cached"]}
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


def test_first_run_that_was_killed_says_so(world: World, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(world, repository, out)
    _wait_for(process, out, "calibrate")
    process.kill()
    process.communicate(timeout=60)
    result = tvm_compress("report", out)
    assert result.status == 2 and "did not finish" in result.error
