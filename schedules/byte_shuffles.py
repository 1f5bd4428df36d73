"""Bytes brought into another order, as functions of LLVM that kernels call and that are inlined.

TVM's own shuffles take one or two vectors and know no unpacking instructions; LLVM finds those, and
NEON's interleaving stores, in shuffles written as these are.
"""

from __future__ import annotations

# Bytes that an unpacking instruction of x86 keeps together; what a transposition turns at once.
LANE = 16


def interleave_name(group: int, run: int) -> str:
    """The function's name: void(plane, ..., plane, out)."""
    return f"tvmc_interleave_{group}_{run}"


def transpose_name(rows: int) -> str:
    """The function's name: void(in, bytes between its rows, out, bytes between its rows)."""
    return f"tvmc_transpose_{rows}"


def interleave(group: int, run: int, wide: bool) -> str:
    """`run` bytes of each of `group` planes, a byte of each in turn; `wide`: as uint16."""
    kind, count = f"<{run} x i8>", group * run
    lines = [*_opening(group, run, kind)]
    full = f"<{count // 2} x i8>"
    parts = ["%v0", "%v1"]
    if group == 4:
        for half in (0, 1):
            both = f"{kind} %v{2 * half}, {kind} %v{2 * half + 1}"
            lines.append(f"  %h{half} = shufflevector {both}, {_mask(list(range(2 * run)))}")
        parts = ["%h0", "%h1"]
    order = _mask([plane * run + i for i in range(run) for plane in range(group)])
    lines.append(f"  %r = shufflevector {full} {parts[0]}, {full} {parts[1]}, {order}")
    stored, value = f"<{count} x i8>", "%r"
    if wide:
        lines.append(f"  %w = zext {stored} %r to <{count} x i16>")
        stored, value = f"<{count} x i16>", "%w"
    return "\n".join([*lines, f"  store {stored} {value}, ptr %o, align 1", "  ret void", "}\n"])


def interleave_by_unpacking(run: int) -> str:
    """The same for four planes with x86's unpacking instructions: every four positions follow one
    another, but those four of a vector are 16 apart (`unpacked_slot`)."""
    bytes_, words = f"<{run} x i8>", f"<{run // 2} x i16>"
    lines = [*_opening(4, run, bytes_)]
    for name, first in (("p", 0), ("q", 2)):
        for high in (0, 1):
            both = f"{bytes_} %v{first}, {bytes_} %v{first + 1}"
            mask = _mask(unpacking_order(run, LANE, high))
            lines += [
                f"  %{name}{high} = shufflevector {both}, {mask}",
                f"  %{name}{high}w = bitcast {bytes_} %{name}{high} to {words}",
            ]
    for half in (0, 1):
        for high in (0, 1):
            number = 2 * half + high
            mask = _mask(unpacking_order(run // 2, LANE // 2, high))
            lines += [
                f"  %r{number} = shufflevector {words} %p{half}w, {words} %q{half}w, {mask}",
                f"  %o{number} = getelementptr i8, ptr %o, i64 {number * run}",
                f"  store {words} %r{number}, ptr %o{number}, align 1",
            ]
    return "\n".join([*lines, "  ret void", "}\n"])


def unpacked_slot(position: int, run: int) -> int:
    """Where `interleave_by_unpacking` puts a position."""
    return position % LANE // 4 * (run // 4) + position // LANE * 4 + position % 4


def transpose(rows: int) -> str:
    """`rows` (16, 8, 4) times 16 bytes, rows `%n` apart, to 16 rows `%m` apart."""
    kind, part = f"<{LANE} x i8>", f"<{rows} x i8>"
    arguments = "ptr %a, i64 %n, ptr %o, i64 %m"
    name = transpose_name(rows)
    lines = [f"define internal void @{name}({arguments}) alwaysinline nounwind {{"]
    for row in range(rows):
        lines += [
            f"  %i{row} = mul i64 %n, {row}",
            f"  %p{row} = getelementptr i8, ptr %a, i64 %i{row}",
            f"  %x0_{row} = load {kind}, ptr %p{row}, align 1",
        ]
    # Rounds: row r with row r + rows / 2, elements in turn, is a step on the way to columns.
    low, high = (_mask(unpacking_order(LANE, LANE, half)) for half in (0, 1))
    half, rounds = rows // 2, rows.bit_length() - 1
    for step in range(rounds):
        for row in range(half):
            pair = f"{kind} %x{step}_{row}, {kind} %x{step}_{row + half}"
            lines += [
                f"  %x{step + 1}_{2 * row} = shufflevector {pair}, {low}",
                f"  %x{step + 1}_{2 * row + 1} = shufflevector {pair}, {high}",
            ]
    columns = LANE // rows  # of a vector
    for column in range(LANE):
        vector, first = f"%x{rounds}_{column // columns}", column % columns * rows
        mask = _mask(list(range(first, first + rows)))
        lines += [
            f"  %y{column} = shufflevector {kind} {vector}, {kind} poison, {mask}",
            f"  %j{column} = mul i64 %m, {column}",
            f"  %q{column} = getelementptr i8, ptr %o, i64 %j{column}",
            f"  store {part} %y{column}, ptr %q{column}, align 1",
        ]
    return "\n".join([*lines, "  ret void", "}\n"])


def _opening(group: int, run: int, kind: str) -> list[str]:
    """The head of an interleaving function, and its loads."""
    planes = ", ".join(f"ptr %a{i}" for i in range(group))
    name = interleave_name(group, run)
    return [
        f"define internal void @{name}({planes}, ptr %o) alwaysinline nounwind {{",
        *(f"  %v{i} = load {kind}, ptr %a{i}, align 1" for i in range(group)),
    ]


def _mask(indices: list[int]) -> str:
    return f"<{len(indices)} x i32> <" + ", ".join(f"i32 {i}" for i in indices) + ">"


def unpacking_order(count: int, of_a_lane: int, high: int) -> list[int]:
    """The shuffle of an unpacking instruction on two vectors of `count` elements: elements of both
    in turn, from the low or the high half of every 16 bytes."""
    half = of_a_lane // 2
    return [
        lane * of_a_lane + high * half + element + which * count
        for lane in range(count // of_a_lane)
        for element in range(half)
        for which in (0, 1)
    ]
