"""What a C project costs on its machine, on a terminal: of reports and of `benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .terminal import new_console, new_table
from .text import (
    NO_CYCLES,
    bytes_text,
    instructions_text,
    percent_text,
    points,
    short_name,
    time_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..board_benchmarking import BoardBenchmark, BoardLatency

_KERNELS_SHOWN = 20


def print_board_benchmark(result: BoardBenchmark, original: str) -> None:
    """`original` says what the artefact's accuracy is compared with: `Artefact.original`."""
    from ..board_benchmarking import board_cost

    console = new_console()
    print_board(console, asdict(board_cost(result)))
    if result.latency is not None:
        _print_latency(console, result, result.latency)
    if result.accuracies:
        table = new_table("", ">top-1", ">95 %", ">minus compressed, points", ">samples")
        for side, row in result.accuracies.items():
            table.add_row(
                original if side == "original" else side,
                percent_text(row.accuracy, 2),
                f"{percent_text(row.low, 1)} .. {percent_text(row.high, 1)}",
                "" if side == "compressed" else points(row.ahead),
                f"{row.samples:,}",
            )
        console.print(table)


def print_board(console: Console, cost: Mapping[str, Any]) -> None:
    """A `BoardCost`, with its kernels."""
    print_cost(console, cost)
    if cost["instructions"] is not None:
        _print_kernels(console, cost["kernels"])


def print_cost(console: Console, cost: Mapping[str, Any]) -> None:
    """A `BoardCost` in a line."""
    table = new_table("", ">flash", ">arena", ">other RAM", ">stack", ">instructions", ">inputs")
    counted = cost["instructions"]
    original = cost.get("original")
    if original:
        table.add_row(
            "original",
            bytes_text(original["flash_bytes"]),
            bytes_text(original["arena_bytes"]),
            *("", ""),
            f"{original['instructions']:,}",
            "1",
        )
    table.add_row(
        "compressed" if original else "network",
        bytes_text(cost["flash_bytes"]),
        bytes_text(cost["arena_bytes"]),
        bytes_text(cost["other_ram_bytes"]),
        "" if cost["stack_bytes"] is None else bytes_text(cost["stack_bytes"]),
        "" if counted is None else instructions_text(cost),
        "" if counted is None else str(cost["inputs"]),
    )
    console.print(table)
    if cost.get("no_original"):
        console.print(f"original: not counted: {cost['no_original']}", style="dim")
    if counted is not None:
        console.print(f"{cost['machine']}: {NO_CYCLES}", style="dim")


def _print_latency(console: Console, result: BoardBenchmark, latency: BoardLatency) -> None:
    table = new_table("", ">median", ">least", ">90 %", ">runs")
    times = (latency.median_us, latency.least_us, latency.p90_us)
    table.add_row("inference", *map(time_text, times), f"{latency.runs:,}")
    console.print(table)
    console.print(f"{result.target}, {result.machine}: measured there", style="dim")


def _print_kernels(console: Console, kernels: list[Mapping[str, Any]]) -> None:
    table = new_table("function", "layers", ">instructions", ">share")
    for row in kernels[:_KERNELS_SHOWN]:
        table.add_row(
            short_name(row["symbol"], 40),
            short_name(", ".join(row["layers"])),
            f"{row['instructions']:,}",
            percent_text(row["share"]),
        )
    rest = kernels[_KERNELS_SHOWN:]
    if rest:
        count = sum(row["instructions"] for row in rest)
        share = percent_text(sum(row["share"] for row in rest))
        table.add_row(f"{len(rest)} others", "", f"{count:,}", share)
    console.print(table)
