"""The report: its schema, the page, the terminal, and the numbers as people read them."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tvm_compress.kernels import Call, LibraryInfo, TensorInfo
from tvm_compress.progress import TerminalProgress
from tvm_compress.recipe import parse_recipe
from tvm_compress.report.arena import Arena, ArenaBuffer
from tvm_compress.report.assemble import of_other_shapes, owner_of, with_changes
from tvm_compress.report.html import render_html
from tvm_compress.report.loops import joined, joined_others
from tvm_compress.report.rows import (
    Accuracy,
    BoardCost,
    Bytes,
    Check,
    Device,
    Exactness,
    FloatRow,
    KernelChoice,
    KernelInstructions,
    Latency,
    LayerRow,
    OriginalCost,
    OtherKernelRow,
    OutputRow,
    Report,
    Side,
    StepEffect,
    StepTime,
    report_schema,
)
from tvm_compress.report.schemes import describe_effects
from tvm_compress.report.terminal import print_report, print_summary
from tvm_compress.report.text import (
    bytes_text,
    change_text,
    count_text,
    kernel_times_text,
    part_rows,
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

from .relay_passes.qdq import graph

NASTY = "conv[/bold]<script>&\"'"


def layer(name: str, after: int = 250, sqnr: float | None = 31.0) -> LayerRow:
    return LayerRow(
        name=name,
        type="conv2d",
        scheme="int8/channel × int8",
        macs=10_000,
        parameters=250,
        bytes_before=1000,
        bytes_after=after,
        time_before_us=20.0,
        time_after_us=5.0,
        time_share=0.4,
        sqnr_db=sqnr,
        own_sqnr_db=None if sqnr is None else sqnr + 6,
        cosine=0.999,
        max_abs_error=0.01,
        kernels=("fused_conv2d",),
    )


def make_report(**changes: Any) -> Report:
    latency = Latency(100.0, 90.0, 130.0, 85.0, 500)
    report = Report(
        model="net",
        source_format="onnx",
        recipe="int8",
        recipe_yaml="version: 1\n",
        target="host",
        target_description="this machine",
        created="2026-01-02T03:04:05+00:00",
        device=Device("cpu <x>", 2, 2, "Linux 6"),
        macs=20_000,
        parameters=500,
        original="float original",
        before=Side(Bytes(4000, 2000, 0, 0, 0, 0, 1500, 500), 900, latency),
        after=Side(
            Bytes(2500, 500, 20, 30, 256, 0, 1300, 394),
            300,
            replace(latency, median_us=40.0, min_us=38.0),
        ),
        layers=(layer("conv1"), layer(NASTY, sqnr=12.0), layer("fc", sqnr=None)),
        other_kernels=(OtherKernelRow("pool_q", "avg_pool", 1.5, 0.1, None),),
        stayed_float=(FloatRow("softmax", "softmax", "no integer form"),),
        outputs=(OutputRow("logits", 33.0, 0.999, 0.2, 32),),
        worst_layer=NASTY,
        accuracy=Accuracy(500, 0.9, 0.87, 0.92, 0.89, 0.86, 0.91, 0.01, -0.002, 0.02, 9, 4, 0.27),
        exactness=Exactness(8, 12, 1000, (), 0.0),
        checks=(Check("exact integers", True, "equal"), Check("accuracy", False, "too low")),
        steps=(StepTime("import", 1.0, False), StepTime("build original", 2.0, True)),
        versions={"tvm_compress": "0.1.0"},
    )
    return replace(report, **changes)


BARE = {
    "before": Side(Bytes(4000, 2000, 0, 0, 0, 0, 1500, 500), 900, None),
    "after": Side(Bytes(2500, 500, 20, 30, 0, 0, 1300, 650), 300, None),
    "layers": (),
    "other_kernels": (),
    "stayed_float": (),
    "outputs": (),
    "worst_layer": None,
    "accuracy": None,
    "exactness": None,
    "checks": (),
}


def errors(report: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(report_schema())
    return [error.message for error in validator.iter_errors(report)]


def as_json(report: Report) -> Any:
    return json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_schema_accepts_reports_and_describes_every_row() -> None:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert errors(as_json(make_report())) == []
    assert errors(as_json(make_report(**BARE))) == []
    described = json.dumps(report_schema())
    assert "McNemar" in described and "95 % Wilson" in described


def test_schema_refuses_what_is_missing_wrong_or_unknown() -> None:
    good = as_json(make_report())
    assert errors({key: value for key, value in good.items() if key != "before"})
    assert errors({**good, "extra": 1})
    assert errors({**good, "macs": "many"})
    assert errors({**good, "layers": good["layers"][0]})


def test_shipped_schema_file_is_the_one_of_the_rows() -> None:
    shipped = Path(__file__).parent.parent / "tvm_compress" / "report" / "report.schema.json"
    assert json.loads(shipped.read_text()) == report_schema()


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    void = frozenset(("meta", "br", "rect", "line", "circle"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_long_names_lose_their_middle() -> None:
    assert short_name("layer1_0_conv1") == "layer1_0_conv1"
    shortened = short_name("backbone_model1_conv2_block_conv1", 20)
    assert shortened == "backbo…2_block_conv1"
    assert len(shortened) == 20


@pytest.mark.parametrize("changes", [{}, BARE])
def test_page_is_whole_and_needs_nothing_from_elsewhere(changes: dict[str, Any]) -> None:
    text = render_html(make_report(**changes))
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert "default-src 'none'" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_page_says_what_was_measured() -> None:
    words = Page(render_html(make_report())).words
    for part in ("1.60x", "2.50x", "89.00 %", "-1.00 pt", "n = 500", "too low", "softmax",
                 "no integer form", "12.0", "cpu <x>", NASTY):  # fmt: skip
        assert part in words


def test_page_has_a_bar_for_each_side_and_a_dot_for_each_error() -> None:
    tags = Page(render_html(make_report())).tags
    bars = [a for tag, a in tags if tag == "rect" and a.get("class") in ("float", "compressed")]
    circles = [a for tag, a in tags if tag == "circle"]
    dots = [a for a in circles if a["class"] != "own"]
    assert len(circles) == 2 * len(dots)
    assert len(bars) == 3 * 2 * 2  # layers, panels, sides
    assert [dot["class"] for dot in dots] == ["good", "poor"]
    assert float(bars[0]["width"] or 0) == pytest.approx(4 * float(bars[1]["width"] or 0), abs=0.2)


def test_page_shows_the_memory_arena_of_a_c_project() -> None:
    row = ArenaBuffer(NASTY, False, 0, 300, 0, 1)
    arena = Arena(
        300, 300, True, "by size, lowest gap", "as given", 300, ("a", "fc"), 0, (row,), 1000
    )
    report = make_report(arena=arena)
    assert not errors(as_json(report))
    assert Arena.from_json(as_json(report)["arena"]) == arena
    page = render_html(report)
    assert "Memory arena" in page and "30.0 % of the board&#x27;s RAM" in page
    assert "Memory arena" not in render_html(make_report())


COST = BoardCost(
    machine="emulator -M board",
    instructions=1_234_567,
    least_instructions=1_234_000,
    most_instructions=1_235_000,
    inputs=4,
    kernels=(
        KernelInstructions("kernel_a", ("conv1", NASTY), 1_000_000, 0.81),
        KernelInstructions("run", (), 234_567, 0.19),
    ),
    flash_bytes=81_300,
    program_flash_bytes=90_000,
    arena_bytes=36_040,
    other_ram_bytes=0,
    stack_bytes=280,
)


def test_instructions_are_called_so_and_never_a_latency(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tuple(
        replace(layer(name), instructions=500_000, time_before_us=None, time_after_us=None)
        for name in ("conv1", NASTY)
    )
    arena = Arena(
        300, 300, True, "by size, lowest gap", "as given", 300, ("a", "fc"), 1,
        (ArenaBuffer("tensor", False, 0, 300, 0, 1),), 1000,
    )  # fmt: skip
    changes = {**BARE, "layers": rows, "board": COST, "is_project": True, "arena": arena}
    data = as_json(make_report(**changes))
    assert not errors(data)
    page = render_html(data)
    Page(page)
    assert "1,234,567 (1,234,000 .. 1,235,000)" in page and "no latency" in page
    assert "C project" in page and "shared libraries" not in page and "kernel_a" in page
    print_report(data, Path("out"))
    print_summary(data, Path("out"))
    text = " ".join(capsys.readouterr().out.split())
    for part in ("1,234,567 (1,234,000 .. 1,235,000)", "no latency", "500,000", "40.5 %", "81.3 kB",
                 "36.0 kB", "280 B", "C project", "kernel_a", "memory arena", "peak at fc",
                 "tensor: 300 B"):  # fmt: skip
        assert part in text, part
    assert "latency (median)" not in text


def test_page_is_the_same_from_json() -> None:
    report = make_report()
    assert render_html(as_json(report)) == render_html(report)


def test_terminal_shows_totals_layers_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(as_json(make_report()), Path("out"))
    text = capsys.readouterr().out
    for part in ("4.00 kB", "2.50 kB", "1.60x", "100 µs", "2.50x", "n = 500", "conv1", "[/bold]",
                 "softmax", "FAILED", "accuracy: too low", "report.html"):  # fmt: skip
        assert part in text


def test_terminal_without_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(as_json(make_report(**BARE)), Path("out"))
    print_report(as_json(make_report(**BARE)), Path("out"))
    assert "latency" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1000), "1.00 kB"),
        (bytes_text(999_499), "999 kB"),
        (bytes_text(999_500), "1.00 MB"),
        (bytes_text(12_345_678), "12.3 MB"),
        (time_text(None), "-"),
        (time_text(0.5), "0.50 µs"),
        (time_text(12_340), "12.3 ms"),
        (time_text(2.5e6), "2.50 s"),
        (count_text(640), "640"),
        (count_text(40_551_040), "40.6 M"),
        (three_digits(9.996), "10.0"),
        (ratio_text(4, 1), "4.00x"),
        (ratio_text(4, 0), "-"),
        (points(0.004), "+0.40"),
        (points(-0.00001), "0.00"),
    ],
)
def test_numbers_as_people_read_them(found: str, expected: str) -> None:
    assert found == expected


def test_multiply_adds_that_run_stand_beside_the_originals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = (replace(layer("sparse"), macs_after=4_000), replace(layer("dense"), macs_after=10_000))
    report = make_report(macs=20_000, macs_after=14_000, layers=rows)
    print_report(as_json(report), Path("out"))
    words = " ".join(capsys.readouterr().out.split())
    assert "multiply-adds 20.0 k 14.0 k 1.43x" in words
    assert "10.0 k → 4.00 k" in words and words.count("10.0 k →") == 1
    assert "compressed: 14.0 k" in Page(render_html(report)).words


def test_a_loop_is_one_row_with_the_sums_of_its_calls() -> None:
    rows = [
        replace(layer(name, sqnr=sqnr), macs_after=7) for name, sqnr in (("t0", 9.0), ("t1", 5.0))
    ]
    found = joined([*rows, layer("fc")], {"t0": "t0", "t1": "t0", "fc": "fc"})
    assert [row.name for row in found] == ["t0", "fc"]
    first = found[0]
    assert (first.calls, first.macs, first.macs_after, first.time_after_us) == (2, 20_000, 14, 10.0)
    assert (first.sqnr_db, first.own_sqnr_db, first.kernels) == (5.0, 11.0, ("fused_conv2d",))
    assert row_name({"name": "t0", "calls": 2}) == "t0 ×2"
    others = [OtherKernelRow(name, "table", 1.0, 0.1, 3.0) for name in ("a", "b")]
    (other,) = joined_others(others)
    assert (other.name, other.time_us, other.calls) == ("a", 2.0, 2)


def test_what_steps_did_is_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    effect = StepEffect(
        "sparsify", 5, 2, 1, "conv1, dense: too slow", "dw, depthwise", 1, "fc, slow"
    )
    report = as_json(make_report(effects=(effect, StepEffect("lowrank", 0, 0, 0))))
    print_summary(report, Path("out"))
    words = " ".join(capsys.readouterr().out.split())
    assert (
        "sparsify 5 layers changed; 1 of them keep their zeros in a dense kernel (such as fc, "
        "slow); 2 put back (such as conv1, dense: too slow); 1 left alone (such as dw, depthwise)"
    ) in words
    assert "lowrank changed nothing" in words
    assert errors(report) == []


def test_a_share_of_selected_layers_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    effect = StepEffect("shrink", 2, 0, 0, share_of="conv2d, fc*")
    print_summary(as_json(make_report(effects=(effect,))), Path("out"))
    words = " ".join(capsys.readouterr().out.split())
    assert "its share is of these layers, not of the network: conv2d, fc*" in words


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("shrink: {layers: [a, b*], keep: {operations: {share: 0.8}}}", "a, b*"),
        ("lowrank: {layers: linear, rank: {network: {share: 0.8}}}", "linear"),
        ("shrink: {layers: all, keep: {operations: {share: 0.8}}}", ""),
        ("shrink: {layers: [a], keep: {channel_share: {share: 0.8}}}", ""),  # each its own
        ("lowrank: {layers: [a], rank: {operations: {share: 0.8}}}", ""),
    ],
)
def test_whose_share_a_step_means(step: str, expected: str) -> None:
    steps = parse_recipe(f"version: 1\nsteps:\n  - {step}\n").steps
    module = graph({"x": (1, 4)}, lambda g, x: g.quantize(x, 1.0, 0), seed=1)
    (effect,) = describe_effects(module, steps, {})
    assert effect.share_of == expected


def test_a_c_project_is_never_compared_with_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    """The library's 4,000 bytes and its 900 of memory are another machine's."""
    original = OriginalCost(5_000_000, (), 162_600, 72_080)
    for board, stored, arena in (
        (None, (None, 2500), (None, 300)),
        (COST, (None, 81_300), (None, 300)),
        (replace(COST, original=original), (162_600, 81_300), (72_080, 300)),
    ):
        data = as_json(make_report(**{**BARE, "is_project": True, "board": board}))
        assert [row[1:] for row in size_rows(data)] == [stored, arena]
        assert {was for _, was, _ in part_rows(data)} == {None}
        print_summary(data, Path("out"))
        shown = capsys.readouterr().out + render_html(data)
        assert "4.00 kB" not in shown and "900 B" not in shown and "library file" not in shown
    assert size_rows(as_json(make_report()))[0] == ("library file", 4000, 2500)


def test_what_of_the_latency_no_layer_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    report = replace(
        report,
        before=replace(report.before, kernels_us=70.0),
        after=replace(report.after, kernels_us=12.0),
    )
    print_report(as_json(report), Path("out"))
    words = "added up 70.0 µs (original; its least latency 85.0 µs), 12.0 µs (artefact; its least"
    shown = " ".join(capsys.readouterr().out.split())
    assert words in shown and "Where the latency is more" in shown
    assert "Where it is less" not in shown
    assert escape(words) in render_html(report)
    longer = replace(report, after=replace(report.after, kernels_us=70.1))
    assert "Where it is less" in kernel_times_text(as_json(longer))
    assert kernel_times_text(as_json(make_report(**BARE))) == ""


def test_a_file_that_is_hardly_smaller_says_which_part_is_code() -> None:
    report = make_report()
    assert size_text(as_json(report)) == ""
    for total, words in ((3_900, "hardly smaller than"), (4_100, "larger than")):
        large = replace(report.after, bytes=replace(report.after.bytes, total=total, code=3_000))
        data = as_json(replace(report, after=large))
        assert f"library file {words} the original's: code is 3.00 kB of" in size_text(data)
        assert escape(size_text(data)) in render_html(data)


def test_a_tuned_artefact_beside_an_untuned_original_is_called_so() -> None:
    tuned, untuned = ({"tuned_kernels": count, "tunable_kernels": 12} for count in (4, 0))
    assert "a part of the latency's ratio is tuning" in tuned_text(untuned, tuned)
    assert "ratio" not in tuned_text(tuned, tuned) + tuned_text(untuned, untuned)


def test_weights_are_shown_with_their_indices() -> None:
    report = make_report()
    held = replace(report.after.bytes, weights=500, indices=70)
    rows = part_rows(as_json(replace(report, after=replace(report.after, bytes=held))))
    assert {key: now for key, _, now in rows}["weights"] == 570
    assert "indices" not in [key for key, *_ in rows]


def test_layers_of_another_shape_say_why_they_have_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = as_json(make_report(other_shapes=("a", "b", "c", "fc", "d")))
    words = "SQNR -: a, b, c and 2 others compute fewer channels than in the original"
    print_report(report, Path("out"))
    assert words in " ".join(capsys.readouterr().out.split())
    assert words in render_html(report)
    assert "SQNR -:" not in render_html(make_report())


def test_which_layers_have_another_shape() -> None:
    """Parts count for their layer; what has its shape or is nowhere in the original does not."""
    sizes = {"a": 4, "b": 8, "c": 8}
    sides = []
    for shrunk in ({}, {"a": 2, "c": 6, "new": 3}):
        channels = {**sizes, **shrunk}
        tensors = {f"t{k}": TensorInfo((1, n), (0, 1), k) for k, n in channels.items()}
        owners = {"a": "a_part1"} if shrunk else {}
        calls = tuple(Call("f", (owners.get(k, k),), f"t{k}") for k in channels)
        sides.append(LibraryInfo(calls, tensors, {}, Bytes(0, 0, 0, 0, 0, 0, 0, 0), 0))
    rows = [layer("a", sqnr=None), layer("b", sqnr=None), layer("c", sqnr=9.0)]
    assert of_other_shapes(sides[0], sides[1], rows) == ("a",)


def test_one_of_a_thing_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_compress.progress.SILENT_SECONDS", 0.0)
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    for total in (1, 2):
        list(progress.track(range(total), "calibrate", total))
    assert re.findall(r"s  (\d \w+)", stream.getvalue()) == ["1 sample", "2 samples"]


def test_costs_of_kernels_have_kind_and_unit() -> None:
    choice = KernelChoice("16x1", 0.5, "", 50.0, 100.0, "cycles", "predicted")
    row = vars(replace(layer("a"), change="blocks 16x1 50 % zeros")) | {"choice": vars(choice)}
    assert change_text(row) == (
        "blocks 16x1 50 % zeros; kernel 16x1, 50 % of its weights stored, 0.50x of dense "
        "(predicted cycles)"
    )


def test_parts_count_for_the_layer() -> None:
    """Also where a layer's name begins like another's."""
    layers = ["conv1", "conv1_2", "fc"]
    found = {name: owner_of(name, layers) for name in ("conv1_part1", "conv1_2", "conv1_2_part1")}
    assert found == {"conv1_part1": "conv1", "conv1_2": "conv1_2", "conv1_2_part1": "conv1_2"}
    assert owner_of("other", layers) == "other"


def test_stored_weights_are_counted_in_the_kernel() -> None:
    """A kernel that spreads weights by bits multiplies zeros too; none of them is stored."""
    module = graph({"x": (1, 4)}, lambda g, x: g.quantize(x, 1.0, 0))
    fc = replace(layer("fc"), macs_after=10_000)
    (row,) = with_changes((fc,), module, "host", {"fc": "unstructured 50 % zeros"}, {"fc": 0.5})
    assert row.choice is not None and row.choice.stored_share == 0.5
    assert "50 % of its weights stored" in change_text(asdict(row))
    (row,) = with_changes((fc,), module, "host", {}, {})
    assert row.choice is None
