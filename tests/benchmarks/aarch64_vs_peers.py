"""Instructions of int8 networks on AArch64 beside XNNPACK and ONNX Runtime.

    python tests/benchmarks/aarch64_vs_peers.py [--networks image,keyword] [--targets cortex-a72]
        [--json out.json]

Ours are the `.tflite` models, compressed through the Python API for a CPU with NEON alone, one with
`sdot` and one with `smmla`, and counted under qemu-aarch64; XNNPACK runs the same files. ONNX
Runtime runs the same networks as its own tools quantise them. The peers' counts stand in
data/aarch64_peers.json; README.md describes how they were made. Counts are no times: they say
nothing of caches or of how many instructions a core issues at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import ASSETS

from tvm_compress import compress
from tvm_compress.artefact import Artefact

PEERS = Path(__file__).parent / "data" / "aarch64_peers.json"
NETWORKS = {  # as the data file names them => the assets' file
    "image": "pretrainedResnet_quant",
    "keyword": "kws_ref_model",
    "person": "vww_96_int8",
    "anomaly": "ad01_int8",
    "mobilenet_v1_025": "mobilenet_v1_0.25_224_quant",
}
TARGETS = {"cortex-a72": "neon", "neoverse-n1": "dotprod", "armv8.2-i8mm": "i8mm"}


def instructions_of(artefact: Artefact) -> int:
    """Of one inference of random codes, under the emulator."""
    project = artefact.project()
    port = project.input_ports[0].spec
    info = np.iinfo(port.dtype)
    random = np.random.default_rng(0)
    codes = random.integers(info.min, info.max + 1, port.shape, dtype=np.dtype(port.dtype))
    result = project.run_codes([{port.name: codes}], count=True)
    assert result.instructions is not None
    return result.instructions[0]


def peer_counts() -> dict[tuple[str, str], dict[str, int]]:
    """The least of every peer, by network and instruction set."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in json.loads(PEERS.read_text())["measurements"]:
        found = counts.setdefault((row["network"], row["instruction_set"]), {})
        found[row["peer"]] = min(row["instructions"], found.get(row["peer"], row["instructions"]))
    return counts


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = peer_counts()
    names = list(dict.fromkeys(name for found in counts.values() for name in found))
    print("| network | target | ours | " + " | ".join(f"{name}, ours/it" for name in names) + " |")
    print("|---" * (3 + len(names)) + "|")
    rows = []
    for network in options.networks.split(","):
        for target in options.targets.split(","):
            path = ASSETS / "tflite" / f"{NETWORKS[network]}.tflite"
            with tempfile.TemporaryDirectory() as folder:
                artefact = compress(path, recipe="int8", target=target, out=Path(folder) / "out")
                ours = instructions_of(artefact)
            peers = counts.get((network, TARGETS[target]), {})
            cells = [
                f"{peers[name]:,}, {ours / peers[name]:.2f}" if name in peers else "-"
                for name in names
            ]
            print(f"| {network} | {target} | {ours:,} | " + " | ".join(cells) + " |", flush=True)
            rows.append({"network": network, "target": target, "ours": ours, **peers})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
