"""Progress of long steps: the flow says what it does, somebody may show it.

The flow never prints. It calls a `Progress`; the command line gives one that draws bars with the
time left on standard error, the API by default one that shows nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar

T = TypeVar("T")

SILENT_SECONDS = 2.0  # nothing is drawn for work shorter than this


class Progress:
    """Shows nothing. The base of `TerminalProgress` and of a caller's own."""

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Around one step of the flow whose length is not known in advance."""
        yield

    def track(
        self, items: Iterable[T], label: str, total: int, unit: str = "samples"
    ) -> Iterator[T]:
        """Yield `items`, `total` in number, and show how far this is and how long it will take."""
        yield from items

    @contextmanager
    def meter(self, label: str, total: int | None) -> Iterator[Meter]:
        """Around work that reports how far it is by itself; `total` None: nobody knows."""
        yield Meter()

    def note(self, message: str) -> None:
        """One line that stays on the screen."""


class Meter:
    """Shows nothing. What `Progress.meter` gives."""

    def show(self, done: int, text: str, fraction: float | None) -> None:
        """`done` units of work are done; `text` says how things stand; `fraction` of the whole,
        where known."""


class TerminalProgress(Progress):
    """Bars with ETA on a terminal; on a pipe or in a log one line for each finished step."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._bar() as bar:
            bar.add_task(label, total=None)
            yield
        self._finished(label, time.perf_counter() - started)

    def track(
        self, items: Iterable[T], label: str, total: int, unit: str = "samples"
    ) -> Iterator[T]:
        started = time.perf_counter()
        with self._bar() as bar:
            task = bar.add_task(label, total=total)
            for item in items:
                yield item
                bar.advance(task)
        counted = f"1 {unit.removesuffix('s')}" if total == 1 else f"{total} {unit}"
        self._finished(label, time.perf_counter() - started, counted)

    @contextmanager
    def meter(self, label: str, total: int | None) -> Iterator[Meter]:
        started = time.perf_counter()
        with self._bar(is_text=True) as bar:
            meter = _TerminalMeter(bar, label, total, None if self._console.is_terminal else self)
            yield meter
        self._finished(label, time.perf_counter() - started, meter.text)

    def note(self, message: str) -> None:
        self._console.print(message, markup=False)

    def _finished(self, label: str, seconds: float, detail: str = "") -> None:
        if seconds >= SILENT_SECONDS:
            self.note(f"  {label:<38}{seconds:7.1f} s  {detail}".rstrip())

    def _bar(self, is_text: bool = False) -> RichBar:
        """`is_text`: the description needs the room of the bar."""
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichBar

        return RichBar(
            SpinnerColumn(),
            TextColumn("{task.description:<38}"),
            *([] if is_text else [BarColumn(bar_width=30)]),
            TextColumn("{task.percentage:>3.0f}%"),
            *([] if is_text else [TimeElapsedColumn()]),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )


class _TerminalMeter(Meter):
    """A bar, or without a terminal a line now and then."""

    _SECONDS_BETWEEN_LINES = 20.0

    def __init__(self, bar: RichBar, label: str, total: int | None, lines: Progress | None) -> None:
        self._bar, self._label, self._total, self._lines = bar, label, total, lines
        self._task = bar.add_task(label, total=None)
        self._started = self._last_line = time.perf_counter()
        self.text = ""

    def show(self, done: int, text: str, fraction: float | None) -> None:
        of = "" if self._total is None else f"/{self._total}"
        self.text = f"{done}{of} trials: {text}"
        if self._lines is None:
            total = None if fraction is None else 1.0
            description = f"{self._label} {self.text}"
            self._bar.update(self._task, description=description, total=total, completed=fraction)
        elif time.perf_counter() - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            left = ""
            if fraction:
                seconds = (self._last_line - self._started) * (1 - fraction) / fraction
                left = f", {seconds:.0f} s left"
            self._lines.note(f"  {self._label}  {self.text}{left}")
