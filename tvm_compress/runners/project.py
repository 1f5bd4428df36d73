"""A C project of a model, and the program that is built from it for one target."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArtefactError, TargetError
from ..targets.runtime_files import LINKER_SCRIPT, rpc_files, runtime_files
from ..targets.toolchains import require_tools

if TYPE_CHECKING:
    from ..model import TensorSpec
    from ..targets import Target

_ALIGNMENT = 16
_C_FLAGS = ("-O2", "-std=c11", "-ffunction-sections", "-fdata-sections", "-Wall", "-Werror")
_HARNESS_FLAGS = ("-Wextra", "-Os", "-fno-tree-loop-distribute-patterns")  # no strlen for a loop
_HARNESS = "harness"


@dataclass(frozen=True)
class Project:
    """Sources and objects of a model with a plain C interface.

    `run` is the name of `int run(const void *const *inputs, void *const *outputs, void *arena)`,
    declared by `header`; 0: all went well.
    """

    folder: Path
    header: str
    run: str
    arena_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sources: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    include_folders: tuple[str, ...] = (".",)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A linked program that reads samples and writes outputs (`targets/runtime/main.c`)."""

    project: Project
    target: Target
    elf: Path
    link_map: Path


def tensor_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def model_io_header(project: Project) -> str:
    """What `main.c` must know of the model."""
    sizes = {
        "INPUT": [tensor_bytes(spec) for spec in project.inputs],
        "OUTPUT": [tensor_bytes(spec) for spec in project.outputs],
    }
    lines = [
        f'#include "{project.header}"',
        f"#define Model_RUN {project.run}",
        f"#define Model_ARENA_BYTES {project.arena_bytes}u",
    ]
    for kind, listed in sizes.items():
        buffer = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in listed)
        lines.append(f"#define Model_{kind}_BYTES {{{', '.join(f'{size}u' for size in listed)}}}")
        lines.append(f"#define Model_{kind}_BUFFER_BYTES {buffer}u")
    return "\n".join(lines) + "\n"


def build_program(project: Project, target: Target, folder: Path) -> Program:
    """Compile and link `project` with the start-up code of the target's emulated machine.

    Everything is written below `folder`. Raises `TargetError` when tools are missing,
    `ArtefactError` when the project does not compile or does not fit the machine.
    """
    linking = ["-static"]
    if target.is_bare_metal:
        linking += ["-nostartfiles", "-T", str(folder / _HARNESS / LINKER_SCRIPT)]
    elif target.is_cross:
        linking.append("-no-pie")  # so that functions lie where the file says
    return _build(project, target, folder / "program.elf", runtime_files(target), linking)


def build_library(project: Project, target: Target, folder: Path) -> Program:
    """The same as a shared library that TVM's RPC server loads (`rpc.py`)."""
    import tvm_ffi.libinfo

    headers = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    compiling = ["-fPIC", *(f"-isystem{path}" for path in headers)]
    library = folder / "model.so"
    return _build(project, target, library, rpc_files(), ["-shared", "-s"], compiling)


def _build(
    project: Project,
    target: Target,
    elf: Path,
    files: dict[str, str],
    linking: Sequence[str],
    compiling: Sequence[str] = (),
) -> Program:
    require_tools(target)
    folder = elf.parent
    harness = folder / _HARNESS
    files["model-io.h"] = model_io_header(project)
    for name, text in files.items():
        path = harness / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    compiler = [target.compiler or "gcc", *target.compiler_flags, *compiling]
    if target.compiler == "riscv64-unknown-elf-gcc":
        compiler.append("--specs=picolibc.specs")
    includes = [f"-I{project.folder / name}" for name in project.include_folders]
    sources = [harness / name for name in files if name.endswith((".c", ".S"))]
    sources += [project.folder / name for name in project.sources]
    objects: list[Path] = []
    for index, source in enumerate(sources):
        is_ours = source.is_relative_to(harness)
        # By number: two files of a project may have one name.
        out = folder / f"{_HARNESS if is_ours else 'model'}_{index}_{source.stem}.o"
        flags = [*_C_FLAGS, *(_HARNESS_FLAGS if is_ours else project.flags)]
        _call(
            [*compiler, *flags, f"-I{harness}", *includes, "-c", str(source), "-o", str(out)],
            f"{source.name} does not compile for {target.name}",
        )
        objects.append(out)
    # Libraries behind who needs them.
    objects += [project.folder / name for name in project.objects]
    link_map = folder / "program.map"
    general = ["-Wl,--gc-sections", f"-Wl,-Map={link_map}"]
    _call(
        [*compiler, *general, *linking, *map(str, objects), "-lm", "-o", str(elf)],
        f"the program does not link for {target.name}",
    )
    return Program(project, target, elf, link_map)


def _call(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except FileNotFoundError:
        raise TargetError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ArtefactError(f"{what}: {command[0]} took more than five minutes") from None
    if done.returncode != 0:
        said = done.stderr.splitlines()
        words = ("error:", "overflow", "undefined reference", "RAM is full")
        # The linker's driver says only that the linker failed.
        lines = [x for x in said if any(w in x for w in words) and "ld returned" not in x]
        detail = " | ".join((lines or said[-3:])[:3])
        raise ArtefactError(f"{what}: {detail}")


def pack_samples(
    project: Project, feeds: list[Mapping[str, np.ndarray]]
) -> bytes:  # [N] feeds => N * (all inputs)
    """`input.bin`: of every sample all inputs, in the project's order."""
    parts = []
    for feed in feeds:
        for spec in project.inputs:
            array = np.asarray(feed[spec.name])
            if array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
                raise ArtefactError(
                    f"input {spec.name!r} is {array.dtype}{list(array.shape)}; the program takes "
                    f"{spec.dtype}{list(spec.shape)}"
                )
            parts.append(np.ascontiguousarray(array).tobytes())
    return b"".join(parts)


def unpack_samples(project: Project, content: bytes) -> list[dict[str, np.ndarray]]:
    """`output.bin` => the outputs of every sample, by name."""
    size = sum(tensor_bytes(spec) for spec in project.outputs)
    if size == 0 or len(content) % size:
        raise ArtefactError(f"output.bin has {len(content)} bytes, no multiple of {size}")
    samples, at = [], 0
    while at < len(content):
        sample = {}
        for spec in project.outputs:
            count = math.prod(spec.shape)
            array = np.frombuffer(content, spec.dtype, count, at).reshape(spec.shape)
            sample[spec.name] = array.copy()
            at += array.nbytes
        samples.append(sample)
    return samples
