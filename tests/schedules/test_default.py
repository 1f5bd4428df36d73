"""The generic schedule: whatever comes is scheduled, and computes the same as before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

from tvm_compress.schedules import (
    SCHEDULE_ATTR,
    BatchMatmulSpec,
    Conv2dSpec,
    MatmulSpec,
    is_generic,
    pack_weight,
    prim_func,
    schedule,
)
from tvm_compress.schedules.table import table_lookup
from tvm_compress.targets import Target, get_target

from .kernels import INT8, assert_same, check, naive, random_array, run

X = (1, 13, 11, 33)
Case = Callable[[], tuple[list[te.Tensor], list[te.Tensor]]]


def placeholder(shape: tuple[int, ...], dtype: str = "float32", name: str = "x") -> te.Tensor:
    return te.placeholder(shape, dtype, name=name)


def add_int8() -> tuple[list[te.Tensor], list[te.Tensor]]:
    a, b = placeholder(X, "int8", "a"), placeholder(X, "int8", "b")
    total = te.compute(X, lambda *i: a[i].astype("int32") + b[i].astype("int32"), name="total")
    return [a, b], [te.compute(X, lambda *i: (total[i] >> 1).astype("int8"), name="half")]


def table() -> tuple[list[te.Tensor], list[te.Tensor]]:
    x, t = placeholder(X, "int8"), placeholder((256,), "int8", "t")
    return [x, t], [te.compute(X, lambda *i: t[x[i].astype("int32") + 128], name="looked_up")]


def large_relu() -> tuple[list[te.Tensor], list[te.Tensor]]:
    x = placeholder((1, 101, 103, 33))
    return [x], [topi.nn.relu(x)]


def per_channel() -> tuple[list[te.Tensor], list[te.Tensor]]:
    x, b = placeholder(X), placeholder((33,), name="b")
    return [x, b], [topi.nn.relu(topi.add(x, b))]


def pool(kind: str) -> Case:
    def case() -> tuple[list[te.Tensor], list[te.Tensor]]:
        x = placeholder(X)
        args = ([3, 3], [2, 2], [1, 1], [1, 1, 1, 1], kind)
        return [x], [topi.nn.pool2d(x, *args, layout="NHWC")]

    return case


def softmax() -> tuple[list[te.Tensor], list[te.Tensor]]:
    x = placeholder((2, 3, 41))
    return [x], [topi.nn.softmax(x)]


def argmax() -> tuple[list[te.Tensor], list[te.Tensor]]:
    x = placeholder((4, 50))
    return [x], [topi.argmax(x, -1)]


def one(function: Callable[[te.Tensor], te.Tensor], shape: tuple[int, ...] = X) -> Case:
    def case() -> tuple[list[te.Tensor], list[te.Tensor]]:
        x = placeholder(shape)
        return [x], [function(x)]

    return case


CASES: dict[str, tuple[Case, str]] = {
    "add_int8": (add_int8, "default.elementwise"),
    "table": (table, "default.elementwise"),
    "large_relu": (large_relu, "default.elementwise"),
    "per_channel": (per_channel, "default.elementwise"),
    "max_pool": (pool("max"), "default.reduction"),
    "avg_pool": (pool("avg"), "default.reduction"),
    "softmax": (softmax, "default.rows"),
    "global_sum": (one(lambda x: topi.sum(x, [1, 2])), "default.reduction"),
    "global_sum_keepdims": (one(lambda x: topi.sum(x, [1, 2], keepdims=True)), "default.reduction"),
    "last_axis_max": (one(lambda x: topi.max(x, -1)), "default.reduction"),
    "total": (one(topi.sum), "default.naive"),
    "argmax": (argmax, "default.naive"),
    "transpose": (one(lambda x: topi.transpose(x, [0, 3, 1, 2])), "default.elementwise"),
    "reshape": (one(lambda x: topi.reshape(x, (13, 363))), "default.elementwise"),
    "concat": (one(lambda x: topi.concatenate([x, topi.nn.relu(x)], 3)), "default.elementwise"),
    "pad": (one(lambda x: topi.nn.pad(x, [0, 1, 2, 0])), "default.elementwise"),
    "slice": (
        one(lambda x: topi.strided_slice(x, [0, 0, 0, 3], [1, 7, 7, 30], [1, 1, 1, 2])),
        "default.elementwise",
    ),
    "two_uses_of_exp": (
        one(lambda x: topi.multiply(topi.exp(x), topi.nn.relu(topi.exp(x)))),
        "default.elementwise",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scheduled_equals_naive(main_target: Target, name: str) -> None:
    case, form = CASES[name]
    inputs, outputs = case()
    before = naive(inputs, outputs)
    after = schedule(before, main_target)
    assert after.attrs["tirx.is_scheduled"]
    assert after.attrs[SCHEDULE_ATTR] == form
    rng = np.random.default_rng(0)
    arrays = [random_array(rng, [int(n) for n in t.shape], str(t.dtype)) for t in inputs]
    results = [(tuple(int(n) for n in t.shape), str(t.dtype)) for t in outputs]
    expected = run(before, main_target, arrays, *results)
    for ours, theirs in zip(run(after, main_target, arrays, *results), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_batch_matmul(main_target: Target, transpose_b: bool) -> None:
    """16-bit codes: what no template takes."""
    spec = BatchMatmulSpec(
        batch=2, rows=5, depth=9, columns=7, transpose_b=transpose_b,
        a_dtype="int16", b_dtype="uint8", acc_dtype="int64", a_zero_point=3, b_zero_point=100,
    )  # fmt: skip
    check(spec, main_target, "default.batch_matmul")


def test_unpacked_convolution_still_runs() -> None:
    spec = Conv2dSpec(
        batch=1,
        height=6,
        width=5,
        in_channels=4,
        out_channels=9,
        kernel=(3, 3),
        padding=(1, 1, 1, 1),
        **INT8,
    )
    func = schedule(prim_func(spec), get_target("host"))
    assert func.attrs[SCHEDULE_ATTR] == "default.conv2d"
    generic = tvm.target.Target("llvm")
    assert tvm.compile(func.with_attr("global_symbol", "main"), generic) is not None


def test_opaque_function_is_left_alone() -> None:
    buffer = tirx.decl_buffer((4,), "float32", "x")
    func = tirx.PrimFunc([buffer], tirx.Evaluate(tirx.const(0, "int32")))
    after = schedule(func, get_target("host"))
    assert after.attrs[SCHEDULE_ATTR] == "default.naive"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("width", [15, 16, 17, 40])
def test_channels_first_to_last(main_target: Target, channels: int, width: int) -> None:
    """An image is quantised and interleaved."""
    x = placeholder((2, channels, 9, width))
    codes = te.compute(
        (2, 9, width, channels),
        lambda b, i, j, c: te.max(te.min(x[b, c, i, j] * 40, 127.0), -128.0).astype("int8"),
    )
    for output in (codes, topi.transpose(x, [0, 2, 3, 1])):
        before = naive([x], [output])
        after = schedule(before, main_target)
        array = random_array(np.random.default_rng(0), [int(n) for n in x.shape], "float32")
        shape = (tuple(int(n) for n in output.shape), str(output.dtype))
        (expected,), (found,) = (run(f, main_target, [array], shape) for f in (before, after))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (1, 300, 7), (500, 1000)], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_table_of_bytes(main_target: Target, shape: tuple[int, ...], dtype: str) -> None:
    for entries in ("int8", "uint8"):
        func = table_lookup(shape, dtype, entries)
        rng = np.random.default_rng(0)
        codes = random_array(rng, shape, dtype)
        values = random_array(rng, (256,), entries)
        after = schedule(func, main_target)
        (found,) = run(after, main_target, [codes, values], (shape, entries))
        smallest = np.iinfo(dtype).min
        np.testing.assert_array_equal(found, values[codes.astype(np.int64) - smallest])


@pytest.mark.parametrize("name", ["x86-64-v3", "cortex-m4", "cortex-m55", "riscv64gc"])
def test_layers_without_a_kernel_of_the_target_are_known(name: str) -> None:
    target = get_target(name)
    spec = MatmulSpec(rows=1, in_features=32, out_features=16, **INT8)
    packed = pack_weight(spec, np.ones(spec.weight_shape, np.int8) * 90, target)
    assert packed is not None
    assert not is_generic(prim_func(packed[0]), target)
    doubles = spec.replace(acc_dtype="int64", data_dtype="int16", weight_zero_point=3)
    assert is_generic(prim_func(doubles), target)  # not packed: nobody reads it so
    assert not is_generic(te.create_prim_func(elementwise()), target)


def elementwise() -> list[te.Tensor]:
    """No anchor at all."""
    x = te.placeholder((4,), "float32", name="x")
    return [x, te.compute((4,), lambda i: x[i] + 1.0, name="y")]
