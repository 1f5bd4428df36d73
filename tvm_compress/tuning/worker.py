"""A worker process of tuning: builds candidates, or runs and times them.

It imports TVM once and then answers requests, JSON over a pipe, one at a time. Whatever a candidate
does to it (crash, hang) is the business of `pool.py`. It ends when its parent does.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..targets import Target

FUNCTION, ARGUMENTS, REFERENCE, DETAILS, SAMPLES = (
    "function.json",
    "arguments.npz",
    "reference.so",
    "task.json",
    "samples.npz",
)
KERNEL = "kernel"

# Measuring: repeats of about this long, the least of them counts; more where they do not agree.
_REPEAT_SECONDS = 2e-3
_REPEATS, _MOST_ROUNDS = 7, 3
_AGREE = 1.04
# A candidate this much slower than the best is not measured to the end.
_HOPELESS = 1.6
# Weights come from beyond the second-level cache in a network: as many copies take turns.
_COLD_BYTES, _MOST_COPIES = 2 << 20, 16
# Float sums differ by their order: as parts of the largest result.
_FLOAT_TOLERANCE = 2e-4


def main() -> None:
    """`python -m tvm_compress.tuning.worker FD`: serve the requests that come through FD."""
    from ..startup import start_without_torch

    _end_with_parent()
    start_without_torch()
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = _OPERATIONS[request.pop("op")](**request)
        except Exception as error:  # noqa: BLE001 - a candidate may fail in any way
            detail = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {detail[-300:]}"}
        connection.send_bytes(json.dumps(answer).encode())


def _end_with_parent() -> None:
    """Where the kernel can: SIGKILL to us when our parent is gone, even in an endless loop."""
    import ctypes
    import signal

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def start(threads: int) -> dict[str, Any]:
    """Import what every request needs."""
    import tvm

    from .. import schedules  # noqa: F401

    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    return {}


# --- building -----------------------------------------------------------------------------------


def build(
    task: str, choice: Mapping[str, int] | None, output: str, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Schedule, compile and link one candidate; `choice` None: the naive function."""
    import tvm

    from ..schedules import schedule

    func = _function(task)
    link = None
    if choice is None:
        built_for = tvm.target.Target("llvm")
    else:
        chosen = _target(json.dumps(target))
        func, built_for = schedule(func, chosen, choice), chosen.tvm_target()
        link = linker(chosen)
    module = tvm.IRModule({KERNEL: func.with_attr("global_symbol", KERNEL)})
    library = tvm.tirx.build(module, target=built_for)
    # -nostartfiles, -nostdlib: linking takes half as long; kernels call nothing but the runtime.
    options = ["-s"] if choice is None else ["-s", "-nostartfiles", "-nostdlib"]
    library.export_library(output, fcompile=link, options=options)
    return {}


def linker(target: Target) -> Any:
    """What links a kernel alone, for TVM's `export_library`; None: this machine's."""
    from tvm.support import cc

    if not target.is_cross or target.is_x86:
        return None
    # The compiler's own helpers: 32-bit Arm divides 64 bits by a function.
    options = [*target.compiler_flags, "-lgcc"]
    return cc.cross_compiler(target.compiler, options=options)


def build_bare(
    task: str, choice: Mapping[str, int], symbol: str, output: str, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Schedule and compile one candidate as a C project has it: a `CompiledKernel`."""
    from ..bare.compile import compile_kernel

    kernel = compile_kernel(_function(task), symbol, _target(json.dumps(target)), choice)
    Path(output).write_bytes(kernel.to_bytes())
    return {}


@lru_cache(maxsize=64)
def _function(task: str) -> Any:
    import tvm

    return tvm.ir.load_json((Path(task) / FUNCTION).read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _target(text: str) -> Any:
    from ..targets import Target

    fields = json.loads(text)
    fields["capabilities"] = frozenset(fields["capabilities"])
    for name in ("toolchain", "compiler_flags"):
        fields[name] = tuple(fields[name])
    return Target(**fields)


# --- running ------------------------------------------------------------------------------------


class _Here:
    """Kernels run in this process."""

    def __init__(self) -> None:
        import tvm

        self.device = tvm.cpu()

    def load(self, path: str) -> Callable[..., Any]:
        import tvm

        return tvm.runtime.load_module(path)[KERNEL]

    def tensor(self, array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def repeat(self, kernel: Callable[..., Any], sets: list[list[Any]], number: int) -> float:
        """Seconds of one call, the mean over `number` calls; argument sets take turns."""
        calls = [sets[i % len(sets)] for i in range(number)]
        started = time.perf_counter()
        for arguments in calls:
            kernel(*arguments)
        return (time.perf_counter() - started) / number


class Remote:
    """Kernels run on a server of TVM's RPC, got from a tracker."""

    def __init__(self, tracker: str, key: str, threads: int) -> None:
        from tvm import rpc

        host, _, port = tracker.rpartition(":")
        self.session = rpc.connect_tracker(host, int(port)).request(key, session_timeout=600)
        self.device = self.session.cpu(0)
        self.session.get_function("runtime.config_threadpool")(1, threads)
        self._uploaded: set[str] = set()

    def load(self, path: str) -> Any:
        # Once, and no two by one name: the file of a library that is loaded must not change.
        name = f"{Path(path).parent.name}-{Path(path).name}"
        if name not in self._uploaded:
            self.session.upload(path, target=name)
            self._uploaded.add(name)
        self._module = self.session.load_module(name)
        return self._module[KERNEL]

    def tensor(self, array: np.ndarray) -> Any:
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def repeat(self, kernel: Any, sets: list[list[Any]], number: int) -> float:
        return self.timer(sets[0])(number)

    def timer(self, arguments: list[Any]) -> Callable[[int], float]:
        """Of the kernel that was loaded last: seconds of one call, the mean over so many."""
        module = self._module

        def seconds(number: int) -> float:
            timer = module.time_evaluator(KERNEL, self.device, number=number, repeat=1)
            return float(timer(*arguments).mean)

        return seconds


_device: _Here | Remote | None = None
_prepared: dict[str, Any] = {}


def connect(tracker: str, key: str, threads: int) -> dict[str, Any]:
    """Run kernels elsewhere from now on."""
    global _device
    _device = Remote(tracker, key, threads)
    return {}


def _runner() -> _Here | Remote:
    global _device
    if _device is None:
        _device = _Here()
    return _device


class _Arguments:
    """Arguments of a task and what the naive function makes of them."""

    def __init__(self, task: str, seed: int) -> None:
        import tvm

        folder = Path(task)
        details = json.loads((folder / DETAILS).read_text(encoding="utf-8"))
        self.is_integer = bool(details["is_integer"])
        self.results: list[int] = details["results"]
        with np.load(folder / ARGUMENTS, allow_pickle=False) as stored:
            self.constants = {int(name): stored[name] for name in stored.files}
        random = np.random.default_rng(seed)
        self.arrays: list[np.ndarray] = []
        for index, (shape, dtype) in enumerate(details["parameters"]):
            if index in self.constants:
                self.arrays.append(np.asarray(self.constants[index], order="C"))
            elif index in self.results:
                self.arrays.append(np.zeros(shape, dtype))
            else:
                self.arrays.append(random_array(random, tuple(shape), dtype))
        # The naive function runs here even when candidates run elsewhere: it is the specification.
        naive = tvm.runtime.load_module(str(folder / REFERENCE))[KERNEL]
        local = [tvm.runtime.tensor(array) for array in self.arrays]
        naive(*local)
        self.expected = {index: local[index].numpy() for index in self.results}

    def sets(self, device: _Here | Remote) -> list[list[Any]]:
        """Argument lists that share data and results; weights are copies beyond the caches."""
        first = [device.tensor(array) for array in self.arrays]
        size = sum(array.nbytes for array in self.constants.values())
        copies = min(_MOST_COPIES, math.ceil(_COLD_BYTES / max(size, 1)))
        if isinstance(device, Remote):
            copies = 1
        sets = [first]
        for _ in range(copies - 1):
            again = list(first)
            for index in self.constants:
                again[index] = device.tensor(self.arrays[index])
            sets.append(again)
        return sets

    def difference(self, arguments: list[Any]) -> str:
        """How the results of a candidate differ from the naive function's; empty: they do not."""
        for index, expected in self.expected.items():
            wrong = difference(arguments[index].numpy(), expected, self.is_integer)
            if wrong:
                return wrong
        return ""


def difference(found: np.ndarray, expected: np.ndarray, is_integer: bool) -> str:
    """How a result differs from the naive function's; empty: it does not. `is_integer`: the sums
    are."""
    if is_integer and expected.dtype.kind != "f":
        wrong = found != expected
    elif expected.dtype.kind == "f":
        limit = _FLOAT_TOLERANCE * max(float(np.abs(expected).max(initial=0.0)), 1e-30)
        wrong = ~(np.abs(found - expected) <= limit)
    else:  # codes of sums in floats: a step, where the order of the sum decides
        wrong = np.abs(found.astype(np.int64) - expected) > 1
    return f"wrong result: {int(wrong.sum())} of {wrong.size} values differ" if wrong.any() else ""


def random_array(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Data for a kernel: all codes of the small integer types, a normal distribution of floats."""
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    if dtype in ("int8", "uint8", "int16", "uint16"):
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return random.integers(0, 2, shape).astype(dtype)


def prepare(task: str) -> dict[str, Any]:
    """Make arguments, run the naive function."""
    arguments = _Arguments(task, seed=0)
    _prepared.clear()  # of one task at a time: large layers have large arguments
    _prepared[task] = (arguments, arguments.sets(_runner()))
    return {}


def samples(task: str, count: int) -> dict[str, Any]:
    """Write arguments and the naive function's results to a file, for others to run."""
    arrays: dict[str, np.ndarray] = {}
    for seed in range(count):
        made = _Arguments(task, seed)
        arrays |= {f"argument_{seed}_{index}": array for index, array in enumerate(made.arrays)}
        arrays |= {f"expected_{seed}_{index}": array for index, array in made.expected.items()}
    with (Path(task) / SAMPLES).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return {}


def measure(task: str, library: str, best: float | None) -> dict[str, Any]:
    """Check one candidate against the naive function, then time it: `seconds` of one call."""
    if task not in _prepared:
        prepare(task)
    arguments, sets = _prepared[task]
    device = _runner()
    kernel = device.load(library)
    wrong = _check(kernel, arguments, sets[0])
    if wrong:
        return {"error": wrong}
    return {"seconds": _time(device, kernel, sets, best)}


def compare(task: str, libraries: list[str], seed: int) -> dict[str, Any]:
    """Check candidates on fresh data, then time them in turns: `seconds` and `errors` of each."""
    arguments = _Arguments(task, seed)
    device = _runner()
    sets = arguments.sets(device)
    seconds: list[float | None] = [None] * len(libraries)
    errors = [""] * len(libraries)
    for _ in range(_MOST_ROUNDS):
        for index, library in enumerate(libraries):
            kernel = device.load(library)
            errors[index] = errors[index] or _check(kernel, arguments, sets[0])
            if not errors[index]:
                took = _time(device, kernel, sets, None)
                before = seconds[index]
                seconds[index] = took if before is None else min(before, took)
    return {"seconds": seconds, "errors": errors}


def _check(kernel: Callable[..., Any], arguments: _Arguments, tensors: list[Any]) -> str:
    for index in arguments.results:
        tensors[index].copyfrom(np.full_like(arguments.arrays[index], 85))
    kernel(*tensors)
    return arguments.difference(tensors)


def _time(
    device: _Here | Remote, kernel: Callable[..., Any], sets: list[list[Any]], best: float | None
) -> float:
    """Least mean of several repeats. Other work on the machine only ever adds time, so the least is
    the truth, once two repeats agree on it."""
    once = min(device.repeat(kernel, sets, 1) for _ in range(2))
    number = max(1, min(500, round(_REPEAT_SECONDS / max(once, 1e-7))))
    times: list[float] = []
    for _ in range(_MOST_ROUNDS):
        for _ in range(_REPEATS):
            times.append(device.repeat(kernel, sets, number))
            if best is not None and len(times) >= 3 and min(times) > _HOPELESS * best:
                return min(times)
        times.sort()
        if times[1] <= _AGREE * times[0]:
            break
    return times[0]


_OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "start": start,
    "build": build,
    "build_bare": build_bare,
    "connect": connect,
    "prepare": prepare,
    "samples": samples,
    "measure": measure,
    "compare": compare,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
