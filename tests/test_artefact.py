"""The artefact folder: what `open` refuses, and that writing survives being killed anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tvm_compress.artefact import FORMAT, MANIFEST, Artefact, describe_files
from tvm_compress.errors import ArtefactError
from tvm_compress.workspace import Workspace

KEY = "model-1"


def fill(folder: Path, content: str = "one", key: str = KEY) -> None:
    """A folder that looks like an artefact."""
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy" / "model.so").write_text(content)
    manifest = {
        "format": FORMAT,
        "versions": {"tvm_compress": "0.1.0"},
        "model": {"name": "net", "key": key, "original": "float original"},
        "target": {"name": "host"},
        "inputs": [{"name": "x", "shape": [1, 2], "dtype": "float32"}],
        "outputs": [],
        "files": describe_files(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **values}))


def content(folder: Path) -> str:
    Artefact.open(folder)
    return (folder / "deploy" / "model.so").read_text()


def test_open_reads_inputs(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    (spec,) = Artefact.open(tmp_path / "out").inputs
    assert (spec.name, spec.shape, spec.dtype) == ("x", (1, 2), "float32")


def _remove_file(out: Path) -> None:
    (out / "deploy" / "model.so").unlink()


def _flip_a_byte(out: Path) -> None:
    (out / "deploy" / "model.so").write_text("0ne")


def _cut_manifest(out: Path) -> None:
    (out / MANIFEST).write_text('{"format"')


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_remove_file, "model.so: is missing"),
        (_flip_a_byte, "changed or damaged"),
        (_cut_manifest, "cannot be read"),
        (lambda out: change(out, format=99), "artefact format 99"),
        (lambda out: change(out, inputs=None), "'inputs' is missing"),
        (lambda out: change(out, files={"../x": {}}), "leads out of the folder"),
        (lambda out: (out / MANIFEST).unlink(), "it is no artefact folder"),
        (lambda out: (out / MANIFEST).write_text("[1]"), "not a JSON object"),
        (lambda out: (out / MANIFEST).write_text("[" * 100_000), "cannot be read"),
    ],
)
def test_open_refuses(tmp_path: Path, spoil: Callable[[Path], Any], part: str) -> None:
    out = tmp_path / "out"
    fill(out)
    spoil(out)
    with pytest.raises(ArtefactError) as caught:
        Artefact.open(out)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_open_of_nothing_and_of_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such folder"):
        Artefact.open(tmp_path / "out")
    with Workspace(tmp_path / "out", KEY):
        with pytest.raises(ArtefactError, match="did not finish"):
            Artefact.open(tmp_path / "out")


# --- writing ------------------------------------------------------------------------------------


def publish(out: Path, text: str, key: str = KEY, force: bool = False) -> None:
    with Workspace(out, key, force) as work:
        fill(work.staging, text, key)
        work.publish()


def test_publish_replaces_everything_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "one")
    (out / "report.html").write_text("old")
    publish(out, "two")
    assert content(out) == "two"
    assert not (out / "report.html").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_cache_is_kept_used_and_cleaned(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        (folder / "x").write_text("x")

    for parts in ([1], [1], [2]):
        with Workspace(tmp_path / "out", KEY) as work:
            assert (work.cached("step", parts, make) / "x").read_text() == "x"
            fill(work.staging)
            work.publish()
    assert len(made) == 2
    kept = list((tmp_path / "out" / ".work" / "cache").iterdir())
    assert len(kept) == 1  # the first entry was not used by the last run


def test_step_that_fails_leaves_no_half_result(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise ArtefactError("no")

    with pytest.raises(ArtefactError, match="no"), Workspace(tmp_path / "out", KEY) as work:
        work.cached("step", [], fails)
    assert not list(tmp_path.iterdir())


def test_interrupt_keeps_finished_steps(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", KEY) as work:
        work.cached("step", [], lambda folder: None)
        raise KeyboardInterrupt
    made: list[Path] = []
    with Workspace(tmp_path / "out", KEY) as work:
        work.cached("step", [], made.append)
    assert not made


def test_artefact_of_another_model_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "one")
    with pytest.raises(ArtefactError, match="another model.*--force"):
        publish(out, "two", key="model-2")
    assert content(out) == "one"
    publish(out, "two", key="model-2", force=True)
    assert content(out) == "two"


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(out, "one")
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"thesis\.txt"):
        publish(out, "two", force=True)
    assert (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="is a file"):
        publish(tmp_path / "file", "two")
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ArtefactError, match="cannot be written"):
        publish(tmp_path / "a" / "b", "two")


def test_two_runs_at_once(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", KEY):
        with pytest.raises(ArtefactError, match="another run"), Workspace(tmp_path / "out", KEY):
            pass


def test_file_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoExchange:
        def __init__(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr("tvm_compress.workspace.ctypes.CDLL", NoExchange)
    publish(tmp_path / "out", "one")
    publish(tmp_path / "out", "two")
    assert content(tmp_path / "out") == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {repository!r}]
from test_artefact import KEY, fill
from tvm_compress import workspace
from tvm_compress.workspace import Workspace

names = ("rename", "rmtree")
countdown = int(sys.argv[2])

def dying(real):
    def call(*arguments, **options):
        global countdown
        countdown -= 1
        if countdown < 0:
            os._exit(9)
        return real(*arguments, **options)
    return call

with Workspace(Path(sys.argv[1]), KEY) as work:
    work.cached("step", [], lambda folder: None)
    fill(work.staging, "two")
    Path.rename = dying(Path.rename)
    workspace.shutil.rmtree = dying(workspace.shutil.rmtree)
    if sys.argv[3] == "no-exchange":
        workspace.ctypes.CDLL = lambda *_, **__: None
    work.publish()
"""


@pytest.mark.parametrize("exchange", ["exchange", "no-exchange"])
def test_killed_at_every_step_of_publishing(
    tmp_path: Path, repository: Path, exchange: str
) -> None:
    """Whatever the moment, the next run finds a whole artefact, the old one or the new one."""
    script = KILLED.format(tests=str(repository / "tests"), repository=str(repository))
    outcomes = []
    for step in range(8):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        publish(out, "one")
        done = subprocess.run(
            [sys.executable, "-c", script, str(out), str(step), exchange], check=False, timeout=60
        )
        with Workspace(out, KEY):  # what the next run does first
            outcomes.append(content(out))
        assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert done.returncode == 0
    assert outcomes[-1] == "two"
    assert set(outcomes) <= {"one", "two"} and len(outcomes) > 2


def test_code_fingerprint_is_stable_and_cheap() -> None:
    code = "from tvm_compress.workspace import code_fingerprint as f; print(f())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parent.parent,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1
