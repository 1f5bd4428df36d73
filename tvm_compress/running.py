"""Run an artefact over all samples of a file and write the outputs, by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .benchmarking import set_threads
from .data import read_arrays
from .errors import DataError
from .progress import Progress

_AT_ONCE = 256  # samples for each start of an emulator or connection to a board

if TYPE_CHECKING:
    from .artefact import Artefact
    from .data import Run


def run_file(
    artefact: Artefact,
    data: Path,
    out: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one array per model output to `out` (.npz), first axis = samples as in `data`.

    Returns the number of samples and the shape of each output. `out` is replaced only when all
    samples have run. Raises `DataError` when the data does not fit the model.
    """
    artefact.require_can_run()
    set_threads(threads)
    dataset = read_arrays(data, artefact.inputs)
    session = artefact.runnable()
    at_once = _AT_ONCE if artefact.is_project else 1
    results: dict[str, list[np.ndarray]] = {spec.name: [] for spec in artefact.outputs}
    progress = progress or Progress()

    def all_runs() -> Iterator[tuple[Run, dict[str, np.ndarray]]]:
        runs = dataset.runs()
        while piece := list(islice(runs, at_once)):
            yield from zip(piece, session.run_all([run.feed for run in piece]), strict=True)

    count = -(-len(dataset) // dataset.batch)
    for run, outputs in progress.track(all_runs(), "running", count):
        for name, array in outputs.items():
            has_batch = dataset.batch > 1 or (array.ndim > 0 and array.shape[0] == 1)
            results[name].append(array[: run.count] if has_batch else array[None])
    arrays = {name: np.concatenate(parts) for name, parts in results.items()}
    half_done = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with half_done.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        half_done.replace(out)
    except OSError as error:
        half_done.unlink(missing_ok=True)
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    return {
        "samples": len(dataset),
        "outputs": {name: list(array.shape) for name, array in arrays.items()},
    }
