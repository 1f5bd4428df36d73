"""The folder of a tuning run's candidates. What a killed run left behind, the next one removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "tvm-compress-tune-"
LOCK = "in-use"  # locked as long as the run lives: the kernel lets go of it, however that ends
# A folder without the file was made just now, or by an earlier version.
_UNLOCKED_SECONDS = 3600.0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of our own in the system's place for such, removed at the end."""
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        with (Path(name) / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)


def remove_abandoned() -> None:
    """Remove the user's folders of runs that are no more. A lock says so, not a process id: those
    are reused, and other containers count their own."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid():
        return False
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return time.time() - status.st_mtime > _UNLOCKED_SECONDS
    except BlockingIOError:
        return False
    return True
