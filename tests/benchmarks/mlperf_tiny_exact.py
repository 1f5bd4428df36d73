"""MLPerf Tiny's four networks on emulated Cortex-M boards: bytes that differ, and accuracy.

    python tests/benchmarks/mlperf_tiny_exact.py [--inputs N] [--networks image,keyword]
        [--sources tflite,onnx] [--cores cortex-m4,cortex-m55] [--json out.json]

One row for each network, source and core. `tflite`: the outputs against TensorFlow Lite's reference
kernels; `onnx`: the float model by recipe int8 against its own reference graph. All inputs that the
assets have unless `--inputs` says otherwise, but no fewer than 100 are a claim. Exit status 1 when
a byte differs or a quality target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import ASSETS

from tests.mlperf_networks import CORES, NETWORKS, SOURCES, Comparison, artefact_for, compare


def accuracy(found: Comparison, quality: float | None) -> str:
    """Top-1 with its interval and the least that the benchmark asks for."""
    if found.right is None or found.interval is None:
        return "-"
    low, high = (100 * bound for bound in found.interval)
    return (
        f"{100 * found.right / found.inputs:.2f} % [{low:.1f}, {high:.1f}], at least {quality:.0%}"
    )


def main() -> int:
    """The table; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--cores", default=",".join(CORES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| network | source | core | inputs | bytes | differing | top-1 | as float | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows, failed = [], False
    for name in options.networks.split(","):
        network = NETWORKS[name]
        for source in options.sources.split(","):
            for core in options.cores.split(","):
                started = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    artefact = artefact_for(network, source, core, ASSETS, Path(folder) / "out")
                    found = compare(
                        network, source, artefact, ASSETS, options.inputs or network.inputs
                    )
                missed = found.right is not None and (
                    found.right < (network.quality or 0.0) * found.inputs
                )
                failed = failed or found.differing > 0 or missed
                agreeing = "-" if found.agreeing is None else f"{found.agreeing}"
                cells = [
                    name, source, core, found.inputs, f"{found.bytes:,}", found.differing,
                    accuracy(found, network.quality), agreeing,
                    f"{time.perf_counter() - started:.0f}",
                ]  # fmt: skip
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                rows.append({"network": name, "source": source, "core": core, **asdict(found)})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
