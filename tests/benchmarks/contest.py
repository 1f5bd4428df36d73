"""What benchmarks of single layers share: options, specs, and contestants that take turns."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_compress.targets import Target

# (height, width, in, out, kernel)
Convolution = tuple[int, int, int, int, int]


def options(description: str) -> argparse.ArgumentParser:
    """A parser of --target, --threads and --only; `description` is a module's docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--target", default="host")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    return parser


def chosen_target(arguments: argparse.Namespace) -> Target:
    """The target with so many threads, which has to be this machine's. Before anything starts
    threads."""
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    from tvm_compress.targets import get_target

    target = dataclasses.replace(get_target(arguments.target), threads=arguments.threads)
    target.require_runs_here()
    return target


def same_convolutions(layers: Iterable[Convolution], only: str) -> Iterator[tuple[str, Any]]:
    """(name such as `3x3 56x56 64-64`, spec of float32) of those whose name contains `only`;
    outputs as large as inputs."""
    from tvm_compress.schedules import Conv2dSpec

    for height, width, channels, outputs, kernel in layers:
        name = f"{kernel}x{kernel} {height}x{width} {channels}-{outputs}"
        if only in name:
            yield name, Conv2dSpec(
                batch=1, height=height, width=width, in_channels=channels, out_channels=outputs,
                kernel=(kernel, kernel), padding=(kernel // 2,) * 4,
            )  # fmt: skip


def contest(
    contestants: Sequence[Callable[[], float]], repetitions: int = 20, least_seconds: float = 0.5
) -> list[float]:
    """The best of many runs of each, in turns."""
    best = [float("inf")] * len(contestants)
    started, done = time.perf_counter(), 0
    while done < repetitions or time.perf_counter() - started < least_seconds:
        done += 1
        for index, run in enumerate(contestants):
            best[index] = min(best[index], run())
    return best
