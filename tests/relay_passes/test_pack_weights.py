"""Weight-only codes that no kernel reads: decoded before the float kernel, by name and by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.build import build, compile_reference
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.encodings import GroupWise
from tvm_compress.relay_passes.pack_weights import DECODED_ATTR
from tvm_compress.schedules import SCHEDULE_ATTR, schedule
from tvm_compress.targets import get_target

from .qdq import Expr, Graph, fuse, graph, lower, random_inputs

HOST = get_target("host")


def group_wise(
    g: Graph, shape: tuple[int, ...], layout: str, dtype: str, size: int, zero_points: bool
) -> tuple[GroupWise, relax.Var]:
    """A random weight in groups of `size`, and its decoded value in the graph."""
    columns = shape[layout.index("O")]
    depth = int(np.prod(shape)) // columns
    low, high = (-8, 8) if dtype == "int4" else (-128, 128)
    count = -(-depth // size)
    encoding = GroupWise.from_codes(
        g.rng.integers(low, high, (depth, columns)).astype(np.int8),
        g.rng.uniform(0.01, 0.02, (count, columns)),
        layout,
        shape,
        dtype,
        size,
        g.rng.integers(-8, 8, (count, columns)).astype(np.int8) if zero_points else None,
    )
    return encoding, g.emit(encoding.call(g.builder), "weight")


def conv(
    layout: str,
    op: Callable[..., Expr],
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    size: int,
    dtype: str = "int4",
    zero_points: bool = False,
    **attrs: Any,
) -> tuple[tvm.IRModule, GroupWise]:
    """relu(conv(x, decode(codes, scales)))"""
    encodings: list[GroupWise] = []

    def body(g: Graph, x: Expr) -> Expr:
        encoding, value = group_wise(g, weight, layout, dtype, size, zero_points)
        encodings.append(encoding)
        return g.emit(relax.op.nn.relu(g.emit(op(x, value, **attrs), "layer")), "out")

    return graph({"x": shape}, body), encodings[0]


def schedules_of(module: tvm.IRModule) -> list[str]:
    """The form chosen for each kernel of the shipped module, in the order of the calls."""
    fused = fuse(lower(module).module)
    names = [
        binding.value.args[0]
        for binding in ir.bindings(fused["main"])
        if ir.op_name(binding.value) == "relax.call_tir"
    ]
    return [str(schedule(fused[name], HOST).attrs[SCHEDULE_ATTR]) for name in names]


def run(executable: relax.VMExecutable, arrays: list[np.ndarray]) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result: np.ndarray = machine["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy()
    return result


CONV = relax.op.nn.conv2d
CONV1D = relax.op.nn.conv1d
TRANSPOSED = relax.op.nn.conv2d_transpose
DECODED = {
    "3x3": dict(layout="OIHW", op=CONV, shape=(1, 32, 9, 8), weight=(48, 32, 3, 3), size=32),
    # 45 positions: the last group of 4 holds one, the last byte of a column half a code.
    "ragged": dict(layout="OIHW", op=CONV, shape=(2, 5, 7, 6), weight=(19, 5, 3, 3), size=4),
    "odd group": dict(layout="OIHW", op=CONV, shape=(1, 6, 7, 6), weight=(34, 6, 3, 1), size=7),
    "one group": dict(layout="OIHW", op=CONV, shape=(1, 6, 7, 6), weight=(8, 6, 3, 3), size=54),
    "large": dict(layout="OIHW", op=CONV, shape=(1, 160, 4, 4), weight=(160, 160, 3, 3), size=32),
    "int8 codes": dict(
        layout="OIHW", op=CONV, shape=(1, 5, 7, 6), weight=(19, 5, 3, 3), size=4, dtype="int8"
    ),
    "dilated": dict(
        layout="OIHW", op=CONV, shape=(1, 5, 9, 9), weight=(16, 5, 3, 3), size=8, dilation=2
    ),
    "grouped": dict(
        layout="OIHW", op=CONV, shape=(1, 12, 7, 6), weight=(30, 4, 3, 3), size=8, groups=3
    ),
    "1d": dict(layout="OIW", op=CONV1D, shape=(1, 5, 30), weight=(7, 5, 5), size=8),
    "transposed": dict(
        layout="IOHW",
        op=TRANSPOSED,
        shape=(1, 6, 5, 4),
        weight=(6, 9, 3, 3),
        size=8,
        strides=(2, 2),
    ),
    "depthwise": dict(
        layout="OIHW", op=CONV, shape=(1, 21, 7, 6), weight=(21, 1, 3, 3), size=4, groups=21
    ),
}


@pytest.mark.parametrize(
    ("case", "zero_points"),
    [(case, True) for case in DECODED] + [("ragged", False), ("depthwise", False)],
)
def test_codes_without_a_kernel_are_decoded_before_a_scheduled_one(
    case: str, zero_points: bool
) -> None:
    module, encoding = conv(**DECODED[case], zero_points=zero_points)  # type: ignore[arg-type]
    built = build(module, HOST)
    assert built.decoded_per_call == ("layer",)
    (at,) = (k for k, call in enumerate(built.calls) if call.output == "layer_decoded")
    assert built.calls[at].layers == ()
    assert built.calls[at + 1].layers == ("layer",)
    form = "x86.depthwise" if case == "depthwise" else "x86.matrix"
    forms = schedules_of(module)
    assert form in forms
    assert not any(name.startswith(("default.conv2d", "default.naive")) for name in forms)
    arrays = random_inputs(module, 0)
    expected = run(compile_reference(built.reference_module), arrays)
    assert float(np.abs(expected).max()) > 0.1
    np.testing.assert_allclose(run(built.executable, arrays), expected, rtol=1e-5, atol=1e-5)
    # What ships are the codes, padded to whole vectors at most; never the float weight.
    weights = [c for c in built.constants if c.role == "weights"]
    assert [c.layer for c in weights] == ["layer"]
    stored = encoding.stored.nbytes
    assert stored <= weights[0].bytes <= max(2 * stored, stored + 1024)
    assert {c.layer for c in built.constants if c.role == "scales"} == {"layer"}


def test_codes_that_a_kernel_reads_are_not_decoded() -> None:
    module, _ = conv("OIHW", CONV, (1, 64, 5, 5), (32, 64, 1, 1), 32)
    built = build(module, HOST)
    assert built.decoded_per_call == ()
    assert "x86.matrix" in schedules_of(module)
    assert not any("decoded" in call.output for call in built.calls)


def test_two_layers_share_the_decoding_kernel_but_not_the_name() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        for name in ("first", "second"):
            _, weight = group_wise(g, (16, 16, 3, 3), "OIHW", "int4", 32, False)
            x = g.emit(relax.op.nn.conv2d(x, weight, padding=1), name)
        return x

    module = graph({"x": (1, 16, 6, 6)}, body)
    built = build(module, HOST)
    assert built.decoded_per_call == ("first", "second")
    decoding = [call for call in built.calls if call.output.endswith("_decoded")]
    assert [call.output for call in decoding] == ["first_decoded", "second_decoded"]
    assert len({call.symbol for call in decoding}) == 1
    assert [c.layer for c in built.constants if c.role == "weights"] == ["first", "second"]


def test_float_and_integer_layers_list_nothing() -> None:
    def body(g: Graph, x: Expr) -> Expr:
        return g.emit(relax.op.nn.conv2d(x, g.weight((4, 4, 3, 3))), "layer")

    fused = fuse(lower(graph({"x": (1, 4, 6, 6)}, body)).module)
    assert str(fused["main"].attrs[DECODED_ATTR]) == "[]"
