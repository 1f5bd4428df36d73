"""Grouping of kernels, names, and the recorded order of calls against what the VM calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.build import build
from tvm_compress.model import model_from_module
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.fuse_epilogues import FuseEpilogues
from tvm_compress.relay_passes.lower import LowerToKernels
from tvm_compress.relay_passes.narrow_indices import NarrowIndices
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

from .qdq import Expr, Graph, calls, graph, random_inputs

A, B, OUT = (0.0317, 11), (0.0573, -20), (0.0731, 4)


def conv(g: Graph, x: Expr, name: str) -> Expr:
    return g.emit(relax.op.nn.conv2d(x, g.weight((4, 4, 3, 3)), padding=1), name)


def fused(module: tvm.IRModule) -> tvm.IRModule:
    """The pass behind the passes that it follows in the pipeline."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            LowerToKernels(),
            transform.LegalizeOps(),
            NarrowIndices(),
            transform.AnnotateTIROpPattern(),
            transform.RewriteDataflowReshape(),
            FuseEpilogues(),
        ]
    )(module)


def groups(module: tvm.IRModule) -> dict[str, list[str]]:
    """Result of each call => kernels in it."""
    found = {}
    for binding in ir.bindings(module["main"]):
        value = binding.value
        if ir.op_name(value) == "relax.call_tir":
            found[binding.var.name] = [value.args[0].name_hint]
        elif isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            inner = module[value.op].body.blocks[0].bindings
            found[binding.var.name] = [
                b.value.args[0].name_hint.rstrip("0123456789") for b in inner
            ]
    return found


NHWC = {"x": (1, 4, 6, 5)}


def chain(g: Graph, x: Expr) -> Expr:
    x = g.qdq(x, *A)
    x = g.qdq(conv(g, x, "first"), *B, name="between")
    return g.quantize(g.emit(relax.op.nn.relu(conv(g, x, "second")), "relu"), *OUT)


def test_requantisation_joins_its_convolution() -> None:
    found = groups(fused(graph(NHWC, chain)))
    assert found["between_q"] == ["conv2d", "requantize"]
    assert found["y"] == ["conv2d", "requantize"]


def test_recorded_calls_name_layers_and_tensors() -> None:
    module = fused(graph(NHWC, chain))
    recorded = calls(module)
    assert [entry for entry in recorded if entry["layers"]] == [
        {"layers": ["first"], "output": "between_q"},
        {"layers": ["second"], "output": "y"},
    ]
    assert [entry["output"] for entry in recorded] == list(groups(module))


def residual(g: Graph, x: Expr) -> Expr:
    """A diamond: the block's input is read by the convolution and by the addition."""
    x = g.qdq(conv(g, g.qdq(x, *A), "stem"), *B, name="block")
    inner = g.qdq(g.emit(relax.op.nn.relu(conv(g, x, "inner")), "relu"), *A, name="inner_y")
    return g.quantize(g.emit(relax.op.add(conv(g, inner, "outer"), x), "sum"), *OUT)


def test_residual_joins_the_last_convolution_and_the_shared_input_stays() -> None:
    found = groups(fused(graph(NHWC, residual)))
    assert found["block_q"] == ["conv2d", "requantize"]
    assert found["inner_y_q"] == ["conv2d", "requantize"]
    assert found["y"] == ["conv2d", "requantize_sum"]


def two_branches(g: Graph, x: Expr) -> Expr:
    x = g.qdq(x, *A)
    total = g.emit(relax.op.add(conv(g, x, "left"), conv(g, x, "right")), "sum")
    return g.quantize(total, *OUT)


def test_one_group_holds_one_anchor() -> None:
    module = fused(graph(NHWC, two_branches))
    found = groups(module)
    assert found["y"] == ["conv2d", "requantize_sum"]
    assert sorted(name for entry in calls(module) for name in entry["layers"]) == ["left", "right"]
    assert all(len(entry["layers"]) <= 1 for entry in calls(module))


def read_twice(g: Graph, x: Expr) -> tuple[Expr, Expr]:
    """Accumulators with two readers are computed once and stored."""
    acc = conv(g, g.qdq(x, *A), "conv")
    return g.quantize(acc, *A, name="fine"), g.quantize(acc, *OUT, name="coarse")


def test_tensor_with_two_readers_is_computed_once() -> None:
    found = groups(fused(graph(NHWC, read_twice)))
    assert [kernels for kernels in found.values() if "conv2d" in kernels] == [["conv2d"]]
    # The transpose into graph order joins each of them.
    assert sum("requantize" in kernels for kernels in found.values()) == 2


def returned(g: Graph, x: Expr) -> tuple[Expr, Expr]:
    """The same value as a result and as an operand."""
    y = g.quantize(conv(g, g.qdq(x, *A), "conv"), *B, name="codes")
    z = g.emit(relax.op.sigmoid(g.dequantize(y, *B)), "sigmoid")
    return y, g.quantize(z, 1 / 256, -128, name="open")


def test_result_of_main_is_not_swallowed() -> None:
    found = groups(fused(graph(NHWC, returned)))
    assert found["codes"] == ["conv2d", "requantize"]
    assert sum("table" in kernels for kernels in found.values()) == 1


def pooled(g: Graph, x: Expr) -> Expr:
    x = g.qdq(conv(g, g.qdq(x, *A), "conv"), *B, name="features")
    x = g.qdq(g.emit(relax.op.mean(x, [2, 3]), "mean"), *A, name="pooled")
    return g.emit(relax.op.matmul(x, g.weight((4, 3), 1)), "logits")


def test_sums_of_a_pool_are_requantised_in_place() -> None:
    found = groups(fused(graph(NHWC, pooled)))
    assert found["pooled_q"] == ["sum", "requantize"]
    assert ["matmul", "dequantize"] in found.values()


def same_operand_twice(g: Graph, x: Expr) -> Expr:
    d = g.qdq(conv(g, g.qdq(x, *A), "conv"), *B, name="features")
    return g.quantize(g.emit(relax.op.matmul(d, d), "square"), *OUT)


def gated(g: Graph, x: Expr) -> Expr:
    """A broadcast product: the gate is smaller and stays a kernel of its own."""
    x = g.qdq(conv(g, g.qdq(x, *A), "conv"), *A, name="features")
    gate = g.qdq(g.emit(relax.op.mean(x, [2, 3], keepdims=True), "mean"), *A, name="pooled")
    gate = g.qdq(g.emit(relax.op.sigmoid(gate), "sigmoid"), 1 / 256, -128, name="open")
    return g.quantize(g.emit(relax.op.multiply(x, gate), "gated"), *OUT)


def test_product_with_a_smaller_operand() -> None:
    found = groups(fused(graph(NHWC, gated)))
    assert [k[:2] for k in found.values() if "product" in k] == [["product", "requantize"]]
    assert found["open_q"] == ["sum", "requantize", "table"] or found["open_q"] == ["table"]


def floats(g: Graph, x: Expr) -> Expr:
    y = g.emit(relax.op.nn.conv2d(x, g.const(g.rng.normal(0, 1, (4, 4, 3, 3))), padding=1), "conv")
    y = g.emit(relax.op.add(y, g.const(g.rng.normal(0, 1, (1, 4, 1, 1)))), "biased")
    return g.emit(relax.op.nn.relu(y), "relu")


def test_float_epilogues_fuse_too() -> None:
    found = groups(fused(graph(NHWC, floats)))
    assert found["relu"] == ["conv2d", "add", "relu"]


GRAPHS: dict[str, Any] = {
    body.__name__: body
    for body in (
        chain, residual, two_branches, read_twice, returned, pooled, gated, floats,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_recorded_calls_are_the_calls_of_the_vm(name: str) -> None:
    """In order, by symbol; and each call writes a tensor of the recorded variable's size."""
    module = graph(NHWC, GRAPHS[name])
    built = build(module, get_target("host"))
    model = model_from_module(module, name, "relax")
    session = Session(built.executable, model.inputs, model.outputs)
    seen: list[tuple[str, tuple[int, ...]]] = []

    def hook(symbol: str, before: bool, arguments: tuple[Any, ...]) -> None:
        if not before and not symbol.startswith("vm."):
            seen.append((symbol, tuple(arguments[-1].shape)))

    session.observe(hook)
    session.run({model.inputs[0].name: random_inputs(module, 0)[0]})
    assert [symbol for symbol, _ in seen] == [call.symbol for call in built.calls]
    shapes = {b.var.name: ir.shape_of(b.var) for b in ir.bindings(built.reference_module["main"])}
    for (symbol, shape), call in zip(seen, built.calls, strict=True):
        recorded = shapes.get(call.output)
        if recorded is not None:
            assert np.prod(shape, dtype=int) == np.prod(recorded, dtype=int), symbol


def test_branches_keep_their_calls() -> None:
    """An `If` reads fused values; its own operators are compiled, and the result is right."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 4, 6, 5], "float32"))
    flag = relax.Var("flag", relax.TensorType([], "bool"))
    with builder.function("main", [x, flag]):
        g = Graph(builder, 0)
        features = g.qdq(conv(g, g.qdq(x, *A), "conv"), *B, name="features")
        branches = []
        for operator in (relax.op.nn.relu, relax.op.negative):
            inner = relax.Var("inner", relax.TensorType([1, 4, 6, 5], "float32"))
            binding = relax.VarBinding(inner, builder.normalize(operator(features)))
            branches.append(relax.SeqExpr([relax.BindingBlock([binding])], inner))
        result = builder.emit(relax.If(flag, *branches), name_hint="branch")
        builder.emit_func_output(g.quantize(result, *OUT))
    module = builder.finalize()
    built = build(module, get_target("host"))
    assert [call.layers for call in built.calls if call.layers] == [("conv",)]
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    data = np.random.default_rng(0).normal(0, 2, (1, 4, 6, 5)).astype(np.float32)
    taken = [
        machine["main"](tvm.runtime.tensor(data), tvm.runtime.tensor(np.array(value, bool))).numpy()
        for value in (True, False)
    ]
    assert (taken[0] >= OUT[1]).all()
    assert (taken[1] < OUT[1]).any()
