"""Latency of whole networks beside ONNX Runtime, OpenVINO and LiteRT: the README's table.

    python tests/benchmarks/x86_vs_peers.py [--models resnet_50,bert] [--threads 1,2] [--runs 15]
    python tests/benchmarks/x86_vs_peers.py --accuracy

The same model, threads and input for everybody, in one process that is pinned to as many cores as
there are threads. The contestants take turns; in its turn each first runs once untimed (its weights
are warm then, and its threads awake), then a few times. Latencies are the least and the median of
all timed runs. Before anything is timed the outputs are compared with ONNX Runtime's in float32.

Peers run at their best: float32 as delivered; int8 as ONNX Runtime's static quantiser (per channel,
u8 or s8 activations, whichever is faster), NNCF for OpenVINO, and the int8 `.tflite` of the same
network where the assets have one, on LiteRT with XNNPACK. Ours is `float32` and the recipe `int8`.

`--accuracy` scores the int8 forms of the networks with data instead (`peers_accuracy.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION_SAMPLES = 64  # where only speed is measured
RANDOM_SAMPLES = 16  # for networks with random weights: there is nothing to learn from more
WORK = Path.home() / ".cache" / "tvm-compress" / "peers"
LEAST_SQNR_DB = {"float32": 60.0, "int8": 3.0}


@dataclass(frozen=True)
class Network:
    """A benchmark model: `build` makes it with random weights, or it is an asset with data.

    `channels_last`: the ONNX file has the input's axes in the order of the `.tflite`.
    """

    title: str
    asset: str | None = None
    build: str | None = None
    transformer: bool = False
    tflite: str | None = None
    channels_last: bool = False
    is_timed: bool = True


NETWORKS: dict[str, Network] = {
    "resnet_50": Network("ResNet-50-class 224x224", build="resnet_50"),
    "resnet_50_sparse": Network(
        "ResNet-50-class, 80 % zeros 16x1", build="resnet_50_sparse", is_timed=False
    ),
    "mobilenet_v2": Network("MobileNetV2-class 224x224", build="mobilenet_v2"),
    "bert": Network("BERT-class 6x384, 128 tokens", build="bert_encoder", transformer=True),
    "resnet20": Network("ResNet-20", "cifar10_resnet20"),
    "resnet56": Network("ResNet-56", "cifar10_resnet56"),
    "squeezenet": Network("SqueezeNet 1.1", "imagenet_squeezenet1_1"),
    "efficientnet": Network("EfficientNet-Lite0", "imagenet_efficientnet_lite0"),
    "dscnn": Network("MLPerf DS-CNN", "mlperf_kws_dscnn", tflite="kws_ref_model"),
    "resnet8": Network("MLPerf ResNet-8", "mlperf_ic_resnet8", tflite="pretrainedResnet_quant"),
    "dscnn_s": Network("DS-CNN-S (Arm)", "arm_kws_DS_CNN_S", is_timed=False),
    "dnn_s": Network("DNN-S (Arm)", "arm_kws_DNN_S", is_timed=False),
    "mobilenet_v1": Network(
        "MobileNetV1 0.25", "imagenet_mobilenetv1_025_224", tflite="mobilenet_v1_0.25_224_quant",
        channels_last=True, is_timed=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One contestant: which side of the table, least and median milliseconds, error."""

    contestant: str
    kind: str  # float32 or int8
    is_ours: bool
    min_ms: float
    median_ms: float
    sqnr_db: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models",
        help=f"comma-separated, of {', '.join(NETWORKS)}; default: the README's",
    )
    parser.add_argument(
        "--accuracy", action="store_true", help="score int8 on labelled data instead of timing"
    )
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--target", default="host")
    parser.add_argument("--runs", type=int, default=15, help="turns of each contestant")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument(
        "--database", type=Path,
        help="folder of tuning records for our kernels, over those that ship; without it: untuned",
    )  # fmt: skip
    parser.add_argument("--against", default="onnxruntime,openvino,litert")
    parser.add_argument("--kinds", default="float32,int8")
    parser.add_argument(
        "--work", type=Path, default=WORK,
        help="folder that keeps the peers' quantised models",
    )  # fmt: skip
    parser.add_argument(
        "--realtime", action="store_true",
        help="run the contestants before all other work of the machine (root; for busy machines)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the timings there as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one network, timings to stdout
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps([asdict(timing) for timing in measure(arguments)]))
        return
    wanted = (
        [name for name, network in NETWORKS.items() if network.is_timed or arguments.accuracy]
        if arguments.models is None
        else arguments.models.split(",")
    )
    for name in wanted:
        if name not in NETWORKS:
            parser.error(f"unknown model {name!r}; there are {', '.join(NETWORKS)}")
    if arguments.accuracy:
        import peers_accuracy

        peers_accuracy.run({name: NETWORKS[name] for name in wanted}, arguments)
        return
    counts = [int(part) for part in arguments.threads.split(",")]
    timings: dict[str, dict[int, list[Timing]]] = {}
    for name in wanted:
        found = {threads: measure_apart(name, threads) for threads in counts}
        if all(found.values()):
            timings[name] = found
            if arguments.json:
                plain = {
                    model: {n: [asdict(t) for t in found] for n, found in by_threads.items()}
                    for model, by_threads in timings.items()
                }
                arguments.json.write_text(json.dumps(plain, indent=1))
    for threads in counts:
        print_table(timings, threads)


def measure_apart(name: str, threads: int) -> list[Timing]:
    """Measure in a process of its own: thread pools keep the cores that they were started on."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--threads", str(threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        print(f"{name}: not measured (status {result.returncode}), see above", flush=True)
        return []
    found = [Timing(**timing) for timing in json.loads(result.stdout.splitlines()[-1])]
    print_lines(name, threads, found)
    return found


# --- one network ----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> list[Timing]:
    """Timings of every contestant on `arguments.threads` threads."""
    threads = int(arguments.threads)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise SystemExit(f"{threads} threads need as many cores; this process may use {cores}")
    os.sched_setaffinity(0, cores[:threads])
    # Read when TVM's pool starts: it would count two hardware threads as one core.
    os.environ["TVM_NUM_THREADS"] = str(threads)
    network = NETWORKS[arguments.one]
    model = model_file(network, arguments.work)
    samples = input_samples(network, model)
    kinds = arguments.kinds.split(",")
    modules = compressed_modules(model, samples, arguments, kinds)
    files = peer_files(network, model, samples, arguments, kinds)
    sessions = {
        kind: our_session(loaded, module, arguments, threads)
        for kind, (loaded, module) in modules.items()
    }
    if arguments.realtime:  # threads that are started later inherit it
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
    return race(network, model, files, sessions, samples[0], arguments, threads)


def model_file(network: Network, work: Path) -> Path:
    """The ONNX file; networks with random weights are written first."""
    if network.asset is not None:
        from asset_data import ASSETS

        return ASSETS / "onnx" / f"{network.asset}.onnx"
    import networks
    import onnx

    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{network.build}.onnx"
    onnx.save(getattr(networks, str(network.build))(), str(path))
    return path


def input_samples(network: Network, model: Path) -> list[dict[str, np.ndarray]]:
    """Calibration inputs; the first is what is timed."""
    import onnx

    (value,) = onnx.load(str(model)).graph.input
    if network.asset is not None:
        from asset_data import TASKS

        (task,) = (task for task in TASKS if task.model == network.asset)
        inputs = [np.ascontiguousarray(x, np.float32) for x in task.calibration()]
        step = max(1, len(inputs) // CALIBRATION_SAMPLES)
        return [{value.name: x} for x in inputs[::step][:CALIBRATION_SAMPLES]]
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    random = np.random.default_rng(1)
    return [
        {value.name: random.normal(size=shape).astype(np.float32)} for _ in range(RANDOM_SAMPLES)
    ]


def compressed_modules(
    model: Path,
    samples: list[dict[str, np.ndarray]],
    arguments: argparse.Namespace,
    kinds: list[str],
) -> dict[str, Any]:
    """Our graph forms, by kind."""
    from tvm_compress import load_model
    from tvm_compress.flow import compress_module

    loaded = load_model(model)
    modules = {}
    for kind in kinds:
        started = time.perf_counter()
        if kind == "float32":
            modules[kind] = (loaded, loaded.module)
        else:
            compressed, _ = compress_module(
                loaded.module, arguments.recipe, arguments.target, samples
            )
            modules[kind] = (loaded, compressed)
        say(f"{model.stem}: {kind} compressed in {time.perf_counter() - started:.1f} s")
    return modules


def peer_files(
    network: Network,
    model: Path,
    samples: list[dict[str, np.ndarray]],
    arguments: argparse.Namespace,
    kinds: list[str],
) -> list[tuple[str, str, Path]]:
    """(runtime, kind and form, file) of every peer; quantised models stay in the work folder."""
    from tvm_compress import peers
    from tvm_compress.targets import get_target

    names = arguments.against.split(",")
    # Peers look at the machine, whatever ours is compiled for.
    has_vnni = bool(get_target("host").capabilities & {"avx512vnni", "avxvnni"})
    key = hashlib.sha256(model.read_bytes() + Path(peers.__file__).read_bytes())
    key.update(f"{'vnni' if has_vnni else ''} {len(samples)}".encode())
    folder = arguments.work / f"{model.stem}-{key.hexdigest()[:12]}"
    files = [(n, "float32", model) for n in names if n != "litert" and "float32" in kinds]
    if "int8" not in kinds:
        return files
    if "onnxruntime" in names:
        forms = {form: folder / f"{form}.onnx" for form in ("u8s8", "s8s8")}
        if not all(path.exists() for path in forms.values()):
            forms = peers.quantize_for_onnxruntime(
                model, samples, folder, has_vnni=has_vnni, transformer=network.transformer
            )
        files += [("onnxruntime", f"int8 {form}", path) for form, path in forms.items()]
    if "openvino" in names:
        path = folder / "nncf.xml"
        if not path.exists():
            peers.quantize_for_openvino(model, samples, path, transformer=network.transformer)
        files.append(("openvino", "int8", path))
    if "litert" in names and network.tflite is not None:
        files.append(("litert", "int8", model.parents[1] / "tflite" / f"{network.tflite}.tflite"))
    return files


def race(
    network: Network,
    model: Path,
    files: list[tuple[str, str, Path]],
    sessions: dict[str, Any],
    feed: dict[str, np.ndarray],
    arguments: argparse.Namespace,
    threads: int,
) -> list[Timing]:
    """Load everybody, compare outputs, time in turns."""
    from tvm_compress import peers

    reference = peers.load_onnxruntime(model, threads).run(feed)
    programs: dict[tuple[str, str], Callable[[], object]] = {}
    errors: dict[tuple[str, str], float] = {}
    for runtime, kind, path in files:
        peer = peers.LOADERS[runtime](path, threads)
        is_tflite = runtime == "litert"
        given = as_tflite(feed, peer.inputs, network.channels_last) if is_tflite else feed
        expected = softmax(reference) if is_tflite else reference
        errors[runtime, kind] = sqnr_db(expected, peer.run(given))
        programs[runtime, kind] = peer.bind(given)
    for kind, session in sessions.items():
        errors["ours", kind] = sqnr_db(reference, list(session.run(feed).values()))
        programs["ours", kind] = session.bind(feed)
    for (runtime, kind), error in errors.items():
        if error < LEAST_SQNR_DB[kind.partition(" ")[0]]:
            raise SystemExit(f"{network.title}: {runtime} {kind} is off: SQNR {error:.1f} dB")
    times = take_turns(programs, arguments.runs)
    return [
        Timing(
            contestant=" ".join([runtime, *kind.split()[1:]]),
            kind=kind.partition(" ")[0],
            is_ours=runtime == "ours",
            min_ms=min(times[runtime, kind]) * 1e3,
            median_ms=float(np.median(times[runtime, kind])) * 1e3,
            sqnr_db=min(errors[runtime, kind], 999.0),
        )
        for runtime, kind in programs
    ]


def our_session(loaded: Any, module: Any, arguments: argparse.Namespace, threads: int) -> Any:
    """Compiled for exactly this number of threads."""
    from tvm_compress.benchmarking import set_threads
    from tvm_compress.build import build
    from tvm_compress.runtime import Session
    from tvm_compress.targets import get_target

    started = time.perf_counter()
    target = dataclasses.replace(get_target(arguments.target), threads=threads)
    target.require_runs_here()
    built = build(module, target, tuned_choices(arguments.database, target))
    say(f"{loaded.name}: built for {threads} threads in {time.perf_counter() - started:.1f} s")
    set_threads(threads)
    return Session(built.executable, loaded.inputs, loaded.outputs)


def tuned_choices(database: Path | None, target: Any) -> Any:
    """What `build` looks tuned choices up in."""
    if database is None:
        return None
    from tvm_compress.tuning.database import Database, TunedChoices
    from tvm_compress.tuning.tune import this_cpu

    return TunedChoices(Database(database), target, this_cpu())


def as_tflite(
    feed: dict[str, np.ndarray], names: tuple[str, ...], is_channels_last: bool
) -> dict[str, np.ndarray]:
    """The one input under the file's own name, channels last."""
    (array,) = feed.values()
    return {names[0]: array if is_channels_last else array.transpose(0, 2, 3, 1).copy()}


def softmax(outputs: list[np.ndarray]) -> list[np.ndarray]:
    """The assets' `.tflite` files end in a softmax, which their ONNX files may leave out."""
    if all(np.allclose(x.sum(-1), 1, atol=1e-3) and x.min() >= 0 for x in outputs):
        return outputs
    exponentials = [np.exp(x - x.max(-1, keepdims=True)) for x in outputs]
    return [x / x.sum(-1, keepdims=True) for x in exponentials]


def sqnr_db(reference: list[np.ndarray], outputs: list[np.ndarray]) -> float:
    """10 log10(sum x^2 / sum (x - y)^2) over all outputs."""
    signal = sum(float((x.astype(np.float64) ** 2).sum()) for x in reference)
    noise = sum(
        float(((x.astype(np.float64) - y.reshape(x.shape)) ** 2).sum())
        for x, y in zip(reference, outputs, strict=True)
    )
    return 10 * math.log10(signal / noise) if noise else math.inf


def take_turns(
    programs: dict[tuple[str, str], Callable[[], object]], turns: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every timed run."""
    from tvm_compress.benchmarking import runs_a_turn, take_turn

    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    runs = {key: runs_a_turn(program) for key, program in programs.items()}
    for _ in range(turns):
        for key, program in programs.items():
            times[key] += take_turn(program, runs[key])
    return times


# --- tables ---------------------------------------------------------------------------------------


def print_lines(name: str, threads: int, timings: list[Timing]) -> None:
    """Every contestant of one network."""
    for t in timings:
        print(
            f"{name:14s} {threads} threads {t.kind:8s} {t.contestant:18s} "
            f"min {t.min_ms:9.3f} ms  median {t.median_ms:9.3f} ms  SQNR {t.sqnr_db:6.1f} dB",
            flush=True,
        )


def print_table(timings: dict[str, dict[int, list[Timing]]], threads: int) -> None:
    """Markdown: least milliseconds; ours to the faster of ORT and OpenVINO, by minimum (median)."""
    print(f"\n{threads} thread{'s' * (threads > 1)}:\n")
    columns = ["onnxruntime", "openvino", "litert"]
    titles = {"onnxruntime": "ORT", "openvino": "OpenVINO", "litert": "LiteRT"}
    head = ["model"]
    for kind in ("float32", "int8"):
        head += [f"{titles[c]} {kind}" for c in columns if (c, kind) != ("litert", "float32")]
        head += [f"ours {kind}", "ours / faster of ORT, OpenVINO"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, by_threads in timings.items():
        if threads not in by_threads:
            continue
        cells = [NETWORKS[name].title]
        for kind in ("float32", "int8"):
            of_kind = [t for t in by_threads[threads] if t.kind == kind]
            for column in columns:
                if (column, kind) == ("litert", "float32"):
                    continue
                forms = [t for t in of_kind if t.contestant.startswith(column)]
                cells.append(f"{min(t.min_ms for t in forms):.3f}" if forms else "")
            ours = [t for t in of_kind if t.is_ours]
            # LiteRT has only the smallest networks and no float32: shown, but not the yardstick.
            others = [t for t in of_kind if not t.is_ours and t.contestant != "litert"]
            if not ours or not others:
                cells += [f"{t.min_ms:.3f}" for t in ours] or [""]
                cells.append("")
                continue
            least = ours[0].min_ms / min(t.min_ms for t in others)
            median = ours[0].median_ms / min(t.median_ms for t in others)
            ratios.setdefault((kind, "min"), []).append(least)
            ratios.setdefault((kind, "median"), []).append(median)
            cells += [f"{ours[0].min_ms:.3f}", f"{least:.2f} ({median:.2f})"]
        print("| " + " | ".join(cells) + " |")
    for kind in ("float32", "int8"):
        if (kind, "min") in ratios:
            least, median = (
                math.exp(float(np.mean(np.log(ratios[kind, which])))) for which in ("min", "median")
            )
            print(f"\nGeometric mean, {kind}: {least:.2f} of the faster peer's time ({median:.2f})")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
