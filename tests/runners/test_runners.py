"""A small model written by hand, on every emulated machine: outputs, counts, stack, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tvm_compress.errors import ArtefactError
from tvm_compress.model import TensorSpec
from tvm_compress.runners import Program, Project, build_program, footprint, run_program
from tvm_compress.targets import Target, get_target, list_targets
from tvm_compress.targets.machines import MACHINES
from tvm_compress.targets.toolchains import missing_tools

HEADER = """
#include <stdint.h>
#define TOY_ARENA_BYTES 64
int toy_run(const void *const *inputs, void *const *outputs, void *arena);
int32_t spin(int32_t rounds);
"""
# scores = (codes . weights + bias) << shift[0]; halves = codes / 2 as floats. `spin` takes a number
# of instructions that depends on the sample in a known way.
SOURCE = """
#include "toy.h"
#include <string.h>
static const int8_t weights[4][8] = {
    {1, -2, 3, -4, 5, -6, 7, -8}, {8, 7, 6, 5, 4, 3, 2, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1}, {127, -128, 0, 0, 0, 0, 0, 127}};
static const int32_t bias[4] = {10, -20, 300000, 7};
int32_t offset = 5; /* data: in flash and in RAM */
__attribute__((noinline)) int32_t spin(int32_t rounds) {
    while (rounds > 0) {
        __asm__ volatile("nop\\n\\tnop\\n\\tnop" ::: "memory");
        --rounds;
    }
    return rounds;
}
int toy_run(const void *const *inputs, void *const *outputs, void *arena) {
    const int8_t *codes = inputs[0];
    const int32_t *shift = inputs[1];
    int32_t *scores = outputs[0];
    float *halves = outputs[1];
    int16_t *wide = arena;
    if (shift[0] < 0) return 1;
    for (int i = 0; i < 8; ++i) wide[i] = codes[i];
    for (int o = 0; o < 4; ++o) {
        int32_t sum = bias[o] + offset - 5;
        for (int i = 0; i < 8; ++i) sum += wide[i] * weights[o][i];
        scores[o] = (int32_t)((uint32_t)sum << shift[0]);
    }
    for (int i = 0; i < 8; ++i) halves[i] = (float)codes[i] * 0.5f;
    spin(1000 * shift[0]);
    return 0;
}
"""
CALL = "spin(1000 * shift[0]);"
WEIGHTS = np.array(
    [
        [1, -2, 3, -4, 5, -6, 7, -8],
        [8, 7, 6, 5, 4, 3, 2, 1],
        [-1, -1, -1, -1, 1, 1, 1, 1],
        [127, -128, 0, 0, 0, 0, 0, 127],
    ]
)
BIAS = np.array([10, -20, 300000, 7])
INPUTS = (TensorSpec("codes", (1, 8), "int8"), TensorSpec("shift", (1,), "int32"))
OUTPUTS = (TensorSpec("scores", (4,), "int32"), TensorSpec("halves", (2, 4), "float32"))
# One target for each emulated machine, and those with a calling convention of their own.
CROSS = [
    "cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55",
    "cortex-m85", "cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "armv8.2-i8mm",
    "armv7-neon", "riscv32imc", "riscv32imafc", "riscv64gc", "riscv64gcv",
]  # fmt: skip


def toy(folder: Path, source: str = SOURCE, arena_bytes: int = 64) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.h").write_text(HEADER)
    (folder / "toy.c").write_text(source)
    return Project(folder, "toy.h", "toy_run", arena_bytes, INPUTS, OUTPUTS, sources=("toy.c",))


def built(name: str, folder: Path, **changes: object) -> Program:
    target = get_target(name)
    missing = missing_tools(target)
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")
    return build_program(toy(folder / "model", **changes), target, folder)  # type: ignore[arg-type]


def samples(shifts: list[int]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [
        {
            "codes": rng.integers(-128, 128, (1, 8), dtype=np.int8),
            "shift": np.array([shift], np.int32),
        }
        for shift in shifts
    ]


def expected(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    codes = feed["codes"][0].astype(np.int64)
    scores = (WEIGHTS @ codes + BIAS) << int(feed["shift"][0])
    return {
        "scores": scores.astype(np.int32),
        "halves": (codes * 0.5).astype(np.float32).reshape(2, 4),
    }


def test_every_machine_is_run_here() -> None:
    assert {get_target(name).machine for name in CROSS} == set(MACHINES)
    assert {t.compiler for t in list_targets()} - {""} == {get_target(n).compiler for n in CROSS}


@pytest.mark.parametrize("name", CROSS)
def test_outputs_and_instruction_counts(name: str, tmp_path: Path) -> None:
    program = built(name, tmp_path)
    feeds = samples([0, 1, 2, 3, 2])
    result = run_program(program, feeds)
    for feed, outputs in zip(feeds, result.outputs, strict=True):
        for key, wanted in expected(feed).items():
            assert outputs[key].dtype == wanted.dtype
            np.testing.assert_array_equal(outputs[key], wanted)
    counted = result.instructions
    assert counted is not None
    assert counted[2] == counted[4]  # the same work, other data
    # 1000 rounds of three nops and of what the compiler made of the loop, two to four instructions.
    spins = [functions["spin"] for functions in result.by_function[1:4]]
    a_thousand = [spins[1] - spins[0], spins[2] - spins[1]]
    assert len(set(a_thousand)) == 1 and 5000 <= a_thousand[0] <= 7000
    assert counted[3] - counted[2] == pytest.approx(a_thousand[0], abs=8)
    for total, functions in zip(counted, result.by_function, strict=True):
        assert sum(functions.values()) <= total <= sum(functions.values()) + 20
    assert run_program(program, feeds).instructions == counted  # exactly repeatable


def test_many_samples_are_shared_out_and_come_back_in_order(tmp_path: Path) -> None:
    program = built("cortex-m4", tmp_path)
    feeds = samples([number % 4 for number in range(37)])
    told: list[int] = []
    result = run_program(program, feeds, progress=told.append)
    assert len(result.outputs) == len(result.by_function) == len(result.ticks) == 37
    for feed, outputs in zip(feeds, result.outputs, strict=True):
        np.testing.assert_array_equal(outputs["scores"], expected(feed)["scores"])
    counts = np.array(result.instructions).reshape(-1)
    assert len(set(counts[1::4])) == 1 and len(set(counts[:4])) == 4
    assert all(0 <= number <= 37 for number in told)
    assert run_program(program, []).outputs == ()


@pytest.mark.parametrize("name", ["cortex-m4", "cortex-m7", "cortex-m55", "riscv64gc"])
def test_the_machines_own_timer_agrees(name: str, tmp_path: Path) -> None:
    """With `-icount` the timer counts instructions; no plugin is loaded."""
    program = built(name, tmp_path)
    feeds = samples([1, 10, 3])
    counted = run_program(program, feeds).instructions
    timed = run_program(program, feeds, count=False, is_timed_by_instructions=True)
    assert counted is not None and timed.instructions is None
    tick_ns = MACHINES[program.target.machine].tick_ns
    for instructions, ticks in zip(counted, timed.ticks, strict=True):
        assert ticks * tick_ns == pytest.approx(instructions, abs=2 * tick_ns + 60)


def test_stack_and_memory_of_the_linked_program(tmp_path: Path) -> None:
    local = "volatile int8_t room[{0}]; room[0] = room[{0} - 1] = 1; spin(room[0]);"
    deep = [
        built("cortex-m4", tmp_path / str(room), source=SOURCE.replace(CALL, local.format(room)))
        for room in (400, 3400)
    ]
    stacks = [run_program(p, samples([0])).stack_bytes or 0 for p in deep]
    assert 400 < stacks[0] < 600 and stacks[1] - stacks[0] == 3000
    shallow = built("cortex-m4", tmp_path / "shallow")
    size = footprint(shallow.elf, shallow.link_map)
    # Weights, biases and `offset`, and the code of three small functions.
    assert 32 + 16 + 4 < size.model_flash_bytes < 600
    assert size.model_ram_bytes == 4
    assert size.model_flash_bytes < size.flash_bytes < 8192
    large = built("cortex-m4", tmp_path / "large", arena_bytes=64 + 4096)
    assert footprint(large.elf, large.link_map).ram_bytes - size.ram_bytes == 4096


def test_a_model_larger_than_the_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not link for cortex-m55.*RAM"):
        built("cortex-m55", tmp_path, arena_bytes=600_000)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("cortex-m4", "*(volatile int *)0xF0000000u = 1;"), ("riscv32imc", '__asm__("unimp");')],
)
def test_a_fault_ends_the_run(name: str, fault: str, tmp_path: Path) -> None:
    program = built(name, tmp_path, source=SOURCE.replace(CALL, fault))
    with pytest.raises(ArtefactError, match="status 3.*the processor stopped"):
        run_program(program, samples([0]))


@pytest.mark.parametrize("name", ["cortex-m4", "cortex-a53"])
def test_a_program_that_never_ends_is_stopped(name: str, tmp_path: Path) -> None:
    program = built(name, tmp_path, source=SOURCE.replace(CALL, "for (;;) {}"))
    with pytest.raises(ArtefactError, match="no end after 2 s"):
        run_program(program, samples([0]), seconds=2.0)


def test_an_error_of_the_model_is_reported(tmp_path: Path) -> None:
    program = built("cortex-m4", tmp_path)
    with pytest.raises(ArtefactError, match="status 4.*returned an error"):
        run_program(program, samples([0, -1]))
    wrong = {"codes": np.zeros((1, 8), np.uint8), "shift": np.zeros(1, np.int32)}
    with pytest.raises(ArtefactError, match="'codes' is uint8"):
        run_program(program, [wrong])


def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="toy.c does not compile for cortex-m4"):
        built("cortex-m4", tmp_path, source="int nothing(")


def test_on_this_machine(tmp_path: Path) -> None:
    """The same project with the host's own compiler."""
    program = built("host", tmp_path)
    feeds = samples([0, 1])
    result = run_program(program, feeds)
    assert result.instructions is None and result.stack_bytes is None
    for feed, outputs in zip(feeds, result.outputs, strict=True):
        np.testing.assert_array_equal(outputs["scores"], expected(feed)["scores"])


def test_missing_tools_name_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm_compress.errors import TargetError

    monkeypatch.setenv("PATH", str(tmp_path))
    target: Target = get_target("cortex-m4")
    with pytest.raises(TargetError, match="arm-none-eabi-gcc.*apt-get install gcc-arm-none-eabi"):
        build_program(toy(tmp_path / "model"), target, tmp_path)
