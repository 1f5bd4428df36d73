"""`verify` of a board names the layer whose kernel goes wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tvm_compress import compress
from tvm_compress.artefact import Artefact
from tvm_compress.bare.emit import read_interface
from tvm_compress.bare.observe import checksum
from tvm_compress.errors import ArtefactError
from tvm_compress.progress import Progress
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools
from tvm_compress.verification import check_project

from ..command_line import tiny_data, tiny_onnx

TARGET = "cortex-m4"


def test_checksum_is_crc32() -> None:
    """The check value of its specification."""
    assert checksum(np.frombuffer(b"123456789", np.int8)) == 0xCBF43926


@pytest.mark.links
@pytest.mark.slow
def test_the_first_wrong_layer_is_named(tmp_path: Path) -> None:
    missing = missing_tools(get_target(TARGET))
    if missing:
        pytest.skip(f"{TARGET}: {', '.join(missing)} not installed")
    data = tiny_data(tmp_path / "data.npz")
    artefact = compress(
        tiny_onnx(tmp_path / "tiny.onnx"), target=TARGET, calibration=data, out=tmp_path / "out"
    )
    with np.load(data) as arrays:
        feeds = [{name: arrays[name][k][None] for name in arrays.files} for k in range(3)]
    feeds = [{s.name: feed[s.name] for s in artefact.inputs} for feed in feeds]
    exact = check_project(artefact, feeds, Progress())
    observed = artefact.project().observed
    assert not exact.differing
    assert exact.tensors >= len(observed) >= 2

    conv, *_, linear = re.findall(r"tvmc_\w+\(([^;]*)\);", _calls(artefact))
    first = observed[0]
    with changed(artefact, _constant_of(conv)):
        wrong = check_project(artefact, feeds, Progress())
    assert wrong.differing[0] == f"{first['name']} ({', '.join(first['layers'])})"
    assert "conv" in first["layers"]
    with changed(artefact, _constant_of(linear)):
        wrong = check_project(artefact, feeds, Progress())
    assert not {name.split(" ")[0] for name in wrong.differing} & {o["name"] for o in observed}
    assert wrong.differing or wrong.float_difference


def _calls(artefact: Artefact) -> str:
    (header,) = artefact.path.glob("deploy/*_io.h")
    return header.with_name(header.name.replace("_io.h", ".c")).read_text()


def _constant_of(call: str) -> str:
    return re.findall(r"\w+_constant\d+", call)[0]


@contextlib.contextmanager
def changed(artefact: Artefact, constant: str) -> Iterator[None]:
    """Another first number in a constant."""
    (path,) = artefact.path.glob("deploy/*_constants.c")
    text = path.read_text()
    head = re.search(rf"{constant}\[\d+\][^{{]*\{{\s*(-?\d+)", text)
    assert head is not None
    other = "100" if int(head.group(1)) < 50 else "-100"
    path.write_text(text[: head.start(1)] + other + text[head.end(1) :])
    yield
    path.write_text(text)


def test_a_project_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "interface.json").write_text('{"name": "old", "inputs": []}')
    with pytest.raises(ArtefactError, match="version 1, not 2: .*compress again"):
        read_interface(tmp_path)
