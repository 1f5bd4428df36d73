"""Writing an artefact so that a killed run costs nothing: caches, staging, one atomic swap.

While `compress` works, finished steps go to `OUT/.work/cache`, the new artefact grows in the hidden
sibling `.OUT.new`, and the artefact that was in OUT stays as it is. At the end the two folders
change places in one system call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO

from .artefact import MANIFEST, _read_json
from .errors import ArtefactError
from .interrupts import check, was_interrupted

WORK = ".work"
KNOWN = {
    "recipe.yaml", "deploy", "reference", "tuning", "report.json", "report.html", MANIFEST, WORK
}  # fmt: skip
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # fcntl.h


class Workspace:
    """Holds OUT for one run of `compress`; a context manager.

    `model_key` identifies the source model: an artefact of another model in OUT is replaced only
    with `force`. A folder with files that are not ours is never replaced.
    """

    def __init__(self, out: Path, model_key: str, force: bool = False) -> None:
        self.out = Path(out).resolve()
        self.staging = self.out.parent / f".{self.out.name}.new"
        self._aside = self.out.parent / f".{self.out.name}.old"
        self._model_key = model_key
        self._force = force
        self._used: set[str] = set()
        self._lock: IO[str] | None = None
        self._is_first_run = True
        self._made_parents: list[Path] = []

    def __enter__(self) -> Workspace:
        if self.out.exists() and not self.out.is_dir():
            raise ArtefactError(f"{self.out}: is a file; choose another -o")
        self._recover()
        self._check_ours()
        self._is_first_run = not self.out.exists()
        self._made_parents = [
            folder for folder in (*self.out.parents,) if not folder.exists()
        ]  # innermost first
        try:
            (self.out / WORK / "cache").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"{self.out}: cannot be written: {error.strerror}") from None
        self._take_lock()
        if self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        for half_done in (self.out / WORK / "cache").glob("*.part"):
            shutil.rmtree(half_done, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, Exception) and self._is_first_run and not was_interrupted():
            # Bad input leaves no trace; an interrupt keeps what is finished.
            shutil.rmtree(self.out, ignore_errors=True)
            with suppress(OSError):  # somebody else's files may be in them by now
                for folder in self._made_parents:
                    folder.rmdir()

    def cached(self, name: str, key_parts: Iterable[object], make: Callable[[Path], None]) -> Path:
        """The folder of one finished step; `make(folder)` fills it when it is not there yet.

        `key_parts` are everything the step depends on besides the code itself.
        """
        digest = hashlib.sha256(code_fingerprint().encode())
        for part in key_parts:
            digest.update(f"{part}\0".encode())
        label = f"{name}-{digest.hexdigest()[:20]}"
        self._used.add(label)
        folder = self.out / WORK / "cache" / label
        if not folder.is_dir():
            half_done = folder.with_name(f"{label}.part")
            shutil.rmtree(half_done, ignore_errors=True)
            half_done.mkdir()
            make(half_done)
            check()
            half_done.rename(folder)
        return folder

    def publish(self) -> None:
        """Put the finished staging folder in the place of OUT; keep only the caches used now."""
        check()
        if self.out.exists():
            _exchange(self.staging, self.out, self._aside)
        old = self.staging if self.staging.exists() else self._aside
        with suppress(OSError):  # only caches
            (old / WORK).rename(self.out / WORK)
        shutil.rmtree(old, ignore_errors=True)
        for entry in (self.out / WORK / "cache").glob("*"):
            if entry.name not in self._used:
                shutil.rmtree(entry, ignore_errors=True)

    def _recover(self) -> None:
        """Finish or undo what a killed `publish` left behind."""
        if self._aside.exists():
            if self.out.exists():
                shutil.rmtree(self._aside)
            else:
                self._aside.rename(self.out)
        if (self.staging / WORK).is_dir() and self.out.is_dir() and not (self.out / WORK).exists():
            (self.staging / WORK).rename(self.out / WORK)

    def _check_ours(self) -> None:
        if not self.out.is_dir():
            return
        foreign = sorted(p.name for p in self.out.iterdir() if p.name not in KNOWN)
        if foreign:
            raise ArtefactError(
                f"{self.out}: holds {foreign[0]!r}, which is not part of an artefact; "
                "choose another -o, or move it away"
            )
        if not (self.out / MANIFEST).is_file():
            return
        try:
            holds = _read_json(self.out / MANIFEST).get("model", {})
        except ArtefactError:
            return  # damaged: replacing it is the cure
        if holds.get("key") != self._model_key and not self._force:
            raise ArtefactError(
                f"{self.out}: holds the artefact of another model ({holds.get('name')}); "
                "choose another -o, or replace it with --force"
            )

    def _take_lock(self) -> None:
        self._lock = (self.out / WORK / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise ArtefactError(f"{self.out}: another run is writing to it; wait for it") from None


def _exchange(new: Path, out: Path, aside: Path) -> None:
    """Swap two folders. One system call on Linux; two renames where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        arguments = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE)
        if renameat2(*arguments) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            code = ctypes.get_errno()
            raise ArtefactError(f"{out}: cannot be replaced: {os.strerror(code)}")
    out.rename(aside)
    new.rename(out)


@cache
def code_fingerprint() -> str:
    """Hash of our own sources and of TVM's version: caches of other code are not ours."""
    import importlib.metadata

    root = Path(__file__).resolve().parent
    return hash_sources(
        [root, *(root / name for name in ("relay_passes", "schedules", "targets"))],
        importlib.metadata.version("apache-tvm"),
    )


def hash_sources(paths: Iterable[Path], version: str) -> str:
    """Hash of Python files, those below folders included, and of a version."""
    digest = hashlib.sha256(version.encode())
    for path in paths:
        top = path.resolve()
        for file in [top] if top.is_file() else sorted(top.rglob("*.py")):
            digest.update(str(file.relative_to(top.parent)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
