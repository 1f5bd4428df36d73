"""Where a user's caches are. What is lost there is only time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/tvm-compress`, or `~/.cache/tvm-compress`; nothing is created."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # noqa: PTH117
    return root / "tvm-compress"
