"""Speed of the x86 kernels layer by layer, float32 and int8, beside ONNX Runtime.

    python tests/benchmarks/kernels_x86.py [--target x86-64-v3] [--threads 1] [--only mobilenet]

Every layer is a convolution with bias and ReLU (float32) or bias, requantisation and clipping to
int8. The contestants take turns; the figure is the best of many runs, in 10^9 operations a second,
two operations a multiply-add. ONNX Runtime gets its own layout (NCHW) and its own reordering; our
kernels NHWC.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contest import chosen_target, contest, options

# (name, height, width, in, out, kernel, stride, depthwise)
LAYERS: list[tuple[str, int, int, int, int, tuple[int, int], int, bool]] = [
    ("resnet8 stem", 32, 32, 3, 16, (3, 3), 1, False),
    ("resnet8 stage 1", 32, 32, 16, 16, (3, 3), 1, False),
    ("resnet8 stage 2", 16, 16, 32, 32, (3, 3), 1, False),
    ("resnet8 stage 3", 8, 8, 64, 64, (3, 3), 1, False),
    ("ds-cnn stem", 49, 10, 1, 64, (10, 4), 2, False),
    ("ds-cnn depthwise", 25, 5, 64, 64, (3, 3), 1, True),
    ("ds-cnn pointwise", 25, 5, 64, 64, (1, 1), 1, False),
    ("mobilenet-v1-0.25 early", 48, 48, 8, 16, (1, 1), 1, False),
    ("mobilenet-v1-0.25 late", 3, 3, 256, 256, (1, 1), 1, False),
    ("mobilenet-v2 stem", 224, 224, 3, 32, (3, 3), 2, False),
    ("mobilenet-v2 expand 112", 112, 112, 16, 96, (1, 1), 1, False),
    ("mobilenet-v2 depthwise 112/2", 112, 112, 96, 96, (3, 3), 2, True),
    ("mobilenet-v2 project 56", 56, 56, 144, 24, (1, 1), 1, False),
    ("mobilenet-v2 depthwise 56", 56, 56, 144, 144, (3, 3), 1, True),
    ("mobilenet-v2 expand 14", 14, 14, 96, 576, (1, 1), 1, False),
    ("mobilenet-v2 depthwise 14", 14, 14, 576, 576, (3, 3), 1, True),
    ("mobilenet-v2 head 7", 7, 7, 320, 1280, (1, 1), 1, False),
    ("efficientnet-lite0 depthwise 5x5", 14, 14, 672, 672, (5, 5), 1, True),
    ("squeezenet squeeze 55", 55, 55, 128, 16, (1, 1), 1, False),
    ("squeezenet expand 13", 13, 13, 48, 192, (3, 3), 1, False),
    ("resnet-50 3x3 56", 56, 56, 64, 64, (3, 3), 1, False),
    ("resnet-50 3x3 28", 28, 28, 128, 128, (3, 3), 1, False),
    ("resnet-50 3x3 14", 14, 14, 256, 256, (3, 3), 1, False),
    ("resnet-50 3x3 7", 7, 7, 512, 512, (3, 3), 1, False),
    ("resnet-50 1x1 14", 14, 14, 1024, 256, (1, 1), 1, False),
]
REPETITIONS, LEAST_SECONDS = 30, 0.3


def main() -> None:
    """Print one line a layer."""
    parser = options(__doc__ or "")
    arguments = parser.parse_args()
    target = chosen_target(arguments)
    print(f"target {arguments.target}, {arguments.threads} threads; GOP/s, best of {REPETITIONS}+")
    print(
        f"{'layer':34s} {'MMAC':>7s} {'f32':>7s} {'int8':>7s} {'ort f32':>8s} {'ort int8':>8s}",
        end="",
    )
    print(f" {'int8/f32':>8s} {'f32/ort':>8s} {'int8/ort':>8s}")
    for layer in LAYERS:
        if arguments.only in layer[0]:
            compare(layer, target, arguments.threads)


def compare(layer: tuple[Any, ...], target: Any, threads: int) -> None:
    """Time the four contestants of one layer in turns."""
    from tvm_compress.schedules import Conv2dSpec

    name, height, width, channels, outputs, kernel, stride, depthwise = layer
    spec = Conv2dSpec(
        batch=1,
        height=height,
        width=width,
        in_channels=channels,
        out_channels=outputs,
        kernel=kernel,
        strides=(stride, stride),
        padding=((kernel[0] - 1) // 2, (kernel[1] - 1) // 2, kernel[0] // 2, kernel[1] // 2),
        groups=channels if depthwise else 1,
    )
    int8 = spec.replace(data_dtype="int8", weight_dtype="int8", acc_dtype="int32")
    contestants = [
        ours(spec, target),
        ours(int8, target),
        onnxruntime(spec, threads, quantised=False),
        onnxruntime(spec, threads, quantised=True),
    ]
    best = contest(contestants, REPETITIONS, LEAST_SECONDS)
    f32, quick, ort, ort_quick = (2 * spec.macs / seconds / 1e9 for seconds in best)
    print(
        f"{name:34s} {spec.macs / 1e6:7.2f} {f32:7.1f} {quick:7.1f} {ort:8.1f} {ort_quick:8.1f}"
        f" {quick / f32:8.2f} {f32 / ort:8.2f} {quick / ort_quick:8.2f}",
        flush=True,
    )


def ours(spec: Any, target: Any) -> Callable[[], float]:
    """The layer as this project builds it, with the epilogue of its kind: returns seconds of one
    call."""
    spec, weight = packed(spec, target)
    return timed(spec, [weight], target)


def packed(spec: Any, target: Any) -> tuple[Any, np.ndarray]:
    """The layer in the target's layout, with a random weight."""
    from tvm_compress.schedules import pack_weight

    rng = np.random.default_rng(0)
    weight = (
        rng.integers(-127, 128, spec.weight_shape, dtype="int8")
        if spec.is_integer
        else rng.standard_normal(spec.weight_shape, dtype="float32")
    )
    return pack_weight(spec, weight, target) or (spec, weight)


def timed(spec: Any, weights: list[np.ndarray], target: Any) -> Callable[[], float]:
    """A kernel with the epilogue of its kind: returns seconds of one call."""
    import tvm

    library, arguments = built(spec, weights, target)
    timer = library.mod.time_evaluator("main", tvm.cpu(), number=calls(spec.macs))
    return lambda: float(timer(*arguments).mean)


def built(
    spec: Any, weights: list[np.ndarray], target: Any, activation: bool = True
) -> tuple[Any, list[Any]]:
    """A compiled kernel with the epilogue of its kind (floats: ReLU if `activation`), and its
    arguments: the first is its input, the last its output."""
    import tvm
    from tvm import te, tirx

    from tvm_compress.schedules import describe, schedule

    rng = np.random.default_rng(0)
    integer = spec.is_integer
    inputs, acc = describe(spec)
    shape, channels = spec.output_shape, spec.out_channels
    bias = te.placeholder((channels,), spec.acc_dtype, name="bias")
    total = te.compute(shape, lambda *i: acc[i] + bias[i[-1]], name="total")
    constants = [bias]
    if integer:
        scale = te.placeholder((channels,), "float32", name="scale")
        constants.append(scale)
        scaled = te.compute(
            shape,
            lambda *i: tirx.nearbyint(total[i].astype("float32") * scale[i[-1]]),
            name="scaled",
        )
        out = te.compute(
            shape,
            lambda *i: te.max(te.min(scaled[i], 127.0), -128.0).astype("int32").astype("int8"),
            name="out",
        )
    elif activation:
        out = te.compute(shape, lambda *i: te.max(total[i], 0.0), name="out")
    else:
        out = total
    func = schedule(te.create_prim_func([*inputs, *constants, out]), target)
    library = tvm.compile(func, target.tvm_target())
    data = rng.integers(-128, 128, spec.data_shape).astype(spec.data_dtype)
    arrays = [data, *weights, np.zeros(channels, spec.acc_dtype)]
    if integer:
        arrays.append(np.full(channels, 1e-4, "float32"))
    arguments = [tvm.runtime.tensor(a) for a in (*arrays, np.zeros(shape, str(out.dtype)))]
    return library, arguments


def onnx_layer(spec: Any, quantised: bool, as_qdq: bool = False) -> tuple[bytes, np.ndarray]:
    """The same layer alone in an ONNX model, and data for it."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    # HWIO -> OIHW
    shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    geometry = {
        "strides": list(spec.strides),
        "pads": list(spec.padding),
        "group": spec.groups,
        "kernel_shape": list(spec.kernel),
    }
    data_shape = (1, spec.in_channels, spec.height, spec.width)
    if quantised:
        values = {
            "xs": np.float32(0.1),
            "xz": np.uint8(128),
            "w": rng.integers(-63, 64, shape).astype("int8"),
            "ws": np.full(spec.out_channels, 0.01, "float32"),
            "wz": np.zeros(spec.out_channels, "int8"),
            "ys": np.float32(0.1),
            "yz": np.uint8(128),
            "b": np.zeros(spec.out_channels, "int32"),
        }
        names = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b")
        nodes = [helper.make_node("QLinearConv", list(names), ["y"], **geometry)]
        if as_qdq:  # OpenVINO takes QLinearConv with one scale a tensor only
            values["bs"] = np.full(spec.out_channels, 0.001, "float32")
            nodes = [
                helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
                helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
                helper.make_node("DequantizeLinear", ["b", "bs"], ["bf"], axis=0),
                helper.make_node("Conv", ["xf", "wf", "bf"], ["yf"], **geometry),
                helper.make_node("QuantizeLinear", ["yf", "ys", "yz"], ["y"]),
            ]
        element, data = TensorProto.UINT8, rng.integers(0, 256, data_shape).astype("uint8")
    else:
        values = {
            "w": rng.standard_normal(shape, dtype="float32"),
            "b": np.zeros(spec.out_channels, "float32"),
        }
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["t"], **geometry),
            helper.make_node("Relu", ["t"], ["y"]),
        ]
        element, data = TensorProto.FLOAT, rng.standard_normal(data_shape, dtype="float32")
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, data_shape)],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), data


def onnxruntime(spec: Any, threads: int, quantised: bool) -> Callable[[], float]:
    """The layer in ONNX Runtime."""
    import onnxruntime as ort

    model, data = onnx_layer(spec, quantised)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    number = calls(spec.macs)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(number):
            session.run(None, {"x": data})
        return (time.perf_counter() - started) / number

    return run


def openvino(spec: Any, threads: int, quantised: bool) -> Callable[[], float]:
    """The layer in OpenVINO."""
    import openvino as ov

    model, data = onnx_layer(spec, quantised, as_qdq=True)
    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(data))
    number = calls(spec.macs)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(number):
            request.infer()
        return (time.perf_counter() - started) / number

    return run


def calls(macs: int) -> int:
    """Calls per measurement: about half a millisecond, short enough to fall between
    interruptions."""
    return max(1, int(2e7 / macs))


if __name__ == "__main__":
    main()
