"""Random recipes on random small networks: what ships is what its reference graph computes, and
later steps keep what earlier ones made.

`TVM_COMPRESS_RANDOM_RECIPES=200 pytest tests/end_to_end/test_random_recipes.py` tries more, 300:330
others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import Expr
from tvm.relax import op

from tests.relay_passes.floats import Net, run, samples
from tests.relay_passes.floats import build as make
from tvm_compress.build import build, compile_reference
from tvm_compress.flow import compress_module
from tvm_compress.importers import load_model
from tvm_compress.recipe import parse_recipe
from tvm_compress.relay_passes import ir
from tvm_compress.relay_passes.correct_bias import decoded_weight
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.select import list_layers
from tvm_compress.relay_passes.sparsify import read_sparsified
from tvm_compress.runtime import Session
from tvm_compress.targets import get_target

ALWAYS = 5  # seeds that are tried by default: without loops, which take longest to compile
SEEDS = range(*map(int, os.environ.get("TVM_COMPRESS_RANDOM_RECIPES", str(ALWAYS)).split(":")))
SAMPLES = 12
TOLERANCE = 1e-3
HOST = get_target("host")


def random_network(seed: int) -> tvm.IRModule:
    """Convolutions of all kinds in a row, with sums and concatenations of branches; a linear end,
    perhaps behind a recurrent one. Some images are one pixel wide."""
    rng = np.random.default_rng(seed)

    def block(net: Net, x: relax.Var, name: str) -> relax.Var:
        channels = (ir.shape_of(x) or ())[1]
        wider = int(rng.choice([16, 24, 40]))
        kinds: dict[str, Callable[[], relax.Var]] = {
            "plain": lambda: net.conv_relu(name, x, wider, strides=int(rng.integers(1, 3))),
            "point": lambda: net.conv_relu(name, x, wider, kernel=1),
            "depthwise": lambda: net.conv_relu(name, x, channels, groups=channels),
            "multiplied": lambda: net.conv_relu(name, x, 2 * channels, groups=channels),
            "grouped": lambda: net.conv_relu(name, x, 2 * channels, groups=int(rng.choice([2, 4]))),
            "apart": lambda: net.conv_relu(name, x, wider, kernel=1, strides=2),
            "dilated": lambda: net.conv_relu(name, x, wider, dilation=2, padding=2),
            "residual": lambda: residual(net, x, name, channels),
            "concat": lambda: concat(net, x, name),
            "pool": lambda: net(name, op.nn.max_pool2d(x, (2, 2), strides=(2, 2))),
        }
        kind = str(rng.choice(list(kinds)))
        if kind == "pool" and min((ir.shape_of(x) or ())[2:]) < 4:
            kind = "point"
        return kinds[kind]()

    def residual(net: Net, x: relax.Var, name: str, channels: int) -> relax.Var:
        inner = net.conv_relu(f"{name}_1", x, 24)
        inner = net.conv_bias(f"{name}_2", inner, channels)
        return net(f"{name}_relu", op.nn.relu(net(f"{name}_sum", op.add(inner, x))))

    def concat(net: Net, x: relax.Var, name: str) -> relax.Var:
        parts = [net.conv_relu(f"{name}_1", x, 16, kernel=1), net.conv_relu(f"{name}_3", x, 16)]
        return net(name, op.concat(parts, axis=1))

    def recurrent(net: Net, x: relax.Var) -> relax.Var:
        """A gated cell over the image's rows: both weights are the same constants at each step."""
        _, channels, rows, _ = ir.shape_of(x) or ()
        means = net("means", op.mean(x, axis=[3]))  # [1, C, H]
        into, again = net.array(channels, 32, spread=channels**-0.5), net.array(16, 32, spread=0.25)
        state = net.linear("h0", net("last", op.reshape(means, (1, -1))), 16)
        for step in range(min(rows, 3)):
            row = net(f"row{step}", op.strided_slice(means, [2], [step], [step + 1]))
            now = net(f"x{step}", op.reshape(row, (1, channels)))
            products = [net(f"in{step}", op.matmul(now, into)),
                        net(f"re{step}", op.matmul(state, again))]  # fmt: skip
            parts = net(f"parts{step}", op.split(net(f"sum{step}", op.add(*products)), 2, 1))
            gate, fresh = (net(f"part{i}_{step}", relax.TupleGetItem(parts, i)) for i in (0, 1))
            new = op.multiply(
                net(f"gate{step}", op.sigmoid(gate)), net(f"new{step}", op.tanh(fresh))
            )
            state = net(f"h{step}_", op.add(net(f"gated{step}", new), state))
        return state

    def body(net: Net, x: relax.Var) -> relax.Var:
        x = net.conv_relu("stem", x, int(rng.choice([16, 32])))
        for number in range(int(rng.integers(1, 4))):
            x = block(net, x, f"b{number}")
        end = rng.choice(["mean", "flat", "recurrent"])
        if end == "mean" or (end == "recurrent" and seed < ALWAYS):
            pooled = net("mean", op.mean(x, axis=[2, 3]))
        elif end == "flat":
            pooled = net("flat", op.reshape(x, (1, -1)))
        else:
            pooled = recurrent(net, x)
        hidden: Expr = net("fc1_bias", op.add(net.linear("fc1", pooled, 32), net.array(32)))
        return net.linear("fc2", net("fc1_relu", op.nn.relu(hidden)), 10)

    return make(body, (1, 3, int(rng.choice([8, 11])), int(rng.choice([9, 9, 1]))), seed)


def random_steps(seed: int) -> list[str]:
    """Steps in an order that can work, each with a random config; at least one."""
    rng = np.random.default_rng(1000 + seed)

    def pick(*options: str) -> str:
        return str(rng.choice(options))

    share = f"{rng.uniform(0.3, 0.9):.2f}"
    # Mostly zeros, and insisted on: small layers would often stay as they are.
    pattern = pick("{block: {outputs: 16, inputs: 1}}", "{block: {outputs: 4, inputs: 2}}",
                   "unstructured", "{semi_structured: {kept: 2, of: 4}}")  # fmt: skip
    zeros = "" if "semi" in pattern else f"sparsity: {rng.uniform(0.5, 0.95):.2f}, "
    # Integers, and 4-bit codes with scales of groups or tables; some for weights alone.
    integers = pick("weights: int8", "weights: int8", "weights: int6", "weights: int4",
                    "weights: int4, granularity: {per_group: 32}", "weights: codebook4",
                    "weights: normal4, granularity: {per_group: 32}",
                    "weights: codebook4, table_channels: 4")  # fmt: skip
    activations = pick("int8", "int8", "uint8", "int16" if "int8" in integers else "int8")
    steps = {
        "equalize": "{}",
        "shrink": f"{{keep: {{operations: {{share: {share}}}}}, "
        f"criterion: {pick('l1', 'surgeon', 'thinet', 'merging')}, multiple: {pick('1', '8')}}}",
        "lowrank": f"{{form: {pick('channels', 'rows_and_columns', 'tucker', 'canonical')}, "
        f"rank: {{operations: {{share: {share}}}}}, insist: true}}",
        "structured": f"{{form: {pick('{circulant: {block: 4}}', 'hadamard')}, insist: true}}",
        "sparsify": f"{{{zeros}pattern: {pattern}, "
        f"criterion: {pick('magnitude', 'second_order', 'activation_aware')}, insist: true}}",
        "equalize_inputs": "{}",
        "quantize": f"{{{integers}, activations: {activations}}}",
        "correct_bias": "{}",
    }
    chosen = [name for name in steps if name != "correct_bias" and rng.random() < 0.5]
    if {"lowrank", "structured"} <= set(chosen):  # one of them, or it is refused
        chosen.remove(pick("lowrank", "structured"))
    if not chosen:
        chosen = ["sparsify", "quantize"]
    if chosen[-1] == "quantize" and rng.random() < 0.5:
        chosen.append("correct_bias")
    return [f"{name}: {steps[name]}" for name in chosen]


def session_run(executable: Any, module: tvm.IRModule, arrays: list[np.ndarray]) -> np.ndarray:
    loaded = load_model(module)
    session = Session(executable, loaded.inputs, loaded.outputs)
    feeds = [{loaded.inputs[0].name: array} for array in arrays]
    return np.stack([session.run(feed)[loaded.outputs[0].name] for feed in feeds])


@pytest.mark.parametrize("seed", SEEDS)
def test_artefact_is_its_reference_graph(seed: int) -> None:
    module, steps = random_network(seed), random_steps(seed)
    lines = "\n".join(f"  - {step}" for step in steps)
    recipe = parse_recipe(f"version: 1\nsteps:\n{lines}\n")
    data = [{"x": array} for array in samples(module, count=SAMPLES)]
    compressed = compress_module(module, recipe, "host", data)[0]
    built = build(compressed, HOST)
    arrays = samples(module, count=SAMPLES, seed=7)
    shipped = session_run(built.executable, module, arrays)
    reference = session_run(compile_reference(built.reference_module), module, arrays)
    scale = max(float(np.abs(reference).max()), 1e-6)
    is_integer = any(step.startswith("quantize") for step in steps)
    if is_integer and not built.left_float:
        np.testing.assert_array_equal(shipped, reference, err_msg=str(steps))
    else:
        np.testing.assert_allclose(shipped, reference, rtol=0, atol=TOLERANCE * scale)
    if not is_integer:
        # The module after the last step runs anywhere, and it is what ships.
        plain = np.stack([run(compressed, array) for array in arrays])
        np.testing.assert_allclose(shipped, plain, rtol=0, atol=TOLERANCE * scale)
    keeps_zeros(recipe, compressed)


def keeps_zeros(recipe: Any, compressed: tvm.IRModule) -> None:
    """Layers that are called sparse have these zeros in the end."""
    notes = read_sparsified(compressed)
    if "sparsify" not in [step.name for step in recipe.steps]:
        assert not notes
        return
    weights = {layer.name: layer for layer in list_layers(compressed)}
    assert notes and set(notes) <= set(weights)
    graph = Graph(compressed["main"])
    values = {variable.name: value for variable, value in graph.values.items()}
    for name, words in notes.items():
        stored = values[name].args[1]
        weight = decoded_weight(graph, stored, compressed)
        weight = ir.constant(stored) if weight is None else weight
        if "%" in words and weight is not None:
            wanted = int(words.rpartition(" % zeros")[0].split()[-1])
            assert 100 * np.mean(weight == 0) >= wanted - 0.6, (name, words)
