"""What single kernels cost on a target, side by side: times, instructions of its emulator, or a
prediction.

All kernels of a call take turns on the same machine, warm, with the target's threads, their weights
beyond the caches as in a network. Nothing is checked here: kernels have tests of their own.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import ArtefactError
from .relay_passes.costs import COUNTED, MEASURED
from .tuning.worker import KERNEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .bare.compile import CompiledKernel
    from .schedules import KernelSpec
    from .schedules.stored_weight import Decoding, StoredWeight
    from .targets import Target

# A kernel runs about this long at a turn, in this many turns; few where one run takes long.
_TURN_SECONDS, _TURNS, _LEAST_TURNS = 1e-3, 15, 3
_MOST_SECONDS = 0.1
# On a busy machine: for so long at most, until each kernel has had half of its turns while this
# process waited for a core no more than this share of the time.
_PATIENCE_SECONDS = 2.0
_CALM = 0.02
# Weights come from beyond the second-level cache in a network: as many copies take turns.
_COLD_BYTES, _MOST_COPIES = 2 << 20, 16
# Under an emulator layers are cut to about so many products: counts grow with the rows.
_COUNTED_MACS = 300_000
_LEAST_ROWS = 4
_MOST_INSTRUCTIONS = 5e8


_Shared = dict[tuple[tuple[int, ...], str], tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Kernel:
    """A layer's kernel, with the bias and the activation that usually follow it, and what it reads
    besides its data; or one that decodes a weight."""

    spec: KernelSpec | StoredWeight
    weights: tuple[np.ndarray, ...]


class KernelBench(Protocol):
    """One way to find out what kernels cost."""

    unit: str

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        """Of one call of each, in `unit`. Raises `TargetError` or `ArtefactError` where the target
        cannot run them."""
        ...


def bench_of(target: Target) -> KernelBench | None:
    """The best way there is here; None: the target does not run here, nor anything like it."""
    from .bare.session import cannot_run
    from .tuning.tune import emulated

    if target.rpc_tracker:
        return RemoteBench(target)
    if not target.is_cross:
        return LocalBench(target) if target.runs_here() else None
    board = emulated(target)
    if not board.is_emulated or not board.machine or cannot_run(board) is not None:
        return None
    return CountingBench(board)


class LocalBench:
    """Times on this machine."""

    unit = MEASURED

    def __init__(self, target: Target) -> None:
        self.target = target
        self.modules = _Modules(target)

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        import tvm

        # The thread's own time: other processes may have the core meanwhile, in every turn of one
        # kernel and in none of another's. Kernels on several threads have no such clock.
        clock = thread_time if self.target.threads == 1 else perf_counter
        programs = [
            _Program(self.modules.of(kernel.spec)[KERNEL], _arguments(kernel, tvm.cpu()), clock)
            for kernel in kernels
        ]
        with _threads(self.target.threads):
            return _in_turns([program.seconds for program in programs])


class RemoteBench:
    """Times on a device behind TVM's RPC tracker."""

    unit = MEASURED

    def __init__(self, target: Target) -> None:
        self.target = target
        self.modules = _Modules(target)

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        from tempfile import TemporaryDirectory

        from .runners.rpc import Rpc
        from .tuning.worker import Remote, linker

        rpc = Rpc.of(self.target)
        rpc.require()
        failed = None
        try:
            device = Remote(rpc.tracker, rpc.key, self.target.threads)
            with TemporaryDirectory() as folder:
                runs: list[Callable[[int], float]] = []
                for number, kernel in enumerate(kernels):
                    path = Path(folder) / f"{KERNEL}{number}.so"
                    library = self.modules.of(kernel.spec)
                    options = ["-s", "-nostartfiles", "-nostdlib"]
                    library.export_library(str(path), fcompile=linker(self.target), options=options)
                    device.load(str(path))
                    runs.append(device.timer(_arguments(kernel, device.device)[0]))
                return _in_turns(runs)
        except Exception as error:  # noqa: BLE001 - whatever a foreign server does
            failed = " ".join(str(error).split())[-300:]
        # Not raised within `except`: as long as a traceback holds the session, the device is taken.
        raise ArtefactError(f"device {rpc.key!r} failed while kernels were compared: {failed}")


class CountingBench:
    """Instructions under the target's emulator: exact. Layers are cut to few rows, and what those
    take stands for all: kernels work row by row."""

    unit = COUNTED

    def __init__(self, target: Target) -> None:
        self.target = target
        # By spec and which one of a call's kernels of that spec it is: symbols differ.
        self._compiled: dict[tuple[Any, int], CompiledKernel] = {}

    def costs(self, kernels: Sequence[Kernel]) -> list[float]:
        from .bare.compile import compile_kernel
        from .model import TensorSpec
        from .tuning.emulated import Bench, DataSet
        from .tuning.scratch import scratch_folder

        parameters: list[TensorSpec] = []
        constants: dict[int, np.ndarray] = {}
        data: _Shared = {}  # (shape, dtype) => position, array: kernels share them
        results: _Shared = {}
        takes, compiled, times = {}, [], []
        alike: Counter[Any] = Counter()
        for kernel in kernels:
            spec, share = _cut(kernel.spec)
            func = _function(spec)
            arrays = _arrays(replace(kernel, spec=spec), func)
            positions = []
            for place, array in enumerate(arrays):
                shared = data if place == 0 else results if place == len(arrays) - 1 else None
                key = (array.shape, str(array.dtype))
                if shared is None or key not in shared:
                    position = len(parameters)
                    parameters.append(TensorSpec(str(position), *key))
                    if shared is None:
                        constants[position] = array
                    else:
                        shared[key] = position, array
                positions.append(position if shared is None else shared[key][0])
            same = spec, alike[spec]
            alike[spec] += 1
            if same not in self._compiled:
                symbol = f"candidate{len(self._compiled)}"
                self._compiled[same] = compile_kernel(func, symbol, self.target, None)
            compiled.append(self._compiled[same])
            takes[compiled[-1].symbol] = tuple(positions)
            times.append(share)
        sets = (DataSet(dict(data.values()), dict(results.values())),)
        bench = Bench(self.target, tuple(parameters), constants, True, sets, False, takes)
        with scratch_folder() as folder:
            counts = bench.count(compiled, folder, _MOST_INSTRUCTIONS)
        for count in counts:
            if isinstance(count, str):
                raise ArtefactError(f"{self.target.name}: a kernel does not run: {count}")
        return [share * float(count) for share, count in zip(times, counts, strict=True)]


# --- building -----------------------------------------------------------------------------------


def _function(spec: KernelSpec | StoredWeight) -> Any:
    from .schedules.lone_layer import lone_layer
    from .schedules.stored_weight import StoredWeight

    return spec.prim_func() if isinstance(spec, StoredWeight) else lone_layer(spec)


class _Modules:
    """Kernels of a target as runtime modules with a function `KERNEL`, each compiled once however
    often it is compared with others."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._found: dict[KernelSpec | Decoding, Any] = {}

    def of(self, spec: KernelSpec | StoredWeight) -> Any:
        from .schedules.stored_weight import StoredWeight

        key = spec.decoding if isinstance(spec, StoredWeight) else spec
        if key not in self._found:
            self._found[key] = self._compiled(spec)
        return self._found[key]

    def _compiled(self, spec: KernelSpec | StoredWeight) -> Any:
        import tvm

        from .schedules import schedule

        func = schedule(_function(spec), self.target).with_attr("global_symbol", KERNEL)
        with tvm.transform.PassContext():
            return tvm.tirx.build(tvm.IRModule({KERNEL: func}), target=self.target.tvm_target())


def _tensor_specs(func: Any) -> tuple[Any, ...]:
    from .model import TensorSpec

    return tuple(
        TensorSpec(str(i), tuple(int(side) for side in p.shape), str(p.dtype))
        for i, p in enumerate(func.params)
    )


def _arrays(kernel: Kernel, func: Any) -> list[np.ndarray]:
    """Data, weights, bias and room for the result; decoding has neither data nor bias."""
    from .schedules.stored_weight import StoredWeight
    from .tuning.worker import random_array

    if isinstance(kernel.spec, StoredWeight):
        return [*kernel.weights, np.zeros(kernel.spec.shape, kernel.spec.dtype)]
    specs = _tensor_specs(func)
    random = np.random.default_rng(0)
    data = random_array(random, specs[0].shape, specs[0].dtype)
    bias, result = (np.zeros(spec.shape, spec.dtype) for spec in specs[-2:])
    return [data, *map(np.ascontiguousarray, kernel.weights), bias, result]


def _arguments(kernel: Kernel, device: Any) -> list[list[Any]]:
    """Argument lists that share data and results, and have weights of their own."""
    import tvm

    func = _function(kernel.spec)
    arrays = _arrays(kernel, func)
    first = 1 if len(arrays) > len(kernel.weights) + 1 else 0  # behind the data
    own = range(first, first + len(kernel.weights))
    size = sum(array.nbytes for array in kernel.weights)
    copies = min(_MOST_COPIES, math.ceil(_COLD_BYTES / max(size, 1)))
    tensors = [tvm.runtime.tensor(array, device) for array in arrays]
    return [
        tensors,
        *(
            [
                tvm.runtime.tensor(arrays[place], device) if place in own else tensor
                for place, tensor in enumerate(tensors)
            ]
            for _ in range(copies - 1)
        ),
    ]


def _cut(spec: Any) -> tuple[Any, float]:
    """A layer of fewer rows, and how many times as many the whole one has."""
    from .schedules import MatmulSpec, SparseConv2dSpec

    dense = spec.dense if isinstance(spec, SparseConv2dSpec) else spec
    is_flat = isinstance(spec, MatmulSpec) or (isinstance(spec, SparseConv2dSpec) and spec.is_flat)
    name = "rows" if isinstance(spec, MatmulSpec) else "width" if is_flat else "height"
    rows = getattr(spec, name) if is_flat else spec.output_shape[1]
    fewer = max(min(rows, _LEAST_ROWS), rows * _COUNTED_MACS // dense.macs)
    if fewer >= rows:
        return spec, 1.0
    removed = (rows - fewer) * (1 if is_flat else spec.strides[0])
    return spec.replace(**{name: getattr(spec, name) - removed}), rows / fewer


# --- timing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Program:
    """A loaded kernel with argument lists that take turns."""

    function: Callable[..., Any]
    arguments: list[list[Any]]
    clock: Callable[[], float]

    def seconds(self, number: int) -> float:
        """Of one call, the mean over `number`."""
        calls = [self.arguments[i % len(self.arguments)] for i in range(number)]
        started = self.clock()
        for arguments in calls:
            self.function(*arguments)
        return (self.clock() - started) / number


def _in_turns(runs: Sequence[Callable[[int], float]]) -> list[float]:
    """Microseconds: the least of all turns. Other work only ever adds time.

    On a busy machine it does so in most turns, and by chance in all turns of one kernel: they go on
    until each kernel had its turns while no thread of this process waited for a core.
    """
    once = [min(run(1) for _ in range(2)) for run in runs]
    numbers = [max(1, round(_TURN_SECONDS / max(seconds, 1e-7))) for seconds in once]
    together = sum(n * s for n, s in zip(numbers, once, strict=True))
    turns = int(max(_LEAST_TURNS, min(_TURNS, _MOST_SECONDS * len(runs) / max(together, 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    calm = [0] * len(runs)
    end = perf_counter() + _PATIENCE_SECONDS
    while len(times[0]) < turns or (2 * min(calm) < turns and perf_counter() < end):
        for place, (run, number) in enumerate(zip(runs, numbers, strict=True)):
            before = _waited()
            times[place].append(run(number))
            waited = _waited() - before
            calm[place] += waited <= _CALM * number * times[place][-1]
    return [1e6 * min(found) for found in times]


def _waited() -> float:
    """Seconds that threads of this process were ready to run while others had the cores; always 0
    where the system does not count them."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has ended
    return nanoseconds * 1e-9


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """TVM's pool with so many threads, on cores of their own; as it was afterwards."""
    import tvm

    from .benchmarking import set_threads

    with ExitStack() as stack:
        if hasattr(os, "sched_setaffinity") and count == 1:
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {max(cores)})
            stack.callback(os.sched_setaffinity, 0, cores)
        before = int(tvm.get_global_func("runtime.NumThreads")())
        set_threads(count)
        stack.callback(tvm.get_global_func("runtime.config_threadpool"), 1, before)
        yield
