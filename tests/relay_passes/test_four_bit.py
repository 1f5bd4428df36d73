"""4-bit weights with tables and groups: from graph form to the shipped library, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tvm_compress.build import Built, build, compile_reference
from tvm_compress.relay_passes.encodings import FourBit, match_encoding
from tvm_compress.relay_passes.graph import Graph
from tvm_compress.relay_passes.ir import WIDE_INPUTS_ATTR
from tvm_compress.relay_passes.numerics.granularity import PerGroup
from tvm_compress.relay_passes.quantize import read_left_float
from tvm_compress.relay_passes.quantize_config import QuantizeConfig
from tvm_compress.report.schemes import describe_schemes
from tvm_compress.schedules.weights import pack_int4
from tvm_compress.targets import get_target

from .floats import Net, quantize, samples
from .floats import build as build_net
from .floats import run as run_graph

HOST = get_target("host")
CONFIGS = {
    "groups": QuantizeConfig(weights="int4", granularity=PerGroup(16)),
    "one table": QuantizeConfig(weights="codebook4"),
    "tables": QuantizeConfig(weights="codebook4", table_channels=4, granularity=PerGroup(32)),
    "normal": QuantizeConfig(weights="normal4"),
}


def encodings(module: tvm.IRModule) -> dict[str, FourBit]:
    """Weight's variable => its encoding."""
    graph = Graph(module["main"])
    found = {v.name: match_encoding(graph.values[v], module) for v in graph.values}
    return {name: item for name, item in found.items() if isinstance(item, FourBit)}


def run(executable: relax.VMExecutable, array: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return np.asarray(machine["main"](tvm.runtime.tensor(array)).numpy())


def check(module: tvm.IRModule, bound: float = 0.5) -> Built:
    """Simulation near the float module, shipped library equal to the reference."""
    built = build(module, HOST)
    reference = compile_reference(built.reference_module)
    for x in samples(module):
        x = np.clip(x, -3.9, 3.9)
        shipped = run(built.executable, x)
        np.testing.assert_array_equal(shipped, run(reference, x))
        np.testing.assert_allclose(shipped, run_graph(module, x), atol=bound)
    return built


def linears(net: Net, x: relax.Var) -> relax.Var:
    hidden = net("a_relu", op.nn.relu(net("a_bias", op.add(net.linear("a", x, 37), net.array(37)))))
    return net.linear("b", hidden, 10)


def convolutions(net: Net, x: relax.Var) -> relax.Var:
    """3x3, pointwise, strided and depthwise; 4 inputs leave the first one an odd row."""
    y = net.conv_relu("stem", x, 16)
    y = net.conv_relu("wide", y, 24)
    y = net.conv_relu("depthwise", y, 24, groups=24)
    y = net.conv_relu("pointwise", y, 40, kernel=1)
    return net.conv_relu("strided", y, 8, strides=2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_layers(config: QuantizeConfig, rows: int) -> None:
    module = build_net(linears, (rows, 75))
    quantised = quantize(module, config)
    assert read_left_float(quantised) == []
    assert set(encodings(quantised)) == {"a_weight", "b_weight"}
    for x in samples(module):
        x = np.clip(x, -3.9, 3.9)
        assert np.abs(run_graph(quantised, x) - run_graph(module, x)).max() < 0.5
    check(quantised)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_convolutions(config: QuantizeConfig) -> None:
    quantised = quantize(build_net(convolutions, (1, 4, 9, 8)), config)
    assert read_left_float(quantised) == []
    # Rows of 12 inputs are three words, and a depthwise channel has nine weights: int8 is no larger.
    assert set(encodings(quantised)) == {"wide_weight", "pointwise_weight", "strided_weight"}
    schemes = describe_schemes(quantised)
    assert schemes["stem"] == schemes["depthwise"] == "int8/channel × int8"
    check(quantised, bound=1.0)


def test_groups_do_not_cross_kernel_rows() -> None:
    config = QuantizeConfig(weights="int4", granularity=PerGroup(32))
    found = encodings(quantize(build_net(convolutions, (1, 4, 9, 8)), config))
    sizes = {name.removesuffix("_weight"): item.group_size for name, item in found.items()}
    # Rows of 48 and 120; the 24 inputs of the pointwise layer are one group.
    assert sizes == {"wide": 24, "pointwise": 0, "strided": 24}


def test_what_the_library_holds() -> None:
    """Half a byte a weight, a byte a group, sixteen a table; nothing else of the weights."""
    module = build_net(lambda net, x: net.linear("a", x, 128), (1, 512))
    for name, scales, tables in (("groups", 512 // 16, 0), ("tables", 512 // 32, 128 // 4)):
        built = check(quantize(module, CONFIGS[name]))
        held: dict[str, int] = {}
        for item in built.constants:
            held[item.role] = held.get(item.role, 0) + item.bytes
        assert held["weights"] == 512 * 128 // 2
        assert held.get("table", 0) == 16 * tables
        per_channel = 4 * 128  # the float scale of the sums, and perhaps that of the input
        assert held["scales"] in (scales * 128 + per_channel, scales * 128 + per_channel + 4)


def test_the_exported_file_has_no_other_copy(tmp_path: Path) -> None:
    module = build_net(lambda net, x: net.linear("a", x, 512), (1, 1024))
    sizes = {}
    for name, config in {"int8": QuantizeConfig(), "groups": CONFIGS["groups"]}.items():
        built = build(quantize(module, config), HOST)
        built.export(tmp_path / f"{name}.so")
        sizes[name] = (tmp_path / f"{name}.so").stat().st_size
    saved = 1024 * 512 // 2 - 1024 * 512 // 16  # half a byte each, less a byte a group
    assert abs(sizes["int8"] - sizes["groups"] - saved) < 16_384


def random_encoding(layout: str, shape: tuple[int, ...], size: int, channels: int) -> FourBit:
    rng = np.random.default_rng(0)
    n = shape[layout.index("O")]
    k = int(np.prod(shape)) // n
    count = -(-k // size) if size else 0
    return FourBit(
        layout,
        shape,
        pack_int4(rng.integers(-8, 8, (k, n)).astype(np.int8)),
        rng.uniform(0.01, 0.1, n).astype(np.float32),
        rng.integers(1, 256, (count, n)).astype(np.uint8) if size else None,
        rng.integers(-64, 65, (-(-n // channels), 16)).astype(np.int8) if channels else None,
        size,
        channels,
    )


@pytest.mark.parametrize(
    ("layout", "shape"), [("IO", (75, 21)), ("OIHW", (9, 5, 3, 2)), ("OIW", (6, 8, 3))]
)
@pytest.mark.parametrize(("size", "channels"), [(8, 0), (0, 4), (16, 1000), (0, 0)])
def test_the_body_is_the_definition(
    layout: str, shape: tuple[int, ...], size: int, channels: int
) -> None:
    """Decoding function, `decode()` and what the class's docstring says, index by index."""
    encoding = random_encoding(layout, shape, size, channels)

    def body(net: Net, x: relax.Var) -> Any:
        return net("out", op.add(x, net("w", encoding.call(net.builder))))

    module = build_net(body, shape)
    graph = Graph(module["main"])
    read = next(filter(None, (match_encoding(graph.values[v], module) for v in graph.values)))
    assert isinstance(read, FourBit)
    for ours, theirs in zip(read.parts, encoding.parts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    decoded = run_graph(module, np.zeros(shape, np.float32))
    np.testing.assert_array_equal(decoded, encoding.decode())
    order = [layout.index(letter) for letter in "HWIO" if letter in layout]
    matrix = decoded.transpose(order).reshape(-1, shape[layout.index("O")])
    for k, n in ((0, 0), (len(matrix) - 1, matrix.shape[1] - 1), (17, 3)):
        code = encoding.stored[k // 2, n] >> 4 * (k % 2) & 15
        value = int(code) - 16 * (code > 7)
        if channels:
            assert encoding.tables is not None
            value = int(encoding.tables[n // channels, code])
        if size:
            assert encoding.multiples is not None
            value *= int(encoding.multiples[k // size, n])
        assert matrix[k, n] == np.float32(value) * encoding.scales[n]


def test_reports_name_the_form() -> None:
    module = build_net(linears, (1, 75))
    words = {name: describe_schemes(quantize(module, c))["a"] for name, c in CONFIGS.items()}
    assert words == {
        "groups": "int4/group 16 × int8",
        "one table": "a table/channel × int8",
        "tables": "a table for 4/group 32 × int8",
        "normal": "a table/channel × int8",
    }


def test_a_large_bias_stays_within_int32() -> None:
    def body(net: Net, x: relax.Var) -> relax.Var:
        weight = net.rng.normal(0, 1e-6, (64, 8)).astype(np.float32)
        return net("b", op.add(net("a", op.matmul(x, relax.const(weight))), net.array(8)))

    for config in (CONFIGS["groups"], CONFIGS["tables"]):
        quantised = quantize(build_net(body, (1, 64)), config)
        (encoding,) = encodings(quantised).values()
        graph = Graph(quantised["main"])
        bias = next(v for v in graph.values if v.name == "b_bias")
        stored = graph.constant(graph.values[bias].args[0])
        assert stored is not None
        assert stored.dtype == np.int32
        assert np.abs(stored.astype(np.int64)).max() <= 2**30
        check(quantised)
        assert encoding.scales.min() > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_with_a_wide_input_get_bytes(config: QuantizeConfig) -> None:
    """A 16-bit input, which `equalize_inputs` may ask for, does not fit the kernels of 4 bits."""
    module = build_net(linears, (1, 80))
    module["main"] = module["main"].with_attr(WIDE_INPUTS_ATTR, '["x"]')
    quantised = quantize(module, config)
    assert set(encodings(quantised)) == {"b_weight"}
    assert describe_schemes(quantised)["a"] == "int8/channel × int16"
    check(quantised)
