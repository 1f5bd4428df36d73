"""The output folder of `compress`: what runs on the target, and the evidence.

recipe.yaml      resolved: alone (with the model and data) it reproduces the artefact
deploy/          what goes to the target: the shared library, or a C project (`bare/README.md`)
reference/       what the artefact is checked against: the float original built by the same
                 compiler for the same target, the executable reference graph, kernel lists
tuning/          the tuning records it was built with, if any; `tune --import` reads them
report.json      report.html
manifest.json    versions, target, inputs and outputs, SHA-256 of every file above
.work/           caches of the last run; may be deleted
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtefactError, TargetError

if TYPE_CHECKING:
    from .bare.session import ProjectSession
    from .data import Dataset
    from .model import TensorSpec
    from .recipe import Recipe
    from .runners.rpc import Rpc
    from .runtime import Session
    from .targets import Target

FORMAT = 2
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
KERNELS = "reference/kernels.json"
RECORDS = "tuning/records.json"
DEPLOY = "deploy"
LIBRARIES = {
    "compressed": "deploy/model.so",
    "original": "reference/original.so",
    "reference": "reference/reference.so",
}
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Artefact:
    """A finished artefact folder. `Artefact.open` checks it before anything is loaded from it."""

    path: Path
    manifest: Mapping[str, Any]
    device: Rpc | None = None
    """Where it runs instead of where its target does; an artefact never says so itself."""

    @property
    def original(self) -> str:
        """What the artefact is compared with: `float original`, or what came quantised."""
        return str(self.manifest["model"]["original"])

    @classmethod
    def open(cls, path: str | Path) -> Artefact:
        """Open and check a folder. Raises `ArtefactError`: missing, incomplete, damaged, foreign.

        The library is code: an artefact from somebody you do not trust must not be run. The
        hashes find damage, they do not prove where the folder came from.
        """
        path = Path(path)
        if not path.is_dir():
            raise ArtefactError(f"{path}: no such folder; make one with `tvm-compress compress`")
        if not (path / MANIFEST).is_file():
            unfinished = (path / ".work").is_dir()
            hint = (
                "the run that makes it did not finish; run the same `compress` command again"
                if unfinished
                else f"it has no {MANIFEST}; it is no artefact folder"
            )
            raise ArtefactError(f"{path}: {hint}")
        manifest = _read_json(path / MANIFEST)
        _check_manifest(path, manifest)
        _check_files(path, manifest["files"])
        return cls(path, manifest)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return _specs(self.manifest["inputs"])

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return _specs(self.manifest["outputs"])

    @cached_property
    def target(self) -> Target:
        """What it was built for, of the present table, or of the board file that it was given."""
        from .board_file import target_of_entry

        target = target_of_entry(self.manifest["target"])
        if self.device is None:
            return target
        return replace(
            target, runner="rpc", rpc_tracker=self.device.tracker, rpc_key=self.device.key
        )

    def on(self, device: Rpc | None) -> Artefact:
        """The same, run on a device behind an RPC tracker; None: where its target runs.

        Raises `TargetError` for what no such device can run.
        """
        if device is None:
            return self
        if not self.is_project:
            raise TargetError(
                f"{self.path}: is a shared library for this machine's CPU; for an x86 machine "
                "behind an RPC tracker compress with a board file of `cpu: "
                f"{self.target.name}` and `runner: rpc`"
            )
        if self.target.is_bare_metal:
            raise TargetError(
                f"{self.path}: is for {self.target.name}, without an operating system, on which no "
                "RPC server runs"
            )
        return replace(self, device=device)

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe that made this artefact."""
        from .recipe import load_recipe

        return load_recipe(self.path / RECIPE)

    @cached_property
    def kernels(self) -> Mapping[str, Any]:
        """Kernel calls and constants of the libraries (`flow.py` writes them)."""
        return _read_json(self.path / KERNELS)

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """`report.json` as plain data."""
        return _read_json(self.path / REPORT_JSON)

    def load_data(self, source: Any) -> Dataset:
        """What `data.load_data` makes of `source`, for this model, prepared as its recipe says."""
        from .data import load_data
        from .model import Model

        shell = Model(str(self.path), None, self.inputs, self.outputs, "artefact")
        return load_data(source, shell, self.recipe.preprocessing)

    def path_of(self, which: str = "compressed") -> Path:
        """Path of one of the `LIBRARIES`."""
        return self.path / LIBRARIES[which]

    @property
    def is_project(self) -> bool:
        """Whether it ships as a C project, which runs on a machine of its own."""
        return not self.path_of("compressed").exists()

    def require_can_run(self) -> None:
        """Raise `TargetError` where it can be run neither on this machine nor under an emulator."""
        from .bare.session import cannot_run

        if not self.is_project:
            self.target.require_runs_here()
            return
        reason = cannot_run(self.target)
        if reason is not None:
            raise TargetError(f"{self.path}: cannot be run here: {reason}")

    def project(self) -> ProjectSession:
        """Its C project, run as its target is."""
        from .bare.session import ProjectSession

        return ProjectSession(self.path / DEPLOY, self.target)

    def runnable(self, which: str = "compressed") -> Session | ProjectSession:
        """Something with `run`: one of the libraries, or the C project."""
        if which == "compressed" and self.is_project:
            return self.project()
        return self.session(which)

    def session(self, which: str = "compressed") -> Session:
        """Load one of the libraries on this machine; a C project has none of its own."""
        from .runtime import Session

        return Session(self.path_of(which), self.inputs, self.outputs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ArtefactError(f"{path}: {size} bytes; the limit is {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path}: is missing; compress again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); compress again") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: is not a JSON object; compress again")
    return value


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("format")
    if version != FORMAT:
        raise ArtefactError(
            f"{path}: artefact format {version!r}; this tvm-compress reads format {FORMAT}. "
            "Compress again, or use the version that wrote it "
            f"({manifest.get('versions', {}).get('tvm_compress', 'unknown')})"
        )
    for key, kind in (("files", dict), ("inputs", list), ("outputs", list), ("target", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ArtefactError(f"{path / MANIFEST}: {key!r} is missing; compress again")


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    root = path.resolve()
    for name, entry in files.items():
        file = path / name
        if not file.resolve().is_relative_to(root):
            raise ArtefactError(f"{path / MANIFEST}: file name {name!r} leads out of the folder")
        if not file.is_file():
            raise ArtefactError(f"{file}: is missing; compress again")
        if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            raise ArtefactError(
                f"{file}: differs from the manifest (changed or damaged); compress again"
            )


def _specs(entries: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    from .model import TensorSpec

    return tuple(
        TensorSpec(str(e["name"]), tuple(int(d) for d in e["shape"]), str(e["dtype"]))
        for e in entries
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file under `folder`, the `files` entry of a manifest."""
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
