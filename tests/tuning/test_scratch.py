"""Folders of runs that are no more are removed; those of others, and of living runs, stay."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tvm_compress.tuning import scratch
from tvm_compress.tuning.scratch import LOCK, PREFIX, remove_abandoned, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name.removeprefix(PREFIX) for path in folder.iterdir()}


def test_living_runs_keep_their_folder(temporary: Path) -> None:
    with scratch_folder() as one, scratch_folder() as other:
        remove_abandoned()
        assert one.is_dir() and other.is_dir() and one != other
    assert names(temporary) == set()


def test_what_is_left_of_killed_runs_goes(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("killed", "old", "new"):
        (temporary / (PREFIX + name)).mkdir()
    killed = temporary / (PREFIX + "killed")
    (killed / LOCK).touch()
    (killed / "task0").mkdir()
    (killed / "task0" / "candidate.so").touch()
    os.utime(temporary / (PREFIX + "old"), (0, 0))  # no lock: made before there were any
    (temporary / "target").mkdir()
    (temporary / (PREFIX + "link")).symlink_to(temporary / "target")
    (temporary / "target" / LOCK).touch()
    (temporary / "other").mkdir()
    remove_abandoned()
    assert names(temporary) == {"new", "link", "target", "other"}
    assert (temporary / "target" / LOCK).exists()

    (temporary / (PREFIX + "theirs")).mkdir()
    (temporary / (PREFIX + "theirs") / LOCK).touch()
    monkeypatch.setattr(scratch.os, "getuid", lambda: temporary.stat().st_uid + 1)
    remove_abandoned()
    assert "theirs" in names(temporary)
