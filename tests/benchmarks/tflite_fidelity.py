"""Compiled int8 `.tflite` models against TensorFlow Lite's reference interpreter, byte for byte.

    python tests/benchmarks/tflite_fidelity.py [--inputs 200] [--intermediates 20] [--models A,B]

One row per model: bytes of the outputs that were compared and elements that differ over `--inputs`
real inputs, and the same for every intermediate tensor over `--intermediates`. Exit status 1 when
any differs. The models and data are those of the folder that TVM_COMPRESS_ASSETS names.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asset_data import ASSETS

from tests.relay_passes.tflite_fidelity import MODELS, compare


def main() -> int:
    """The table; 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--intermediates", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    print("model | inputs | output bytes | differing | inputs | tensors | bytes | differing")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models.split(","):
            cells: list[object] = [model]
            for count, every in ((options.inputs, False), (options.intermediates, True)):
                inputs = list(itertools.islice(MODELS[model](ASSETS), count))
                path = ASSETS / "tflite" / f"{model}.tflite"
                found = compare(path, inputs, Path(scratch), every)
                cells += [found.inputs, *([found.tensors] if every else []), found.bytes]
                cells.append(found.differing)
                failed += found.differing
                for name in found.worst:
                    print(f"  differs: {name}", file=sys.stderr)
            print(" | ".join(str(cell) for cell in cells), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
