"""Reports on a terminal, with rich. Everything goes to standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .text import (
    PARTS,
    bytes_text,
    change_text,
    count_text,
    db_text,
    effect_text,
    kernel_times_text,
    other_shapes_text,
    part_rows,
    percent_text,
    points,
    ratio_text,
    row_name,
    short_name,
    size_rows,
    size_text,
    three_digits,
    time_text,
    tuned_text,
)

if TYPE_CHECKING:
    from ..benchmarking import Benchmark
    from ..profiling import Profile
    from ..verification import Verification

BAR_WIDTH = 12
OWN_NOTE = "own: of the layer alone, with the original's values at its inputs."
PROJECT_NOTE = (
    "per layer: a C project's integers are compared by checksum (not where layers stayed float); "
    "SQNR: compile for host"
)
PIPE_WIDTH = 120  # columns when the output is not a terminal
TABLE_WIDTH = 100  # of a table that is mostly sentences


def new_console() -> Console:
    """Names of layers may hold square brackets, so nothing is read as rich markup."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    return console


def _bold(*parts: str) -> Text:
    """Every other part bold, beginning with the first."""
    return Text.assemble(*((part, "" if index % 2 else "bold") for index, part in enumerate(parts)))


def new_table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column whose name starts with `>` is right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    return table


def _bar(fraction: float | None) -> str:
    """A bar of block characters, in eighths."""
    if not fraction:
        return ""
    eighths = max(1, round(fraction * BAR_WIDTH * 8))
    full, rest = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


# --- profile ------------------------------------------------------------------------------------


def print_profile(profile: Profile) -> None:
    console = new_console()
    console.print(_bold(profile.model, f": {profile.sentence()}"))
    console.print(
        f"{count_text(profile.macs)} MACs, {count_text(profile.parameters)} parameters "
        f"({bytes_text(profile.weight_bytes)}), peak activations "
        f"{bytes_text(profile.peak_activation_bytes)} at {profile.peak_at}"
    )
    layers = new_table("layer", "type", "output", ">MACs", ">share", ">params", ">share",
                       ">weights", ">activations")  # fmt: skip
    for row in profile.layers:
        layers.add_row(
            row.name,
            row.type,
            "x".join(map(str, row.output_shape)),
            count_text(row.macs),
            _share(row.macs, profile.macs),
            count_text(row.parameters),
            _share(row.parameters, profile.parameters),
            bytes_text(row.weight_bytes),
            bytes_text(row.output_bytes),
        )
    console.print(layers)
    types = new_table(
        "type", ">count", ">MACs", ">share", "", ">params", ">share", "", ">activations"
    )
    for kind in profile.types:
        types.add_row(
            kind.type,
            str(kind.count),
            count_text(kind.macs),
            _share(kind.macs, profile.macs),
            _bar(kind.macs / profile.macs if profile.macs else 0),
            count_text(kind.parameters),
            _share(kind.parameters, profile.parameters),
            _bar(kind.parameters / profile.parameters if profile.parameters else 0),
            bytes_text(kind.output_bytes),
        )
    console.print(types)


def _share(part: float, total: float) -> str:
    return percent_text(part / total) if total else "-"


# --- the report of an artefact ------------------------------------------------------------------


def print_summary(report: Mapping[str, Any], path: Path) -> None:
    """What `compress` ends with: totals, checks, and where the rest is."""
    console = new_console()
    _print_totals(console, report)
    if report.get("board"):
        from .board import print_cost

        print_cost(console, report["board"])
    if report.get("arena"):
        from .arena import facts

        console.print(f"arena     {facts(report['arena'])[0]}")
    for note in report.get("notes", []):
        console.print(f"note      {note}")
    _print_checks(console, report["checks"])
    _print_kernels(console, report["steps"])
    console.print(f"artefact  {path}", soft_wrap=True)
    console.print(f"report    {path / 'report.html'}", soft_wrap=True)


def _how_made(step: Mapping[str, Any]) -> str:
    detail = "cached" if step["cached"] else step.get("detail", "")
    return f" ({detail})" if detail else ""


def _print_kernels(console: Console, steps: Iterable[Mapping[str, Any]]) -> None:
    for step in steps:
        if step.get("detail"):
            console.print(f"{step['name']:<18}{step['detail']}", style="dim")


def print_report(report: Mapping[str, Any], path: Path) -> None:
    """Everything but the plots."""
    console = new_console()
    _print_totals(console, report)
    _print_layers(console, report)
    _print_changes(console, report["layers"])
    if report.get("board"):
        from .board import print_board

        print_board(console, report["board"])
    if report.get("arena"):
        from .arena import arena_lines

        for line in arena_lines(report["arena"]):
            console.print(line, no_wrap=True)
    _print_float(console, report["stayed_float"])
    for note in report.get("notes", []):
        console.print(f"note      {note}")
    _print_checks(console, report["checks"])
    steps = ", ".join(
        f"{step['name']} {step['seconds']:.1f} s{_how_made(step)}" for step in report["steps"]
    )
    console.print(f"made by   {steps}", style="dim")
    console.print(f"report    {path / 'report.html'}", soft_wrap=True)


def _print_totals(console: Console, report: Mapping[str, Any]) -> None:
    console.print(
        _bold(report["model"], "  recipe ", report["recipe"], "  target ", report["target"])
    )
    before, after = report["before"], report["after"]
    table = new_table("", f">{report['original']}", ">compressed", ">ratio")
    for key, was, now in part_rows(report):
        table.add_row(f"  {PARTS.get(key, key)}", *_sizes(was, now))
    stored, memory = size_rows(report)
    table.add_row(stored[0], *_sizes(*stored[1:]), style="bold")
    if report.get("macs_after") is not None:
        x, y = report["macs"], report["macs_after"]
        table.add_row("multiply-adds", count_text(x), count_text(y), ratio_text(x, y))
    table.add_row(memory[0], *_sizes(*memory[1:]))
    if before["latency"] and after["latency"]:
        x, y = before["latency"], after["latency"]
        table.add_row(
            "latency (median)",
            time_text(x["median_us"]),
            time_text(y["median_us"]),
            ratio_text(x["median_us"], y["median_us"]),
            style="bold",
        )
        table.add_row("  10 % .. 90 %", _spread(x), _spread(y), "")
        least = (x["min_us"], y["min_us"])
        table.add_row("  least", *map(time_text, least), ratio_text(*least))
    accuracy = report["accuracy"]
    if accuracy:
        table.add_row(
            f"top-1 accuracy (n = {accuracy['samples']})",
            percent_text(accuracy["before"], 2),
            percent_text(accuracy["after"], 2),
            f"{points(-accuracy['drop'])} points",
            style="bold",
        )
        table.add_row(
            "  95 % interval",
            _interval(accuracy["before_low"], accuracy["before_high"]),
            _interval(accuracy["after_low"], accuracy["after_high"]),
            f"{points(-accuracy['drop_high'])} .. {points(-accuracy['drop_low'])}",
        )
    for output in report["outputs"]:
        table.add_row(
            f"output {output['name']} (n = {output['samples']})",
            "",
            "identical" if output["sqnr_db"] is None else f"SQNR {db_text(output['sqnr_db'])} dB",
            "",
        )
    console.print(table)
    if size_text(report):
        console.print(size_text(report))
    for effect in report.get("effects", []):
        console.print(f"{effect['step']:<10}{effect_text(effect)}")
    device = report["device"]
    if before["latency"]:
        console.print(
            f"{device['cpu']}, {device['threads']} of {device['cores']} threads, "
            f"{before['latency']['runs']} interleaved runs",
            style="dim",
        )
    if after.get("tunable_kernels"):
        console.print(f"schedules: {tuned_text(before, after)}", style="dim")


def _sizes(before: int | None, after: int) -> tuple[str, str, str]:
    was = "-" if before is None else bytes_text(before)
    return was, bytes_text(after), ratio_text(before or 0, after)


def _spread(latency: Mapping[str, Any]) -> str:
    return f"{time_text(latency['p10_us'])} .. {time_text(latency['p90_us'])}"


def _interval(low: float, high: float) -> str:
    return f"{low * 100:.2f} .. {high * 100:.2f}"


def _print_layers(console: Console, report: Mapping[str, Any]) -> None:
    """With times, or where a board ran it with instructions."""
    cost = report.get("board")
    costs = (">instructions", "") if cost else (">time", "")
    columns = ("layer", "scheme", ">MACs", "", ">bytes", "", *costs, ">share", ">SQNR", ">own")
    table = new_table(*columns)
    for row in report["layers"]:
        table.add_row(
            row_name(row),
            row["scheme"],
            *_macs(row),
            f"{bytes_text(row['bytes_before'])} →",
            bytes_text(row["bytes_after"]),
            *(_counted(row, cost) if cost else _timed(row)),
            db_text(row["sqnr_db"]),
            db_text(row["own_sqnr_db"]),
        )
    for row in report["other_kernels"]:
        table.add_row(
            row_name(row),
            *[""] * (5 + len(costs) - 1),
            time_text(row["time_us"]),
            percent_text(row["time_share"]),
            db_text(row["sqnr_db"]),
            "",
            style="dim",
        )
    console.print(table)
    console.print(f"SQNR in dB against the {report['original']}. {OWN_NOTE}", style="dim")
    for words in (other_shapes_text(report), kernel_times_text(report)):
        if words:
            console.print(words, style="dim")
    if report["worst_layer"]:
        console.print(_bold("", "largest own error: ", report["worst_layer"]))


def _print_changes(console: Console, rows: Iterable[Mapping[str, Any]]) -> None:
    """What steps made of layers, and which kernels came of it."""
    table = new_table("layer", "what was done to it, and the kernel")
    for row in rows:
        if change_text(row):
            table.add_row(row_name(row), change_text(row))
    if table.row_count:
        console.print(table)


def _macs(row: Mapping[str, Any]) -> tuple[str, str]:
    """The original's, and those that run where they are others."""
    after = row.get("macs_after")
    if after is None or after == row["macs"]:
        return (count_text(row["macs"]), "")
    return (f"{count_text(row['macs'])} →", count_text(after))


def _timed(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{time_text(row['time_before_us'])} →",
        time_text(row["time_after_us"]),
        percent_text(row["time_share"]),
    )


def _counted(row: Mapping[str, Any], cost: Mapping[str, Any]) -> tuple[str, ...]:
    count = row.get("instructions")
    if count is None or not cost["instructions"]:
        return ("", "-", "-")
    before = row.get("instructions_before")
    was = "" if before is None else f"{before:,} →"
    return (was, f"{count:,}", percent_text(count / cost["instructions"]))


def _print_float(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        console.print("Nothing stayed in float.")
        return
    table = new_table("stayed float", "operator", "why")
    for row in rows:
        table.add_row(short_name(row["name"]), row["operator"], row["reason"])
    console.print(table)


def _print_checks(console: Console, checks: Iterable[Mapping[str, Any]]) -> None:
    for check in checks:
        mark = Text("ok    ", "bold green") if check["passed"] else Text("FAILED", "bold red")
        console.print(mark, f"{check['name']}: {check['detail']}")


# --- verify, benchmark, lists -------------------------------------------------------------------


def print_verification(
    result: Verification, per_layer: bool, original: str, is_project: bool
) -> None:
    """`original`: what the artefact is compared with (`Artefact.original`)."""
    from dataclasses import asdict

    console = new_console()
    if per_layer and not result.tensors:
        console.print(PROJECT_NOTE if is_project else "no layer's tensor is one of the original's")
    elif per_layer:
        table = new_table("tensor", "layers", ">SQNR dB", ">own dB", ">cosine", ">max error")
        for row in result.tensors:
            table.add_row(
                short_name(row.name),
                short_name(", ".join(row.layers)),
                db_text(row.sqnr_db),
                db_text(row.own_sqnr_db),
                "-" if row.cosine is None else f"{row.cosine:.6f}",
                f"{row.max_abs_error:.4g}",
            )
        console.print(table)
        console.print(OWN_NOTE, style="dim")
    table = new_table("output", ">inputs", ">SQNR dB", ">cosine", ">max error")
    for output in result.outputs:
        table.add_row(
            output.name,
            str(output.samples),
            db_text(output.sqnr_db),
            "-" if output.cosine is None else f"{output.cosine:.6f}",
            f"{output.max_abs_error:.4g}",
        )
    console.print(table)
    if result.worst_layer:
        console.print(_bold("", "largest own error: ", result.worst_layer))
    accuracy = result.accuracy
    if accuracy:
        console.print(
            f"top-1 accuracy: {original} {percent_text(accuracy.before, 2)} "
            f"({_interval(accuracy.before_low, accuracy.before_high)}), "
            f"compressed {percent_text(accuracy.after, 2)} "
            f"({_interval(accuracy.after_low, accuracy.after_high)}), n = {accuracy.samples}"
        )
        console.print(
            f"paired difference: {points(-accuracy.drop)} points "
            f"({points(-accuracy.drop_high)} .. {points(-accuracy.drop_low)}); only original "
            f"right {accuracy.only_before_right}, only compressed right "
            f"{accuracy.only_after_right}, McNemar p = {accuracy.p_value:.3g}"
        )
    _print_checks(console, [asdict(check) for check in result.checks])


def print_benchmark(result: Benchmark, original: str) -> None:
    """`original` says what the artefact is timed against: `Artefact.original`."""
    console = new_console()
    labels = {"compressed": "compressed", "original": original}
    base = result.latencies["compressed"]
    table = new_table(
        "", ">median", ">10 %", ">90 %", ">least", ">median / compressed", ">least / compressed"
    )
    for side, latency in result.latencies.items():
        table.add_row(
            labels.get(side, side),
            time_text(latency.median_us),
            time_text(latency.p10_us),
            time_text(latency.p90_us),
            time_text(latency.min_us),
            f"{three_digits(latency.median_us / base.median_us)}x",
            f"{three_digits(latency.min_us / base.min_us)}x",
        )
    console.print(table)
    if result.accuracies:
        table = new_table("", ">top-1", ">95 %", ">minus compressed, points")
        for side, row in result.accuracies.items():
            table.add_row(
                labels.get(side, side),
                percent_text(row.accuracy, 2),
                _interval(row.low, row.high),
                ""
                if side == "compressed"
                else f"{points(row.ahead)} ({points(row.ahead_low)} .. {points(row.ahead_high)})",
            )
        console.print(table)
        count = result.accuracies["compressed"].samples
        console.print(f"the same {count} samples for all; differences are paired", style="dim")
    kernels = result.kernels["compressed"]
    total = sum(kernel.time_us for kernel in kernels) or 1.0
    table = new_table("kernel", "layers", ">time", ">share", "")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.time_us):
        share = kernel.time_us / total
        layers = short_name(", ".join(kernel.layers) or kernel.output)
        table.add_row(
            short_name(kernel.symbol, 40),
            layers,
            time_text(kernel.time_us),
            percent_text(share),
            _bar(share),
        )
    console.print(table)
    device = result.device
    runs = result.latencies["compressed"].runs
    console.print(
        f"{device.cpu}, {device.threads} of {device.cores} threads, {runs} interleaved runs",
        style="dim",
    )


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A list of alike mappings as a table."""
    console = new_console()
    if not rows:
        console.print("(none)")
        return
    table = new_table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def print_targets(rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` as `targets.listing.facts` makes them; what else they say is in the JSON."""
    console = new_console()
    table = new_table("name", "runs here", ">flash kB", ">RAM kB", "description")
    lacking: dict[str, list[str]] = {}
    for row in rows:
        runs = ("emulated" if row["emulator"] else "yes") if row["runs_here"] else "no"
        memories = (row["flash_bytes"], row["ram_bytes"])
        sizes = ("" if size is None else f"{size / 1000:.0f}" for size in memories)
        table.add_row(row["name"], runs, *sizes, row["description"])
        if row["missing"]:
            packages = f" (apt-get install {' '.join(row['packages'])})" if row["packages"] else ""
            lacking.setdefault(f"{', '.join(row['missing'])}{packages}", []).append(row["name"])
    width = min(console.width, TABLE_WIDTH)
    console.print(table, width=width)
    for missing, names in lacking.items():
        console.print(f"{', '.join(names)}: missing here: {missing}", width=width)
