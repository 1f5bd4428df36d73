"""Object files => a static library in the System V format that every linker reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60


def archive(members: Sequence[tuple[str, bytes, Sequence[str]]]) -> bytes:
    """(file name, content, symbols that it defines) of each member. The same input gives the same
    bytes: no times, no owners."""
    long_names = b"".join(f"{name}/\n".encode() for name, _, _ in members)
    name_at, at = {}, 0
    for name, _, _ in members:
        name_at[name] = at
        at += len(name) + 2
    symbols = [symbol for _, _, defined in members for symbol in defined]
    strings = b"".join(symbol.encode() + b"\0" for symbol in symbols)
    index_bytes = 4 + 4 * len(symbols) + len(strings)
    offset = len(_MAGIC) + _padded(index_bytes) + _padded(len(long_names))
    bodies = []
    found: list[int] = []
    for name, content, defined in members:
        found += [offset] * len(defined)
        body = _member(f"/{name_at[name]}", content)
        bodies.append(body)
        offset += len(body)
    index = struct.pack(f">I{len(found)}I", len(found), *found) + strings
    return _MAGIC + _member("/", index) + _member("//", long_names) + b"".join(bodies)


def _padded(size: int) -> int:
    return _HEADER_BYTES + size + size % 2


def _member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)
