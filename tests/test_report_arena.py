"""The picture of a memory plan, in SVG and in letters."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tvm_compress.bare.order import Graph, InPlace, Operator, plan_graph
from tvm_compress.report.arena import (
    GRID_COLUMNS,
    GRID_ROWS,
    HEIGHT,
    LEFT,
    NAMED_STEPS,
    RIGHT,
    TOP,
    WIDTH,
    Arena,
    arena_lines,
    arena_of,
    arena_section,
    arena_svg,
    facts,
)

NASTY = "conv[/bold]<script>&\"'"


def network() -> Graph:
    """A residual block that gains from another order, with a workspace and an add in place."""
    tensors = {"x": 1600, "skip": 800, "wide": 4000, "narrow": 200, "y": 800}
    return Graph(
        tensors,
        (
            Operator("conv_skip", ("x",), ("skip",)),
            Operator(NASTY, ("x",), ("wide",), workspace_bytes=96),
            Operator("project", ("wide",), ("narrow",)),
            Operator("add", ("narrow", "skip"), ("y",), in_place=(InPlace("y", "skip"),)),
        ),
        ("x",),
        ("y",),
    )


def make(graph: Graph, ram_bytes: int | None = None, reorder: bool = True) -> Any:
    found = plan_graph(graph, alignment=1, reorder=reorder)
    return json.loads(json.dumps(asdict(arena_of(found, found.steps, ram_bytes))))


def chain(count: int) -> Graph:
    operators = [Operator(f"op{i}", (f"t{i}",), (f"t{i + 1}",)) for i in range(count)]
    sizes = {f"t{i}": 100 + i % 7 for i in range(count + 1)}
    return Graph(sizes, tuple(operators), ("t0",), (f"t{count}",))


def printed(arena: Any, capsys: pytest.CaptureFixture[str]) -> str:
    console = Console(width=120)
    for line in arena_lines(arena):
        console.print(line)
    return capsys.readouterr().out


def test_facts_name_the_layer_at_the_peak() -> None:
    said = " ".join(facts(make(network(), ram_bytes=11_600)))
    assert "5800 bytes" in said and f"peak at {NASTY} (step 1 of 4)" not in said
    assert "peak at project (step 2 of 4)" in said
    assert "kernels reordered (exact search): the peak was 6496 bytes" in said
    assert "50.0 % of the board's RAM" in said
    assert "reordered" not in " ".join(facts(make(chain(5))))


def test_svg_has_every_buffer_where_it_lies() -> None:
    arena = make(network())
    text = arena_svg(arena)
    root = ElementTree.fromstring(text)  # well formed
    shapes = [e for e in root.iter("rect") if "buffer" in (e.get("class") or "")]
    assert len(shapes) == len(arena["buffers"]) == 6
    wide = (WIDTH - LEFT - RIGHT) / 4
    for row, shape in zip(arena["buffers"], shapes, strict=True):
        bottom = float(shape.get("y", "")) + float(shape.get("height", ""))
        assert bottom == pytest.approx(TOP + HEIGHT * (1 - row["offset"] / arena["bytes"]), abs=0.2)
        assert float(shape.get("height", "")) == pytest.approx(
            HEIGHT * row["bytes"] / arena["bytes"], abs=0.2
        )
        assert float(shape.get("x", "")) == pytest.approx(LEFT + row["first"] * wide, abs=1)
        assert float(shape.get("width", "")) == pytest.approx(
            (row["last"] - row["first"] + 1) * wide, abs=2
        )
        assert ("work" in shape.get("class", "")) == row["is_workspace"]
    peaks = [e for e in root.iter("rect") if e.get("class") == "peak"]
    assert float(peaks[0].get("x", "")) == pytest.approx(LEFT + arena["peak_step"] * wide, abs=0.1)
    assert "peak: project" in text


def test_names_are_escaped_in_the_page_and_no_markup_in_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arena = make(network(), reorder=False)
    assert arena["steps"][arena["peak_step"]] == NASTY
    page = arena_section(arena)
    assert "<script" not in page and "conv[/bold]&lt;script&gt;" in page
    assert NASTY in printed(arena, capsys)


def test_terminal_shows_what_lies_where(capsys: pytest.CaptureFixture[str]) -> None:
    arena = make(network())
    out = printed(arena, capsys)
    rows = [line.split(maxsplit=2)[2] for line in out.splitlines() if re.search(r"B [A-Z·]", line)]
    assert len(rows) == GRID_ROWS
    columns = [[row[step * (len(rows[0]) // 4)] for row in rows] for step in range(4)]
    letters = {row["name"]: "ABCDEF"[i] for i, row in enumerate(arena["buffers"])}
    # 4000 of 5800 bytes are 8 of 12 rows, from the step that writes it to the one that reads it.
    for step, count in ((0, 8), (1, 8), (2, 0), (3, 0)):
        assert abs(columns[step].count(letters["wide"]) - count) <= (1 if count else 0)
    assert all(len(line) <= 120 for line in out.splitlines())
    assert "^ project" in out
    for row in arena["buffers"]:
        is_alive = row["first"] <= arena["peak_step"] <= row["last"]
        assert is_alive == (f" {row['name']}: " in out)


@pytest.mark.parametrize("count", [1, 2, 19, NAMED_STEPS, NAMED_STEPS + 1, GRID_COLUMNS + 1, 400])
def test_any_number_of_steps(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    arena = make(chain(count))
    ElementTree.fromstring(arena_svg(arena))
    out = printed(arena, capsys)
    assert all(len(line) <= 120 for line in out.splitlines())
    assert f"^ op{arena['peak_step']}" in out


def test_nothing_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    arena = make(Graph({}, ()))
    assert arena_svg(arena) == ""
    assert "0 bytes" in printed(arena, capsys)
    assert "Memory arena" in arena_section(arena)


def test_rows_say_how_good_the_plan_is() -> None:
    fields = asdict(
        Arena(1000, 900, False, "by size, lowest gap", "as given", 900, ("conv",), 0, (), None)
    )
    assert "100 above what is alive at once" in " ".join(facts(fields))
    assert "proved to be the least" in " ".join(facts({**fields, "is_optimal": True}))
    assert "no arena is smaller" in " ".join(facts({**fields, "bytes": 900}))
