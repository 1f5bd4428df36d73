"""Numbers as people read them. Shared by the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of `Bytes` that need other words.
PARTS = {"weights": "weights and indices", "code": "machine code"}
# A file of more than this share of the original's deserves a word.
HARDLY_SMALLER = 0.9

NO_CYCLES = (
    "instructions are counted exactly; they are no cycles and no latency, for the emulator has no "
    "pipeline and no slow memory"
)


def bytes_text(count: float) -> str:
    """`1.2 MB`: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{three_digits(count)} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def short_name(name: str, width: int = 26) -> str:
    """At most `width` characters: a long name loses its middle, which says least."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def time_text(microseconds: float | None) -> str:
    """`123 us`, `4.56 ms`, `7.8 s`."""
    if microseconds is None:
        return "-"
    if microseconds < 999.5:
        return f"{three_digits(microseconds)} µs"
    if microseconds < 999_500:
        return f"{three_digits(microseconds / 1000)} ms"
    return f"{three_digits(microseconds / 1e6)} s"


def count_text(count: float) -> str:
    """`40.6 M`."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 999.5 or unit == " G":
            return f"{count:.0f}" if unit == "" else f"{three_digits(count)}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def three_digits(value: float) -> str:
    """`1.23`, `12.3`, `123`."""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def ratio_text(before: float, after: float) -> str:
    """`3.9x smaller` without the noun: `3.90x`; `-` when there is nothing to divide."""
    return f"{three_digits(before / after)}x" if before and after else "-"


def percent_text(fraction: float | None, digits: int = 1) -> str:
    return "-" if fraction is None else f"{fraction * 100:.{digits}f} %"


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points, with its sign: `+0.40`, `0.00`."""
    text = f"{fraction * 100:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def db_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def change_text(row: Mapping[str, Any]) -> str:
    """What steps made of a layer, and the kernel that was chosen for it."""
    choice = row.get("choice")
    parts = [row.get("change", "")]
    if choice and choice["form"]:
        share = choice["stored_share"]
        stored = "" if share is None else f", {100 * share:.0f} % of its weights stored"
        gain = ""
        if choice["cost"] and choice["dense_cost"]:
            ratio = choice["cost"] / choice["dense_cost"]
            how = f"{choice['kind']} {choice['unit']}".strip()
            gain = f", {ratio:.2f}x of dense ({how})"
        parts.append(f"kernel {choice['form']}{stored}{gain}")
        parts.append("insisted on" if choice["reason"] else "")
    elif choice and choice["reason"] and choice["reason"] not in parts[0]:
        parts.append(f"dense kernel: {choice['reason']}")
    return "; ".join(filter(None, parts))


def effect_text(effect: Mapping[str, Any]) -> str:
    """What a step did, in one line: how many layers it changed, put back and left."""
    counts = effect["changed"], effect["put_back"], effect["left"]
    if not any(counts):
        return "changed nothing: no layer that it is for has what it asks for"
    layers = "1 layer" if effect["changed"] == 1 else f"{effect['changed']} layers"
    parts = [f"{layers} changed"]
    for key, words in (
        ("dense", "of them keep their zeros in a dense kernel"),
        ("put_back", "put back"),
        ("left", "left alone"),
    ):
        if effect[key]:
            parts.append(f"{effect[key]} {words} (such as {effect[f'{key}_because']})")
    if effect.get("share_of"):
        parts.append(f"its share is of these layers, not of the network: {effect['share_of']}")
    return "; ".join(parts)


def part_rows(report: Mapping[str, Any]) -> list[tuple[str, int | None, int]]:
    """Key of `Bytes`, the original's bytes and the compressed ones, of what there is.

    The original of a C project is a library of another machine, whose weights are packed as that
    one likes them: nothing to compare with (`None`).
    """
    before, after = (_with_indices(report[side]["bytes"]) for side in ("before", "after"))
    is_project = report.get("is_project", False)
    return [
        (key, None if is_project else before[key], after[key])
        for key in after
        if key != "total" and (after[key] or (before[key] and not is_project))
    ]


def _with_indices(held: Mapping[str, int]) -> dict[str, int]:
    """Weights are what is stored for them: where zeros are left out, the indices as well."""
    stored = {**held, "weights": held["weights"] + held["indices"]}
    return {key: count for key, count in stored.items() if key != "indices"}


def size_text(report: Mapping[str, Any]) -> str:
    """Why the library file is hardly smaller than the original's, or larger; empty: it is."""
    before, after = report["before"]["bytes"], report["after"]["bytes"]
    if report.get("is_project") or after["total"] <= HARDLY_SMALLER * before["total"]:
        return ""
    is_larger = after["total"] > before["total"]
    how = "larger than" if is_larger else "hardly smaller than"
    weights = [_with_indices(side)["weights"] for side in (before, after)]
    return (
        f"library file {how} the original's: code is {bytes_text(after['code'])} of its "
        f"{bytes_text(after['total'])} (original: {bytes_text(before['code'])} of "
        f"{bytes_text(before['total'])}), weights {bytes_text(weights[1])} (original: "
        f"{bytes_text(weights[0])}); kernels take as much code in a small network as in a large one"
    )


def size_rows(report: Mapping[str, Any]) -> list[tuple[str, int | None, int]]:
    """What is to be stored, and the memory at run time: words, the original's bytes (`None` where
    it was not built for the same machine) and the compressed ones."""
    before, after = report["before"], report["after"]
    if not report.get("is_project"):
        return [
            ("library file", before["bytes"]["total"], after["bytes"]["total"]),
            ("memory at run time", before["plan_bytes"], after["plan_bytes"]),
        ]
    board = report.get("board")
    original = board["original"] if board else None
    return [
        (
            "C project, linked" if board else "C project",
            original["flash_bytes"] if original else None,
            board["flash_bytes"] if board else after["bytes"]["total"],
        ),
        ("arena", original["arena_bytes"] if original else None, after["plan_bytes"]),
    ]


def kernel_times_text(report: Mapping[str, Any]) -> str:
    """What the layers' times are, and what of the latency is not in them; empty without times."""
    sides = [
        (name, side["kernels_us"], side["latency"]["min_us"])
        for name, side in (("original", report["before"]), ("artefact", report["after"]))
        if side.get("kernels_us") is not None and side["latency"]
    ]
    if not sides:
        return ""
    sums = ", ".join(
        f"{time_text(kernels)} ({name}; its least latency {time_text(least)})"
        for name, kernels, least in sides
    )
    words = f"Times: each kernel alone, repeated; added up {sums}. "
    if any(kernels < least for _, kernels, least in sides):
        words += (
            "Where the latency is more: the calls between kernels, and memory that a repeated "
            "kernel has in its cache. "
        )
    if any(kernels >= least for _, kernels, least in sides):
        words += (
            "Where it is less: being timed alone costs a kernel more than it takes in its place "
            "(its call, threads that wake up, data that the kernel before leaves in the cache), "
            "and other work disturbs each differently. "
        )
    return words.rstrip()


def other_shapes_text(report: Mapping[str, Any]) -> str:
    """Why layers have no SQNR; empty where none lacks it for its shape."""
    names = report.get("other_shapes", [])
    if not names:
        return ""
    more = f" and {len(names) - 3} others" if names[3:] else ""
    return (
        f"SQNR -: {', '.join(names[:3])}{more} compute fewer channels than in the original, so "
        "that there is nothing to compare them with."
    )


def row_name(row: Mapping[str, Any], width: int = 26) -> str:
    """A layer's name; of a loop's with the number of its calls."""
    calls = f" ×{row['calls']}" if row.get("calls", 1) > 1 else ""
    return short_name(row["name"], width - len(calls)) + calls


def tuned_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How many kernels were built from measured choices."""
    words = (
        f"{after['tuned_kernels']} of {after['tunable_kernels']} kernels tuned, "
        f"{before['tuned_kernels']} of {before['tunable_kernels']} of the original; "
        "the others have the default"
    )
    if after["tuned_kernels"] and not before["tuned_kernels"] and before["tunable_kernels"]:
        words += (
            "; so a part of the latency's ratio is tuning, not compression (--trials N tunes both)"
        )
    return words


def instructions_text(cost: Mapping[str, Any]) -> str:
    """Median, and the range where there is one."""
    median, least, most = (
        cost[key] for key in ("instructions", "least_instructions", "most_instructions")
    )
    return f"{median:,}" if least == most else f"{median:,} ({least:,} .. {most:,})"
