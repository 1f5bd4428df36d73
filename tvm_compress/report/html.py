"""The report as one HTML page: no script, no font and no picture from elsewhere.

Plots are SVG written here, a few rectangles each; colours are CSS variables, so that the page
follows the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from .arena import arena_section
from .assemble import plain
from .rows import Report
from .text import (
    NO_CYCLES,
    PARTS,
    bytes_text,
    change_text,
    count_text,
    db_text,
    effect_text,
    instructions_text,
    kernel_times_text,
    other_shapes_text,
    part_rows,
    percent_text,
    points,
    ratio_text,
    row_name,
    size_rows,
    size_text,
    three_digits,
    time_text,
    tuned_text,
)

GOOD_SQNR_DB = 30.0  # about 3 % noise amplitude: rarely costs accuracy
POOR_SQNR_DB = 15.0  # about 18 %
ROW = 20  # pixels of one layer in the plots
LABEL = 210
PANEL = 250
GAP = 34
MARGIN = 12  # right of the last panel, for half a label


def write_html(report: Report | Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report | Mapping[str, Any]) -> str:
    """The page as text. `report` is rows or what `report.json` holds."""
    data = plain(report)
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    script = files(__package__).joinpath("report.js").read_text(encoding="utf-8")
    title = f"{data['model']}: {data['recipe']} on {data['target']}"
    sections = [
        _header(data),
        _cards(data),
        _checks(data["checks"]),
        _notes([*_effects(data), *data.get("notes", ())]),
        _composition(data),
        _board(data["board"]) if data.get("board") else "",
        arena_section(data["arena"]) if data.get("arena") else "",
        _layer_plot(data),
        _layer_table(data),
        _stayed_float(data["stayed_float"]),
        _provenance(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _header(data: Mapping[str, Any]) -> str:
    after = data.get("macs_after")
    executed = "" if after in (None, data["macs"]) else f" (compressed: {count_text(after)})"
    facts = (
        f"{count_text(data['macs'])} MACs{executed} · "
        f"{count_text(data['parameters'])} parameters · from {data['source_format']}"
    )
    return (
        f'<header><p class="eyebrow">tvm-compress report</p><h1>{escape(data["model"])}</h1>'
        f'<p class="lead">recipe <b>{escape(data["recipe"])}</b> · target '
        f'<b>{escape(data["target"])}</b> <span class="quiet">'
        f"({escape(data['target_description'])})</span></p>"
        f'<p class="quiet">{escape(facts)} · {escape(data["created"])}</p></header>'
    )


# --- cards --------------------------------------------------------------------------------------


def _cards(data: Mapping[str, Any]) -> str:
    before, after = data["before"], data["after"]
    stored, memory = size_rows(data)
    cards = [
        _size_card(
            *stored,
            ""
            if data.get("is_project")
            else "weights alone "
            + ratio_text(before["bytes"]["weights"], after["bytes"]["weights"])
            + " smaller",
        )
    ]
    if before["latency"] and after["latency"]:
        x, y = before["latency"], after["latency"]
        cards.append(
            _card(
                "Latency",
                ratio_text(x["median_us"], y["median_us"]),
                "faster",
                [
                    ("float", x["median_us"], time_text(x["median_us"])),
                    ("compressed", y["median_us"], time_text(y["median_us"])),
                ],
                f"median of {y['runs']} interleaved runs; 10 to 90 %: "
                f"{time_text(x['p10_us'])} to {time_text(x['p90_us'])} and "
                f"{time_text(y['p10_us'])} to {time_text(y['p90_us'])}"
                + (f"; {tuned_text(before, after)}" if after.get("tunable_kernels") else ""),
            )
        )
    cards.append(
        _size_card(*memory, "activations and temporaries of the compiled plan"),
    )
    cards.append(_accuracy_card(data))
    return f'<section class="cards">{"".join(cards)}</section>'


def _size_card(words: str, before: int | None, after: int, note: str) -> str:
    title = words[:1].upper() + words[1:]
    bars: list[tuple[str, float, str]] = [("compressed", after, bytes_text(after))]
    if before is None:
        return _card(title, bytes_text(after), "", bars, note)
    bars.insert(0, ("float", before, bytes_text(before)))
    return _card(title, ratio_text(before, after), "smaller", bars, note)


def _card(title: str, figure: str, unit: str, bars: list[tuple[str, float, str]], note: str) -> str:
    largest = max((value for _, value, _ in bars), default=0) or 1
    lines = "".join(
        f'<div class="bar"><span>{escape(label)}</span><i><b class="{label}" '
        f'style="width:{100 * value / largest:.1f}%"></b></i><em>{escape(text)}</em></div>'
        for label, value, text in bars
    )
    return (
        f'<article class="card"><h2>{escape(title)}</h2><p class="figure">{escape(figure)}'
        f'<small> {escape(unit)}</small></p>{lines}<p class="note">{escape(note)}</p></article>'
    )


def _accuracy_card(data: Mapping[str, Any]) -> str:
    accuracy = data["accuracy"]
    if not accuracy:
        worst = [row["sqnr_db"] for row in data["outputs"] if row["sqnr_db"] is not None]
        figure = f"{min(worst):.1f}" if worst else "not measured"
        unit = "dB SQNR" if worst else ""
        note = (
            f"output against the {data['original']}; give labelled --eval data for an accuracy"
            if worst
            else "no labelled data was given"
        )
        if data["outputs"] and not worst:
            figure, unit, note = "identical", "", f"output equals the {data['original']}"
        return (
            f'<article class="card"><h2>Output</h2><p class="figure">{figure}'
            f'<small> {unit}</small></p><p class="note">{note}</p></article>'
        )
    low = min(accuracy["before_low"], accuracy["after_low"])
    high = max(accuracy["before_high"], accuracy["after_high"])
    pad = max((high - low) * 0.15, 0.002)
    low, high = max(0.0, low - pad), min(1.0, high + pad)
    rows = "".join(
        _interval_row(label, accuracy, side, low, high)
        for label, side in (("float", "before"), ("compressed", "after"))
    )
    return (
        f'<article class="card"><h2>Top-1 accuracy</h2><p class="figure">'
        f"{percent_text(accuracy['after'], 2)}<small> {points(-accuracy['drop'])} pt"
        f"</small></p>{rows}"
        f'<p class="note">n = {accuracy["samples"]}, 95 % intervals; paired difference '
        f"{points(-accuracy['drop_high'])} to {points(-accuracy['drop_low'])} points, "
        f"McNemar p = {accuracy['p_value']:.2g}</p></article>"
    )


def _interval_row(
    label: str, accuracy: Mapping[str, Any], side: str, low: float, high: float
) -> str:
    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    left, right = place(accuracy[f"{side}_low"]), place(accuracy[f"{side}_high"])
    return (
        f'<div class="bar"><span>{label}</span><i class="range"><b class="{label}" '
        f'style="left:{left:.1f}%;width:{right - left:.1f}%"></b>'
        f'<u style="left:{place(accuracy[side]):.1f}%"></u></i>'
        f"<em>{percent_text(accuracy[side], 2)}</em></div>"
    )


def _checks(checks: Iterable[Mapping[str, Any]]) -> str:
    items = "".join(
        f'<li class="{"ok" if check["passed"] else "failed"}"><b>{escape(check["name"])}</b> '
        f"{escape(check['detail'])}</li>"
        for check in checks
    )
    return f'<section><ul class="checks">{items}</ul></section>' if items else ""


def _effects(data: Mapping[str, Any]) -> list[str]:
    return [f"{item['step']}: {effect_text(item)}" for item in data.get("effects", ())]


def _notes(notes: Iterable[str]) -> str:
    lines = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    return f"<section>{lines}</section>" if lines else ""


# --- what the bytes are -------------------------------------------------------------------------


def _composition(data: Mapping[str, Any]) -> str:
    parts = part_rows(data)
    before = {key: was for key, was, _ in parts if was is not None}
    after = {key: now for key, _, now in parts}
    largest = max(sum(before.values()), sum(after.values()), 1)
    rows = "".join(
        f'<div class="stack"><span>{label}</span><i>{_stack(side, largest)}</i>'
        f"<em>{bytes_text(sum(side.values()))}</em></div>"
        for label, side in (("float", before), ("compressed", after))
        if side
    )
    lines = "".join(
        f'<tr><td><span class="key {key}"></span>{PARTS.get(key, key)}</td>'
        f"<td>{'-' if was is None else bytes_text(was)}</td><td>{bytes_text(now)}</td>"
        f"<td>{ratio_text(was or 0, now)}</td></tr>"
        for key, was, now in parts
    )
    emitted = f"Sections of the two shared libraries, as emitted. {size_text(data)}".rstrip()
    if data.get("is_project"):
        emitted = (
            "Sections of the C project's objects, without start-up code and C library. The "
            "original's are those of another machine."
        )
    return (
        "<section><h2>What the bytes are</h2>"
        f'<p class="quiet">{escape(emitted)}</p>{rows}'
        '<table class="small"><thead><tr><th>part</th><th>float</th><th>compressed</th>'
        f"<th>ratio</th></tr></thead><tbody>{lines}</tbody></table></section>"
    )


def _stack(side: Mapping[str, int], largest: int) -> str:
    return "".join(
        f'<b class="{key}" style="width:{100 * size / largest:.2f}%" '
        f'title="{PARTS.get(key, key)}: {bytes_text(size)}"></b>'
        for key, size in side.items()
        if size > 0
    )


# --- what it costs on a board -------------------------------------------------------------------


def _board(cost: Mapping[str, Any]) -> str:
    facts = [
        ("flash of the model, linked", bytes_text(cost["flash_bytes"])),
        ("arena", bytes_text(cost["arena_bytes"])),
        ("other RAM of the model", bytes_text(cost["other_ram_bytes"])),
    ]
    original = cost.get("original")
    if original:
        facts += [
            ("flash of the original", bytes_text(original["flash_bytes"])),
            ("arena of the original", bytes_text(original["arena_bytes"])),
            ("instructions of the original", f"{original['instructions']:,}"),
        ]
    if cost.get("no_original"):
        facts.append(("the original was not counted", cost["no_original"]))
    if cost["stack_bytes"] is not None:
        facts.append(("stack, deepest", bytes_text(cost["stack_bytes"])))
    table = kernels = note = ""
    if cost["instructions"] is not None:
        facts.append((f"instructions, {cost['inputs']} inputs", instructions_text(cost)))
        note = f'<p class="quiet">{escape(cost["machine"])}: {escape(NO_CYCLES)}.</p>'
        kernels = "".join(
            f"<tr><td>{escape(row['symbol'])}</td><td>{escape(', '.join(row['layers']))}</td>"
            + _cell(row["instructions"], f"{row['instructions']:,}")
            + _cell(row["share"], percent_text(row["share"]))
            + "</tr>"
            for row in cost["kernels"]
        )
        table = (
            '<div class="scroll"><table class="sortable"><thead><tr><th>function</th><th>layers'
            f"</th><th>instructions</th><th>share</th></tr></thead><tbody>{kernels}</tbody></table>"
            "</div>"
        )
    lines = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts)
    return (
        f'<section><h2>On the board</h2><table class="small"><tbody>{lines}</tbody></table>'
        f"{note}{table}</section>"
    )


# --- layers -------------------------------------------------------------------------------------


def _layer_plot(data: Mapping[str, Any]) -> str:
    layers = data["layers"]
    if not layers:
        return ""
    panels: list[tuple[str, str, str, Any]] = [("Size", "bytes_before", "bytes_after", bytes_text)]
    if any(row["time_after_us"] is not None for row in layers):
        panels.append(("Time", "time_before_us", "time_after_us", time_text))
    if any(row.get("instructions") is not None for row in layers):
        panels.append(("Instructions", "instructions_before", "instructions", _count_or_dash))
    height = ROW * len(layers) + 46
    width = LABEL + (PANEL + GAP) * (len(panels) + 1) - GAP + MARGIN
    parts = []
    for index, row in enumerate(layers):
        y = 40 + index * ROW
        if index % 2 == 0:
            parts.append(f'<rect class="stripe" x="0" y="{y}" width="{width}" height="{ROW}"/>')
        parts.append(
            f'<text class="label" x="{LABEL - 10}" y="{y + 14}" text-anchor="end">'
            f"{escape(_short(row['name']))}<title>{escape(row['name'])}</title></text>"
        )
    x = LABEL
    for title, key_before, key_after, text in panels:
        parts.append(_bar_panel(layers, x, title, key_before, key_after, text))
        x += PANEL + GAP
    parts.append(_error_panel(data, x))
    return (
        "<section><h2>Layer by layer</h2>"
        f'<p class="quiet"><span class="key float"></span>{escape(data["original"])} '
        '<span class="key compressed"></span>compressed. Signal to noise (SQNR) of each output '
        "against the original: higher is better; red is below "
        f"{POOR_SQNR_DB:.0f} dB. The ring is of the layer alone, with the original's values at "
        "its inputs; the dot holds all errors so far.</p>"
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Size, time and error of every layer">'
        f"{''.join(parts)}</svg></div></section>"
    )


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:14]}…{name[-14:]}"


def _bar_panel(
    layers: list[Mapping[str, Any]],
    x: float,
    title: str,
    key_before: str,
    key_after: str,
    text: Any,
) -> str:
    values = [row.get(key) or 0 for row in layers for key in (key_before, key_after)]
    largest = max(values) or 1
    parts = [
        f'<text class="head" x="{x}" y="16">{title}</text>',
        f'<text class="axis" x="{x + PANEL}" y="16" text-anchor="end">{text(largest)}</text>',
        f'<line class="rule" x1="{x}" x2="{x + PANEL}" y1="26" y2="26"/>',
    ]
    for index, row in enumerate(layers):
        y = 40 + index * ROW
        before, after = row.get(key_before), row.get(key_after)
        was = "" if before is None else f"{text(before)} → "
        tip = f"{row['name']}: {was}{text(after)}"
        parts.append(f"<g><title>{escape(tip)}</title>")
        for value, css, offset, thick in ((before, "float", 3, 6), (after, "compressed", 10, 6)):
            if value:
                wide = max(1.0, PANEL * value / largest)
                parts.append(
                    f'<rect class="{css}" x="{x}" y="{y + offset}" width="{wide:.1f}" '
                    f'height="{thick}" rx="1"/>'
                )
        parts.append("</g>")
    return "".join(parts)


def _count_or_dash(count: int | None) -> str:
    return "-" if count is None else count_text(count)


def _error_panel(data: Mapping[str, Any], x: float) -> str:
    layers = data["layers"]
    known = [
        row[key] for row in layers for key in ("sqnr_db", "own_sqnr_db") if row[key] is not None
    ]
    if not known:
        return ""
    top = max(10.0, *known, GOOD_SQNR_DB) * 1.05
    bottom = min(0.0, *known)

    def place(value: float) -> float:
        return x + PANEL * (value - bottom) / (top - bottom)

    end = 40 + ROW * len(layers)
    parts = [
        f'<text class="head" x="{x}" y="16">SQNR, dB</text>',
        f'<line class="rule" x1="{x}" x2="{x + PANEL}" y1="26" y2="26"/>',
    ]
    step = 10 if top - bottom <= 80 else 20
    mark = int(bottom // step) * step
    while mark <= top:
        if mark >= bottom:
            parts.append(
                f'<line class="grid" x1="{place(mark):.1f}" x2="{place(mark):.1f}" y1="26" '
                f'y2="{end}"/><text class="axis" x="{place(mark):.1f}" y="37" '
                f'text-anchor="middle">{mark}</text>'
            )
        mark += step
    for index, row in enumerate(layers):
        value = row["sqnr_db"]
        if value is None:
            continue
        y = 40 + index * ROW + ROW / 2
        kind = "good" if value >= GOOD_SQNR_DB else "poor" if value < POOR_SQNR_DB else "fair"
        tip = f"{row['name']}: {value:.1f} dB, cosine {row['cosine']:.6f}"
        own = row["own_sqnr_db"]
        ring = ""
        if own is not None:
            tip += f"; own {own:.1f} dB"
            ring = f'<circle class="own" cx="{place(own):.1f}" cy="{y}" r="4.5"/>'
        parts.append(
            f"<g><title>{escape(tip)}</title>{ring}"
            f'<line class="stem" x1="{place(max(bottom, 0)):.1f}" x2="{place(value):.1f}" '
            f'y1="{y}" y2="{y}"/>'
            f'<circle class="{kind}" cx="{place(value):.1f}" cy="{y}" r="4.5"/></g>'
        )
    return "".join(parts)


def _layer_table(data: Mapping[str, Any]) -> str:
    names = ("layer", "type", "scheme", "change", "MACs before", "MACs after",
             "bytes before", "bytes after", "time before", "time after", "share", "SQNR dB",
             "own dB", "max error")  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(_layer_line(row, row["name"] == data["worst_layer"]) for row in data["layers"])
    body += "".join(
        f'<tr class="other"><td>{escape(row_name(row, len(row["name"]) + 8))}</td>'
        f"<td>{escape(row['kernel'])}</td><td></td><td></td>"
        + _cell(None, "") * 5
        + _cell(row["time_us"], time_text(row["time_us"]))
        + _cell(row["time_share"], percent_text(row["time_share"]))
        + _cell(row["sqnr_db"], db_text(row["sqnr_db"]))
        + _cell(None, "")
        + _cell(None, "")
        + "</tr>"
        for row in data["other_kernels"]
    )
    return (
        '<section><h2>All kernels</h2><p class="quiet">Click a column to sort. The layer with the '
        "largest error is marked; rows in grey are kernels without weights. "
        f"{escape(other_shapes_text(data))} {escape(kernel_times_text(data))}</p>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _layer_line(row: Mapping[str, Any], is_worst: bool) -> str:
    error = row["max_abs_error"]
    after = row.get("macs_after")
    name = row_name(row, len(row["name"]) + 8)
    return (
        f"<tr{' class=worst' if is_worst else ''}><td>{escape(name)}</td>"
        f"<td>{escape(row['type'])}</td><td>{escape(row['scheme'])}</td>"
        f"<td>{escape(change_text(row))}</td>"
        + _cell(row["macs"], count_text(row["macs"]))
        + _cell(after, _count_or_dash(after))
        + _cell(row["bytes_before"], bytes_text(row["bytes_before"]))
        + _cell(row["bytes_after"], bytes_text(row["bytes_after"]))
        + _cell(row["time_before_us"], time_text(row["time_before_us"]))
        + _cell(row["time_after_us"], time_text(row["time_after_us"]))
        + _cell(row["time_share"], percent_text(row["time_share"]))
        + _cell(row["sqnr_db"], db_text(row["sqnr_db"]))
        + _cell(row["own_sqnr_db"], db_text(row["own_sqnr_db"]))
        + _cell(
            error, "-" if error is None else three_digits(error) if error >= 1 else f"{error:.3g}"
        )
        + "</tr>"
    )


def _cell(value: float | None, text: str) -> str:
    return f'<td data-v="{"" if value is None else repr(float(value))}">{escape(text)}</td>'


def _stayed_float(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return '<section><h2>What stayed float</h2><p class="quiet">Nothing.</p></section>'
    lines = "".join(
        f"<tr><td>{escape(row['name'])}</td><td>{escape(row['operator'])}</td>"
        f"<td>{escape(row['reason'])}</td></tr>"
        for row in rows
    )
    return (
        '<section><h2>What stayed float</h2><div class="scroll"><table class="words"><thead><tr>'
        f"<th>name</th><th>operator</th><th>why</th></tr></thead><tbody>{lines}</tbody></table>"
        "</div></section>"
    )


def _how_made(step: Mapping[str, Any]) -> str:
    return "taken over from an earlier run" if step["cached"] else escape(step.get("detail", ""))


def _provenance(data: Mapping[str, Any]) -> str:
    device = data["device"]
    steps = "".join(
        f"<tr><td>{escape(step['name'])}</td><td>{step['seconds']:.1f} s</td>"
        f"<td>{_how_made(step)}</td></tr>"
        for step in data["steps"]
    )
    versions = " · ".join(f"{escape(k)} {escape(v)}" for k, v in data["versions"].items())
    return (
        '<section class="two"><div><h2>Recipe, resolved</h2>'
        f"<pre>{escape(data['recipe_yaml'])}</pre></div>"
        f'<div><h2>How it was made</h2><table class="words"><tbody>{steps}</tbody></table>'
        f'<p class="quiet">Measured on {escape(device["cpu"])}, {device["threads"]} of '
        f"{device['cores']} threads, {escape(device['system'])}.<br>{versions}</p></div></section>"
    )
