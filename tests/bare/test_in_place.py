"""Leads of in-place kernels: run over one block of memory, exact to the byte."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tvm import te, tirx

from tvm_compress.bare.in_place import leads
from tvm_compress.bare.kernel_code import _lower, c_source, to_bare
from tvm_compress.targets import get_target

TARGET = get_target("host")
Kernel = Callable[..., object]


def tensor(name: str, shape: tuple[int, ...], dtype: str = "int8") -> te.Tensor:
    return te.placeholder(shape, dtype, name=name)


def lowered(*tensors: te.Tensor) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """The naive kernel with its own order of accesses, and the same lowered."""
    function = te.create_prim_func(list(tensors))
    return function, _lower(function, TARGET, True)


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[tirx.PrimFunc], Kernel]:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (Debian: apt-get install gcc)")

    def compile_(function: tirx.PrimFunc) -> Kernel:
        bare = to_bare(function, "kernel", TARGET, True)
        source = c_source(bare)
        file, library = tmp_path / "kernel.c", tmp_path / "kernel.so"
        file.write_text(f"#include <stdbool.h>\n#include <stdint.h>\n{source}")
        subprocess.run(
            ["gcc", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-o", library, file],
            check=True,
        )
        kernel = ctypes.CDLL(str(library)).kernel
        spaces = [ctypes.create_string_buffer(w.bytes + 64) for w in bare.workspaces]
        return lambda *pointers: kernel(*pointers, *spaces)

    return compile_


def over(kernel: Kernel, inputs: list[np.ndarray], size: int, at: dict[int, int]) -> bytes:
    """Output of a run in which input i starts at[i] bytes behind the output; others lie apart."""
    memory = np.zeros(1 << 16, np.uint8)
    places = []
    free = 1 << 14
    for i, array in enumerate(inputs):
        start = at.get(i, free)
        if i not in at:
            free += array.nbytes
        memory[start : start + array.nbytes] = array.view(np.uint8).ravel()
        places.append(start)
    base = memory.ctypes.data
    kernel(*(ctypes.c_void_p(base + place) for place in [*places, 0]))
    return memory[:size].tobytes()


def a(shape: tuple[int, ...] = (6, 5, 4)) -> te.Tensor:
    return tensor("a", shape)


def add() -> list[te.Tensor]:
    x, y = a(), tensor("b", (6, 5, 4))
    return [x, y, te.compute(x.shape, lambda *i: x[i] + y[i], name="c")]


def widen() -> list[te.Tensor]:
    x = a()
    return [x, te.compute(x.shape, lambda *i: x[i].astype("int32") * 3, name="c")]


def backwards() -> list[te.Tensor]:
    x = a((40,))
    return [x, te.compute(x.shape, lambda i: x[39 - i], name="c")]


def shifted() -> list[te.Tensor]:
    x = a((40,))
    return [x, te.compute((37,), lambda i: x[i + 3], name="c")]


def look_back() -> list[te.Tensor]:
    x = a((40,))
    return [x, te.compute((37,), lambda i: x[i] + x[i + 3] * 2, name="c")]


def pool() -> list[te.Tensor]:
    x = a((8, 6, 3))
    kernel = [te.reduce_axis((0, 2), name=n) for n in ("ky", "kx")]

    def value(y: tirx.Var, z: tirx.Var, c: tirx.Var) -> tirx.PrimExpr:
        return te.max(x[y * 2 + kernel[0], z * 2 + kernel[1], c], axis=kernel)

    return [x, te.compute((4, 3, 3), value, name="c")]


def depthwise() -> list[te.Tensor]:
    x, w = a((6, 5, 4)), tensor("w", (3, 3, 4))
    padded = te.compute(
        (8, 7, 4),
        lambda y, z, c: tirx.if_then_else(
            tirx.all(y >= 1, y < 7, z >= 1, z < 6), x[y - 1, z - 1, c], tirx.const(0, "int8")
        ),
        name="padded",
    )
    k = [te.reduce_axis((0, 3), name=n) for n in ("ky", "kx")]
    y = te.compute(
        (6, 5, 4),
        lambda i, j, c: te.sum(padded[i + k[0], j + k[1], c] * w[k[0], k[1], c], axis=k),
        name="c",
    )
    return [x, w, y]


def look_up() -> list[te.Tensor]:
    x, table = tensor("a", (50,), "uint8"), tensor("table", (256,))
    return [x, table, te.compute((50,), lambda i: table[x[i].astype("int32")], name="c")]


def scale_by_last() -> list[te.Tensor]:
    x = a((40,))
    return [x, te.compute(x.shape, lambda i: x[i] + x[39], name="c")]


# Kernel => lead by input.
KERNELS = {
    add: {0: 0, 1: 0},
    widen: {0: 3 * 119},  # 4 bytes are written for 1 that is read
    backwards: {0: 39},
    shifted: {0: 0},
    look_back: {0: 3 * 36},
    pool: {0: 1},  # the maximum is kept in the output
    depthwise: {0: 0, 1: 29 * 4 + 1},  # a padded copy is made first; one sum at a time is kept
    look_up: {0: 0, 1: 49},  # any place of the table may be read last
    scale_by_last: {0: 0},
}


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
def test_runs_in_one_block_of_memory(
    make: Callable[[], list[te.Tensor]],
    compiled: Callable[[tirx.PrimFunc], Kernel],
) -> None:
    tensors = make()
    function, low = lowered(*tensors)
    found = {source: lead for (_, source), lead in leads(low).items()}
    generator = np.random.default_rng(0)
    inputs = [
        generator.integers(0, 100, [int(n) for n in t.shape]).astype(str(t.dtype))
        for t in tensors[:-1]
    ]
    out = tensors[-1]
    size = int(np.prod([int(n) for n in out.shape])) * np.dtype(str(out.dtype)).itemsize
    kernel = compiled(function)
    expected = over(kernel, inputs, size, {})
    assert found == KERNELS[make]
    for source, lead in found.items():
        assert over(kernel, inputs, size, {source: lead}) == expected
        if lead and (make, source) != (look_up, 1):  # the last look-up need not be of place 0
            assert over(kernel, inputs, size, {source: lead - 1}) != expected
