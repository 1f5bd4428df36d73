"""Networks on every kind of core: the same integers, machine code or portable C, four bits or
eight."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.onnx_files import save_onnx, save_samples
from tvm_compress.bare.emit import write_project
from tvm_compress.bare.session import ProjectSession
from tvm_compress.build import build, compile_project, lower
from tvm_compress.flow import compress_job, load_job
from tvm_compress.progress import Progress
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target
from tvm_compress.targets.toolchains import missing_tools

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
SIX = ("cortex-a72", "armv7-neon", "cortex-m4", "cortex-m55", "riscv64gc")  # and x86
PLAIN = ("cortex-m0plus", "cortex-m3", "riscv32imc", "riscv64gcv")
FEEDS = 8


def require(name: str) -> None:
    missing = missing_tools(get_target(name))
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} not installed")


def ragged_onnx(path: Path) -> Path:
    """Strides, borders on one side and channel counts that fit no vector; a sum of two branches."""
    random = np.random.default_rng(11)
    shapes = {
        "a_w": (7, 3, 5, 3), "b_w": (7, 1, 3, 3), "c_w": (13, 7, 1, 1), "d_w": (13, 7, 3, 3),
        "fc_w": (5, 13),
    }  # fmt: skip
    arrays = {
        name: random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        for name, shape in shapes.items()
    }
    arrays["d_b"] = random.standard_normal(13)
    nodes = [
        helper.make_node("Conv", ["image", "a_w"], ["a"], "a", strides=[2, 1], pads=[2, 0, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"], "a_relu"),
        helper.make_node("Conv", ["ar", "b_w"], ["b"], "b", group=7, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "c_w"], ["c"], "c"),
        helper.make_node("Conv", ["ar", "d_w", "d_b"], ["d"], "d", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "d"], ["e"], "sum"),
        helper.make_node("Relu", ["e"], ["er"], "sum_relu"),
        helper.make_node("GlobalAveragePool", ["er"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc_w"], ["scores"], "fc", transB=1),
    ]
    save_samples(path, random, 24, 3, 11, 9)
    return save_onnx(path, nodes, arrays, (1, 3, 11, 9), "scores", (1, 5))


class Network:
    """Compressed once, by one recipe; samples, and what x86 makes of them."""

    def __init__(self, model: Path, data: Path, recipe: str, target: str = "host") -> None:
        self.job = load_job(model, recipe, target, data)
        self.module = compress_job(self.job, Progress())
        inputs, outputs = self.job.model.inputs, self.job.model.outputs
        self.sources = [spec.name for spec in inputs], [spec.name for spec in outputs]
        arrays = np.load(data)
        self.feeds = [
            {spec.name: arrays[spec.name][i][None] for spec in inputs} for i in range(FEEDS)
        ]
        session = Session(build(self.module, get_target("x86-64-v2")).executable, inputs, outputs)
        self.expected = [session.run(feed) for feed in self.feeds]

    def check(self, name: str, folder: Path, form: str = "object") -> None:
        """The same numbers on a target's emulated machine."""
        require(name)
        target = get_target(name)
        project = compile_project(lower(self.module, target), form).project
        write_project(project, "net", self.sources, folder)
        found = ProjectSession(folder, target).run_all(self.feeds)
        assert len({outputs[self.sources[1][0]].tobytes() for outputs in found}) > 1
        for wanted, outputs in zip(self.expected, found, strict=True):
            for key, array in wanted.items():
                np.testing.assert_array_equal(outputs[key], array)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    folder = tmp_path_factory.mktemp("ragged")
    model = ragged_onnx(folder / "ragged.onnx")
    done: dict[str, Network] = {}

    def by(recipe: str) -> Network:
        if recipe not in done:
            done[recipe] = Network(model, model.with_suffix(".npz"), recipe)
        return done[recipe]

    return by


@pytest.mark.parametrize("name", [*SIX, *PLAIN])
def test_one_recipe_everywhere(name: str, ragged: Callable[[str], Network], tmp_path: Path) -> None:
    ragged("int8").check(name, tmp_path)


@pytest.mark.parametrize("name", ["cortex-m0plus", "cortex-m55", "riscv32imc", "armv7-neon"])
def test_portable_c_by_the_targets_compiler(
    name: str, ragged: Callable[[str], Network], tmp_path: Path
) -> None:
    ragged("int8").check(name, tmp_path, "c")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cortex-m3", "w4a8"),
        ("riscv64gcv", "w4a8"),
        ("cortex-m3", "w4a8_group"),
        ("riscv64gcv", "w4a8_group"),
        ("riscv32imc", "codebook4"),
        ("riscv64gcv", "codebook4"),
    ],
)
def test_four_bits_stay_four_bits(
    name: str, recipe: str, ragged: Callable[[str], Network], tmp_path: Path
) -> None:
    ragged(recipe).check(name, tmp_path)
    sizes = stored(tmp_path / "net_constants.c")
    # [K, N] as [ceil(K / 2), N] bytes: the linear layer, and where groups say so, convolutions.
    assert math.ceil(13 / 2) * 5 in sizes
    if recipe != "w4a8":
        assert {math.ceil(7 / 2) * 13, math.ceil(7 * 9 / 2) * 13} <= set(sizes)


def stored(constants: Path) -> list[int]:
    """Elements of every array of constants."""
    return [int(size) for size in re.findall(r"\w+\[(\d+)\]", constants.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_one_recipe_six_targets(name: str, real: Network, tmp_path: Path) -> None:
    """x86 is the sixth: the others are compared with it."""
    real.check(name, tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Network:
    data = tmp_path_factory.mktemp("real") / "few.npz"
    np.savez(
        data, **{key: array[:32] for key, array in np.load(EXAMPLE / "calibration.npz").items()}
    )
    return Network(EXAMPLE / "model.onnx", data, "int8")


def test_cortex_m0_plus_gets_armv6_m(ragged: Callable[[str], Network], tmp_path: Path) -> None:
    """QEMU runs it on a core that has all of Thumb-2, so the instructions are read: the assembler
    knows which belong to ARMv6-M."""
    require("cortex-m0plus")
    target = get_target("cortex-m0plus")
    network = ragged("int8")
    project = compile_project(lower(network.module, target)).project
    write_project(project, "net", network.sources, tmp_path)
    listing = subprocess.run(
        ["arm-none-eabi-objdump", "-d", "--no-show-raw-insn", tmp_path / "libnet_kernels.a"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    instructions = {
        words[1]
        for line in listing.splitlines()
        if len(words := line.split()) > 1 and ":" in words[0]
    }
    assert {"muls", "ldrsb"} <= instructions
    wide = {name for name in instructions if name.endswith(".w")}
    assert not wide and not instructions & set(THUMB2)


THUMB2 = (
    "mla", "smull", "umull", "sdiv", "udiv", "cbz", "cbnz", "it", "ite", "itt", "movw", "movt",
    "ubfx", "sbfx", "bfi", "ssat", "usat", "ldrd", "strd", "tbb", "clz", "rbit", "orn",
)  # fmt: skip
