"""Whole networks with fewer operations: accuracy, emitted bytes and latency, float32 and int8.

    python tests/benchmarks/compressed_models.py prepare --models resnet20 [--only sparse]
    python tests/benchmarks/compressed_models.py time [--threads 1] [--turns 15]
    python tests/benchmarks/compressed_models.py show

`prepare` compresses each network by each recipe below, alone and with the steps of `int8` behind
it, one shot: no training. It scores what it built on labelled samples and keeps library and figures
in the work folder; what is there already is not made again. `time` runs all libraries of a network
and ONNX Runtime in float32 and int8 in turns, in one process that is pinned to as many cores as
there are threads. `show` prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from asset_data import TASKS, Task
from peers_accuracy import calibration_inputs
from x86_vs_peers import NETWORKS, Network, model_file, peer_files, say, take_turns

WORK = Path.home() / ".cache" / "tvm-compress" / "compressed-models"
MODELS = {
    **{name: NETWORKS[name] for name in ("resnet20", "resnet56", "efficientnet", "squeezenet")},
    "crnn": Network("CRNN-S (Arm)", "arm_kws_CRNN_S"),
}
SHARES = (0.5, 0.7, 0.8, 0.9)
RECIPES: dict[str, list[dict[str, Any]]] = {
    "whole": [],
    **{f"sparse {100 * s:g} % 16x1": [{"sparsify": {"sparsity": s}}] for s in SHARES},
    **{
        f"sparse {100 * s:g} % 16x1, sensitivity": [
            {"sparsify": {"sparsity": s, "scope": "sensitivity"}}
        ]
        for s in SHARES[:2]
    },
    **{
        f"sparse {100 * s:g} % unstructured": [
            {"sparsify": {"sparsity": s, "pattern": "unstructured"}}
        ]
        for s in SHARES
    },
    **{
        f"shrink {x:g}x": [
            {"shrink": {"keep": {"operations": {"share": round(1 / x, 3)}}, "multiple": 8}}
        ]
        for x in (1.5, 2)
    },
    **{
        f"low rank {x:g}x": [{"lowrank": {"rank": {"network": {"share": round(1 / x, 3)}}}}]
        for x in (1.5, 2)
    },
}
KINDS = ("float32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("prepare", "time", "show"))
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--target", default="host")
    parser.add_argument("--samples", type=int, default=512, help="for calibration, at most")
    parser.add_argument("--evaluate", type=int, help="score only so many of each test set")
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; there are {', '.join(MODELS)}")
        folder = arguments.work / name
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.command == "prepare":
            prepare(MODELS[name], folder, arguments)
        elif arguments.command == "time":
            time_all(MODELS[name], folder, arguments)
        else:
            show(MODELS[name], folder)


def task_of(network: Network) -> Task:
    """Its data."""
    return next(task for task in TASKS if task.model == network.asset)


# --- prepare --------------------------------------------------------------------------------------


def prepare(network: Network, folder: Path, arguments: argparse.Namespace) -> None:
    """Libraries and figures of all recipes that are not there yet."""
    from tvm_compress import load_model
    from tvm_compress.targets import get_target

    task, model = task_of(network), model_file(network, arguments.work)
    loaded = load_model(model)
    target = dataclasses.replace(get_target(arguments.target), threads=arguments.threads)
    samples = calibration_inputs(task, model, arguments.samples)
    tests = {data: list(pairs(test, arguments.evaluate)) for data, test in task.tests.items()}
    for name, steps in RECIPES.items():
        if arguments.only not in name:
            continue
        missing = [kind for kind in KINDS if not (folder / f"{name} {kind}.json").exists()]
        if not missing:
            continue
        started = time.perf_counter()
        module = compressed(loaded.module, steps, arguments, samples)
        seconds = time.perf_counter() - started
        for kind in missing:
            integer = int8_steps() if kind == "int8" else []
            finished = compressed(module, integer, arguments, samples)
            figures = built(finished, loaded, target, folder / f"{name} {kind}.so", tests)
            figures |= {"seconds": seconds, "calibration": len(samples)}
            (folder / f"{name} {kind}.json").write_text(json.dumps(figures, indent=1))
            say(f"{network.title}: {name} {kind} {json.dumps(figures)}")


def int8_steps() -> list[dict[str, Any]]:
    """The steps of the recipe `int8`."""
    import yaml

    from tvm_compress.recipe import shipped_recipes

    steps: list[dict[str, Any]] = yaml.safe_load(shipped_recipes()["int8"].read_text())["steps"]
    return steps


def compressed(
    module: Any,
    steps: list[dict[str, Any]],
    arguments: argparse.Namespace,
    samples: list[dict[str, np.ndarray]],
) -> Any:
    """The graph form after these steps."""
    import yaml

    from tvm_compress.flow import compress_job, load_job
    from tvm_compress.progress import Progress
    from tvm_compress.recipe import parse_recipe

    if not steps:
        return module
    recipe = parse_recipe(yaml.safe_dump({"version": 1, "steps": steps}))
    threads = arguments.threads  # layers are compared with these as well
    job = load_job(module, recipe, arguments.target, samples, threads=threads)
    return compress_job(job, Progress())


def built(
    module: Any, loaded: Any, target: Any, library: Path, tests: dict[str, list[Any]]
) -> dict[str, Any]:
    """Build, measure bytes, score."""
    from tvm_compress.build import build
    from tvm_compress.contents import describe_library
    from tvm_compress.runtime import Session

    program = build(module, target)
    program.export(library)
    info = describe_library(program, library)
    session = Session(library, loaded.inputs, loaded.outputs)
    scores = {}
    for data, samples in tests.items():
        feeds = ({loaded.inputs[0].name: x} for x, _ in samples)
        outputs = (next(iter(session.run(feed).values())) for feed in feeds)
        right = [int(y.argmax()) == label for y, (_, label) in zip(outputs, samples, strict=True)]
        scores[data] = "".join("01"[answer] for answer in right)
    return {
        "bytes": dataclasses.asdict(info.bytes),
        "sparse": dict(program.sparse_kernels),
        "float": list(program.left_float),
        "right": scores,
    }


def pairs(
    test: Callable[[], tuple[Iterator[np.ndarray], np.ndarray]], count: int | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Inputs and labels."""
    inputs, labels = test()
    for x, label in list(zip(inputs, labels, strict=True))[:count]:
        yield np.ascontiguousarray(x, np.float32), int(label)


# --- time -----------------------------------------------------------------------------------------


def time_all(network: Network, folder: Path, arguments: argparse.Namespace) -> None:
    """Everything that is prepared and both forms of ONNX Runtime, in turns."""
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)
    os.environ["TVM_NUM_THREADS"] = str(len(cores))

    from tvm_compress import load_model, peers
    from tvm_compress.benchmarking import set_threads
    from tvm_compress.runtime import Session

    model = model_file(network, arguments.work)
    samples = calibration_inputs(task_of(network), model, 64)
    loaded = load_model(model)
    feed = {loaded.inputs[0].name: np.ascontiguousarray(next(iter(samples[0].values())))}
    set_threads(len(cores))
    programs: dict[tuple[str, str], Callable[[], object]] = {}
    options = SimpleNamespace(against="onnxruntime", work=arguments.work)
    for _, kind, path in peer_files(network, model, samples, options, list(KINDS)):  # type: ignore[arg-type]
        programs["ONNX Runtime", kind] = peers.load_onnxruntime(path, len(cores)).bind(feed)
    for file in sorted(folder.glob("*.json")):
        if file.name != "times.json":
            name, _, kind = file.stem.rpartition(" ")
            session = Session(file.with_suffix(".so"), loaded.inputs, loaded.outputs)
            programs[name, kind] = session.bind(feed)
    times = take_turns(programs, arguments.turns)
    medians = {f"{n} {kind}": 1e3 * float(np.median(t)) for (n, kind), t in times.items()}
    (folder / "times.json").write_text(json.dumps(medians, indent=1))
    say(f"{network.title}: timed {len(medians)} programs on {len(cores)} cores")


# --- show -----------------------------------------------------------------------------------------


def show(network: Network, folder: Path) -> None:
    """Markdown: one line a recipe; bytes are weights, scales, biases, tables and indices.

    Test inputs that have calibrated do not count.
    """
    shared = task_of(network).shared
    medians = json.loads((folder / "times.json").read_text())
    ort = {"float32": medians["ONNX Runtime float32"]}
    ort["int8"] = min(v for name, v in medians.items() if name.startswith("ONNX Runtime int8"))
    print(f"\n### {network.title}\n\nONNX Runtime: float32 {ort['float32']:.3f} ms, int8", end=" ")
    print(f"{ort['int8']:.3f} ms (the faster of its two forms).\n")
    print("| recipe | top-1 | KiB | ms | ORT float32 | ORT int8 | int8: top-1 | KiB | ms |", end="")
    print(" ORT float32 | ORT int8 |\n" + "|---" * 11 + "|")
    for name in RECIPES:
        cells = [name]
        for kind in KINDS:
            file = folder / f"{name} {kind}.json"
            if not file.exists():
                cells += [""] * 5
                continue
            figures, ms = json.loads(file.read_text()), medians.get(f"{name} {kind}", math.nan)
            right = next(iter(figures["right"].values()))
            if shared:
                right = "".join(answer for k, answer in enumerate(right) if k % shared)
            parts = ("weights", "scales", "biases", "tables", "indices")
            size = sum(figures["bytes"][part] for part in parts) / 1024
            cells += [f"{100 * right.count('1') / len(right):.1f}", f"{size:.0f}", f"{ms:.3f}"]
            cells += [f"{ort['float32'] / ms:.2f}x", f"{ort['int8'] / ms:.2f}x"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
