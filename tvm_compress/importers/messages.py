"""Other libraries' errors in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong: the first, or the last of a C++ trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    chosen = lines[-1] if lines[0].startswith(("Traceback", "Stack trace", "[")) else lines[0]
    return chosen[:300]
