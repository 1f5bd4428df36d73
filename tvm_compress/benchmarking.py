"""Latency and accuracy of the artefact, its float original and other runtimes, side by side.

All sides run in one process, in turn, warm, with the same threads, so that a busy machine disturbs
them alike. Other runtimes are timed only after their outputs were found to agree; they are
calibrated with the samples that the artefact was calibrated with, and scored on the same samples.
Single kernels are timed alone, with the tensors that an inference gives them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from .accuracy import SideAccuracy, beside, right_answers, scores_output, sides_of
from .errors import CheckFailed, DataError, ModelError
from .kernels import LibraryInfo, Observer
from .measures import ErrorSums
from .progress import Progress
from .report.rows import Device, Latency

if TYPE_CHECKING:
    from .accuracy import Scorer
    from .artefact import Artefact
    from .data import Dataset
    from .peers import Peer
    from .runtime import Session

WARM_UP_RUNS = 3
MIN_RUNS = 10
MAX_RUNS = 2000
TURN_SECONDS, LEAST_RUNS_A_TURN, MOST_RUNS_A_TURN = 0.03, 2, 50
# Between turns: idle threads of the one before spin for a while, on cores that others now need.
PAUSE_SECONDS = 0.004
# A kernel alone: so long at a turn, in this many turns, fewer where one call takes long.
KERNEL_TURN_SECONDS, KERNEL_TURNS, LEAST_KERNEL_TURNS, KERNEL_SECONDS = 5e-5, 20, 3, 0.02
# What another runtime must agree to: the float model (as far as rounding goes), or a quantised one.
LEAST_FLOAT_DB, LEAST_INT8_DB, MOST_DB = 30.0, 3.0, 999.0


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel call, alone and repeated: the least disturbed turn."""

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
    agreement_db: dict[str, float]
    """Signal to noise of another runtime's outputs against the original's; at most 999."""
    accuracies: dict[str, SideAccuracy] = field(default_factory=dict)
    """By side, all on the same labelled samples; empty where none were given."""

    @property
    def speedup(self) -> float:
        """Median of the float original over median of the artefact."""
        return self.latencies["original"].median_us / self.latencies["compressed"].median_us


def benchmark(
    artefact: Artefact,
    *,
    against: tuple[str, ...] = (),
    models: tuple[Path, ...] = (),
    calibration: Any = None,
    evaluate: Any = None,
    seconds: float = 5.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time `artefact`, its float original and the runtimes in `against` for `seconds` each.

    Each of these takes the first of `models` that it can read; with `calibration` (what `load_data`
    takes) it also runs that model as its own tools quantise it to int8, with the samples that
    `compress` takes of the same data. With `evaluate` (labelled data) the top-1 accuracy of all
    sides is measured.

    Raises `DataError` when data does not fit, `ModelError` when another runtime cannot run the
    model, `CheckFailed` when it computes something else, `TargetError` when the artefact is not for
    this machine.
    """
    artefact.target.require_runs_here()
    threads = set_threads(threads)
    progress = progress or Progress()
    labelled = None if evaluate is None else _labelled(artefact, evaluate)
    files = peer_files(against, models)
    samples = [] if calibration is None else peer_samples(artefact, calibration, progress)
    feed = probe_inputs(artefact)[0]
    sessions = {side: artefact.session(side) for side in ("compressed", "original")}
    programs = {side: session.bind(feed) for side, session in sessions.items()}
    agreement = {}
    peers = {}
    if against:
        expected = list(sessions["original"].run(feed).values())
        for name, peer in load_peers(files, samples, threads):
            agreement[name] = _agreement_db(name, expected, peer.run(feed))
            programs[name] = peer.bind(feed)
            peers[name] = peer
    accuracies = {} if labelled is None else _accuracies(artefact, peers, labelled, progress)
    latencies = time_interleaved(programs, seconds, progress)
    infos = {side: LibraryInfo.from_json(artefact.kernels[side]) for side in sessions}
    kernels = {side: time_kernels(session, infos[side], feed) for side, session in sessions.items()}
    return Benchmark(this_device(threads), latencies, kernels, agreement, accuracies)


def peer_files(against: tuple[str, ...], models: tuple[Path, ...]) -> dict[str, Path]:
    """Runtime => the first of `models` that it reads. Raises `ModelError` when there is none."""
    from . import peers

    files = {}
    for name in against:
        path = next((model for model in models if model.suffix in peers.READS[name]), None)
        if path is None:
            suffixes = " or ".join(peers.READS[name])
            raise ModelError(
                f"--against {name}: reads {suffixes} files; give one with --model, or leave it out"
            )
        files[name] = path
    return files


def load_peers(
    files: dict[str, Path],
    samples: list[dict[str, np.ndarray]],
    threads: int,
) -> Iterator[tuple[str, Peer]]:
    """Side and loaded model of every runtime, as delivered and, with `samples`, in int8."""
    from . import peers
    from .targets import get_target

    has_vnni = bool(get_target("host").capabilities & {"avx512vnni", "avxvnni"})
    for name, path in files.items():
        yield name, peers.LOADERS[name](path, threads)
        if not samples or path.suffix != ".onnx":
            continue
        with TemporaryDirectory() as folder:
            for side, file in peers.quantize(
                name, path, samples, Path(folder), has_vnni=has_vnni
            ).items():
                yield side, peers.LOADERS[name](file, threads)


def peer_samples(
    artefact: Artefact, calibration: Any, progress: Progress
) -> list[dict[str, np.ndarray]]:
    """Calibration inputs for the other runtimes, those that `compress` takes of the same data.

    They hold all of them in memory.
    """
    dataset = artefact.load_data(calibration).take(artefact.recipe.calibration.samples)
    made_with = artefact.manifest.get("calibration") or {}
    if dataset.fingerprint is None or dataset.fingerprint != made_with.get("fingerprint"):
        progress.note(
            f"{dataset.source}: not known to be the data that the artefact was calibrated with "
            f"({made_with.get('source', 'none')}); the other runtimes are calibrated with it"
        )
    return list(dataset)


def _labelled(artefact: Artefact, evaluate: Any) -> Dataset:
    dataset = artefact.load_data(evaluate)
    if not dataset.has_labels:
        raise DataError(f"{dataset.source}: has no labels, so that no accuracy can be measured")
    scores_output(artefact.outputs, dataset)
    return dataset


def _accuracies(
    artefact: Artefact, peers: Mapping[str, Peer], dataset: Dataset, progress: Progress
) -> dict[str, SideAccuracy]:
    """Of both programs of the artefact and of all `peers`."""
    spec = scores_output(artefact.outputs, dataset)
    place = artefact.outputs.index(spec)

    def scorer(peer: Peer) -> Scorer:
        return lambda feed: peer.run(feed)[place].reshape(spec.shape)

    scorers = {**sides_of(artefact, spec), **{side: scorer(peers[side]) for side in peers}}
    return beside(right_answers(scorers, dataset, spec, progress))


def _agreement_db(name: str, expected: list[np.ndarray], outputs: list[np.ndarray]) -> float:
    """Signal to noise of `outputs`; raises `CheckFailed` when they are another model's."""
    if [x.size for x in expected] != [y.size for y in outputs]:
        shapes = [list(x.shape) for x in expected], [list(y.shape) for y in outputs]
        raise CheckFailed(f"--against {name}: outputs {shapes[1]} instead of {shapes[0]}")
    sums = ErrorSums()
    for x, y in zip(expected, outputs, strict=True):
        sums.add(x, y.reshape(x.shape))
    found = sums.sqnr_db
    decibels = min(MOST_DB, MOST_DB if found is None else found)
    least = LEAST_INT8_DB if "int8" in name else LEAST_FLOAT_DB
    if not decibels >= least:
        raise CheckFailed(
            f"--against {name}: its outputs differ from the original's, {decibels:.1f} dB of "
            f"signal to noise where {least:.0f} were expected; is --model the artefact's source?"
        )
    return decibels


def time_interleaved(
    programs: Mapping[str, Callable[[], Any]], seconds: float, progress: Progress
) -> dict[str, Latency]:
    """Run every program in turn until each had about `seconds`. Times are of single calls."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    runs = {name: runs_a_turn(program) for name, program in programs.items()}
    with progress.step("timing"):
        end = time.perf_counter() + seconds * len(programs)
        while any(
            len(found) < MIN_RUNS or (len(found) < MAX_RUNS and time.perf_counter() < end)
            for found in times.values()
        ):
            for name, program in programs.items():
                times[name] += take_turn(program, runs[name])
    return {name: _latency([1e6 * t for t in found]) for name, found in times.items()}


def runs_a_turn(program: Callable[[], Any]) -> int:
    """Timed runs that fill a turn; warms the program up."""
    took = 0.0
    for _ in range(WARM_UP_RUNS):
        started = time.perf_counter()
        program()
        took = time.perf_counter() - started
    return int(min(MOST_RUNS_A_TURN, max(LEAST_RUNS_A_TURN, TURN_SECONDS / took)))


def take_turn(program: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of `runs` runs, after one untimed run: its weights are warm then, its threads
    awake."""
    time.sleep(PAUSE_SECONDS)
    program()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        program()
        times.append(time.perf_counter() - started)
    return times


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
    session: Session, info: LibraryInfo, feed: Mapping[str, np.ndarray]
) -> tuple[KernelTime, ...]:
    """Time of every kernel call of one inference, each repeated ahead of its turn.

    Not observed in passing: entering and leaving an observer takes 1 to 3 us, several times what a
    step of a small recurrent layer does. Of the turns the least, not the median: on a busy machine
    a parallel kernel waits for a sleeping worker in most of them.
    """
    times: dict[int, float] = {}

    def time_alone(index: int, arguments: tuple[Any, ...]) -> None:
        symbol = info.calls[index].symbol
        once = min(session.timer(symbol, 1, LEAST_KERNEL_TURNS)(*arguments))
        calls = max(1, round(KERNEL_TURN_SECONDS / max(once, 1e-7)))
        affordable = int(KERNEL_SECONDS / (calls * max(once, 1e-7)))
        turns = min(KERNEL_TURNS, max(LEAST_KERNEL_TURNS, affordable))
        times[index] = 1e6 * min(session.timer(symbol, calls, turns)(*arguments))

    Observer(info, before=time_alone).run(session, feed)
    return tuple(
        KernelTime(call.symbol, call.layers, call.output, times[index])
        for index, call in enumerate(info.calls)
        if index in times
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
