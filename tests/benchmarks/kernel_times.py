"""Where the time of a network goes: every kernel of our artefact against the bounds of this core.

    python tests/benchmarks/kernel_times.py resnet_50 --kind int8 [--threads 1] [--top 25]

Models are those of `x86_vs_peers.py`. The time of a kernel is the least over many inferences,
observed in place (so with the caches as the network leaves them; the observer itself costs a few
microseconds a call). The bound is the larger of multiply-accumulates over the peak of the
instruction, and of the bytes of all arguments over the bandwidth of the level they fit in; both are
measured by `core_peaks.c` at the start. `lost` is time above the bound.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import x86_vs_peers

CACHE_LEVELS = {"L1": 24 << 10, "L2": 768 << 10, "L3": 24 << 20}
OBSERVED_RUNS = 60


@dataclass(frozen=True)
class KernelFacts:
    """What is known of a kernel before it runs."""

    symbol: str
    form: str
    shape: str
    macs: int
    bytes: int
    dtype: str  # of the multiplied data; empty for other kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(x86_vs_peers.NETWORKS))
    parser.add_argument("--kind", choices=["float32", "int8"], default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="host")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--runs", type=int, default=OBSERVED_RUNS)
    parser.add_argument("--work", type=Path, default=x86_vs_peers.WORK)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    peaks = measure_peaks()
    print("peaks: " + ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))

    from tvm_compress.benchmarking import set_threads
    from tvm_compress.build import build
    from tvm_compress.kernels import LibraryInfo, Observer
    from tvm_compress.report.rows import Bytes
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    network = x86_vs_peers.NETWORKS[arguments.model]
    path = x86_vs_peers.model_file(network, arguments.work)
    samples = x86_vs_peers.input_samples(network, path)
    modules = x86_vs_peers.compressed_modules(path, samples, arguments, [arguments.kind])
    loaded, module = modules[arguments.kind]
    target = replace(get_target(arguments.target), threads=arguments.threads)
    built = build(module, target)
    facts = describe_kernels(module, target)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: arguments.threads])
    set_threads(arguments.threads)
    session = Session(built.executable, loaded.inputs, loaded.outputs)
    program = session.bind(samples[0])
    whole = x86_vs_peers.take_turns({("", ""): program}, 20)["", ""]
    times: list[list[float]] = [[] for _ in built.calls]
    started = 0.0

    def start(_index: int, _arguments: tuple[Any, ...]) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(index: int, _arguments: tuple[Any, ...]) -> None:
        times[index].append((time.perf_counter() - started) * 1e6)

    info = LibraryInfo(built.calls, {}, {}, Bytes(0, 0, 0, 0, 0, 0, 0, 0), 0)
    observer = Observer(info, after=stop, before=start)
    for _ in range(arguments.runs + 2):
        observer.run(session, samples[0])
    rows = []
    for call, values in zip(built.calls, times, strict=True):
        fact = facts[call.symbol]
        rows.append((min(values[2:]), bound_us(fact, peaks, arguments.threads), fact, call))
    print_rows(rows, min(whole) * 1e6, arguments, peaks)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                [
                    {"time_us": t, "bound_us": b, "layers": call.layers, **vars(fact)}
                    for t, b, fact, call in rows
                ],
                indent=1,
            )
        )


def measure_peaks() -> dict[str, float]:
    """Gop/s of the multiply-accumulate instructions (0: the CPU lacks it), GB/s of reading."""
    source = Path(__file__).parent / "core_peaks.c"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", str(source), "-o", str(program)], check=True
        )
        text = subprocess.run([str(program)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def describe_kernels(module: Any, target: Any) -> dict[str, KernelFacts]:
    """Facts by symbol, from the kernels as they are scheduled."""
    from tvm import tirx

    from tvm_compress import schedules
    from tvm_compress.pipeline import planning_pipeline
    from tvm_compress.schedules.fused import analyse
    from tvm_compress.schedules.spec import SCHEDULE_ATTR

    with target.tvm_target():
        module = planning_pipeline(target)(module)
    facts = {}
    for global_var, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        fused = analyse(function)
        spec = fused.anchor.spec if fused is not None and fused.anchor is not None else None
        scheduled = schedules.schedule(function, target)
        facts[global_var.name_hint] = KernelFacts(
            symbol=global_var.name_hint,
            form=str(scheduled.attrs[SCHEDULE_ATTR]),
            shape=_shape(spec, function),
            macs=int(getattr(spec, "macs", 0)),
            bytes=sum(_bytes(p) for p in function.params),
            dtype=str(getattr(spec, "data_dtype", getattr(spec, "a_dtype", ""))),
        )
    return facts


def _bytes(param: Any) -> int:
    size = np.dtype(re.sub("^bool$", "uint8", str(param.dtype))).itemsize
    return size * math.prod(int(extent) for extent in param.shape)


def _shape(spec: Any, function: Any) -> str:
    if spec is None or not hasattr(spec, "macs"):
        params = [p for p in function.params if math.prod(int(e) for e in p.shape) > 1]
        return " ".join(f"{p.dtype}{[int(e) for e in p.shape]}" for p in params[:1] + params[-1:])
    if hasattr(spec, "kernel"):
        kind = " depthwise" if getattr(spec, "is_depthwise", False) else ""
        return (
            f"{spec.height}x{spec.width}x{spec.in_channels}->{spec.out_channels} "
            f"{spec.kernel[0]}x{spec.kernel[1]}/{spec.strides[0]}{kind}"
        )
    return " ".join(
        f"{key}={value}"
        for key, value in json.loads(spec.to_json()).items()
        if isinstance(value, int) and not isinstance(value, bool)
    )


def bound_us(fact: KernelFacts, peaks: dict[str, float], threads: int) -> float:
    """The least time that this core's instructions and memory allow."""
    names = {"float32": ("fma",), "int16": ("vpdpwssd", "vpmaddwd")}
    peak = max(peaks[n] for n in names.get(fact.dtype, ("vpdpbusd", "vpmaddwd")))
    level = next((name for name, size in CACHE_LEVELS.items() if fact.bytes <= size), "DRAM")
    compute = 2 * fact.macs / peak / threads
    return max(compute, fact.bytes / peaks[level]) / 1e3


def print_rows(
    rows: list[tuple[float, float, KernelFacts, Any]],
    whole_us: float,
    arguments: argparse.Namespace,
    peaks: dict[str, float],
) -> None:
    """One line for every different kernel, the greatest loss first; then sums by form."""
    total = sum(row[0] for row in rows)
    bounds = sum(row[1] for row in rows)
    print(
        f"{arguments.model} {arguments.kind}, {arguments.threads} threads: {len(rows)} calls, "
        f"sum {total:.0f} us, bound {bounds:.0f} us; whole inference {whole_us:.0f} us"
    )
    merged: dict[tuple[str, str, str, int], list[tuple[float, float, KernelFacts]]]
    merged = defaultdict(list)
    for time_us, bound, fact, _ in rows:
        name = re.sub(r"_?\d+$", "", fact.symbol)
        merged[fact.form, fact.shape, name, fact.macs].append((time_us, bound, fact))
    groups = sorted(merged.items(), key=lambda g: -sum(t - b for t, b, _ in g[1]))
    print("| lost us | time us | share | calls | Gop/s | of bound | form | shape | kernel |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (form, shape, name, macs), group in groups[: arguments.top]:
        spent, least = sum(t for t, _, _ in group), sum(b for _, b, _ in group)
        rate = 2e-3 * macs * len(group) / spent
        print(
            f"| {spent - least:.0f} | {spent:.0f} | {spent / total:.1%} | {len(group)} "
            f"| {f'{rate:.0f}' if macs else ''} | {least / spent:.0%} | {form} | {shape} "
            f"| {name[:60]} |"
        )
    by_form: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for time_us, bound, fact, _ in rows:
        for index, value in enumerate((time_us, bound, 1.0)):
            by_form[fact.form][index] += value
    print("\n| form | calls | time us | share | of bound |")
    print("|---|---|---|---|---|")
    for form, (spent, least, count) in sorted(by_form.items(), key=lambda f: -f[1][0]):
        print(f"| {form} | {count:.0f} | {spent:.0f} | {spent / total:.1%} | {least / spent:.0%} |")


if __name__ == "__main__":
    sys.exit(main())
