"""The memory plan of a C project: as rows, as a picture in SVG, and as a picture in letters.

Both pictures have steps from left to right and addresses from bottom to top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Annotated, Any

from .text import bytes_text, percent_text, short_name

if TYPE_CHECKING:
    from rich.text import Text

    from ..bare.order import GraphPlan

COLOURS = 6  # of the style sheet, svg .b0 to .b5
TERMINAL_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Pixels of the SVG.
WIDTH, HEIGHT = 1000, 260
LEFT, TOP, RIGHT = 76, 34, 12
NAMES = 84  # below, for the names of steps
CHARACTER = 6.4  # of 11 px
NAMED_STEPS = 60  # more would not be legible: they get numbers

# Characters of the terminal's.
GRID_ROWS, GRID_COLUMNS = 12, 96


@dataclass(frozen=True)
class ArenaBuffer:
    """A tensor or a kernel's workspace, alive in steps `first` to `last`, both inclusive."""

    name: str
    is_workspace: bool
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """The memory that a C project works in, planned when it was built."""

    bytes: Annotated[int, "size of the arena: tensors between kernels, and kernels' workspaces"]
    bound_bytes: Annotated[int, "alive at once in the worst step: no arena is smaller"]
    is_optimal: Annotated[bool, "whether `bytes` is proved to be the least for this order"]
    heuristic: Annotated[str, "how the offsets were found"]
    order: Annotated[str, "how the order of kernels was found"]
    given_peak_bytes: Annotated[int, "alive at once in the worst step of the model's own order"]
    steps: Annotated[tuple[str, ...], "layer or kernel of each step"]
    peak_step: Annotated[int, "index of the step that sets the size"]
    buffers: tuple[ArenaBuffer, ...]
    ram_bytes: Annotated[int | None, "RAM of the board"]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Arena:
        """Inverse of `dataclasses.asdict`."""
        buffers = tuple(ArenaBuffer(**row) for row in value["buffers"])
        return cls(**{**value, "steps": tuple(value["steps"]), "buffers": buffers})


def arena_of(found: GraphPlan, steps: Sequence[str], ram_bytes: int | None) -> Arena:
    """Rows of a plan. `steps` names the layer or kernel of each step, in the plan's order."""
    plan, order = found.arena, found.order
    return Arena(
        bytes=plan.bytes,
        bound_bytes=plan.bound_bytes,
        is_optimal=plan.is_optimal,
        heuristic=plan.heuristic,
        order=order.method,
        given_peak_bytes=order.given_peak_bytes,
        steps=tuple(steps),
        peak_step=plan.peak_step,
        buffers=tuple(
            ArenaBuffer(x.name, x.is_workspace, plan.offsets[x.name], x.bytes, x.first, x.last)
            for x in plan.lifetimes
            if x.bytes
        ),
        ram_bytes=ram_bytes,
    )


def peak_name(arena: Mapping[str, Any]) -> str:
    """The layer at the peak."""
    steps = arena["steps"]
    return steps[arena["peak_step"]] if steps else "-"


def facts(arena: Mapping[str, Any]) -> list[str]:
    """What there is to say in words, a sentence each."""
    size, bound = arena["bytes"], arena["bound_bytes"]
    if size == bound:
        quality = "no arena is smaller, because so much is alive at once"
    elif arena["is_optimal"]:
        quality = f"proved to be the least, though only {bound} are alive at once"
    else:
        quality = f"{size - bound} above what is alive at once, the lower bound"
    said = [
        (
            f"{size} bytes; peak at {peak_name(arena)} (step {arena['peak_step'] + 1} of "
            f"{len(arena['steps'])})"
        ),
        f"{quality} (placed {arena['heuristic']})",
    ]
    if arena["order"] != "as given":
        said.append(
            f"kernels reordered ({arena['order']}): the peak was {arena['given_peak_bytes']} bytes "
            "in the model's own order"
        )
    if arena["ram_bytes"]:
        said.append(f"{percent_text(size / arena['ram_bytes'])} of the board's RAM")
    return said


# --- SVG ----------------------------------------------------------------------------------------


def arena_section(arena: Mapping[str, Any]) -> str:
    """The section of the HTML report."""
    said = "".join(f"<li>{escape(fact)}.</li>" for fact in facts(arena))
    return (
        "<section><h2>Memory arena</h2>"
        f'<p class="figure">{bytes_text(arena["bytes"])}<small> peak at '
        f"<b>{escape(peak_name(arena))}</b></small></p>"
        f'<ul class="quiet">{said}</ul>'
        '<p class="quiet">Every tensor and workspace over the steps of one inference; height is '
        "its place in the arena, hatched rectangles are workspaces of kernels.</p>"
        f'<div class="scroll">{arena_svg(arena)}</div></section>'
    )


def arena_svg(arena: Mapping[str, Any]) -> str:
    """Buffers as rectangles: time from left to right, addresses from bottom to top."""
    steps = arena["steps"]
    if not steps:
        return ""
    wide = (WIDTH - LEFT - RIGHT) / len(steps)
    top = max(arena["bytes"], 1)
    end = TOP + HEIGHT

    def y(address: float) -> float:
        return end - HEIGHT * address / top

    peak = arena["peak_step"]
    named = len(steps) <= NAMED_STEPS
    parts = [
        (
            '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><line class="hatch" y2="6"/></pattern></defs>'
        ),
        (
            f'<rect class="peak" x="{LEFT + peak * wide:.1f}" y="{TOP - 6}" width="{wide:.1f}" '
            f'height="{HEIGHT + 6}"/>'
        ),
    ]
    for part in range(5):
        address = top * part / 4
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(address):.1f}" '
            f'y2="{y(address):.1f}"/><text class="axis" x="{LEFT - 8}" '
            f'y="{y(address) + 3.5:.1f}" text-anchor="end">{bytes_text(address)}</text>'
        )
    for index, row in enumerate(arena["buffers"]):
        parts.append(_rectangle(row, index, steps, wide, y))
    middle = LEFT + (peak + 0.5) * wide
    anchor = "start" if peak * 3 < len(steps) else "end" if peak * 3 > 2 * len(steps) else "middle"
    parts.append(
        f'<text class="head" x="{middle:.1f}" y="{TOP - 14}" text-anchor="{anchor}">'
        f"peak: {escape(short_name(steps[peak], 40))}</text>"
    )
    parts += [
        _step_name(LEFT + (i + 0.5) * wide, end + 12, name, str(i + 1), named, i == peak)
        for i, name in enumerate(steps)
        if named or i % (len(steps) // 20) == 0
    ]
    height = end + (NAMES if named else 24)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Memory arena over time">'
        f"{''.join(parts)}</svg>"
    )


def _rectangle(
    row: Mapping[str, Any], index: int, steps: Sequence[str], wide: float, y: Any
) -> str:
    x, width = LEFT + row["first"] * wide, (row["last"] - row["first"] + 1) * wide
    top, height = (
        y(row["offset"] + row["bytes"]),
        y(row["offset"]) - y(row["offset"] + row["bytes"]),
    )
    until = "" if row["last"] == row["first"] else f" to {steps[row['last']]}"
    tip = f"{row['name']}: {row['bytes']} bytes at {row['offset']}; {steps[row['first']]}{until}"
    css = "work" if row["is_workspace"] else f"b{index % COLOURS}"
    place = f'x="{x + 0.75:.1f}" y="{top:.1f}" width="{max(width - 1.5, 0.5):.1f}" '
    place += f'height="{max(height, 0.75):.1f}"'
    shape = f'<rect class="buffer {css}" {place} rx="1.5"/>'
    if row["is_workspace"]:
        shape += f'<rect fill="url(#hatch)" {place}/>'
    room = int((width - 8) / CHARACTER)
    label = ""
    if height >= 13 and room >= 3:
        label = (
            f'<text class="inside" x="{x + width / 2:.1f}" y="{top + height / 2 + 4:.1f}" '
            f'text-anchor="middle">{escape(short_name(row["name"], room))}</text>'
        )
    return f"<g><title>{escape(tip)}</title>{shape}{label}</g>"


def _step_name(x: float, y: float, name: str, number: str, named: bool, is_peak: bool) -> str:
    css = "head" if is_peak else "axis"
    if not named:
        return f'<text class="{css}" x="{x:.1f}" y="{y}" text-anchor="middle">{number}</text>'
    return (
        f'<text class="{css}" transform="translate({x + 3:.1f} {y}) rotate(-50)" '
        f'text-anchor="end">{escape(short_name(name, 22))}<title>{escape(name)}</title></text>'
    )


# --- terminal -----------------------------------------------------------------------------------


def arena_lines(arena: Mapping[str, Any]) -> list[Text]:
    """The picture for a terminal: a letter for each buffer, coloured where there are colours."""
    from rich.text import Text

    lines = [Text("memory arena", "bold")]
    lines += [Text(f"  {fact}") for fact in facts(arena)]
    steps = arena["steps"]
    if not steps or not arena["buffers"]:
        return lines
    columns = _columns(arena)
    wide = max(1, min(4, GRID_COLUMNS // len(columns)))
    rows = min(GRID_ROWS, max(1, arena["bytes"]))
    for row in reversed(range(rows)):
        low, high = arena["bytes"] * row / rows, arena["bytes"] * (row + 1) / rows
        line = Text(f"{bytes_text(high):>10} ")
        for step in columns:
            line.append_text(_cell(arena["buffers"], step, low, high, wide))
        lines.append(line)
    place = 11 + wide * columns.index(arena["peak_step"])
    lines.append(Text(" " * place + "^" * wide + f" {short_name(peak_name(arena), 40)}"))
    alive = [
        (index, row)
        for index, row in enumerate(arena["buffers"])
        if row["first"] <= arena["peak_step"] <= row["last"]
    ]
    for index, row in sorted(alive, key=lambda item: -item[1]["offset"]):
        lines.append(
            Text.assemble(
                " " * 11,
                (_letter(index), _style(index)),
                f" {row['name']}: {bytes_text(row['bytes'])} at {row['offset']}",
            )
        )
    return lines


def _columns(arena: Mapping[str, Any]) -> list[int]:
    """The steps that are shown: all, or of each group the one with the most alive."""
    count = len(arena["steps"])
    group = -(-count // GRID_COLUMNS)

    def alive(step: int) -> tuple[bool, int]:
        rows = arena["buffers"]
        total = sum(row["bytes"] for row in rows if row["first"] <= step <= row["last"])
        return (step == arena["peak_step"], total)

    return [max(range(i, min(i + group, count)), key=alive) for i in range(0, count, group)]


def _cell(rows: Sequence[Mapping[str, Any]], step: int, low: float, high: float, wide: int) -> Text:
    """The buffer that fills most of the addresses `low` to `high` in a step."""
    from rich.text import Text

    best, most = -1, (high - low) / 4  # less is shown as free
    for index, row in enumerate(rows):
        if row["first"] <= step <= row["last"]:
            common = min(high, row["offset"] + row["bytes"]) - max(low, row["offset"])
            if common > most:
                best, most = index, common
    return Text("·" * wide, "dim") if best < 0 else Text(_letter(best) * wide, _style(best))


def _letter(index: int) -> str:
    return LETTERS[index % len(LETTERS)]


def _style(index: int) -> str:
    return f"reverse {TERMINAL_COLOURS[index % len(TERMINAL_COLOURS)]}"
