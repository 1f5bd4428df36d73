"""Canonicalisation, pass by pass: structure, names, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.relay_passes.canonicalize import (
    AttachBias,
    FoldBatchNorm,
    FoldConstants,
    FoldPad,
    FoldSafeSoftmax,
    NameLayers,
    RemoveIdentities,
    SplitConcat,
    canonicalize,
)
from tvm_compress.relay_passes.ir import array_const, constant, dtype_of, op_name, shape_of

Expr = Any
rng = np.random.default_rng(1)
TARGET = tvm.target.Target({"kind": "llvm", "opt-level": 0})  # compiling dominates


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("float32")


def const(*shape: int) -> Expr:
    return array_const(normal(*shape))


def module(
    build: Callable[[Callable[..., Expr], Expr], Expr],
    shape: tuple[int, ...] = (1, 4, 6, 6),
    dtype: str = "float32",
) -> tvm.IRModule:
    """`main(x)`: `build(emit, x)` gives the result."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))

    def emit(expr: Expr, name: str = "") -> Expr:
        return builder.emit(expr, name)

    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(build(emit, x))
        builder.emit_func_output(output)
    return builder.get()


def run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    vm = relax.VirtualMachine(tvm.compile(mod, TARGET), tvm.cpu())
    return vm["main"](tvm.runtime.tensor(x)).numpy()


def apply(passed: Any, mod: tvm.IRModule) -> tvm.IRModule:
    """What a pass alone makes of a module."""
    return passed(mod)


def names(mod: tvm.IRModule) -> list[str]:
    return [b.var.name for block in mod["main"].body.blocks for b in block.bindings]


def ops(mod: tvm.IRModule) -> list[str]:
    """Operators in order, without `relax.`."""
    return [
        (op_name(b.value) or type(b.value).__name__).removeprefix("relax.").removeprefix("nn.")
        for block in mod["main"].body.blocks
        for b in block.bindings
    ]


def unchanged_numbers(before: tvm.IRModule, after: tvm.IRModule) -> None:
    relax.analysis.well_formed(after)
    param = before["main"].params[0]
    x = normal(*(shape_of(param) or ()))
    if str(param.ty.dtype) != "float32":
        x = rng.integers(-100, 100, x.shape).astype(str(param.ty.dtype))
    expected, actual = run(before, x), run(after, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# ---- FoldBatchNorm -------------------------------------------------------------------------------


def batch_norm(x: Expr, channels: int, axis: int = 1) -> Expr:
    variance = array_const(np.abs(normal(channels)) + 0.2)
    parameters = [const(channels), const(channels), const(channels), variance]
    call = relax.op.nn.batch_norm(x, *parameters, axis=axis, epsilon=1e-3, training=False)
    return relax.TupleGetItem(call, 0)


def conv(x: Expr, out: int, into: int, **options: Any) -> Expr:
    return relax.op.nn.conv2d(x, const(out, into, 3, 3), padding=1, **options)


ANCHORS: dict[str, Callable[[Expr], Expr]] = {
    "conv2d": lambda x: conv(x, 8, 4),
    "grouped": lambda x: conv(x, 8, 2, groups=2),
    "depthwise": lambda x: conv(x, 4, 1, groups=4),
    "transposed": lambda x: relax.op.nn.conv2d_transpose(x, const(4, 5, 3, 3), strides=2),
    "transposed grouped": lambda x: relax.op.nn.conv2d_transpose(
        x, const(4, 3, 3, 3), strides=2, groups=2
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_batch_norm_folds_into(anchor: str, bias: bool) -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        y = emit(ANCHORS[anchor](x), "layer")
        channels = (shape_of(y) or ())[1]
        if bias:
            y = emit(relax.op.add(y, const(channels, 1, 1)), "layer_bias")
        return emit(relax.op.nn.relu(emit(batch_norm(y, channels), "norm")), "act")

    before = module(build)
    after = canonicalize()(before)
    assert [op for op in ops(after) if not op.startswith("conv2d")] == ["add", "relu"]
    assert names(after)[0] == "layer"
    if bias:
        assert names(after)[1] == "layer_bias"
    unchanged_numbers(before, after)


def test_batch_norm_folds_into_channels_last() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        y = relax.op.nn.conv2d(
            x, const(3, 3, 4, 8), padding=1, data_layout="NHWC", kernel_layout="HWIO"
        )
        return emit(batch_norm(emit(y, "layer"), 8, axis=3))

    before = module(build, (1, 6, 6, 4))
    after = canonicalize()(before)
    assert ops(after) == ["conv2d", "add"]
    assert shape_of(after["main"].body.blocks[0].bindings[1].value.args[1]) == (1, 1, 1, 8)
    unchanged_numbers(before, after)


def test_batch_norm_folds_into_matmul_and_conv1d() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        y = emit(relax.op.nn.conv1d(x, const(6, 4, 3)), "first")
        y = emit(relax.op.reshape(emit(batch_norm(y, 6)), (2, 24)))
        y = emit(relax.op.add(emit(relax.op.matmul(y, const(24, 5)), "fc"), const(5)))
        return emit(batch_norm(y, 5))

    before = module(build, (2, 4, 6))
    after = canonicalize()(before)
    assert ops(after) == ["conv1d", "add", "reshape", "matmul", "add"]
    unchanged_numbers(before, after)


def test_batch_norm_stays_where_another_reads_the_convolution() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        y = emit(conv(x, 4, 4), "layer")
        return emit(relax.op.add(emit(batch_norm(y, 4)), y))

    before = module(build)
    after = canonicalize()(before)
    assert ops(after) == ["conv2d", "multiply", "add", "add"]
    unchanged_numbers(before, after)


def test_batch_norm_before_a_convolution_becomes_scale_and_shift() -> None:
    before = module(lambda emit, x: emit(conv(emit(batch_norm(x, 4)), 4, 4)))
    after = canonicalize()(before)
    assert ops(after) == ["multiply", "add", "conv2d"]
    unchanged_numbers(before, after)


def test_quantised_weight_is_not_scaled() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        integers = array_const(rng.integers(-127, 127, (4, 4, 3, 3)).astype("int8"))
        scale, zero = array_const(np.full(4, 0.02, "float32")), array_const(np.zeros(4, "int8"))
        w = emit(relax.op.dequantize(integers, scale, zero, 0), "w")
        return emit(batch_norm(emit(relax.op.nn.conv2d(x, w, padding=1), "layer"), 4))

    before = module(build)
    after = canonicalize()(before)
    assert ops(after) == ["dequantize", "conv2d", "multiply", "add"]
    unchanged_numbers(before, after)


def test_scales_and_biases_around_a_matmul() -> None:
    """(alpha * x) w - a + b, divided by c."""

    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        x = emit(relax.op.multiply(x, array_const(np.float32(0.5))))
        y = emit(relax.op.matmul(x, const(4, 3)), "fc")
        y = emit(relax.op.subtract(y, const(3)))
        y = emit(relax.op.add(y, const(1, 3)))
        return emit(relax.op.divide(y, array_const(np.abs(normal(3)) + 0.5)))

    before = module(build, (2, 4))
    after = canonicalize()(before)
    assert ops(after) == ["matmul", "add"]
    unchanged_numbers(before, after)


def test_factor_that_varies_over_space_stays() -> None:
    before = module(
        lambda emit, x: emit(relax.op.multiply(emit(conv(x, 4, 4), "layer"), const(1, 1, 6, 6)))
    )
    assert ops(canonicalize()(before)) == ["conv2d", "multiply"]


def test_factor_that_enlarges_stays() -> None:
    before = module(
        lambda emit, x: emit(relax.op.multiply(emit(conv(x, 4, 4), "layer"), const(3, 4, 1, 1)))
    )
    assert ops(canonicalize()(before)) == ["conv2d", "multiply"]


# ---- FoldPad -------------------------------------------------------------------------------------


def same_pad(x: Expr, value: float = 0.0) -> Expr:
    return relax.op.nn.pad(x, [0, 0, 0, 0, 0, 1, 1, 2], "constant", value)


def test_pad_becomes_convolution_padding() -> None:
    before = module(lambda emit, x: emit(conv(emit(same_pad(x)), 4, 4), "layer"))
    after = canonicalize()(before)
    assert ops(after) == ["conv2d"]
    assert names(after) == ["layer"]
    (binding,) = after["main"].body.blocks[0].bindings
    assert [int(p) for p in binding.value.attrs.padding] == [1, 2, 2, 3]
    unchanged_numbers(before, after)


def test_pad_becomes_conv1d_padding_in_its_layout() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        x = emit(relax.op.nn.pad(x, [0, 0, 2, 1, 0, 0]))
        return emit(
            relax.op.nn.conv1d(x, const(3, 4, 5), data_layout="NWC", kernel_layout="WIO"), "layer"
        )

    before = module(build, (1, 6, 4))
    after = canonicalize()(before)
    assert ops(after) == ["conv1d"]


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: same_pad(x, 1.0),
        lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "reflect"),
        lambda x: relax.op.nn.pad(x, [0, 1, 0, 0, 1, 1, 1, 1]),
    ],
    ids=["not zero", "reflected", "batch"],
)
def test_pad_that_is_no_padding_stays(pad: Callable[[Expr], Expr]) -> None:
    before = module(lambda emit, x: emit(conv(emit(pad(x)), 4, 4)))
    assert ops(canonicalize()(before)) == ["pad", "conv2d"]


def test_pad_of_integers_with_their_zero_point() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        scale, zero = array_const(np.float32(0.1)), array_const(np.int32(-7))
        x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, 0, 1, 1, 0], "constant", -7.0))
        return emit(conv(emit(relax.op.dequantize(x, scale, zero)), 4, 4), "layer")

    before = module(build, dtype="int8")
    after = canonicalize()(before)
    assert ops(after) == ["dequantize", "conv2d"]
    unchanged_numbers(before, after)


def test_pad_of_integers_with_another_value_stays() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        scale, zero = array_const(np.float32(0.1)), array_const(np.int32(-7))
        x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, 0, 1, 1, 0], "constant", 0.0))
        return emit(conv(emit(relax.op.dequantize(x, scale, zero)), 4, 4), "layer")

    assert "pad" in ops(canonicalize()(module(build, dtype="int8")))


def test_average_pool_counts_the_padding() -> None:
    before = module(lambda emit, x: emit(relax.op.nn.avg_pool2d(emit(same_pad(x)), (3, 3), (2, 2))))
    after = canonicalize()(before)
    assert ops(after) == ["avg_pool2d"]
    unchanged_numbers(before, after)


def test_max_pool_of_what_is_never_negative() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        return emit(relax.op.nn.max_pool2d(emit(same_pad(emit(relax.op.nn.relu(x)))), (3, 3)))

    before = module(build)
    after = canonicalize()(before)
    assert ops(after) == ["relu", "max_pool2d"]
    unchanged_numbers(before, after)
    signed = module(lambda emit, x: emit(relax.op.nn.max_pool2d(emit(same_pad(x)), (3, 3))))
    assert ops(canonicalize()(signed)) == ["pad", "max_pool2d"]


# ---- RemoveIdentities ----------------------------------------------------------------------------

IDENTITIES: dict[str, Callable[[Callable[..., Expr], Expr], Expr]] = {
    "reshape": lambda emit, x: relax.op.reshape(x, (1, 4, 6, 6)),
    "reshape back": lambda emit, x: relax.op.reshape(
        emit(relax.op.reshape(x, (4, 36))), (1, 4, 6, 6)
    ),
    "squeeze, expand": lambda emit, x: relax.op.expand_dims(emit(relax.op.squeeze(x, [0])), 0),
    "permute": lambda emit, x: relax.op.permute_dims(x, [0, 1, 2, 3]),
    "permute back": lambda emit, x: relax.op.permute_dims(
        emit(relax.op.permute_dims(x, [0, 2, 3, 1])), [0, 3, 1, 2]
    ),
    "astype": lambda emit, x: relax.op.astype(x, "float32"),
    "dropout": lambda emit, x: relax.TupleGetItem(emit(relax.op.nn.dropout(x)), 0),
    "pad": lambda emit, x: relax.op.nn.pad(x, [0] * 8),
    "concat": lambda emit, x: relax.op.concat([x], 1),
    "clip": lambda emit, x: relax.op.clip(x, -np.inf, np.inf),
    "slice": lambda emit, x: relax.op.strided_slice(x, [1, 2], [0, 0], [4, 2**62]),
    "tile": lambda emit, x: relax.op.tile(x, [1, 1, 1, 1]),
    "broadcast": lambda emit, x: relax.op.broadcast_to(x, (1, 4, 6, 6)),
    "x + 0": lambda emit, x: relax.op.add(array_const(np.zeros((4, 1, 1), "float32")), x),
    "x - 0": lambda emit, x: relax.op.subtract(x, array_const(np.float32(0))),
    "x * 1": lambda emit, x: relax.op.multiply(x, array_const(np.ones(6, "float32"))),
    "x / 1": lambda emit, x: relax.op.divide(x, array_const(np.float32(1))),
    "max -inf": lambda emit, x: relax.op.maximum(x, array_const(np.float32(-np.inf))),
    "tuple": lambda emit, x: relax.TupleGetItem(emit(relax.Tuple([x, x])), 1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_is_removed(name: str) -> None:
    before = module(lambda emit, x: emit(relax.op.nn.relu(emit(IDENTITIES[name](emit, x))), "act"))
    after = canonicalize()(before)
    assert ops(after) == ["relu"]
    assert names(after) == ["act"]


def test_concat_of_a_split() -> None:
    def build(emit: Callable[..., Expr], x: Expr, order: tuple[int, int] = (0, 1)) -> Expr:
        pieces = emit(relax.op.split(x, 2, axis=1))
        items = [emit(relax.TupleGetItem(pieces, i)) for i in order]
        return emit(relax.op.nn.relu(emit(relax.op.concat(items, axis=1))))

    assert ops(canonicalize()(module(build))) == ["relu"]
    swapped = module(lambda emit, x: build(emit, x, (1, 0)))
    assert "concat" in ops(canonicalize()(swapped))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda emit, x: relax.op.nn.relu6(x), "clip"),
        (
            lambda emit, x: relax.op.minimum(
                emit(relax.op.maximum(x, array_const(np.float32(-1)))), array_const(np.float32(2))
            ),
            "clip",
        ),
        (
            lambda emit, x: relax.op.maximum(
                array_const(np.float32(-1)), emit(relax.op.minimum(x, array_const(np.float32(2))))
            ),
            "clip",
        ),
        (
            lambda emit, x: relax.op.minimum(emit(relax.op.nn.relu(x)), array_const(np.float32(6))),
            "clip",
        ),
        (lambda emit, x: relax.op.maximum(x, array_const(np.float32(0))), "relu"),
    ],
    ids=["relu6", "min of max", "max of min", "min of relu", "max 0"],
)
def test_bounds(build: Callable[..., Expr], expected: str) -> None:
    before = module(lambda emit, x: emit(build(emit, x)))
    after = canonicalize()(before)
    assert ops(after) == [expected]
    unchanged_numbers(before, after)


def test_integer_clip_over_the_whole_type() -> None:
    full = module(
        lambda emit, x: emit(relax.op.abs(emit(relax.op.clip(x, -128, 127)))), dtype="int8"
    )
    assert ops(canonicalize()(full)) == ["abs"]
    part = module(lambda emit, x: emit(relax.op.clip(x, -128, 126)), dtype="int8")
    assert ops(canonicalize()(part)) == ["clip"]


def test_slices_of_two_axes_become_one() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        y = emit(relax.op.strided_slice(x, [2], [0], [2**62], [2]))
        return emit(relax.op.strided_slice(y, [3], [-4], [-1], [2]))

    before = module(build)
    after = canonicalize()(before)
    assert ops(after) == ["strided_slice"]
    unchanged_numbers(before, after)


def test_moving_axes_of_size_one_is_a_reshape() -> None:
    before = module(lambda emit, x: emit(relax.op.permute_dims(x, [0, 2, 3, 1])), (1, 1, 6, 5))
    assert ops(canonicalize()(before)) == ["reshape"]


def test_permutations_compose() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        return emit(relax.op.permute_dims(emit(relax.op.permute_dims(x, [1, 2, 0])), [1, 0, 2]))

    before = module(build, (2, 3, 4))
    after = canonicalize()(before)
    assert ops(after) == ["permute_dims"]
    unchanged_numbers(before, after)


# ---- FoldConstants -------------------------------------------------------------------------------


def test_constant_expressions_fold() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        w = emit(relax.op.permute_dims(const(5, 6), [1, 0]))
        w = emit(relax.op.multiply(w, emit(relax.op.sqrt(array_const(np.float32(4))))))
        w = emit(relax.op.concat([w, emit(relax.op.astype(w, "float32"))], 1))
        b = emit(relax.op.strided_slice(const(30), [0], [3], [23], [2]))
        return emit(relax.op.add(emit(relax.op.matmul(x, w)), b))

    before = module(build, (2, 6))
    after = canonicalize()(before)
    assert ops(after) == ["matmul", "add"]
    unchanged_numbers(before, after)


def test_mask_made_from_nothing_folds() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        row = emit(relax.op.arange(0, 6, 1, dtype="int64"))
        column = emit(relax.op.expand_dims(row, 1))
        seen = emit(relax.op.less_equal(row, column))
        everywhere = emit(relax.op.full((6, 6), relax.const(True, "bool"), "bool"))
        seen = emit(relax.op.logical_and(seen, everywhere))
        mask = emit(relax.op.where(seen, relax.const(0.0), relax.const(-1e9)))
        return emit(relax.op.add(x, mask))

    before = module(build, (6, 6))
    after = canonicalize()(before)
    assert ops(after) == ["add"]
    unchanged_numbers(before, after)


@pytest.mark.parametrize(
    "operator", ["divide", "power", "greater", "where", "mean", "split", "take"]
)
def test_more_constant_operators(operator: str) -> None:
    a, b = array_const(np.abs(normal(4, 6)) + 0.1), array_const(np.abs(normal(6)) + 0.1)
    calls = {
        "divide": lambda emit: relax.op.divide(a, b),
        "power": lambda emit: relax.op.power(a, b),
        "greater": lambda emit: relax.op.astype(emit(relax.op.greater(a, b)), "float32"),
        "where": lambda emit: relax.op.where(emit(relax.op.less(a, b)), a, b),
        "mean": lambda emit: relax.op.mean(a, [0], keepdims=True),
        "split": lambda emit: relax.TupleGetItem(emit(relax.op.split(a, [1, 3], 0)), 1),
        "take": lambda emit: relax.op.take(a, array_const(np.array([3, 0], "int32")), 0),
    }
    before = module(
        lambda emit, x: emit(relax.op.add(x, emit(relax.op.sum(emit(calls[operator](emit)))))),
        (2, 6),
    )
    after = canonicalize()(before)
    assert ops(after) == ["add"]
    unchanged_numbers(before, after)


def test_integer_division_is_left_alone() -> None:
    a = array_const(np.array([7, -7], "int32"))
    b = array_const(np.array([2, 2], "int32"))
    before = module(
        lambda emit, x: emit(relax.op.add(x, emit(relax.op.divide(a, b)))), (2,), "int32"
    )
    assert ops(apply(FoldConstants(), before)) == ["divide", "add"]


def test_large_broadcast_is_left_alone() -> None:
    one = array_const(np.ones((1, 1), "float32"))
    before = module(
        lambda emit, x: emit(relax.op.add(x, emit(relax.op.broadcast_to(one, (2048, 1024))))),
        (2048, 1024),
    )
    assert "broadcast_to" in ops(apply(FoldConstants(), before))


def quantised_weight(emit: Callable[..., Expr], shape: tuple[int, ...], axis: int) -> Expr:
    size = shape[axis]
    integers = array_const(rng.integers(-127, 127, shape).astype("int8"))
    scale = array_const(np.linspace(0.01, 0.02, size).astype("float32"))
    zero = array_const(np.arange(size).astype("int8"))
    return emit(relax.op.dequantize(integers, scale, zero, axis), "w")


def test_permuted_quantised_weight_keeps_integers() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        w = quantised_weight(emit, (5, 6), 0)
        return emit(relax.op.matmul(x, emit(relax.op.permute_dims(w, [1, 0]))), "fc")

    before = module(build, (2, 6))
    after = canonicalize()(before)
    assert ops(after) == ["dequantize", "matmul"]
    value = after["main"].body.blocks[0].bindings[0].value
    assert constant(value.args[0]) is not None
    assert dtype_of(value.args[0]) == "int8"
    assert shape_of(value) == (6, 5)
    assert int(value.attrs.axis) == 1
    unchanged_numbers(before, after)


def test_reshaped_quantised_weight_keeps_integers() -> None:
    """Depthwise, TFLite: [1, 3, 3, C] => [3, 3, C, 1]."""

    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        w = quantised_weight(emit, (1, 3, 3, 4), 3)
        w = emit(relax.op.reshape(w, (3, 3, 4, 1)))
        return emit(
            relax.op.nn.conv2d(x, w, groups=4, data_layout="NHWC", kernel_layout="HWOI"), "dw"
        )

    before = module(build, (1, 6, 6, 4))
    after = canonicalize()(before)
    assert ops(after) == ["dequantize", "conv2d"]
    assert int(after["main"].body.blocks[0].bindings[0].value.attrs.axis) == 2
    unchanged_numbers(before, after)


def test_reshape_that_cuts_the_channels_stays() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        return emit(
            relax.op.add(x, emit(relax.op.reshape(quantised_weight(emit, (4, 6), 0), (2, 12))))
        )

    before = module(build, (2, 12))
    assert ops(canonicalize()(before)) == ["dequantize", "reshape", "add"]


def test_quantise_is_never_evaluated() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        scale, zero = array_const(np.float32(0.1)), array_const(np.int8(3))
        q = emit(relax.op.quantize(const(4), scale, zero))
        return emit(relax.op.add(x, emit(relax.op.dequantize(q, scale, zero))))

    assert ops(canonicalize()(module(build, (4,)))) == ["quantize", "dequantize", "add"]


def test_repeated_folds_share_one_constant() -> None:
    """What an unrolled loop repeats must not multiply the weights."""
    weight = const(6, 6)

    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        for step in range(3):
            w = emit(relax.op.permute_dims(weight, [1, 0]))
            x = emit(relax.op.matmul(x, w), f"cell_t{step}")
        return x

    after = canonicalize()(module(build, (2, 6)))
    constants = [b.value.args[1] for b in after["main"].body.blocks[0].bindings]
    assert len(constants) == 3
    assert all(c.same_as(constants[0]) for c in constants)


# ---- names, branches, what stays untouched -------------------------------------------------------


def test_names_are_unique_and_stable() -> None:
    def named(builder: relax.BlockBuilder, name: str, expr: Expr) -> Expr:
        expr = builder.normalize(expr)
        var = relax.DataflowVar(name, expr.ty)  # as it is, not made unique by the builder
        builder.emit_normalized(relax.VarBinding(var, expr))
        return var

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 4, 6, 6), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = named(builder, "conv1", relax.op.nn.relu(x))
            y = named(builder, "conv1", conv(y, 4, 4))  # the anchor's claim is stronger
            y = named(builder, "conv1", conv(y, 4, 4))
            y = named(builder, "lv3", conv(y, 4, 4))
            y = named(builder, "x", relax.op.nn.relu(y))
            output = builder.emit_output(named(builder, "9/bad name", relax.op.abs(y)))
        builder.emit_func_output(output)
    after = canonicalize()(builder.get())
    assert names(after) == ["conv1_3", "conv1", "conv1_2", "conv2d_0", "x_2", "n9_bad_name"]
    tvm.ir.assert_structural_equal(canonicalize()(after), after)
    assert names(canonicalize()(after)) == names(after)


def test_result_that_is_the_input() -> None:
    after = canonicalize()(module(lambda emit, x: emit(relax.op.reshape(x, (1, 4, 6, 6)))))
    x = normal(1, 4, 6, 6)
    np.testing.assert_array_equal(run(after, x), x)


def test_branches_become_functions() -> None:
    """As one function this module crashes: the branches would share storage."""
    weight, added = normal(4, 4), normal(4)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 4), "float32"))
    condition = relax.Var("c", relax.TensorType((), "bool"))
    with builder.function("main", [x, condition]):
        y = builder.emit(relax.op.nn.relu6(x), "before")

        def branch(expr: Expr, name: str) -> relax.SeqExpr:
            builder._begin_binding_block()
            inner = builder.emit(expr, name)
            inner = builder.emit(relax.op.reshape(inner, (2, 4)))
            return relax.SeqExpr([builder._end_block()], inner)

        result = builder.emit(
            relax.If(
                condition,
                branch(relax.op.matmul(y, array_const(weight)), "dense"),
                branch(relax.op.add(y, array_const(added)), "shift"),
            )
        )
        result = builder.emit(relax.op.nn.relu(result), "after")
        builder.emit_func_output(result)
    after = canonicalize()(builder.get())
    relax.analysis.well_formed(after)
    outlined = {g.name_hint: str(f) for g, f in after.functions_items()}
    assert set(outlined) == {"main", "value_0_then", "value_0_else"}
    assert "dense" in outlined["value_0_then"]
    assert "reshape" not in "".join(outlined.values())
    array = normal(2, 4)
    clipped = np.clip(array, 0, 6)
    for taken, expected in ((True, clipped @ weight), (False, clipped + added)):
        arguments = [tvm.runtime.tensor(array), tvm.runtime.tensor(np.array(taken))]
        vm = relax.VirtualMachine(tvm.compile(after, TARGET), tvm.cpu())
        result = vm["main"](*arguments).numpy()
        np.testing.assert_allclose(result, np.maximum(expected, 0), rtol=1e-5, atol=1e-6)
    again = canonicalize()(after)
    assert {g.name_hint for g in again.get_global_vars()} == set(outlined)


def test_decodings_and_attributes_stay() -> None:
    """A private encoding function is not rewritten, and its call is not folded."""
    builder = relax.BlockBuilder()
    codes = relax.Var("codes", relax.TensorType((4, 4), "int8"))
    with builder.function("decode", [codes], attrs={"tvm_compress.encoding": "test"}, private=True):
        with builder.dataflow():
            w = builder.emit(relax.op.astype(codes, "float32"))
            w = builder.emit_output(relax.op.add(w, array_const(np.float32(0))))
        builder.emit_func_output(w)
    decode = builder.get().get_global_var("decode")
    x = relax.Var("x", relax.TensorType((2, 4), "float32"))
    with builder.function("main", [x], attrs={"tvm_compress.input_names": ["X:0"]}):
        with builder.dataflow():
            stored = array_const(np.ones((4, 4), "int8"))
            w = builder.emit(relax.Call(decode, [stored]), "w")
            y = builder.emit_output(relax.op.matmul(x, w))
        builder.emit_func_output(y)
    after = canonicalize()(builder.get())
    assert list(after["main"].attrs["tvm_compress.input_names"]) == ["X:0"]
    assert ops(after) == ["Call", "matmul"]
    (kept,) = (f for g, f in after.functions_items() if g.name_hint == "decode")
    assert "add" in str(kept)


def test_dead_code_goes() -> None:
    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        emit(conv(x, 4, 4), "unused")
        return emit(relax.op.nn.relu(x), "act")

    assert names(canonicalize()(module(build))) == ["act"]


def test_each_pass_alone_in_a_sequential() -> None:
    before = module(lambda emit, x: emit(batch_norm(emit(conv(emit(same_pad(x)), 8, 4)), 8)))
    passes = [FoldPad(), FoldBatchNorm(), RemoveIdentities(), FoldConstants(), NameLayers()]
    after = tvm.transform.Sequential(passes)(before)
    assert ops(after) == ["conv2d", "add"]
    unchanged_numbers(before, after)


def test_product_of_joined_operands_is_split() -> None:
    weight = const(7, 5)

    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        state = emit(relax.op.tanh(emit(relax.op.strided_slice(x, [1], [0], [3]), "cut")), "state")
        joined = emit(relax.op.concat([x, state], axis=1), "joined")
        return emit(relax.op.matmul(joined, weight), "cell")

    before = module(build, (1, 4))
    after = apply(SplitConcat(), before)
    assert [op for op in ops(after) if op in ("concat", "matmul", "add")][-3:].count("matmul") == 2
    assert {"cell_in0", "cell_in1"} <= set(names(after))
    unchanged_numbers(before, after)


def test_bias_behind_a_sum_goes_to_its_product() -> None:
    def gate(emit: Callable[..., Expr], x: Expr) -> Expr:
        left = emit(relax.op.matmul(x, const(4, 5)), "left")
        right = emit(relax.op.matmul(emit(relax.op.tanh(x), "state"), const(4, 5)), "right")
        return emit(relax.op.add(emit(relax.op.add(left, right), "sum"), const(5)), "biased")

    before = module(gate, (1, 4))
    after = apply(AttachBias(), before)
    values = {b.var.name: b.value for block in after["main"].body.blocks for b in block.bindings}
    assert values["left_bias"].args[0].name == "left"
    assert [item.name for item in values["biased"].args] == ["left_bias", "right"]
    unchanged_numbers(before, after)


def test_bias_of_one_number_or_of_a_shared_sum_stays() -> None:
    def scalar(emit: Callable[..., Expr], x: Expr) -> Expr:
        total = emit(relax.op.add(emit(relax.op.matmul(x, const(4, 4)), "left"), x), "sum")
        return emit(relax.op.add(total, const(1)), "biased")

    def shared(emit: Callable[..., Expr], x: Expr) -> Expr:
        total = emit(relax.op.add(emit(relax.op.matmul(x, const(4, 4)), "left"), x), "sum")
        return emit(relax.op.multiply(emit(relax.op.add(total, const(4)), "biased"), total), "out")

    for build in (scalar, shared):
        before = module(build, (1, 4))
        assert ops(apply(AttachBias(), before)).count("add") == 2


def test_zeros_take_what_is_multiplied_by_them_along() -> None:
    def first_step(emit: Callable[..., Expr], x: Expr) -> Expr:
        zeros = array_const(np.zeros((1, 4), np.float32))
        held = emit(relax.op.multiply(emit(relax.op.sigmoid(x), "gate"), zeros), "held")
        return emit(relax.op.add(held, emit(relax.op.tanh(x), "new")), "state")

    before = module(first_step, (1, 4))
    after = canonicalize()(before)
    assert ops(after) == ["tanh"]
    unchanged_numbers(before, after)


def test_constant_state_becomes_a_bias_and_other_axes_stay() -> None:
    def first_step(emit: Callable[..., Expr], x: Expr) -> Expr:
        joined = emit(relax.op.concat([x, const(1, 3)], axis=1), "joined")
        return emit(relax.op.matmul(joined, const(7, 5)), "cell")

    before = module(first_step, (1, 4))
    after = apply(SplitConcat(), before)
    assert ops(after).count("matmul") == 1
    unchanged_numbers(before, after)

    def rows(emit: Callable[..., Expr], x: Expr) -> Expr:
        joined = emit(relax.op.concat([x, x], axis=0), "joined")
        return emit(relax.op.matmul(joined, const(4, 5)), "cell")

    before = module(rows, (1, 4))
    assert ops(apply(SplitConcat(), before)).count("matmul") == 1


# --- softmax with a guard against rows that are hidden altogether -------------------------------

VISIBLE = np.where(np.tri(6, dtype=bool), 0, -np.inf).astype("float32")


def guarded_softmax(
    mask: np.ndarray | None, product: bool = True, bound: float = -np.inf
) -> tvm.IRModule:
    """As `torch.export` writes attention: where(not any(x != -inf), 0, softmax(x))."""

    def build(emit: Callable[..., Expr], x: Expr) -> Expr:
        if product:
            x = emit(relax.op.matmul(x, const(6, 6)))
        if mask is not None:
            x = emit(relax.op.add(x, array_const(mask)))
        softmax = emit(relax.op.nn.softmax(x, -1))
        seen = emit(relax.op.logical_not(emit(relax.op.equal(x, relax.const(bound)))))
        seen = emit(relax.op.max(emit(relax.op.astype(seen, "int8")), [-1], keepdims=True))
        hidden = emit(relax.op.logical_not(emit(relax.op.astype(seen, "bool"))))
        return emit(
            relax.op.where(hidden, emit(relax.op.full_like(softmax, relax.const(0.0))), softmax)
        )

    return module(build, (6, 6))


@pytest.mark.parametrize("mask", [None, VISIBLE], ids=["no mask", "causal"])
def test_guard_of_rows_that_cannot_be_hidden_goes(mask: np.ndarray | None) -> None:
    before = guarded_softmax(mask)
    after = canonicalize()(before)
    assert ops(after) == (["matmul", "softmax"] if mask is None else ["matmul", "add", "softmax"])
    unchanged_numbers(before, after)


@pytest.mark.parametrize("case", ["row hidden by the mask", "input", "another bound"])
def test_guard_that_may_be_needed_stays(case: str) -> None:
    hidden = VISIBLE.copy()
    hidden[3] = -np.inf
    before = {
        "row hidden by the mask": lambda: guarded_softmax(hidden),
        "input": lambda: guarded_softmax(VISIBLE, product=False),
        "another bound": lambda: guarded_softmax(None, bound=0.0),
    }[case]()
    assert "where" in ops(canonicalize()(before))
    assert "where" in ops(FoldSafeSoftmax()(before))
    unchanged_numbers(before, canonicalize()(before))
