"""MLPerf Tiny's float networks sparsified and in int8 on emulated cores, beside dense int8.

    python tests/benchmarks/sparse_cores.py [--networks image,keyword,anomaly]
        [--cores cortex-m4,cortex-m55] [--sparsities 0.5,0.7,0.8] [--blocks 16]
        [--inputs 500] [--insist]

Recipe: `sparsify` of so many blocks of neighbouring outputs, then int8. Flash is everything that is
loaded of the linked program, instructions are of one inference under QEMU; the accuracy is that of
the reference graph, which the board equals bit for bit: some inputs are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import ASSETS
from mlperf_tiny import cost_of

from tests.mlperf_networks import NETWORKS, Network, artefact_for, as_onnx, compare, labels, reals
from tvm_compress.artefact import Artefact
from tvm_compress.verification import reference_session

COMPARED = 4
"""Inputs of which all bytes are compared."""


def recipe(sparsity: float | None, block: int, insist: bool, folder: Path) -> Path:
    """Int8, with a step `sparsify` in front unless `sparsity` is None."""
    pattern = f"{{block: {{outputs: {block}, inputs: 1}}}}" if block > 1 else "unstructured"
    first = (
        ""
        if sparsity is None
        else f"  - sparsify: {{layers: all, sparsity: {sparsity}, pattern: {pattern}, "
        f"insist: {str(insist).lower()}}}\n"
    )
    path = folder / "recipe.yaml"
    path.write_text(
        f"version: 1\nsteps:\n{first}"
        "  - equalize_inputs: {layers: all}\n"
        "  - quantize: {layers: all, weights: int8, activations: int8, calibrate: sqnr}\n"
        "  - correct_bias: {layers: all}\n"
    )
    return path


def quality(network: Network, artefact: Artefact, inputs: int) -> str:
    """Top-1 of the reference graph in percent, or `-` without labels."""
    known = labels(network, ASSETS, inputs)
    if known is None:
        return "-"
    project, session = artefact.project(), reference_session(artefact)
    name, output = artefact.inputs[0].name, artefact.outputs[0].name
    right = 0
    for values, label in zip(reals(network, ASSETS, inputs), known, strict=False):
        code = project.codes({name: as_onnx(network, values)})
        right += int(np.argmax(session.run(code)[output]) == label)
    return f"{100 * right / len(known):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="image,keyword,anomaly")
    parser.add_argument("--cores", default="cortex-m4,cortex-m55")
    parser.add_argument("--sparsities", default="0.5,0.7,0.8")
    parser.add_argument("--blocks", default="16")
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--insist", action="store_true")
    options = parser.parse_args()
    titles = "core network block sparsity flash of_dense instructions of_dense arena top-1"
    print("| " + " | ".join(title.replace("_", " ") for title in titles.split()) + " |")
    print("|---" * 10 + "|", flush=True)
    kinds: list[tuple[int, float | None]] = [(1, None)]
    for block in options.blocks.split(","):
        kinds += [(int(block), float(s)) for s in options.sparsities.split(",")]
    for name in options.networks.split(","):
        for core in options.cores.split(","):
            dense = None
            for block, sparsity in kinds:
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary)
                    chosen = recipe(sparsity, block, options.insist, folder)
                    artefact = artefact_for(
                        NETWORKS[name], "onnx", core, ASSETS, folder / "out", chosen
                    )
                    cost = cost_of(artefact)
                    dense = dense or cost
                    found = compare(NETWORKS[name], "onnx", artefact, ASSETS, COMPARED)
                    assert not found.differing, found
                    top1 = quality(NETWORKS[name], artefact, options.inputs)
                    cells = (
                        core, name, f"{block}x1" if sparsity else "-", sparsity or "dense",
                        f"{cost.flash_bytes:,}", f"{cost.flash_bytes / dense.flash_bytes:.3f}",
                        f"{cost.instructions:,}", f"{cost.instructions / dense.instructions:.3f}",
                        f"{cost.arena_bytes:,}", top1,
                    )  # fmt: skip
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
