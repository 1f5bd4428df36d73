"""Latency of the artefact and its float original side by side, and where the time goes.

All sides run in one process, in turn, warm, with the same threads, so that a busy machine disturbs
them alike. The time of single kernels is measured in separate inferences.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, ModelError
from .kernels import LibraryInfo, Observer
from .progress import Progress
from .report.rows import Device, Latency

if TYPE_CHECKING:
    from .artefact import Artefact
    from .runtime import Session

WARM_UP_RUNS = 3
MIN_RUNS = 10
MAX_RUNS = 2000
OBSERVED_RUNS = 20


@dataclass(frozen=True)
class KernelTime:
    """Least time of one kernel call over the observed inferences: the least disturbed one."""

    symbol: str
    layers: tuple[str, ...]
    output: str
    time_us: float


@dataclass(frozen=True)
class Benchmark:
    """`latencies` by side: `compressed`, `original` and the other runtimes that were asked for."""

    device: Device
    latencies: dict[str, Latency]
    kernels: dict[str, tuple[KernelTime, ...]]  # by side, in order of execution

    @property
    def speedup(self) -> float:
        """Median of the float original over median of the artefact."""
        return self.latencies["original"].median_us / self.latencies["compressed"].median_us


def benchmark(
    artefact: Artefact,
    *,
    against: tuple[str, ...] = (),
    model: Path | None = None,
    seconds: float = 5.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time `artefact`, its float original and the runtimes in `against` for `seconds` each.

    Raises `ModelError` when the other runtime cannot run `model`, `TargetError` when the artefact
    is not for this machine.
    """
    from .targets import get_target

    get_target(artefact.manifest["target"]["name"]).require_runs_here()
    threads = set_threads(threads)
    progress = progress or Progress()
    feed = probe_inputs(artefact)[0]
    sessions = {side: artefact.session(side) for side in ("compressed", "original")}
    programs = {side: session.bind(feed) for side, session in sessions.items()}
    for name in against:
        programs[name] = _OTHERS[name](artefact, model, feed, threads)
    latencies = time_interleaved(programs, seconds, progress)
    infos = {side: LibraryInfo.from_json(artefact.kernels[side]) for side in sessions}
    kernels = {side: time_kernels(session, infos[side], feed) for side, session in sessions.items()}
    return Benchmark(this_device(threads), latencies, kernels)


def time_interleaved(
    programs: Mapping[str, Callable[[], Any]], seconds: float, progress: Progress
) -> dict[str, Latency]:
    """Run every program in turn until each had about `seconds`. Times are of single calls."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        for _ in range(WARM_UP_RUNS):
            program()
    with progress.step("timing"):
        end = time.perf_counter() + seconds * len(programs)
        rounds = 0
        while rounds < MIN_RUNS or (rounds < MAX_RUNS and time.perf_counter() < end):
            rounds += 1
            for name, program in programs.items():
                started = time.perf_counter()
                program()
                times[name].append((time.perf_counter() - started) * 1e6)
    return {name: _latency(values) for name, values in times.items()}


def _latency(times_us: list[float]) -> Latency:
    low, median, high = np.percentile(times_us, [10, 50, 90])
    return Latency(
        median_us=float(median),
        p10_us=float(low),
        p90_us=float(high),
        min_us=min(times_us),
        runs=len(times_us),
    )


def time_kernels(
    session: Session, info: LibraryInfo, feed: Mapping[str, np.ndarray], runs: int = OBSERVED_RUNS
) -> tuple[KernelTime, ...]:
    """Least time of every kernel call over `runs` inferences.

    Not the median: on a busy machine the first parallel kernel waits for a sleeping worker in most
    runs, and the shares of the others would say nothing.
    """
    times: list[list[float]] = [[] for _ in info.calls]
    observer = Observer(info, lambda index, _result, took: times[index].append(took * 1e6))
    for _ in range(runs + 1):
        observer.run(session, feed)
    return tuple(
        KernelTime(call.symbol, call.layers, call.output, min(values[1:]))
        for call, values in zip(info.calls, times, strict=True)
        if len(values) > 1
    )


def probe_inputs(artefact: Artefact) -> list[dict[str, np.ndarray]]:
    """The inputs that are kept in every artefact for checks without data."""
    from .data import read_arrays

    return list(read_arrays(artefact.path / "reference" / "probes.npz", artefact.inputs))


def set_threads(threads: int | None) -> int:
    """Use `threads` threads (default: every core this process may use). Returns the number."""
    available = len(os.sched_getaffinity(0))
    threads = threads or available
    # Read by TVM when its pool starts; by itself it would count two hardware threads as one core.
    os.environ.setdefault("TVM_NUM_THREADS", str(max(threads, available)))
    import tvm

    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    return int(tvm.get_global_func("runtime.NumThreads")())


def this_device(threads: int) -> Device:
    """The machine we run on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return Device(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        system=f"{platform.system()} {platform.release()}",
    )


def _onnxruntime(
    artefact: Artefact, model: Path | None, feed: Mapping[str, np.ndarray], threads: int
) -> Callable[[], Any]:
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(
            "--against onnxruntime: the package is not installed; pip install onnxruntime"
        ) from None
    if model is None or not model.is_file():
        raise ModelError(f"{model}: no such model file for --against onnxruntime")
    if model.suffix != ".onnx":
        raise ModelError(f"{model}: onnxruntime reads .onnx files")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its idle threads would keep the cores from the others, who take turns with it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}
    missing = names - set(feed)
    if missing:
        raise DataError(f"{model}: input {missing.pop()!r} is not an input of the artefact")
    arrays = {name: feed[name] for name in names}
    return lambda: session.run(None, arrays)


_OTHERS = {"onnxruntime": _onnxruntime}
