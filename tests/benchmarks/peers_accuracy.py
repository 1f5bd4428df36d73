"""Accuracy of int8 beside ONNX Runtime, OpenVINO and LiteRT: what `x86_vs_peers.py --accuracy`
does.

Everybody gets the same calibration inputs (those that `compress` takes of the task's) and is scored
on the same labelled samples. LiteRT runs the `.tflite` of the network as its authors quantised it,
where the assets have one; its weights may differ from those of the ONNX file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from asset_data import TASKS, Task
from x86_vs_peers import Network, compressed_modules, model_file, our_session, peer_files, say

Rows = dict[str, dict[str, Any]]  # side => its accuracy
PEERS = ("onnxruntime", "openvino")  # the yardstick: both quantise what we do


def run(networks: dict[str, Network], arguments: argparse.Namespace) -> None:
    """Score all networks with data; print the table."""
    found: dict[str, dict[str, Rows]] = {}
    if arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    for name, network in networks.items():
        if network.asset is None:
            continue
        if name not in found:
            found[name] = score(network, arguments)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))
        for data, rows in found[name].items():
            for side, row in rows.items():
                say(f"{name:14s} {data:18s} {side:22s} {100 * row['accuracy']:6.2f}")
    print_table({networks[name].title: sets for name, sets in found.items() if name in networks})


def score(network: Network, arguments: argparse.Namespace) -> dict[str, Rows]:
    """Accuracy of every side on each data set of one network."""
    from dataclasses import asdict

    from tvm_compress import load_data, peers
    from tvm_compress.accuracy import beside, right_answers, scores_output
    from tvm_compress.progress import TerminalProgress
    from tvm_compress.recipe import load_recipe

    (task,) = (task for task in TASKS if task.model == network.asset)
    model = model_file(network, arguments.work)
    samples = calibration_inputs(task, model, load_recipe(arguments.recipe).calibration.samples)
    loaded, module = compressed_modules(model, samples, arguments, ["int8"])["int8"]
    session = our_session(loaded, module, arguments, 1)
    spec = session.outputs[0]
    sides: dict[str, Callable[[Any], np.ndarray]] = {
        "float32": _first(peers.load_onnxruntime(model, 1), network),
        "compressed": lambda feed: session.run(feed)[spec.name],
    }
    for runtime, kind, path in peer_files(network, model, samples, arguments, ["int8"]):
        sides[f"{runtime} {kind}"] = _first(peers.LOADERS[runtime](path, 1), network)
    found = {}
    for data, test in task.tests.items():
        dataset = load_data(_pairs(test, loaded.inputs[0].name), loaded)
        right = right_answers(
            sides, dataset, scores_output(loaded.outputs, dataset), TerminalProgress()
        )
        found[data] = {side: asdict(row) for side, row in beside(right).items()}
    return found


def calibration_inputs(task: Task, model: Path, count: int) -> list[dict[str, np.ndarray]]:
    """At most `count` of the task's calibration inputs, as `compress` takes them."""
    from tvm_compress import load_data, load_model

    loaded = load_model(model)
    name = loaded.inputs[0].name
    return list(load_data([{name: x} for x in task.calibration()], loaded).take(count))


def _pairs(
    test: Callable[[], tuple[Iterator[np.ndarray], np.ndarray]], name: str
) -> Callable[[], Iterator[tuple[dict[str, np.ndarray], int]]]:
    """Samples and labels as `load_data` takes them."""

    def pairs() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        inputs, labels = test()
        for x, label in zip(inputs, labels, strict=True):
            yield {name: np.ascontiguousarray(x, np.float32)}, int(label)

    return pairs


def _first(peer: Any, network: Network) -> Callable[[Any], np.ndarray]:
    """The first output of another runtime."""
    from x86_vs_peers import as_tflite

    if peer.name != "litert":
        return lambda feed: peer.run(feed)[0]
    return lambda feed: peer.run(as_tflite(feed, peer.inputs, network.channels_last))[0]


def print_table(found: dict[str, dict[str, Rows]]) -> None:
    """Markdown, in percent; differences are paired, with their 95 % intervals, in points."""
    sides = {
        "float32": "float32",
        "onnxruntime int8 u8s8": "ORT u8s8",
        "onnxruntime int8 s8s8": "ORT s8s8",
        "openvino int8": "OpenVINO",
        "litert int8": "LiteRT",
        "compressed": "ours",
    }
    head = ["model, data", "n", *sides.values(), "ours minus better ORT", "ours minus OpenVINO"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for title, sets in found.items():
        for data, rows in sets.items():
            cells = [f"{title}, {data}", f"{rows['compressed']['samples']:,}"]
            cells += [
                f"{100 * rows[side]['accuracy']:.2f}" if side in rows else "" for side in sides
            ]
            for peer in PEERS:
                forms = [row for side, row in rows.items() if side.startswith(peer)]
                cells.append(lead(max(forms, key=accuracy_of, default=None)))
            print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def accuracy_of(row: dict[str, Any]) -> float:
    return float(row["accuracy"])


def lead(row: dict[str, Any] | None) -> str:
    """How far ours is ahead of a peer."""
    if row is None:
        return ""
    low, high = -100 * row["ahead_high"], -100 * row["ahead_low"]
    return f"{-100 * row['ahead']:+.2f} ({low:+.2f} .. {high:+.2f})"
