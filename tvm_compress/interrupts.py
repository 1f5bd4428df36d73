"""Ctrl-C. TVM may turn a `KeyboardInterrupt` that is raised inside one of its callbacks into an
unrelated error, or swallow it; so the signal itself is remembered.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

_interrupted = False


def watch() -> None:
    """From now on remember SIGINT besides raising `KeyboardInterrupt`. Main thread only."""
    global _interrupted
    _interrupted = False
    signal.signal(signal.SIGINT, _on_interrupt)


def was_interrupted() -> bool:
    """Whether SIGINT came since `watch`; then any error is its consequence."""
    return _interrupted


def check() -> None:
    """Raise `KeyboardInterrupt` if the one of the signal was swallowed."""
    if _interrupted:
        raise KeyboardInterrupt


def _on_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
