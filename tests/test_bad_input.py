"""Every case of the design's "Bad input": one clear line, status 2, nothing half-written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tvm_compress.targets import get_target

from .command_line import Result, tiny_data, tiny_onnx, tvm_compress


class Case:
    """A folder with a good model and good data; `compress` spoils one of them at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_onnx(folder / "tiny.onnx")
        self.data = tiny_data(folder / "calibration.npz")

    def refused(self, *parts: str, **spoilt: object) -> Result:
        """Run `compress` and check that it is refused with all `parts` and writes nothing."""
        before = sorted(self.folder.rglob("*"))
        options = {"recipe": "int8", "target": "host", "calib": self.data, **spoilt}
        model = options.pop("model", self.model)
        flags = [item for k, v in options.items() if v is not None for item in (f"--{k}", v)]
        result = tvm_compress("compress", model, *flags, "-o", self.folder / "out")
        assert result.status == 2
        for part in parts:
            assert part in result.error
        assert sorted(self.folder.rglob("*")) == before
        assert result.out == ""
        return result


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def recipe(case: Case, step: str) -> Path:
    path = case.folder / "r.yaml"
    path.write_text(f"version: 1\nsteps:\n  - quantize: {step}\n")
    return path


# --- the model ----------------------------------------------------------------------------------


def test_model_that_does_not_exist(case: Case) -> None:
    case.refused("nothing.onnx", "no such file", model=case.folder / "nothing.onnx")


def test_model_of_an_unknown_format(case: Case) -> None:
    path = case.folder / "model.h5"
    path.write_bytes(b"x")
    case.refused("model.h5", "unknown model format", ".onnx", model=path)


def test_model_that_is_damaged(case: Case) -> None:
    path = case.folder / "broken.onnx"
    path.write_bytes(case.model.read_bytes()[:100])
    case.refused("broken.onnx", model=path)


def test_model_with_an_unsupported_operator_names_operator_and_node(case: Case) -> None:
    node = helper.make_node("Det", ["scores"], ["out"], "my_det")
    path = tiny_onnx(case.folder / "odd.onnx", extra=(node,))
    case.refused("Det", "my_det", model=path)


def test_model_with_a_dynamic_shape(case: Case) -> None:
    path = tiny_onnx(case.folder / "dynamic.onnx", side="n")
    case.refused("'image'", "dynamic", "--shape image=", model=path)


def test_shape_for_an_input_that_does_not_exist(case: Case) -> None:
    case.refused("'img'", "'image'", shape="img=1x1x8x8")


def test_model_with_nan_in_a_weight(case: Case) -> None:
    weight = np.ones((8, 1, 3, 3))
    weight[3, 0, 1, 1] = np.nan
    path = tiny_onnx(case.folder / "nan.onnx", weight=weight)
    case.refused("NaN", "conv", model=path)


# --- the data -----------------------------------------------------------------------------------


def test_no_calibration_data(case: Case) -> None:
    case.refused("calibration data", "--calib", calib=None)


def test_data_of_the_wrong_name(case: Case) -> None:
    np.savez(case.folder / "d.npz", img=np.zeros((2, 1, 8, 8), np.float32))
    case.refused("d.npz", "'image'", "holds 'img'", calib=case.folder / "d.npz")


def test_data_of_the_wrong_shape(case: Case) -> None:
    np.savez(case.folder / "d.npz", image=np.zeros((2, 1, 9, 8), np.float32))
    case.refused("'image'", "[1, 9, 8]", "takes [1, 8, 8]", calib=case.folder / "d.npz")


def test_data_of_the_wrong_dtype(case: Case) -> None:
    np.savez(case.folder / "d.npz", image=np.zeros((2, 1, 8, 8)))
    case.refused("'image'", "float64", "takes float32", calib=case.folder / "d.npz")


@pytest.mark.links
def test_nan_in_the_data(case: Case) -> None:
    images = np.zeros((4, 1, 8, 8), np.float32)
    images[2, 0, 0, 0] = np.nan
    np.savez(case.folder / "d.npz", image=images)
    case.refused("'image'", "NaN", "sample 2", calib=case.folder / "d.npz")


def test_labels_beyond_the_classes(case: Case) -> None:
    labels = np.full(40, 4)
    path = tiny_data(case.folder / "test.npz", labels=labels)
    case.refused("labels", "4 classes", eval=path)


# --- the recipe ---------------------------------------------------------------------------------


def test_recipe_that_does_not_exist(case: Case) -> None:
    case.refused("'int88'", "did you mean 'int8'", recipe="int88")


def test_recipe_with_an_unknown_key(case: Case) -> None:
    case.refused(
        "r.yaml:3", "'weigths'", "did you mean 'weights'", recipe=recipe(case, "{weigths: int8}")
    )


def test_selector_that_matches_nothing(case: Case) -> None:
    case.refused(
        "r.yaml:3: layer selector 'conf'",
        "matches no layer",
        "'conv'",
        recipe=recipe(case, "{layers: conf}"),
    )


# --- the target and the artefact ----------------------------------------------------------------


def test_target_that_does_not_exist(case: Case) -> None:
    case.refused("no target 'hots'", "did you mean 'host'", target="hots")


def test_c_for_a_target_that_is_no_c_project(case: Case) -> None:
    case.refused("--emit is for targets that ship as C projects", "host ships a lib", emit="c")


def test_no_compiler_to_link_with(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(case.folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    case.refused("no C++ compiler", "apt-get install g++")


@pytest.mark.links
def test_out_that_holds_something_else(case: Case) -> None:
    (case.folder / "out").mkdir()
    (case.folder / "out" / "thesis.txt").write_text("mine")
    case.refused("'thesis.txt'", "not part of an artefact")


@pytest.mark.links
@pytest.mark.parametrize(
    ("room", "parts"),
    [({"flash_bytes": 4000}, ("of flash", "largest layers in bytes: fc ")),
     ({"ram_bytes": 100}, ("of RAM for activations",))],
)  # fmt: skip
def test_model_that_is_too_big_for_the_target(
    case: Case, monkeypatch: pytest.MonkeyPatch, room: dict[str, int], parts: tuple[str, ...]
) -> None:
    small = dataclasses.replace(get_target("host"), **room)
    monkeypatch.setattr("tvm_compress.targets.get_target", lambda _name: small)
    (size,) = room.values()
    case.refused("does not fit host", f"more than the {size} there are", *parts)


def test_array_that_is_no_input(case: Case) -> None:
    data = case.folder / "more.npz"
    with np.load(case.data) as arrays:
        np.savez(data, spare=np.zeros(3), **arrays)
    case.refused("array 'spare' is none of the model's inputs ('image')", calib=data)


@pytest.mark.links
def test_out_in_a_folder_that_does_not_exist_is_made(case: Case) -> None:
    out = case.folder / "a" / "b"
    command = ("compress", case.model, "--calib", case.data, "-o", out)
    assert tvm_compress(*command).status == 0
    assert (out / "report.json").is_file()


@pytest.mark.links
def test_folders_made_for_a_failed_run_are_removed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(get_target("host"), flash_bytes=1)
    monkeypatch.setattr("tvm_compress.targets.get_target", lambda _name: small)
    out = case.folder / "a" / "b"
    assert tvm_compress("compress", case.model, "--calib", case.data, "-o", out).status == 2
    assert not (case.folder / "a").exists()


@pytest.mark.parametrize("verb", ["verify", "benchmark", "report"])
def test_artefact_that_does_not_exist(tmp_path: Path, verb: str) -> None:
    result = tvm_compress(verb, tmp_path / "out")
    assert result.status == 2 and "no such folder" in result.error


def test_folder_that_is_no_artefact(tmp_path: Path) -> None:
    result = tvm_compress("report", tmp_path)
    assert result.status == 2 and "no artefact folder" in result.error
