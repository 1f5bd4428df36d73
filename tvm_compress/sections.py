"""Sizes of the sections of an ELF file, read from its section headers."""

from __future__ import annotations

import struct
from pathlib import Path

from .errors import ArtefactError


def section_bytes(path: Path) -> dict[str, int]:
    """Section name => bytes that it takes in the file. Raises `ArtefactError` for anything else."""
    return sections_of(path.read_bytes(), str(path))


def sections_of(data: bytes, path: str) -> dict[str, int]:
    """The same of what was read from `path`."""
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise ArtefactError(f"{path}: is not an ELF file")
    wide = data[4] == 2
    order = "<" if data[5] == 1 else ">"
    try:
        if wide:
            (offset,) = struct.unpack_from(order + "Q", data, 0x28)
            entry_size, count, names_index = struct.unpack_from(order + "HHH", data, 0x3A)
        else:
            (offset,) = struct.unpack_from(order + "I", data, 0x20)
            entry_size, count, names_index = struct.unpack_from(order + "HHH", data, 0x2E)
        layout = order + ("IIQQQQ" if wide else "IIIIII")  # name, type, flags, addr, offset, size
        headers = [
            struct.unpack_from(layout, data, offset + index * entry_size) for index in range(count)
        ]
        names_at = headers[names_index][4]
        sizes: dict[str, int] = {}
        for name_at, kind, _flags, _address, _offset, size in headers:
            start = names_at + name_at
            name = data[start : data.index(b"\0", start)].decode("ascii", "replace")
            if kind != 8:  # SHT_NOBITS takes no room in the file
                sizes[name] = sizes.get(name, 0) + size
    except (struct.error, ValueError, IndexError) as error:
        raise ArtefactError(f"{path}: damaged ELF file: {error}") from None
    return sizes


def undefined_symbols(data: bytes, path: str) -> tuple[str, ...]:
    """Names that an ELF object file needs from elsewhere. Raises `ArtefactError` for anything
    else."""
    sections_of(data, path)  # refuses what is none
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    offset_at, count_at = (0x28, 0x3A) if wide else (0x20, 0x2E)
    try:
        (offset,) = struct.unpack_from(order + ("Q" if wide else "I"), data, offset_at)
        entry_size, count = struct.unpack_from(order + "HH", data, count_at)
        layout = order + ("IIQQQQIIQQ" if wide else "IIIIIIIIII")
        headers = [
            struct.unpack_from(layout, data, offset + index * entry_size) for index in range(count)
        ]
        found: dict[str, None] = {}
        for _, kind, _, _, start, size, link, _, _, symbol_size in headers:
            if kind != 2:  # SHT_SYMTAB
                continue
            names_at = headers[link][4]
            for at in range(start + symbol_size, start + size, symbol_size):
                name_at, *_, section = struct.unpack_from(
                    order + ("IBBH" if wide else "IIIBBH"), data, at
                )
                if section == 0 and name_at:
                    begin = names_at + name_at
                    found[data[begin : data.index(b"\0", begin)].decode("ascii", "replace")] = None
    except (struct.error, ValueError, IndexError) as error:
        raise ArtefactError(f"{path}: damaged ELF file: {error}") from None
    return tuple(found)
