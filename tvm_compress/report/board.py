"""The terminal form of `board_benchmarking.BoardBenchmark`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .terminal import new_console, new_table
from .text import bytes_text, percent_text, points, short_name, time_text

if TYPE_CHECKING:
    from rich.console import Console

    from ..board_benchmarking import BoardBenchmark, BoardLatency

_FUNCTIONS_SHOWN = 20


def print_board_benchmark(result: BoardBenchmark, original: str) -> None:
    """`original` says what the artefact's accuracy is compared with: `Artefact.original`."""
    console = new_console()
    _print_memory(console, result)
    counted = result.instructions
    if counted is not None:
        table = new_table("", ">median", ">least", ">most", ">inputs")
        numbers = (counted.median, counted.least, counted.most)
        table.add_row("instructions", *(f"{n:,}" for n in numbers), str(counted.inputs))
        console.print(table)
        _print_functions(console, result)
        console.print(
            f"{result.target}, {result.machine}: instructions are counted exactly; they are no "
            "cycles, for the emulator has no pipeline and no slow memory",
            style="dim",
        )
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


def _print_memory(console: Console, result: BoardBenchmark) -> None:
    memory = result.memory
    stack = "" if result.stack_bytes is None else bytes_text(result.stack_bytes)
    table = new_table("", ">flash", ">arena", ">other RAM", ">stack")
    table.add_row(
        "network",
        bytes_text(memory.model_flash_bytes),
        bytes_text(result.arena_bytes),
        bytes_text(memory.model_ram_bytes),
        stack,
    )
    console.print(table)


def _print_latency(console: Console, result: BoardBenchmark, latency: BoardLatency) -> None:
    table = new_table("", ">median", ">least", ">90 %", ">runs")
    times = (latency.median_us, latency.least_us, latency.p90_us)
    table.add_row("inference", *map(time_text, times), f"{latency.runs:,}")
    console.print(table)
    console.print(f"{result.target}, {result.machine}: measured there", style="dim")


def _print_functions(console: Console, result: BoardBenchmark) -> None:
    table = new_table("function", "layers", ">instructions", ">share")
    for row in result.functions[:_FUNCTIONS_SHOWN]:
        table.add_row(
            short_name(row.symbol, 40),
            short_name(", ".join(row.layers)),
            f"{row.instructions:,}",
            percent_text(row.share),
        )
    rest = result.functions[_FUNCTIONS_SHOWN:]
    if rest:
        count = sum(row.instructions for row in rest)
        share = percent_text(sum(row.share for row in rest))
        table.add_row(f"{len(rest)} others", "", f"{count:,}", share)
    console.print(table)
