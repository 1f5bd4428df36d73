"""ONNX import, one path each, on models of a few nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_compress.errors import ModelError
from tvm_compress.importers import load_model
from tvm_compress.importers.onnx import fold
from tvm_compress.importers.onnx import graph as graph_module
from tvm_compress.model import Model

Build = Callable[..., onnx.ModelProto]
Agrees = Callable[..., Model]
Count = Callable[[Model], Counter[str]]
node = helper.make_node
rng = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("float32")


def test_convolutions(build: Build, agrees: Agrees, count: Count) -> None:
    """1-d, grouped, depthwise, dilated, transposed, automatic padding."""
    proto = build(
        [
            node("Conv", ["x", "w1", "b1"], ["a"], "/net/net.0/first/Conv", pads=[1, 1, 1, 1]),
            node("Conv", ["a", "w2"], ["b"], group=2, dilations=[2, 2], pads=[2, 1, 2, 3]),
            node("Conv", ["b", "w3"], ["c"], group=8, strides=[2, 2], auto_pad="SAME_UPPER"),
            node(
                "ConvTranspose",
                ["c", "w4", "b4"],
                ["d"],
                group=2,
                strides=[2, 2],
                output_padding=[1, 1],
            ),
            node("Reshape", ["d", "shape"], ["e"]),
            node("Conv", ["e", "w5"], ["y"], pads=[2, 0]),
        ],
        {"x": (1, 4, 9, 7)},
        ["y"],
        {
            "w1": weights(8, 4, 3, 3),
            "b1": weights(8),
            "w2": weights(8, 4, 3, 3),
            "w3": weights(8, 1, 3, 3),
            "w4": weights(8, 3, 3, 3),
            "b4": weights(6),
            "w5": weights(5, 6, 4),
            "shape": np.array([1, 6, -1], "int64"),
        },
    )
    model = agrees(proto)
    operators = count(model)
    assert operators["relax.nn.conv2d"] == 3
    assert operators["relax.nn.conv2d_transpose"] == 1
    assert operators["relax.nn.conv1d"] == 1
    assert "relax.nn.pad" not in operators
    assert model.module["main"].body.blocks[0].bindings[0].var.name == "net_0_first"


def test_batch_norm_and_gemm(build: Build, agrees: Agrees, count: Count) -> None:
    proto = build(
        [
            node("Gemm", ["x", "w", "b"], ["a"], "fc", transB=1, alpha=0.5, beta=2.0),
            node("BatchNormalization", ["a", "g", "be", "m", "v"], ["c"], epsilon=1e-3),
            node("Relu", ["c"], ["y"]),
        ],
        {"x": (3, 6)},
        ["y"],
        {
            "w": weights(5, 6),
            "b": weights(5),
            "g": weights(5),
            "be": weights(5),
            "m": weights(5),
            "v": np.abs(weights(5)) + 0.1,
        },
    )
    assert count(agrees(proto)) == {"relax.matmul": 1, "relax.add": 1, "relax.nn.relu": 1}


@pytest.mark.parametrize("opset", [6, 11, 17])
@pytest.mark.parametrize(
    ("low", "high", "operator"),
    [(0.0, 6.0, "relax.clip"), (0.0, None, "relax.nn.relu"), (None, 1.5, "relax.minimum")],
)
def test_clip(
    opset: int,
    low: float | None,
    high: float | None,
    operator: str,
    build: Build,
    agrees: Agrees,
    count: Count,
) -> None:
    bounds: dict[str, Any] = {name: v for name, v in (("min", low), ("max", high)) if v is not None}
    constants = {name: np.float32(value) for name, value in bounds.items()}
    if opset < 11:
        clip = node("Clip", ["x"], ["y"], **bounds)
        constants = {}
    else:
        clip = node("Clip", ["x", *(n if n in constants else "" for n in ("min", "max"))], ["y"])
    proto = build([clip], {"x": (2, 3)}, ["y"], constants, opset=opset)
    if opset == 6 and high is None:  # this version's defaults are finite numbers
        model = load_model(proto)
        assert count(model) in ({"relax.nn.relu": 1}, {"relax.clip": 1})
        return
    assert count(agrees(proto)) == {operator: 1}


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_with_computed_widths(mode: str, build: Build, agrees: Agrees, count: Count) -> None:
    """What torch exports: the widths come from Concat, Reshape, Slice, Transpose and Cast."""
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    proto = build(
        [
            node("ConstantOfShape", ["count"], ["zeros"], value=zero),
            node("Concat", ["given", "zeros"], ["flat"], axis=0),
            node("Reshape", ["flat", "pairs"], ["grid"]),
            node("Slice", ["grid", "last", "lowest", "axis0", "minus1"], ["reversed"]),
            node("Transpose", ["reversed"], ["columns"], perm=[1, 0]),
            node("Reshape", ["columns", "line"], ["ordered"]),
            node("Cast", ["ordered"], ["widths"], to=TensorProto.INT64),
            node("Pad", ["x", "widths"], ["y"], mode=mode),
        ],
        {"x": (1, 2, 4, 5)},
        ["y"],
        {
            "count": np.array([4], "int64"),
            "given": np.array([1, 2, 3, 0], "int64"),
            "pairs": np.array([-1, 2], "int64"),
            "last": np.array([-1], "int64"),
            "lowest": np.array([-(2**63) + 1], "int64"),
            "axis0": np.array([0], "int64"),
            "minus1": np.array([-1], "int64"),
            "line": np.array([-1], "int64"),
        },
        opset=19,
    )
    assert count(agrees(proto)) == {"relax.nn.pad": 1}


def test_negative_pad_crops(build: Build, agrees: Agrees) -> None:
    widths = np.array([0, 0, -1, 1, 0, 0, -2, 1], "int64")
    agrees(build([node("Pad", ["x", "p"], ["y"])], {"x": (1, 2, 6, 5)}, ["y"], {"p": widths}))


def test_shape_arithmetic_folds(build: Build, agrees: Agrees, count: Count) -> None:
    proto = build(
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["batch"]),
            node("Unsqueeze", ["batch", "axis"], ["batch1"]),
            node("Concat", ["batch1", "rest"], ["target"], axis=0),
            node("Reshape", ["x", "target"], ["y"]),
        ],
        {"x": ("batch", 3, 4)},
        ["y"],
        {
            "zero": np.array(0, "int64"),
            "axis": np.array([0], "int64"),
            "rest": np.array([-1], "int64"),
        },
    )
    assert count(agrees(proto)) == {"relax.reshape": 1}


def test_gather(build: Build, agrees: Agrees, count: Count) -> None:
    """An embedding by run-time indices (negative ones too), and a constant position."""
    proto = build(
        [
            node("Gather", ["table", "ids"], ["rows"]),
            node("Gather", ["rows", "last"], ["y"], axis=1),
        ],
        {"ids": (2, 4)},
        ["y"],
        {"table": weights(11, 3), "last": np.array(-1, "int64")},
        dtypes={"ids": TensorProto.INT64},
    )
    ids = np.array([[0, 3, -1, 10], [1, -11, 2, 5]], "int64")
    assert count(agrees(proto, {"ids": ids}))["relax.take"] == 1


def test_tile_split_resize(build: Build, agrees: Agrees) -> None:
    proto = build(
        [
            node("Tile", ["x", "repeats"], ["t"]),
            node("Split", ["t", "parts"], ["a", "b"], axis=1),
            node("Mul", ["b", "b"], ["b2"]),
            node("Concat", ["a", "b2"], ["c"], axis=1),
            node(
                "Resize",
                ["c", "", "scales"],
                ["y"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
        ],
        {"x": (1, 2, 3, 3)},
        ["y"],
        {
            "repeats": np.array([1, 2, 1, 1], "int64"),
            "parts": np.array([1, 3], "int64"),
            "scales": np.array([1, 1, 2, 2], "float32"),
        },
    )
    agrees(proto)


# ---- control flow --------------------------------------------------------------------------------


def conditional(build: Build) -> onnx.ModelProto:
    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    then = branch("then", [node("MatMul", ["x", "w"], ["m"], "dense"), node("Relu", ["m"], ["t"])])
    otherwise = branch("else", [node("Identity", ["x"], ["e"])])
    return build(
        [
            node("Equal", ["mode", "one"], ["is_one"]),
            node("If", ["is_one"], ["r"], "choice", then_branch=then, else_branch=otherwise),
            node("Add", ["r", "x"], ["y"]),
        ],
        {"x": (2, 4), "mode": ()},
        ["y"],
        {"w": weights(4, 4), "one": np.array(1, "int64")},
        dtypes={"mode": TensorProto.INT64},
    )


@pytest.mark.parametrize("mode", [0, 1])
def test_branch_at_run_time(mode: int, build: Build, agrees: Agrees) -> None:
    agrees(conditional(build), {"x": weights(2, 4), "mode": np.array(mode, "int64")})


@pytest.mark.parametrize(("mode", "matmuls"), [(0, 0), (1, 1)])
def test_branch_known_at_import(
    mode: int, matmuls: int, build: Build, agrees: Agrees, count: Count
) -> None:
    model = agrees(conditional(build), {"x": weights(2, 4)}, input_values={"mode": mode})
    operators = count(model)
    assert operators["relax.matmul"] == matmuls
    assert "If" not in operators
    assert [spec.name for spec in model.inputs] == ["x"]


@pytest.mark.parametrize("backwards", [0, 1])
def test_scan_is_unrolled(backwards: int, build: Build, agrees: Agrees, count: Count) -> None:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    body = helper.make_graph(
        [
            node("MatMul", ["h", "w"], ["hw"], "cell/MatMul"),
            node("Add", ["hw", "x_t"], ["sum"]),
            node("Tanh", ["sum"], ["h_next"]),
            node("Identity", ["h_next"], ["out"]),
        ],
        "body",
        [info("h"), info("x_t")],
        [info("h_next"), info("out")],
    )
    scan = node(
        "Scan",
        ["h0", "x"],
        ["h_last", "all"],
        "rnn",
        body=body,
        num_scan_inputs=1,
        scan_input_directions=[backwards],
        scan_output_directions=[backwards],
        scan_input_axes=[1],
        scan_output_axes=[1],
    )
    proto = build(
        [scan],
        {"x": (2, 3, 4)},
        ["h_last", "all"],
        {"w": weights(4, 4), "h0": np.zeros((2, 4), "float32")},
    )
    model = agrees(proto)
    bindings = [b for block in model.module["main"].body.blocks for b in block.bindings]
    matmuls = [b for b in bindings if b.var.name.startswith("cell_t")]
    assert [b.var.name for b in matmuls] == ["cell_t0", "cell_t1", "cell_t2"]
    assert all(b.value.args[1].same_as(matmuls[0].value.args[1]) for b in matmuls)


def loop_model(build: Build, limit: str) -> onnx.ModelProto:
    def info(name: str, dtype: int, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    body = helper.make_graph(
        [
            node("Identity", ["go"], ["go_on"]),
            node("Mul", ["state", "state"], ["square"]),
            node("Add", ["square", "one"], ["next"]),
            node("Identity", ["next"], ["out"]),
        ],
        "body",
        [
            info("i", TensorProto.INT64, ()),
            info("go", TensorProto.BOOL, ()),
            info("state", TensorProto.FLOAT, (3,)),
        ],
        [
            info("go_on", TensorProto.BOOL, ()),
            info("next", TensorProto.FLOAT, (3,)),
            info("out", TensorProto.FLOAT, (3,)),
        ],
    )
    inputs: dict[str, tuple[int, ...]] = {"x": (3,)}
    if limit == "n":
        inputs["n"] = ()
    return build(
        [node("Loop", [limit, "", "x"], ["last", "all"], "loop", body=body)],
        inputs,
        ["last", "all"],
        {"three": np.array(3, "int64"), "one": np.float32(1)},
        dtypes={"n": TensorProto.INT64},
    )


def test_loop_with_known_count(build: Build, agrees: Agrees, count: Count) -> None:
    assert count(agrees(loop_model(build, "three")))["relax.multiply"] == 3


def test_loop_without_known_count(build: Build, agrees: Agrees) -> None:
    proto = loop_model(build, "n")
    with pytest.raises(ModelError, match="Loop of node 'loop' runs a number of times"):
        load_model(proto)
    agrees(proto, {"x": weights(3)}, input_values={"n": 2})


# ---- recurrent layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU_linear", "RNN", "LSTM_peephole"])
def test_recurrent(kind: str, direction: str, build: Build, agrees: Agrees) -> None:
    steps, batch, features, hidden = 3, 2, 5, 4
    operator = kind.split("_")[0]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    directions = 2 if direction == "bidirectional" else 1
    constants = {
        "w": weights(directions, gates * hidden, features),
        "r": weights(directions, gates * hidden, hidden),
        "b": weights(directions, 2 * gates * hidden),
        "h0": weights(directions, batch, hidden),
        "c0": weights(directions, batch, hidden),
        "p": weights(directions, 3 * hidden),
    }
    inputs = ["x", "w", "r", "b", "", "h0"]
    outputs = ["y", "h"]
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if operator == "LSTM":
        inputs += ["c0"] + (["p"] if "peephole" in kind else [])
        outputs.append("c")
    if kind == "GRU_linear":
        attributes["linear_before_reset"] = 1
    recurrent = node(operator, inputs, outputs, "cell", **attributes)
    used = {name: value for name, value in constants.items() if name in inputs}
    agrees(build([recurrent], {"x": (steps, batch, features)}, outputs, used))


# ---- shapes and values of inputs -----------------------------------------------------------------


def dynamic(build: Build) -> onnx.ModelProto:
    return build(
        [node("Add", ["audio", "state"], ["y"])],
        {"audio": ("batch", "samples"), "state": (1, "batch", "samples")},
        ["y"],
    )


def test_one_shape_fixes_the_shared_symbols(build: Build) -> None:
    model = load_model(dynamic(build), shapes={"audio": (2, 8)})
    assert [spec.shape for spec in model.inputs] == [(2, 8), (1, 2, 8)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, r"input 'audio' has dynamic shape batchxsamples; .*--shape audio=1xSIZE"),
        ({"audoi": (1, 8)}, "no input 'audoi'; did you mean 'audio'"),
        ({"audio": (1, 8, 8)}, "declared batchxsamples, which 1x8x8 does not fit"),
        ({"audio": (2, 8), "state": (1, 3, 8)}, "'state' is declared 1xbatchxsamples"),
    ],
)
def test_shape_errors(
    shapes: dict[str, tuple[int, ...]] | None, message: str, build: Build
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(dynamic(build), shapes=shapes)


def test_unknown_frozen_input(build: Build) -> None:
    with pytest.raises(ModelError, match="no input 'moed'; did you mean 'mode'"):
        load_model(conditional(build), input_values={"moed": 1})


# ---- bad files -----------------------------------------------------------------------------------


def small(build: Build) -> onnx.ModelProto:
    return build(
        [node("MatMul", ["x", "w"], ["y"], "dense")], {"x": (1, 4)}, ["y"], {"w": weights(4, 3)}
    )


def test_unsupported_operator(build: Build) -> None:
    proto = build([node("Wobble", ["x"], ["y"], "wob")], {"x": (1, 4)}, ["y"])
    with pytest.raises(ModelError, match="operator Wobble of node 'wob' is not supported"):
        load_model(proto)


def test_operator_of_another_domain_is_not_taken_for_our_own(build: Build) -> None:
    proto = build(
        [node("Conv", ["x", "w"], ["y"], "theirs", domain="com.acme")],
        {"x": (1, 4, 9, 7)}, ["y"], {"w": weights(8, 4, 3, 3)},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"operator com\.acme\.Conv of node 'theirs' is not supp"):
        load_model(proto)


def test_operator_set_from_the_future(build: Build) -> None:
    proto = build([node("Relu", ["x"], ["y"])], {"x": (1, 4)}, ["y"])
    proto.opset_import[0].version = 99
    with pytest.raises(ModelError, match="operator set 99; .* export the model with opset"):
        load_model(proto)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "'w' contains NaN"), (np.inf, "'w' contains Inf")]
)
def test_weights_not_finite(value: float, message: str, build: Build) -> None:
    array = weights(4, 3)
    array[1, 1] = value
    proto = build([node("MatMul", ["x", "w"], ["y"])], {"x": (1, 4)}, ["y"], {"w": array})
    with pytest.raises(ModelError, match=message):
        load_model(proto)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "model.onnx")
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"unknown model format '.bin'; use one of .onnx"):
        load_model(other)
    for content in (b"", b"not a model", bytes(range(256))):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError, match="model.onnx: not an ONNX file"):
            load_model(path)
    with pytest.raises(ModelError, match="cannot import a dict"):
        load_model({})


def test_damaged_files_never_crash(tmp_path: Path, build: Build) -> None:
    """Every outcome of a mutated file is a model or one `ModelError`."""
    content = bytearray(conditional(build).SerializeToString())
    path = tmp_path / "model.onnx"
    messages = []
    for seed in range(120):
        mutation = np.random.default_rng(seed)
        damaged = bytearray(content)
        for _ in range(int(mutation.integers(1, 6))):
            damaged[int(mutation.integers(len(damaged)))] = int(mutation.integers(256))
        if seed % 4 == 0:
            damaged = damaged[: int(mutation.integers(len(damaged)))]
        path.write_bytes(bytes(damaged))
        try:
            load_model(path)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message]


def test_weight_shorter_than_its_shape(build: Build) -> None:
    proto = small(build)
    proto.graph.initializer[0].dims[0] = 400
    with pytest.raises(ModelError, match="tensor 'w' is damaged"):
        load_model(proto)


def external(build: Build, folder: Path, location: str) -> Path:
    proto = small(build)
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    (folder / "weights.bin").write_bytes(data)
    (folder.parent / "outside.bin").write_bytes(data)
    return path


def test_external_data(build: Build, tmp_path: Path, agrees: Agrees) -> None:
    agrees(external(build, tmp_path / "good", "weights.bin"))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("missing.bin", "'missing.bin' of tensor 'w' is missing"),
        ("../outside.bin", "lies outside the model's folder"),
        ("/etc/hostname", "lies outside the model's folder"),
        ("", "lies outside the model's folder"),
    ],
)
def test_bad_external_data(location: str, message: str, build: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(external(build, tmp_path / "bad", location))


def test_external_data_through_a_link(build: Build, tmp_path: Path) -> None:
    path = external(build, tmp_path / "bad", "weights.bin")
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        load_model(path)


def test_external_data_too_short(build: Build, tmp_path: Path) -> None:
    path = external(build, tmp_path / "bad", "weights.bin")
    (path.parent / "weights.bin").write_bytes(b"abc")
    with pytest.raises(ModelError, match="too short for tensor 'w'"):
        load_model(path)


def test_folding_is_bounded(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some bytes cannot make a tensor of gigabytes at import."""
    monkeypatch.setattr(fold, "MAX_ELEMENTS", 1000)
    fill = node("ConstantOfShape", ["s"], ["y"])
    huge = np.array([2**40], "int64")
    assert fold.evaluate(fill, [huge], 17) is None
    assert fold.evaluate(node("Expand", ["a", "s"], ["y"]), [np.zeros(1), huge], 17) is None
    assert fold.evaluate(node("Tile", ["a", "s"], ["y"]), [np.zeros(1), huge], 17) is None
    large = [np.array(v, "int64") for v in (0, 2**40, 1)]
    assert fold.evaluate(node("Range", ["a", "b", "c"], ["y"]), large, 17) is None
    (filled,) = fold.evaluate(fill, [np.array([3], "int64")], 17) or []
    np.testing.assert_array_equal(filled, np.zeros(3, "float32"))


def test_unrolling_is_bounded(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_UNROLLED_NODES", 8)
    with pytest.raises(ModelError, match="unrolls to more than 8 nodes"):
        load_model(loop_model(build, "three"))


def test_local_functions_are_inlined(build: Build, agrees: Agrees) -> None:
    proto = build([node("Twice", ["x"], ["y"], domain="mine")], {"x": (2, 2)}, ["y"])
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], proto.opset_import
    )
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    agrees(proto)


def test_float16_and_integer_tensors_keep_their_type(build: Build, agrees: Agrees) -> None:
    proto = build(
        [node("Mul", ["x", "k"], ["y"])],
        {"x": (5,)},
        ["y"],
        {"k": np.array([2**40], "int64")},
        dtypes={"x": TensorProto.INT64, "y": TensorProto.INT64},
    )
    model = agrees(proto)
    assert model.outputs[0].dtype == "int64"
    assert numpy_helper.to_array(proto.graph.initializer[0])[0] == 2**40


def test_files_of_weights_alone_are_refused_with_how_to_make_one_that_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"write a \.pt2 with torch\.export\.save") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
