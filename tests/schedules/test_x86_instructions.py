"""What the inner loops of the x86 kernels are made of, read from the instructions emitted: also for
instruction sets that this machine may lack."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import tvm

from tvm_compress.schedules import (
    Conv2dSpec,
    MatmulSpec,
    WeightedSpec,
    pack_weight,
    prim_func,
    schedule,
)
from tvm_compress.targets import get_target

from .kernels import FLOAT, INT8, INT16

BYTES: dict[str, Any] = {**INT8, "data_dtype": "uint8"}  # as x86 stores activations


def conv(**fields: Any) -> Conv2dSpec:
    base: dict[str, Any] = {"batch": 1, "height": 29, "width": 29, "in_channels": 64}
    base |= {"out_channels": 64, "kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}
    return Conv2dSpec(**{**base, **fields})


POINTWISE: dict[str, Any] = {"kernel": (1, 1), "strides": (1, 1), "padding": (0, 0, 0, 0)}
LAYERS: dict[str, WeightedSpec] = {
    "float 3x3": conv(**FLOAT),
    "float 1x1": conv(**FLOAT, **POINTWISE),
    "float linear": MatmulSpec(rows=16, in_features=256, out_features=64, **FLOAT),
    "int8 3x3": conv(**BYTES),
    "int8 1x1": conv(**BYTES, **POINTWISE),
    "int8 linear": MatmulSpec(rows=16, in_features=256, out_features=64, **BYTES),
    "int16 1x1": conv(**INT16, **POINTWISE),
    "int8 depthwise": conv(**BYTES, groups=64),
    "float depthwise": conv(**FLOAT, groups=64),
}
# Layer => largest code of its weights, and the multiplying instruction on AVX2 and AVX-512, and
# with VNNI.
MULTIPLIES = {
    "float 3x3": (127, "vfmadd231ps", "vfmadd231ps"),
    "float 1x1": (127, "vfmadd231ps", "vfmadd231ps"),
    "float linear": (127, "vfmadd231ps", "vfmadd231ps"),
    "float depthwise": (127, "vfmadd", "vfmadd"),
    "int8 3x3": (127, "vpmaddwd", "vpdpbusd"),
    "int8 1x1": (127, "vpmaddwd", "vpdpbusd"),
    "int8 linear": (127, "vpmaddwd", "vpdpbusd"),
    "int16 1x1": (127, "vpmaddwd", "vpdpwssd"),
    "int8 depthwise": (127, "vpmaddwd", "vpmaddwd"),
}
CHAINED = dict.fromkeys(("int8 3x3", "int8 1x1", "int8 linear"), (15, "vpmaddubsw", "vpdpbusd"))
CASES = [(name, *found) for table in (MULTIPLIES, CHAINED) for name, found in table.items()]


@pytest.mark.parametrize("target_name", ["x86-64-v3", "x86-64-v4", "x86-64-v4-vnni"])
@pytest.mark.parametrize(
    ("name", "largest", "plain", "vnni"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES]
)
def test_inner_loop(target_name: str, name: str, largest: int, plain: str, vnni: str) -> None:
    """Whole registers are multiplied, nothing is done one by one, and no dense loop spills.

    Depthwise loops and chains, whose weights of some steps are wanted at once, spill a little.
    """
    target = dataclasses.replace(get_target(target_name), threads=1)
    multiply = vnni if target.has("avx512vnni") else plain
    loop = inner_loop(assembly(LAYERS[name], largest, target), multiply)
    register = "zmm" if target.vector_bits == 512 else "ymm"
    products = [line for line in loop if line[0].startswith(multiply)]
    assert products and all(register in line[1] for line in products)
    spilled = [line for line in loop if "rsp" in line[-1]]
    share = 0.5 if multiply == "vpmaddubsw" else 0.2 if "depthwise" in name else 0.0
    assert len(spilled) <= share * len(products)
    scalar = ("imul", "mulss", "vmulss", "vpextr", "vpinsr", "movsbl", "movzbl")
    assert not [line for line in loop if line[0].startswith(scalar)]


def assembly(spec: WeightedSpec, largest: int, target: Any) -> str:
    """Of the layer scheduled for the target, its codes between -largest and largest."""
    random = np.random.default_rng(0)
    codes = random.integers(-largest, largest + 1, spec.weight_shape)
    packed = pack_weight(spec, codes.astype(spec.weight_dtype), target)
    layer = spec if packed is None else packed[0]
    func = schedule(prim_func(layer), target).with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": func}), target=target.tvm_target())
    return str(library.inspect_source("asm"))


def inner_loop(text: str, multiply: str) -> list[list[str]]:
    """Instructions, each as mnemonic and operands, of the innermost loop that multiplies most."""
    loops = re.findall(r"\n(\.LBB\w+):((?:(?!\n\.LBB).)*?)\tj\w+\t\1\n", text, re.DOTALL)
    lines = [
        [line.split(None, 1) for line in body.splitlines() if re.match(r"\t[a-z]", line)]
        for _, body in loops
    ]
    return max(lines, key=lambda body: sum(line[0].startswith(multiply) for line in body))
