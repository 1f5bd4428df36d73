"""A C project as something that runs: real numbers in and out, whatever its target.

The project is compiled with the start-up code of the target's emulated machine and run there, or
as a shared library on a board behind an RPC tracker (`runners/`); inputs become codes and outputs
real numbers as `interface.json` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, TargetError
from ..model import TensorSpec
from ..runners.rpc import NAME_IT
from .emit import read_interface

if TYPE_CHECKING:
    from ..runners.project import Program, Project
    from ..runners.run import RunResult
    from ..targets import Target


def cannot_run(target: Target) -> str | None:
    """Why a project for `target` cannot be run from here, and what to do; None: it can."""
    from ..targets.toolchains import missing_tools

    if target.runner == "serial":
        return (
            "you put its program on the board yourself (runner: serial); deploy/README.md says how "
            "to check it there"
        )
    if target.runner == "rpc" and not target.rpc_tracker:
        return f"it runs behind an RPC tracker; {NAME_IT}"
    missing = missing_tools(target)
    if not missing:
        return None
    return (
        f"{', '.join(missing)} not found on this machine "
        f"(Debian: apt-get install {' '.join(target.toolchain)})"
    )


@dataclass(frozen=True)
class PortSpec:
    """One entry of `interface.json`: codes stand for scale * (code - zero_point)."""

    spec: TensorSpec
    scale: float | None
    zero_point: int
    converted: bool
    ties_away: bool

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> PortSpec:
        """Of an entry under `inputs` or `outputs`."""
        spec = TensorSpec(entry["name"], tuple(entry["shape"]), entry["dtype"])
        return cls(
            spec, entry["scale"], entry["zero_point"], entry["converted"], entry["ties_away"]
        )

    def codes(self, values: np.ndarray) -> np.ndarray:
        """What the model's input is for the C function."""
        if not self.converted or self.scale is None:
            return values
        from ..relay_passes.numerics.tflite import round_half_away

        limits = np.iinfo(self.spec.dtype)
        steps = values.astype(np.float32) / np.float32(self.scale)
        steps = round_half_away(steps) if self.ties_away else np.rint(steps)
        low, high = limits.min - self.zero_point, limits.max - self.zero_point
        codes = np.clip(steps, low, high).astype(np.int32) + self.zero_point
        return codes.astype(self.spec.dtype)

    def reals(self, values: np.ndarray) -> np.ndarray:
        """What the C function's output is for the model."""
        if not self.converted or self.scale is None:
            return values
        counted = values.astype(np.int32) - np.int32(self.zero_point)
        return counted.astype(np.float32) * np.float32(self.scale)


class ProjectSession:
    """A project in `folder`, run as its target is (`Target.runner`).

    Raises `TargetError` at first use when tools of the target are missing.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        self._interface = read_interface(folder)
        self.input_ports = tuple(map(PortSpec.from_json, self._interface["inputs"]))
        self.output_ports = tuple(map(PortSpec.from_json, self._interface["outputs"]))

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference, as `runtime.Session.run`."""
        return self.run_all([arrays])[0]

    def run_all(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """All samples in one process, which is much faster than one by one."""
        result = self.run_codes([self.codes(feed) for feed in feeds])
        return [self.reals(outputs) for outputs in result.outputs]

    def run_codes(
        self, feeds: Sequence[Mapping[str, np.ndarray]], count: bool = False
    ) -> RunResult:
        """Samples as the C function takes them; with `count`, instructions too."""
        from ..runners.run import run_program

        return run_program(self.program, feeds, count=count)

    def checksums(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, int]]:
        """`observe.checksum` of what lay in the arena behind each layer, in order, by tensor; of
        samples as the C function takes them."""
        from ..runners.run import run_program
        from .observe import SUMS, observed_project

        names = [entry["name"] for entry in self.observed]
        if not names:
            return [{} for _ in feeds]
        with TemporaryDirectory(prefix="tvm-compress-observed-") as folder:
            name = self._interface["name"]
            project = observed_project(self._project, name, len(names), Path(folder))
            results = run_program(self._built(project, Path(folder)), feeds, count=False).outputs
        return [dict(zip(names, map(int, outputs[SUMS]), strict=True)) for outputs in results]

    @property
    def observed(self) -> Sequence[Mapping[str, Any]]:
        """Tensors in the arena, in the order of their layers: name, shape, dtype, layers."""
        found: Sequence[Mapping[str, Any]] = self._interface["observed"]
        return found

    def times(self, feed: Mapping[str, np.ndarray], seconds: float) -> list[float]:
        """Seconds of single inferences on a board behind an RPC tracker, for about `seconds`."""
        from ..runners.rpc import time_remote

        return time_remote(self.program, self.codes(feed), seconds)

    def codes(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A sample of the model as the C function takes it."""
        missing = [p.spec.name for p in self.input_ports if p.spec.name not in feed]
        if missing:
            raise DataError(f"input {missing[0]!r} is missing")
        return {
            port.spec.name: port.codes(np.asarray(feed[port.spec.name]))
            for port in self.input_ports
        }

    def reals(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inverse of `codes`, for outputs."""
        return {port.spec.name: port.reals(outputs[port.spec.name]) for port in self.output_ports}

    @cached_property
    def program(self) -> Program:
        self._folder = TemporaryDirectory(prefix="tvm-compress-program-")
        program = self._built(self._project, Path(self._folder.name))
        if self.target.runner != "rpc":
            _require_fits(program)
        return program

    def _built(self, project: Project, folder: Path) -> Program:
        from ..runners.project import build_library, build_program

        build = build_library if self.target.runner == "rpc" else build_program
        return build(project, self.target, folder)

    @property
    def _project(self) -> Project:
        from ..runners.project import Project

        name, form = self._interface["name"], self._interface["form"]
        sources = [f"{name}.c", f"{name}_constants.c"]
        objects = []
        if form == "c":
            sources.append(f"{name}_kernels.c")
        else:
            objects.append(f"lib{name}_kernels.a")
        return Project(
            folder=self.folder,
            header=f"{name}_io.h",
            run=f"{name}_run_arrays",
            arena_bytes=self._interface["arena_bytes"],
            inputs=tuple(port.spec for port in self.input_ports),
            outputs=tuple(port.spec for port in self.output_ports),
            sources=tuple(sources),
            objects=tuple(objects),
            flags=("-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unused-variable",
                   "-Wno-unused-but-set-variable"),
        )  # fmt: skip


def _require_fits(program: Program) -> None:
    """Raise `TargetError` where what was linked of the model is too big for the board; the program
    around it is the user's own."""
    from ..runners.elf import footprint

    target, size = program.target, footprint(program.elf, program.link_map)
    for what, needed, room in (
        ("flash", size.model_flash_bytes, target.flash_bytes),
        ("RAM", program.project.arena_bytes + size.model_ram_bytes, target.ram_bytes),
    ):
        if room is not None and needed > room:
            raise TargetError(
                f"the linked model does not fit {target.name}: it needs {needed} bytes of {what}, "
                f"{needed - room} more than the {room} there are"
            )
