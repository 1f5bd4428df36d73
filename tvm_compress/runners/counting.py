"""Exact instruction counts under QEMU, by our own plugin."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArtefactError, TargetError
from ..user_cache import user_cache
from .elf import Function, functions

_SOURCE = Path(__file__).with_name("instruction_count.c")
_FLAGS = ("-O2", "-shared", "-fPIC", "-Wall")
SYMBOLS, COUNTS, PLUGIN = "symbols.txt", "counts.bin", "instruction_count.so"
_MARKS = ("mark_begin", "mark_end")


@dataclass(frozen=True)
class Counts:
    """Executed instructions of every sample, and of its functions (those that ran)."""

    samples: tuple[int, ...]
    by_function: tuple[dict[str, int], ...]


def plugin() -> Path:
    """The plugin, built with the host's C compiler at first use and kept in the user's cache."""
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + repr((_FLAGS, os.uname().machine)).encode()).hexdigest()[:16]
    path = user_cache() / "plugins" / f"{_SOURCE.stem}-{digest}.so"
    if path.is_file():
        return path
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise TargetError(
            "counting instructions needs a C compiler for this machine; on Debian or Ubuntu: "
            "apt-get install gcc libc6-dev"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent)
    except OSError as error:
        raise TargetError(f"{path.parent}: cannot be written ({error.strerror})") from None
    os.close(handle)
    done = subprocess.run(
        [compiler, *_FLAGS, str(_SOURCE), "-o", unfinished],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        Path(unfinished).unlink()
        raise TargetError(f"{_SOURCE.name} does not compile: {' '.join(done.stderr.split())[:300]}")
    Path(unfinished).replace(path)
    return path


def prepare(elf: Path, folder: Path) -> tuple[list[Function], list[str]]:
    """Put what the plugin reads into `folder`; the functions, and QEMU's arguments there."""
    listed = functions(elf)
    by_name = {function.name: function for function in listed}
    missing = [name for name in _MARKS if name not in by_name]
    if missing:
        raise ArtefactError(f"{elf}: has no function {' or '.join(missing)}")
    lines = [f"M {by_name[name].first:x}" for name in _MARKS]
    lines += [f"R {function.first:x} {function.end:x}" for function in listed]
    (folder / SYMBOLS).write_text("\n".join(lines) + "\n")
    shutil.copyfile(plugin(), folder / PLUGIN)
    return listed, ["-plugin", f"./{PLUGIN},symbols={SYMBOLS},out={COUNTS}"]


def read_counts(folder: Path, listed: list[Function], samples: int) -> Counts:
    """Instructions between the two marks, less those that the marks take themselves."""
    rows = np.fromfile(folder / COUNTS, "<u8").reshape(-1, 2 + len(listed))
    expected = 2 * (1 + samples)
    if len(rows) != expected or not np.array_equal(rows[:, 0], np.arange(expected) % 2):
        raise ArtefactError(f"the emulator passed {len(rows)} marks; {expected} were expected")
    spent = (rows[1::2] - rows[::2])[:, 1:].astype(np.int64)  # [1 + samples, 1 + functions]
    net = spent[1:] - spent[0]
    names = [function.name for function in listed]
    return Counts(tuple(int(n) for n in net[:, 0]), tuple(_by_name(names, row[1:]) for row in net))


def _by_name(names: list[str], counts: np.ndarray) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, count in zip(names, counts, strict=True):
        if count > 0 and name not in (*_MARKS, "main"):
            found[name] = found.get(name, 0) + int(count)
    return found
