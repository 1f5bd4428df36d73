"""MLPerf Tiny's four networks on emulated Cortex-M beside TFLite Micro with CMSIS-NN.

    python tests/benchmarks/mlperf_tiny.py [--networks image,keyword] [--sources tflite,onnx]
        [--cores cortex-m4,cortex-m55] [--json out.json]

`tflite`: the int8 models as they are; `onnx`: the float models by recipe int8. Ours are compressed
through the Python API, linked with the start-up code of the emulated board and run under QEMU. The
peer's figures stand in data/tflm_cmsis_nn.json, measured in the same way, with the same start-up
code, compiler, emulator and counter, on the same input codes; README.md describes how.

Every row is held against the project's bars. Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import ASSETS

from tests.mlperf_networks import CORES, NETWORKS, SOURCES, artefact_for
from tvm_compress.artefact import Artefact
from tvm_compress.runners import footprint
from tvm_compress.runners.project import tensor_bytes

PEER = Path(__file__).parent / "data" / "tflm_cmsis_nn.json"
INPUTS = 2  # as many as the peer was counted on
FLASH_BAR = 0.55
INSTRUCTION_BARS = {  # most of the peer's instructions
    "cortex-m4": {"image": 0.60, "keyword": 0.60, "person": 0.65, "anomaly": 0.65},
    "cortex-m55": dict.fromkeys(NETWORKS, 0.80),
}


@dataclass(frozen=True)
class Cost:
    """Of one inference. `port_bytes`: inputs and outputs where they are not in the arena."""

    instructions: int
    arena_bytes: int
    port_bytes: int
    stack_bytes: int
    flash_bytes: int


def input_codes(shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
    """What both sides are counted on."""
    info = np.iinfo(dtype)
    random = np.random.default_rng(0)
    size = (INPUTS, *shape[1:])
    codes = random.integers(info.min, info.max + 1, size, dtype=np.dtype(dtype))
    return [code.reshape(shape) for code in codes]


def cost_of(artefact: Artefact) -> Cost:
    """Of the linked program, under the emulator."""
    project = artefact.project()
    port = project.input_ports[0].spec
    codes = [{port.name: code} for code in input_codes(port.shape, port.dtype)]
    result = project.run_codes(codes, count=True)
    assert result.instructions is not None and result.stack_bytes is not None
    program = project.program
    specs = (*program.project.inputs, *program.project.outputs)
    return Cost(
        instructions=round(float(np.mean(result.instructions))),
        arena_bytes=program.project.arena_bytes,
        port_bytes=sum(tensor_bytes(spec) for spec in specs),
        stack_bytes=result.stack_bytes,
        flash_bytes=footprint(program.elf, program.link_map).flash_bytes,
    )


@dataclass(frozen=True)
class PeerCost:
    """The peer at its best: of the build with the fewest instructions, and the least flash of any
    build. Its arena holds inputs and outputs."""

    build: str
    instructions: int
    arena_bytes: int
    stack_bytes: int
    flash_bytes: int
    usual_flash_bytes: int
    """With the operators' usual registrations, which bring the kernels of all types."""
    least_flash_bytes: int


def peer_costs() -> dict[tuple[str, str], PeerCost]:
    """By core and network."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in json.loads(PEER.read_text())["measurements"]:
        found.setdefault((row["core"], row["network"]), []).append(row)
    costs = {}
    for key, rows in found.items():
        best = min(rows, key=lambda row: sum(row["instructions"]))
        costs[key] = PeerCost(
            build=best["optimisation"],
            instructions=round(float(np.mean(best["instructions"]))),
            arena_bytes=min(row["arena_bytes"] for row in rows),
            stack_bytes=best["stack_bytes"],
            flash_bytes=best["flash_bytes"],
            usual_flash_bytes=best["flash_all_types_bytes"],
            least_flash_bytes=min(row["flash_bytes"] for row in rows),
        )
    return costs


@dataclass(frozen=True)
class Verdict:
    """One figure beside the peer's; `most` None: the project has no bar for it."""

    ours: int
    theirs: int
    most: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def is_missed(self) -> bool:
        return self.most is not None and self.ratio > self.most

    def __str__(self) -> str:
        text = f"{self.ours:,} / {self.theirs:,} = {self.ratio:.3f}"
        if self.most is None:
            return text
        return f"{text} ({'**missed**' if self.is_missed else 'met'}: {self.most:.2f})"


def verdicts(core: str, network: str, cost: Cost, peer: PeerCost) -> dict[str, Verdict]:
    """In the order of the table's columns."""
    bar = INSTRUCTION_BARS.get(core, {}).get(network)
    with_ports = cost.arena_bytes + cost.port_bytes
    return {
        "instructions": Verdict(cost.instructions, peer.instructions, bar),
        "arena B": Verdict(cost.arena_bytes, peer.arena_bytes, 1.0),
        "arena with input, output B": Verdict(with_ports, peer.arena_bytes, None),
        "stack B": Verdict(cost.stack_bytes, peer.stack_bytes, None),
        "flash B": Verdict(cost.flash_bytes, peer.flash_bytes, FLASH_BAR),
        "flash, its usual operators": Verdict(cost.flash_bytes, peer.usual_flash_bytes, None),
        "flash, its smallest build": Verdict(cost.flash_bytes, peer.least_flash_bytes, None),
    }


def print_row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    """The table; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--cores", default=",".join(CORES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = peer_costs()
    for core in options.cores.split(","):
        for name in options.networks.split(","):
            if (core, name) not in peers:
                parser.error(f"{PEER.name} has no figures of {name} on {core}; choose others")
    rows, is_header_printed, missed = [], False, False
    for core in options.cores.split(","):
        for name in options.networks.split(","):
            for source in options.sources.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    cost = cost_of(artefact_for(NETWORKS[name], source, core, ASSETS, out))
                peer = peers[core, name]
                found = verdicts(core, name, cost, peer)
                if not is_header_printed:
                    print_row(["core", "network", "source", *found])
                    print_row(["---"] * (3 + len(found)))
                    is_header_printed = True
                print_row([core, name, source, *found.values()])
                missed = missed or any(verdict.is_missed for verdict in found.values())
                rows.append(
                    {"core": core, "network": name, "source": source, "ours": asdict(cost),
                     "peer": asdict(peer)}
                )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
