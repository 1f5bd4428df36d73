"""What a linked program takes of flash and RAM, and where its functions are."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtefactError

_ALLOC, _NOBITS, _SYMTAB, _FUNC, _WRITE = 0x2, 8, 2, 2, 0x1
_PLACED = re.compile(
    r"^ (\.[^\s]+)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+) (\S[^\n]*)$", re.MULTILINE
)  # section, address, size, file


@dataclass(frozen=True)
class Footprint:
    """Bytes of a linked program; `model_` of what comes from the model alone, without the program
    around it (start-up code, file access, buffers for a sample, the arena) and the C library."""

    flash_bytes: int
    ram_bytes: int
    model_flash_bytes: int
    model_ram_bytes: int


@dataclass(frozen=True)
class Function:
    """`name` of one that only its own file knows is `before/name`: `before` is the last global
    function ahead of it, which for a kernel's own part is that kernel."""

    name: str
    first: int
    end: int
    is_local: bool = False


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int


def footprint(elf: Path, link_map: Path) -> Footprint:
    """Of the sections that are loaded; `data` takes room in both memories."""
    flash = ram = 0
    for section in _sections(elf.read_bytes(), elf):
        if section.flags & _ALLOC:
            flash += 0 if section.kind == _NOBITS else section.size
            ram += section.size if section.flags & _WRITE or section.kind == _NOBITS else 0
    model_flash = model_ram = 0
    for section_name, size, file in _placed(link_map.read_text(errors="replace")):
        if not _is_of_model(file):
            continue
        is_zero = section_name.startswith((".bss", ".sbss"))
        is_data = section_name.startswith((".data", ".sdata"))
        model_flash += 0 if is_zero else size
        model_ram += size if is_zero or is_data else 0
    return Footprint(flash, ram, model_flash, model_ram)


def _is_of_model(file: str) -> bool:
    """Whether a file that was linked is of the C project: its objects, or a member of its archive
    of kernels. Other archives are the compiler's and the C library."""
    archive, is_member, _ = file.partition(".a(")
    name = Path(archive).name
    return name.endswith("_kernels") if is_member else name.startswith("model_")


def _placed(link_map: str) -> Iterator[tuple[str, int, str]]:
    """Section, bytes and file of everything that was linked and is loaded."""
    text = link_map.partition("Linker script and memory map")[2]
    loaded = (".text", ".rodata", ".srodata", ".data", ".sdata", ".bss", ".sbss", ".ARM.ex")
    for match in _PLACED.finditer(text):
        name, _address, size, file = match.groups()
        if name.startswith(loaded) and int(size, 16) and not file.startswith("load address"):
            yield name, int(size, 16), file


def functions(elf: Path) -> list[Function]:
    """In the order of their addresses, none inside another."""
    data = elf.read_bytes()
    wide, order, sections = data[4] == 2, "<" if data[5] == 1 else ">", _sections(data, elf)
    found: dict[int, Function] = {}
    for table in sections:
        if table.kind != _SYMTAB:
            continue
        names_at = sections[table.link].offset
        step = 24 if wide else 16
        for at in range(table.offset, table.offset + table.size, step):
            if wide:
                name_at, info, _, index, value, size = struct.unpack_from(
                    order + "IBBHQQ", data, at
                )
            else:
                name_at, value, size, info, _, index = struct.unpack_from(
                    order + "IIIBBH", data, at
                )
            if info & 15 != _FUNC or index == 0:
                continue
            start = names_at + name_at
            name = data[start : data.index(b"\0", start)].decode("ascii", "replace")
            # Bit 0 of a Thumb function's address is not part of it.
            first = value & ~1 if data[18:20] == b"\x28\0" else value
            if first not in found or size > found[first].end - first:
                found[first] = Function(name, first, first + size, info >> 4 == 0)
    result: list[Function] = []
    last = ""
    listed = sorted(found.values(), key=lambda f: f.first)
    for function, after in zip(listed, [*listed[1:], None], strict=True):
        end = function.end
        if end == function.first and after is not None:  # assembly that does not say its size
            end = after.first
        if end > function.first and (not result or function.first >= result[-1].end):
            name = f"{last}/{function.name}" if function.is_local else function.name
            last = last if function.is_local else function.name
            result.append(Function(name, function.first, end, function.is_local))
    return result


def _sections(data: bytes, path: Path) -> list[_Section]:
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise ArtefactError(f"{path}: is not an ELF file")
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    try:
        if wide:
            (offset,) = struct.unpack_from(order + "Q", data, 0x28)
            step, count = struct.unpack_from(order + "HH", data, 0x3A)
        else:
            (offset,) = struct.unpack_from(order + "I", data, 0x20)
            step, count = struct.unpack_from(order + "HH", data, 0x2E)
        layout = order + ("IIQQQQI" if wide else "IIIIIII")
        rows = [struct.unpack_from(layout, data, offset + i * step) for i in range(count)]
    except struct.error as error:
        raise ArtefactError(f"{path}: damaged ELF file: {error}") from None
    return [_Section(kind, flags, at, size, link) for _, kind, flags, _, at, size, link in rows]
