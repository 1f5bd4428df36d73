"""C projects: built, compiled with sanitizers on this machine, compared bit for bit."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.bare.archive import archive
from tvm_compress.bare.build import BareBuilt
from tvm_compress.bare.emit import c_identifier, write_project
from tvm_compress.bare.golden import golden_samples
from tvm_compress.bare.program import COPY, program_of
from tvm_compress.build import (
    Lowered,
    compile_project,
    compile_reference,
    export_library,
    lower,
    plan_project,
)
from tvm_compress.contents import describe_project, require_project_fits
from tvm_compress.errors import TargetError
from tvm_compress.flow import compress_job, load_job
from tvm_compress.importers import load_model
from tvm_compress.model import TensorSpec
from tvm_compress.progress import Progress
from tvm_compress.relay_passes.integer_edges import IntegerEdges, edges_of
from tvm_compress.targets import Target, get_target

from ..command_line import tiny_data, tiny_onnx

# Plain kernels for the machine that runs the tests: a bare target without an emulator.
PORTABLE = Target(
    name="portable",
    description="x86-64 as if it were a board",
    tvm_options={
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v2",
        "vector-width": 32,
    },
    vector_bits=32,
    threads=1,
    compiler="gcc",
)
SANITIZED = (
    "-O1", "-g", "-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-Wall", "-Wextra", "-Werror", "-Wno-unused-variable", "-Wno-unused-but-set-variable",
    "-ffp-contract=off", "-fno-strict-aliasing",
)  # fmt: skip
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


class Tiny:
    """A small quantised network, and samples for it."""

    def __init__(self, folder: Path) -> None:
        data = tiny_data(folder / "calibration.npz")
        job = load_job(tiny_onnx(folder / "tiny.onnx"), "int8", "host", data)
        self.module = compress_job(job, Progress())
        self.sources = ([s.name for s in job.model.inputs], [s.name for s in job.model.outputs])
        self.probes = {name: array[:, None] for name, array in np.load(data).items()}

    def project(self, folder: Path, form: str, target: Target = PORTABLE) -> BareBuilt:
        """Write the project with its self-test."""
        lowered = lower(self.module, target)
        reference = folder / "reference.so"
        export_library(compile_reference(lowered.reference_module), reference)
        built = compile_project(lowered, form).project
        taps: tuple[TensorSpec, ...] = ()
        golden = golden_samples(built, reference, taps, self.sources, self.probes)
        (folder / "project").mkdir()
        write_project(built, "tiny", self.sources, folder / "project", golden)
        return built


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def compiled(folder: Path, *more: str) -> Path:
    """The self-test, compiled here with sanitizers."""
    program = folder / "selftest"
    sources = sorted(str(path) for path in folder.glob("*.c"))
    libraries = [str(path) for path in folder.glob("*.a")]
    command = ["gcc", *SANITIZED, *more, f"-I{folder}", *sources, *libraries, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def call(program: Path) -> int:
    return subprocess.run([str(program)], check=False).returncode


@needs_gcc
@pytest.mark.links
@pytest.mark.slow
def test_a_real_network_is_clean_in_c(assets: Path, tmp_path: Path) -> None:
    """Keyword spotting from int8 codes: every kernel of it under the sanitizers."""
    model = load_model(assets / "tflite" / "kws_ref_model.tflite")
    lowered = lower(model.module, PORTABLE)
    reference = tmp_path / "reference.so"
    export_library(compile_reference(lowered.reference_module), reference)
    built = compile_project(lowered, "c").project
    random = np.random.default_rng(4)
    (taken,) = model.inputs
    probes = {taken.name: random.integers(-128, 128, (2, *taken.shape), np.int8)}
    sources = ([spec.name for spec in model.inputs], [spec.name for spec in model.outputs])
    golden = golden_samples(built, reference, (), sources, probes)
    write_project(built, "keyword", sources, tmp_path, golden)
    assert len({output.tobytes() for output in golden.outputs[0]}) == 2
    assert call(compiled(tmp_path)) == 0


@needs_gcc
@pytest.mark.links
@pytest.mark.parametrize("form", ["object", "c"])
def test_selftest_is_bit_exact_and_clean(tiny: Tiny, tmp_path: Path, form: str) -> None:
    tiny.project(tmp_path, form)
    assert call(compiled(tmp_path / "project")) == 0


@needs_gcc
@pytest.mark.links
def test_selftest_finds_a_wrong_weight(tiny: Tiny, tmp_path: Path) -> None:
    tiny.project(tmp_path, "c")
    constants = tmp_path / "project" / "tiny_constants.c"
    text = constants.read_text()
    start = text.index("int8_t")
    changed = re.sub(r"(-?\d+),", "100,", text[start:], count=40)
    assert changed != text[start:]
    constants.write_text(text[:start] + changed)
    assert call(compiled(tmp_path / "project")) > 0


@needs_gcc
@pytest.mark.links
def test_arena_is_large_enough_and_not_too_large(tiny: Tiny, tmp_path: Path) -> None:
    """One byte less than planned is a write behind the arena, which the sanitizer sees."""
    built = tiny.project(tmp_path, "c")
    assert built.arena_bytes > 0
    header = tmp_path / "project" / "tiny.h"
    text = header.read_text()
    smaller = built.arena_bytes - built.alignment
    header.write_text(text.replace(f"ARENA_BYTES {built.arena_bytes}", f"ARENA_BYTES {smaller}"))
    assert call(compiled(tmp_path / "project")) != 0


def undefined(library: Path) -> set[str]:
    found = subprocess.run(["nm", str(library)], check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in found.splitlines() if line.strip()]
    used = {words[1] for words in lines if len(words) == 2 and words[0] == "U"}
    defined = {words[2] for words in lines if len(words) == 3}
    return used - defined


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (Debian: apt-get install binutils)")
@pytest.mark.parametrize(
    "name", ["cortex-m4", "cortex-m7", "cortex-m55", "riscv32imafc", "riscv64gc", "cortex-a53"]
)
def test_objects_need_nothing_but_memory_functions(tiny: Tiny, tmp_path: Path, name: str) -> None:
    target = get_target(name)
    built = compile_project(lower(tiny.module, target)).project
    write_project(built, "tiny", tiny.sources, tmp_path)
    allowed = {"memcpy", "memset", "__aeabi_memcpy", "__aeabi_memset", "__aeabi_memclr"}
    assert undefined(tmp_path / "libtiny_kernels.a") <= allowed
    assert built.library_functions == ()


@pytest.mark.parametrize("name", ["cortex-m0plus", "cortex-m3", "riscv32imc"])
def test_without_fpu_only_the_compiler_runtime_is_needed(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    built = compile_project(lower(tiny.module, get_target(name))).project
    write_project(built, "tiny", tiny.sources, tmp_path)
    others = undefined(tmp_path / "libtiny_kernels.a") - {"memcpy", "memset"}
    assert all(symbol.startswith("__") for symbol in others), others


@pytest.mark.parametrize("form", ["object", "c"])
def test_floats_that_need_the_mathematical_library_are_named(tmp_path: Path, form: str) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 40], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.tanh(x), "y")
            result = builder.emit_output(relax.op.cos(y), "z")
        builder.emit_func_output(result)
    module = builder.get()
    built = compile_project(lower(module, get_target("cortex-m4")), form).project
    assert "cosf" in built.library_functions
    write_project(built, "waves", (["x"], ["z"]), tmp_path)
    assert "cosf" in (tmp_path / "waves.h").read_text()
    assert "PUBLIC m)" in (tmp_path / "CMakeLists.txt").read_text()


def test_inputs_are_integers_with_their_scale(tiny: Tiny) -> None:
    built = compile_project(lower(tiny.module, PORTABLE), "c").project
    (edge,) = built.inputs
    assert edge.converted
    assert edge.dtype == "int8"
    assert edge.scale is not None
    (name,) = built.program.inputs
    assert built.program.tensors[name].dtype == "int8"


def test_edges_leave_the_network_as_it_is(tiny: Tiny) -> None:
    """Codes in, codes out: the float network between a quantiser and a dequantiser."""
    module = IntegerEdges()(tiny.module)
    inputs, outputs = edges_of(module)
    assert str(module["main"].params[0].ty.dtype) == "int8"
    assert len(inputs) == len(tiny.sources[0])
    assert len(outputs) == len(tiny.sources[1])


def test_program_writes_every_tensor_before_it_is_read(tiny: Tiny) -> None:
    program = compile_project(lower(tiny.module, PORTABLE), "c").project.program
    there = set(program.inputs) | {t.name for t in program.constants}
    for step in program.calls:
        assert set(step.inputs) <= there
        assert not set(step.outputs) & there
        there |= set(step.outputs)
    assert set(program.outputs) <= there


def test_buffers_of_one_step_do_not_overlap(tiny: Tiny) -> None:
    built = compile_project(lower(tiny.module, PORTABLE), "c").project
    arena = built.plan.arena
    for step in range(len(built.program.calls)):
        alive = sorted((arena.offsets[life.name], life.bytes) for life in arena.alive(step))
        shared = {life.name for life in arena.alive(step) if life.may_share_with}
        if shared:
            continue
        for (start, size), (following, _) in itertools.pairwise(alive):
            assert start + size <= following
        assert all(start + size <= built.arena_bytes for start, size in alive)


def passing_on(shape: list[Any]) -> tvm.IRModule:
    """main(x) = x"""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "int8"))
    with builder.function("main", [x]):
        builder.emit_func_output(x)
    return builder.get()


def test_an_input_that_is_an_output_is_copied() -> None:
    program = program_of(passing_on([2, 3]), ())
    assert [step.symbol for step in program.calls] == [COPY]
    assert program.outputs == ("output0",)


def test_a_dynamic_shape_is_refused() -> None:
    with pytest.raises(TargetError, match="no constant shape"):
        program_of(passing_on([tvm.tirx.Var("n", "int64"), 3]), ())


@pytest.mark.parametrize(
    ("text", "name"),
    [("ResNet-8", "resnet_8"), ("8bit", "model_8bit"), ("int", "model_int"), ("é", "model")],
)
def test_c_identifier(text: str, name: str) -> None:
    assert c_identifier(text) == name


@pytest.mark.skipif(shutil.which("ar") is None, reason="no ar (Debian: apt-get install binutils)")
def test_archive_is_what_ar_reads(tmp_path: Path) -> None:
    members: list[tuple[str, bytes, list[str]]] = [
        ("a_long_member_name.o", b"odd", ["one"]),
        ("b.o", b"even", ["two", "three"]),
    ]
    library = tmp_path / "lib.a"
    library.write_bytes(archive(members))
    listed = subprocess.run(["ar", "t", library], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == [name for name, _, _ in members]
    for name, content, _ in members:
        found = subprocess.run(["ar", "p", library, name], check=True, capture_output=True)
        assert found.stdout == content


def test_interface_says_what_a_runner_needs(tiny: Tiny, tmp_path: Path) -> None:
    built = compile_project(lower(tiny.module, PORTABLE), "c").project
    write_project(built, "tiny", tiny.sources, tmp_path)
    interface: dict[str, Any] = json.loads((tmp_path / "interface.json").read_text())
    assert [port["name"] for port in interface["inputs"]] == tiny.sources[0]
    assert interface["arena_bytes"] == built.arena_bytes


def fitted(tiny: Tiny, **memory: int) -> Lowered:
    return lower(tiny.module, replace(PORTABLE, **memory))


def test_what_does_not_fit_is_refused_before_kernels_are_compiled(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes that are missing, and the layer at the peak or the largest layers."""
    project = plan_project(fitted(tiny))
    ports = [
        project.program.tensors[n] for n in (*project.program.inputs, *project.program.outputs)
    ]
    ram = project.plan.arena.bytes + sum(port.bytes for port in ports)
    weights = sum(constant.bytes for constant in fitted(tiny).constants)

    def never(*_arguments: object) -> bytes:
        raise AssertionError("a kernel was compiled")

    monkeypatch.setattr("tvm_compress.bare.compile._code", never)
    with pytest.raises(TargetError, match=f"{ram} bytes of RAM, 1 more than") as refused:
        compile_project(fitted(tiny, ram_bytes=ram - 1))
    assert "the peak is at " in str(refused.value)
    plan_project(fitted(tiny, ram_bytes=ram))
    with pytest.raises(TargetError, match=f"{weights} bytes of flash for its weights alone, 1 m"):
        compile_project(fitted(tiny, flash_bytes=weights - 1))


def test_code_counts_against_flash(tiny: Tiny) -> None:
    weights = sum(constant.bytes for constant in fitted(tiny).constants)
    built = compile_project(fitted(tiny, flash_bytes=weights))
    with pytest.raises(TargetError, match="bytes of flash, [1-9]"):
        require_project_fits(built, describe_project(built))
    enough = replace(built, target=replace(built.target, flash_bytes=weights + 100_000))
    require_project_fits(enough, describe_project(enough))


def test_every_layer_is_named(tiny: Tiny) -> None:
    """Also the one whose result the caller owns; the library's facts have the same symbols."""
    built = compile_project(lower(tiny.module, PORTABLE))
    program = built.project.program
    assert [layer for call in program.calls for layer in call.layers] == ["conv", "fc"]
    assert {call.symbol for call in built.calls} == {call.symbol for call in program.calls}
