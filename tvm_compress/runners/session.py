"""A C project as the model that it was made from: floats in, floats out, run as its target is.

The program takes and gives codes where the network starts and ends with integers; what is done here
to get there is what the graph does (`numerics/affine.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArtefactError, DataError
from ..model import TensorSpec
from ..relay_passes.numerics.affine import (
    QuantizationParameters,
    dequantize_affine,
    quantize_affine,
)
from .elf import Footprint, footprint
from .project import Program, Project, build_program
from .run import RunResult, run_program

if TYPE_CHECKING:
    from ..targets import Target

INTERFACE = "interface.json"
_SAMPLES_A_PROCESS = 16
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")
_FLAGS = ("-fno-strict-aliasing", "-ffp-contract=off")


@dataclass(frozen=True)
class Port:
    """An input or output of the program; `parameters` None: it is what the model has there."""

    spec: TensorSpec
    parameters: QuantizationParameters | None

    def from_model(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if array.shape != self.spec.shape:
            raise DataError(
                f"input {self.spec.name!r} has shape {list(array.shape)}; "
                f"the model takes {list(self.spec.shape)}"
            )
        if self.parameters is not None:
            array = quantize_affine(array, self.parameters)
        if array.dtype != np.dtype(self.spec.dtype):
            raise DataError(
                f"input {self.spec.name!r} is {array.dtype}; the model takes {self.spec.dtype}"
            )
        return array

    def to_model(self, array: np.ndarray) -> np.ndarray:
        return array if self.parameters is None else dequantize_affine(array, self.parameters)


@dataclass(frozen=True)
class Interface:
    """`interface.json` of a C project."""

    name: str
    form: str
    arena_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: Mapping[str, tuple[str, ...]]
    """By symbol of a kernel."""


def read_interface(folder: Path) -> Interface:
    """Raises `ArtefactError` for a file that is missing or damaged."""
    path = folder / INTERFACE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        name = str(value["name"])
        if not _IDENTIFIER.fullmatch(name):
            raise ValueError(f"name {name!r}")
        layers: dict[str, tuple[str, ...]] = {}
        for call in value.get("calls", ()):
            symbol = str(call["symbol"])
            layers[symbol] = tuple(dict.fromkeys([*layers.get(symbol, ()), *call["layers"]]))
        return Interface(
            name,
            str(value["form"]),
            int(value["arena_bytes"]),
            tuple(_port(entry) for entry in value["inputs"]),
            tuple(_port(entry) for entry in value["outputs"]),
            layers,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); compress again") from None


def _port(entry: Mapping[str, Any]) -> Port:
    dtype = str(entry["dtype"])
    spec = TensorSpec(str(entry["name"]), tuple(int(side) for side in entry["shape"]), dtype)
    parameters = None
    if entry["converted"]:
        limits = np.iinfo(dtype)
        parameters = QuantizationParameters(
            np.asarray(entry["scale"], np.float32),
            np.asarray(entry["zero_point"], np.int32),
            dtype,
            None,
            int(limits.min),
            int(limits.max),
        )
    return Port(spec, parameters)


def project_of(folder: Path) -> Project:
    """The project in an artefact's `deploy/`."""
    interface = read_interface(folder)
    name, is_c = interface.name, interface.form == "c"
    sources = [f"{name}.c", f"{name}_constants.c", *([f"{name}_kernels.c"] if is_c else [])]
    return Project(
        folder,
        header=f"{name}.h",
        run=f"{name}_run",
        arena_bytes=interface.arena_bytes,
        inputs=tuple(port.spec for port in interface.inputs),
        outputs=tuple(port.spec for port in interface.outputs),
        sources=tuple(sources),
        objects=() if is_c else (f"lib{name}_kernels.a",),
        flags=_FLAGS,
        model_io="model_io.h",
    )


class BoardSession:
    """The program of a C project, built when it is first needed.

    `run` has the interface of `runtime.Session.run`. An emulator takes a moment to start, so for
    many inputs there is `run_all`.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        self.interface = read_interface(folder)

    @cached_property
    def program(self) -> Program:
        self._scratch = TemporaryDirectory(prefix="tvm-compress-program-")
        return build_program(project_of(self.folder), self.target, Path(self._scratch.name))

    @property
    def footprint(self) -> Footprint:
        return footprint(self.program.elf, self.program.link_map)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        return next(self.run_all([arrays]))

    def run_all(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of every feed, in order. As many emulators run as there are cores."""
        for result in self._results(feeds, count=False):
            for codes in result.outputs:
                yield self._to_model(codes)

    def count(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> list[RunResult]:
        """The same with instruction counts, in pieces; outputs as the program gives them."""
        return list(self._results(feeds, count=True))

    def _results(
        self, feeds: Iterable[Mapping[str, np.ndarray]], count: bool
    ) -> Iterator[RunResult]:
        program, rest = self.program, iter(feeds)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        with ThreadPoolExecutor(cores) as pool:
            running: list[Future[RunResult]] = []
            while piece := [self._from_model(feed) for feed in islice(rest, _SAMPLES_A_PROCESS)]:
                running.append(pool.submit(run_program, program, piece, count=count))
                if len(running) > cores:
                    yield running.pop(0).result()
            for future in running:
                yield future.result()

    def _from_model(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [port.spec.name for port in self.interface.inputs]
        if set(feed) != set(names):
            raise DataError(f"inputs {sorted(feed)} are given; the model takes {names}")
        return {
            port.spec.name: port.from_model(feed[port.spec.name]) for port in self.interface.inputs
        }

    def _to_model(self, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            port.spec.name: port.to_model(codes[port.spec.name]) for port in self.interface.outputs
        }
