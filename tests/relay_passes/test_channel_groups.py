"""Which channels leave together: the groups of small networks, and that cutting any of them out
computes what zeros in their place do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.relay_passes.channel_groups import find_channels
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.ir import shape_of
from tvm_compress.relay_passes.remove_channels import masked, shrunk
from tvm_compress.relay_passes.select import list_layers

from .floats import Net, build, samples

Body = Callable[[Net, relax.Var], relax.Var]
IMAGE = (1, 4, 6, 6)


def head(net: Net, x: relax.Var) -> relax.Var:
    return net.linear("fc", net("mean", op.mean(x, [2, 3])), 3)


def chain(net: Net, x: relax.Var) -> relax.Var:
    x = net("pool", op.nn.max_pool2d(net.conv_relu("a", x, 6), [2, 2], [2, 2]))
    x = net("scale", op.multiply(x, net.array(1, 6, 1, 1)))
    return head(net, net("tanh", op.tanh(net.conv_bias("b", x, 5))))


def residual(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("stem", x, 6)
    inner = net.conv_relu("a", x, 5)
    x = net("sum", op.nn.relu(net("add", op.add(net.conv_bias("b", inner, 6), x))))
    return head(net, net("again", op.add(x, net.conv("c", x, 6))))


def padded_shortcut(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("stem", x, 6)
    short = net("half", op.strided_slice(x, [2, 3], [0, 0], [6, 6], [2, 2]))
    wide = net("wide", op.nn.pad(short, [0, 0, 1, 3, 0, 0, 0, 0]))
    return head(net, net("add", op.add(net.conv_bias("a", x, 10, strides=2), wide)))


def concatenated(net: Net, x: relax.Var) -> relax.Var:
    parts = [net.conv_relu(name, x, size) for name, size in (("a", 4), ("b", 5))]
    constant = net.array(1, 2, 6, 6)
    x = net("cat", op.concat([parts[0], x, constant, parts[1]], 1))
    first, second = net("two", op.split(x, [7], 1)), None
    second = net("second", relax.TupleGetItem(first, 1))
    both = net("both", op.concat([second, net("first", relax.TupleGetItem(first, 0))], 1))
    return head(net, net.conv_relu("c", both, 6))


def mobile(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("stem", x, 6)
    wide = net("six", op.clip(net.conv_bias("expand", x, 12, kernel=1), 0.0, 6.0))
    wide = net.conv_relu("dw", wide, 24, groups=12)  # two outputs a channel
    squeezed = net("squeeze", op.mean(wide, [2, 3], keepdims=True))
    gate = net("gate", op.sigmoid(net.conv_bias("se", squeezed, 24, kernel=1)))
    wide = net("gated", op.multiply(wide, gate))
    return head(net, net("add", op.add(net.conv_bias("project", wide, 6, kernel=1), x)))


def shuffled(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 8)
    x = net.conv_relu("g", x, 16, groups=4)
    x = net("split", op.reshape(x, (1, 4, 4, 6, 6)))
    x = net("swap", op.permute_dims(x, [0, 2, 1, 3, 4]))
    x = net("merge", op.reshape(x, (1, 16, 6, 6)))
    return head(net, net.conv_relu("h", x, 8, groups=2))


def flattened(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 5)
    x = net("flat", op.reshape(x, (1, -1)))
    return net.linear("fc2", net("relu", op.nn.relu(net.linear("fc", x, 7))), 3)


def channels_last(net: Net, x: relax.Var) -> relax.Var:
    def conv(name: str, x: relax.Var, outputs: int, groups: int = 1) -> relax.Var:
        inputs = (shape_of(x) or ())[3] // groups
        layout = {"data_layout": "NHWC", "kernel_layout": "HWOI"}
        weight = net.array(3, 3, outputs, inputs)
        return net(name, op.nn.conv2d(x, weight, padding=1, groups=groups, **layout))

    x = net("last", op.permute_dims(x, [0, 2, 3, 1]))
    x = net("a_bias", op.add(conv("a", x, 6), net.array(6)))
    x = net("dw_relu", op.nn.relu(conv("dw", x, 6, groups=6)))
    x = net("pad", op.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0]))
    x = net("pool", op.nn.avg_pool2d(conv("b", x, 5), [2, 2], [2, 2], layout="NHWC"))
    x = net("flat", op.reshape(x, (1, 80)))
    return net.linear("fc", x, 3)


def transposed(net: Net, x: relax.Var) -> relax.Var:
    x = net.conv_relu("a", x, 6)
    up = net("up", op.nn.conv2d_transpose(x, net.array(6, 5, 2, 2), strides=2))
    big = net("big", op.image.resize2d(net("sum", op.nn.relu(up)), (6, 6)))
    return head(net, net.conv("b", big, 4))


def attention(net: Net, x: relax.Var, heads: int = 3, key_heads: int = 3) -> relax.Var:
    wide, width = (shape_of(x) or ())[2], 4

    def project(name: str, count: int) -> relax.Var:
        found = net(
            f"{name}_bias", op.add(net.linear(name, x, count * width), net.array(count * width))
        )
        split = net(f"{name}_heads", op.reshape(found, (1, 5, count, width)))
        return net(f"{name}_first", op.permute_dims(split, [0, 2, 1, 3]))

    def shared(name: str, value: relax.Var) -> relax.Var:
        if key_heads == heads:
            return value
        one = net(f"{name}_one", op.reshape(value, (1, key_heads, 1, 5, width)))
        sides = (1, key_heads, heads // key_heads, 5, width)
        many = net(f"{name}_many", op.broadcast_to(one, sides))
        return net(f"{name}_all", op.reshape(many, (1, heads, 5, width)))

    q, k, v = project("q", heads), project("k", key_heads), project("v", key_heads)
    k, v = shared("k", k), shared("v", v)
    k = net("kt", op.permute_dims(k, [0, 1, 3, 2]))
    scores = net("scaled", op.divide(net("qk", op.matmul(q, k)), relax.const(2.0, "float32")))
    mixed = net("mixed", op.matmul(net("soft", op.nn.softmax(scores, -1)), v))
    merged = net("back", op.permute_dims(mixed, [0, 2, 1, 3]))
    x2 = net.linear("o", net("flat", op.reshape(merged, (1, 5, heads * width))), wide)
    x = net("res", op.add(x, x2))
    norm = net("norm", op.nn.layer_norm(x, net.array(wide), net.array(wide), axes=[-1]))
    up = net("gelu", op.nn.gelu(net.linear("up", norm, 10)))
    return net("res2", op.add(norm, net.linear("down", up, wide)))


def grouped_queries(net: Net, x: relax.Var) -> relax.Var:
    return attention(net, x, 6, 2)


def one_head(net: Net, x: relax.Var) -> relax.Var:
    """Query and key share inner channels, which no batch axis holds."""
    q, k, v = (net.linear(name, x, 6) for name in "qkv")
    scores = net("qk", op.matmul(q, net("kt", op.permute_dims(k, [0, 2, 1]))))
    return net.linear("o", net("av", op.matmul(net("soft", op.nn.softmax(scores, -1)), v)), 8)


def packed_heads(net: Net, x: relax.Var) -> relax.Var:
    """Queries, keys and values from one layer, told apart by `take`."""
    packed = net("split", op.reshape(net.linear("qkv", x, 36), (1, 5, 3, 3, 4)))
    moved = net("moved", op.permute_dims(packed, [2, 0, 3, 1, 4]))
    q, k, v = (
        net(name, op.take(moved, relax.const(i, "int64"), 0)) for i, name in enumerate("qkv")
    )
    scores = net("qk", op.matmul(q, net("kt", op.permute_dims(k, [0, 1, 3, 2]))))
    mixed = net("mixed", op.matmul(net("soft", op.nn.softmax(scores, -1)), v))
    back = net("back", op.permute_dims(mixed, [0, 2, 1, 3]))
    return net.linear("o", net("flat", op.reshape(back, (1, 5, 12))), 8)


def recurrent(net: Net, x: relax.Var) -> relax.Var:
    """Three steps of a gated cell; both weights are the same constants at each."""
    into, again = net.array(8, 12), net.array(6, 12, spread=0.3)
    state = net("h0", op.tanh(net.linear("init", net("x0", op.reshape(x, (1, 40))), 6)))
    for step in range(3):
        now = net(f"x_{step}", op.reshape(op.strided_slice(x, [1], [step], [step + 1]), (1, 8)))
        both = net(
            f"sum_{step}",
            op.add(
                net(f"in_{step}", op.matmul(now, into)), net(f"re_{step}", op.matmul(state, again))
            ),
        )
        parts = net(f"parts_{step}", op.split(both, 2, 1))
        gate = net(f"gate_{step}", op.sigmoid(net(f"g_{step}", relax.TupleGetItem(parts, 0))))
        new = net(f"new_{step}", op.tanh(net(f"n_{step}", relax.TupleGetItem(parts, 1))))
        state = net(f"h_{step}", op.add(op.multiply(gate, new), state))
    return net.linear("fc", state, 3)


TOKENS = (1, 5, 8)
# Body, input, and of each group: labels, layers that compute them, layers that read them.
NETWORKS: list[tuple[Body, tuple[int, ...], list[tuple[int, str, str]]]] = [
    (chain, IMAGE, [(6, "a", "b"), (5, "b", "fc")]),
    (residual, IMAGE, [(6, "stem b c", "a c fc"), (5, "a", "b")]),
    (padded_shortcut, IMAGE, [(6, "stem a", "a fc"), (4, "a", "fc")]),
    (concatenated, IMAGE, [(4, "a", "c"), (5, "b", "c"), (6, "c", "fc")]),
    (mobile, IMAGE, [(6, "stem project", "expand fc"), (12, "expand dw se", "se project")]),
    (shuffled, IMAGE, [(2, "a", "g"), (2, "g", "h"), (4, "h", "fc")]),
    (flattened, IMAGE, [(5, "a", "fc"), (7, "fc", "fc2")]),
    (channels_last, IMAGE, [(6, "a dw", "b"), (5, "b", "fc")]),
    (transposed, IMAGE, [(6, "a", "up"), (5, "up", "b"), (4, "b", "fc")]),
    (attention, TOKENS, [(3, "q k v", "o"), (10, "up", "down")]),
    (grouped_queries, TOKENS, [(2, "q k v", "o"), (10, "up", "down")]),
    (one_head, TOKENS, [(6, "q k", ""), (6, "v", "o")]),
    (packed_heads, TOKENS, [(3, "qkv", "o")]),
    (recurrent, TOKENS, [(6, "init in_0 re_0", "re_0 fc")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "shape", "expected"), NETWORKS, ids=lambda x: getattr(x, "__name__", "")
)
def test_groups(body: Body, shape: tuple[int, ...], expected: list[tuple[int, str, str]]) -> None:
    found = find_channels(build(body, shape)["main"]).groups()
    described = [
        (
            len(group.labels),
            " ".join(layer.name for layer in group.producers),
            " ".join(layer.name for layer in group.consumers),
        )
        for group in found
    ]
    assert described == expected


def test_shrunk_equals_masked() -> None:
    """Random channels of every group leave; all networks in one module, which compiles faster."""
    functions, inputs = {}, {}
    for number, (body, shape, _) in enumerate(NETWORKS):
        module = build(body, shape)
        channels = find_channels(module["main"])
        rng = np.random.default_rng(number)
        keep = np.ones(len(channels.atoms), bool)
        for group in channels.groups():
            leaves = rng.permutation(group.labels)[: rng.integers(1, len(group.labels))]
            keep[leaves] = False
        shifts = {layer: rng.normal(0, 1, len(layer.outputs)) for layer in channels.layers[::2]}
        zeros, labelled = masked(channels, keep, {}, shifts)
        small = shrunk(labelled, keep)
        name = body.__name__
        for which, function in (("zeros", zeros), ("small", small)):
            symbol = f"{name}_{which}"
            functions[symbol] = function.with_attr("global_symbol", symbol)
        inputs[name] = samples(module)
        assert _macs(small) < _macs(module["main"])
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    machine = relax.VirtualMachine(tvm.compile(tvm.IRModule(functions), target), tvm.cpu())
    for name, arrays in inputs.items():
        for array in arrays:
            x = tvm.runtime.tensor(array)
            small, zeros = (machine[f"{name}_{which}"](x).numpy() for which in ("small", "zeros"))
            np.testing.assert_allclose(small, zeros, rtol=1e-4, atol=1e-5, err_msg=name)


def _macs(function: relax.Function) -> int:
    return sum(layer.macs for layer in list_layers(tvm.IRModule({"main": function})))


def test_steps_of_a_loop_go_on_sharing_their_weight() -> None:
    channels = find_channels(build(recurrent, TOKENS)["main"])
    keep = np.ones(len(channels.atoms), bool)
    keep[channels.groups()[0].labels[[1, 4]]] = False
    _, labelled = masked(channels, keep, {}, {})
    layers = find_channels(shrunk(labelled, keep)).layers
    assert [(len(layer.calls), layer.weight.shape) for layer in layers] == [
        (1, (40, 4)), (3, (8, 8)), (3, (4, 8)), (1, (4, 3)),
    ]  # fmt: skip


def test_steps_of_a_loop_go_on_sharing_their_bias() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        weight, bias = net.array(8, 8), net.array(8)
        state = net.linear("init", net("flat", op.reshape(x, (1, 40))), 8)
        for step in range(3):
            product = net(f"s{step}", op.matmul(state, weight))
            state = net(f"h{step}", op.tanh(net(f"b{step}", op.add(product, bias))))
        return net.linear("fc", state, 3)

    channels = find_channels(build(body, TOKENS)["main"])
    keep = np.ones(len(channels.atoms), bool)
    keep[channels.groups()[0].labels[[1, 4]]] = False
    result = shrunk(masked(channels, keep, {}, {})[1], keep)
    calls = {item.name: value for item, value in Graph(result).values.items()}
    biases = [calls[f"b{step}"].args[1] for step in range(3)]
    assert all(item.same_as(biases[0]) for item in biases)


def unknown(net: Net, x: relax.Var) -> relax.Var:
    """Sorting is along the channels: none of those may leave."""
    x = net("sorted", op.sort(net.conv_relu("a", x, 6), axis=1))
    return head(net, net.conv_relu("b", x, 5))


def softmaxed(net: Net, x: relax.Var) -> relax.Var:
    x = net("soft", op.nn.softmax(net.conv_relu("a", x, 6), 1))
    return head(net, net.conv_relu("b", x, 5))


def summed(net: Net, x: relax.Var) -> relax.Var:
    one = net("sum", op.sum(net.conv_relu("a", x, 6), [1], keepdims=True))
    return head(net, net.conv_relu("b", one, 5))


@pytest.mark.parametrize("body", [unknown, softmaxed, summed])
def test_operators_that_mix_channels_keep_them(body: Body) -> None:
    (group,) = find_channels(build(body)["main"]).groups()
    assert [layer.name for layer in group.producers] == ["b"]
