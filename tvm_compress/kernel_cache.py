"""Compiled kernels on disk, found by what they were made from.

An entry is an object file with a checksum behind it (linkers and `objdump` ignore what follows the
sections). Writers put a finished file in its place by a rename, so that any number of processes may
read and write at once; an entry that is damaged counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .user_cache import user_cache

MAX_BYTES = 512 << 20  # some 10,000 kernels
_KEPT_PART = 0.75  # of MAX_BYTES, after old entries were removed: not at every build
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_UNFINISHED = ".unfinished-"
_UNFINISHED_SECONDS = 3600.0  # an unfinished file this old belongs to a killed writer


class KernelCache:
    """Object files of one folder (default: `tvm-compress/kernels` in the user's cache).

    Never raises: a folder that cannot be used only costs time, and `trouble` says so.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = user_cache() / "kernels" if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self.trouble: str | None = None
        """One line about why nothing could be kept; None: all is well."""

    def get(self, key: str) -> bytes | None:
        """The object file of `key` (hexadecimal digits); None: there is none."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        object_file, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if _checksum(key, object_file) != checksum:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # used: the oldest are removed first
        return object_file

    def put(self, key: str, object_file: bytes) -> None:
        """Keep an object file; `trouble` is set where that is not possible."""
        if self.trouble is not None:
            return
        unfinished = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.folder)
            with os.fdopen(number, "wb") as file:
                file.write(object_file + _checksum(key, object_file))
            os.replace(unfinished, self._path(key))  # noqa: PTH105
        except OSError as error:
            self.trouble = (
                f"{self.folder}: cannot be written ({error.strerror}), so the next build compiles "
                "every kernel again; set XDG_CACHE_HOME to a folder that can be written"
            )
            if unfinished is not None:
                with suppress(OSError):
                    Path(unfinished).unlink()

    def trim(self) -> None:
        """Remove what was not used for the longest time where the folder has grown too large."""
        entries: list[tuple[float, int, Path]] = []
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                with suppress(OSError):  # removed by somebody else
                    status = entry.stat(follow_symlinks=False)
                    entries.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in entries)
        is_large = total > self.max_bytes
        for modified, size, path in sorted(entries):
            is_leftover = path.name.startswith(_UNFINISHED)
            if is_leftover and time.time() - modified < _UNFINISHED_SECONDS:
                continue
            if is_leftover or (is_large and total > _KEPT_PART * self.max_bytes):
                with suppress(OSError):
                    path.unlink()
                total -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.o"


def _checksum(key: str, object_file: bytes) -> bytes:
    """Of the content under its key: an entry under another's name is a damaged one."""
    return hashlib.sha256(key.encode() + object_file).digest()
