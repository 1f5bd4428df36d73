"""matmul(x, w) => matmul(x * s, w / s): the features of a model's input on one footing.

Spectra, sensor readings and tabular data have features whose ranges differ by orders of magnitude,
and an input is quantised with one scale for all: the small features are left with a few levels.
Multiplying each feature before the quantiser, and dividing its weights, moves part of the
difficulty to the weights, which have a scale for each output (SmoothQuant, Xiao et al. 2023,
section 4). The scales are powers of two, so the float model computes exactly what it did.

A convolution along the features has one weight for all of them: there is nothing to divide. Such an
input is marked (`wide_inputs`) to be quantised with 16 bits, which is what one layer pays for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import DataError, RecipeError
from .channels import scale_inputs
from .graph import Graph, rebuild
from .ir import WIDE_INPUTS_ATTR, constant_slices, dtype_of, shape_of
from .layer_pairs import float_layers
from .numerics.equalization import activation_scales
from .numerics.statistics import Statistics
from .observations import Observations
from .quantize_weights import weight_layout


@dataclass(frozen=True)
class EqualizeInputsConfig:
    """Even out the ranges of the features of the model's inputs that the selected layers read."""

    strength: float = field(
        default=0.5,
        metadata={"help": "0 leaves the inputs as they are, 1 gives all features one range"},
    )
    spread: float = field(
        default=4.0,
        metadata={"help": "inputs whose largest and median feature range differ less stay"},
    )
    widen: bool = field(
        default=True,
        metadata={"help": "quantise inputs that cannot be scaled by feature with 16 bits"},
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise RecipeError(f"strength is from 0 to 1, not {self.strength}")
        if self.spread < 1.0:
            raise RecipeError(f"spread is at least 1, not {self.spread}")


@dataclass(frozen=True)
class _Features:
    """An input, its axis of features, and the feature that each input channel of a layer reads; no
    layers where the features cannot be scaled."""

    value: relax.Var
    axis: int
    channels: Mapping[relax.Var, NDArray[np.int64]]


def observe(module: tvm.IRModule, schemes: Mapping[str, EqualizeInputsConfig]) -> Observations:
    """The extremes by feature of every input that layers read."""
    found = _inputs(Graph(module["main"]), schemes)
    return Observations(channels={item.value.name: item.axis for item in found})


@tvm.transform.module_pass(opt_level=0, name="EqualizeInputs")
class EqualizeInputs:
    """Scale each float input whose features only selected layers read, feature by feature.

    Uneven inputs that cannot be scaled are listed in the attribute `tvm_compress.wide_inputs` of
    `main`. `schemes` maps layer names to configs (that of the first reader, or else of the first
    layer, counts); `statistics` is what `observe` asks for. Raises `DataError` when statistics are
    missing.
    """

    def __init__(self, schemes: Mapping[str, EqualizeInputsConfig], statistics: Statistics) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        module = module.clone()
        scaled, wide = [], []
        for item in _inputs(graph, self.schemes):
            config = self._config(item)
            ranges = self._ranges(item)
            if not _is_uneven(ranges, config.spread):
                continue
            if item.channels:
                scales = activation_scales(ranges, config.strength, None)
                scaled.append((item, np.exp2(np.rint(np.log2(scales)))))
            elif config.widen:
                wide.append(item.value.name)
        main = _write(graph, scaled)
        module["main"] = main.with_attr(WIDE_INPUTS_ATTR, json.dumps(wide)) if wide else main
        return relax.transform.Normalize()(module)

    def _config(self, item: _Features) -> EqualizeInputsConfig:
        reader = next((layer.name for layer in item.channels), next(iter(self.schemes)))
        return self.schemes[reader]

    def _ranges(self, item: _Features) -> NDArray[np.float64]:
        observed = self.statistics.channels.get(item.value.name)
        if observed is None:
            raise DataError(
                f"the calibration statistics lack the features of {item.value.name!r}; calibrate "
                "this module with what `equalize_inputs.observe` lists"
            )
        return np.maximum(np.abs(observed.low), np.abs(observed.high))


def _is_uneven(ranges: NDArray[np.float64], spread: float) -> bool:
    used = ranges[ranges > 0]
    return bool(used.size) and float(used.max()) >= spread * float(np.median(used))


def _inputs(graph: Graph, schemes: Mapping[str, EqualizeInputsConfig]) -> Iterator[_Features]:
    layers = float_layers(graph, schemes)
    if not layers:
        return
    for parameter in graph.function.params:
        shape = shape_of(parameter)
        if shape is None or dtype_of(parameter) != "float32" or not graph.readers[parameter]:
            continue
        for axis in reversed(range(len(shape))):
            if shape[axis] == 1:
                continue
            channels = _channels_read(graph, parameter, axis, layers)
            if channels:
                yield _Features(parameter, axis, channels)
                break
        else:
            if shape and shape[-1] > 1:
                yield _Features(parameter, len(shape) - 1, {})


def _channels_read(
    graph: Graph, parameter: relax.Var, axis: int, layers: Mapping[relax.Var, object]
) -> dict[relax.Var, NDArray[np.int64]] | None:
    """Layer => the feature behind each of its input channels; `None` when anything else reads the
    input, or when a layer mixes features in one channel."""
    shape = shape_of(parameter) or ()
    sides = [side if index == axis else 1 for index, side in enumerate(shape)]
    labels = {parameter: np.broadcast_to(np.arange(shape[axis]).reshape(sides), shape)}
    found: dict[relax.Var, NDArray[np.int64]] = {}
    for value, readers in graph.readers.items():
        if value not in labels:
            continue
        for reader in readers:
            if reader is None:
                return None
            if reader not in layers:
                moved = _moved(graph, reader, labels[value])
                if moved is None:
                    return None
                labels[reader] = moved
                continue
            call = graph.values[reader]
            if not call.args[0].same_as(value):
                return None
            is_conv = hasattr(call.attrs, "data_layout")
            channel = str(call.attrs.data_layout).index("C") if is_conv else labels[value].ndim - 1
            rows = np.moveaxis(labels[value], channel, -1).reshape(-1, labels[value].shape[channel])
            if (rows != rows[0]).any() or "I" not in weight_layout(call):
                return None
            found[reader] = rows[0]
    return found


def _moved(graph: Graph, variable: relax.Var, labels: NDArray) -> NDArray | None:
    """What the operator makes of an array that it only moves."""
    call, shape = graph.values[variable], shape_of(variable)
    name = graph.op(variable)
    if name == "relax.reshape" and shape is not None:
        return labels.reshape(shape)
    if name == "relax.permute_dims":
        axes = call.attrs.axes
        return labels.transpose(None if axes is None else [int(axis) for axis in axes])
    if name == "relax.strided_slice":
        slices = constant_slices(call, labels.shape)
        if slices is not None:
            return labels[tuple(slice(*slices.get(axis, (None,))) for axis in range(labels.ndim))]
    return None


def _write(graph: Graph, chosen: list[tuple[_Features, NDArray[np.float64]]]) -> relax.Function:
    blocks = graph.function.body.blocks
    is_dataflow = len(blocks) == 1 and isinstance(blocks[0], relax.DataflowBlock)
    replace: dict[relax.Var, tvm.ir.Expr] = {}
    after: dict[relax.Var, list[relax.VarBinding]] = {}
    scaled: dict[relax.Var, relax.Var] = {}
    weights: dict[tuple[tvm.ir.Expr, bytes], relax.Constant] = {}  # steps of a loop share theirs
    for item, scales in chosen:
        shape = shape_of(item.value) or ()
        sides = [side if index == item.axis else 1 for index, side in enumerate(shape)]
        factor = relax.const(scales.reshape(sides).astype(np.float32))
        kind = relax.DataflowVar if is_dataflow else relax.Var
        scaled[item.value] = kind(f"{item.value.name}_equalized", item.value.ty)
        after[item.value] = [
            relax.VarBinding(scaled[item.value], relax.op.multiply(item.value, factor))
        ]
        for layer, channels in item.channels.items():
            call = graph.values[layer]
            key = (call.args[1], channels.tobytes())
            if key not in weights:
                array = graph.constant(call.args[1])
                assert array is not None
                weights[key] = relax.const(scale_inputs(array, call, 1.0 / scales[channels]))
            arguments = [call.args[0], weights[key], *call.args[2:]]
            replace[layer] = relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def read(_reader: relax.Var | None, variable: relax.Var) -> relax.Var:
        return scaled.get(variable, variable)

    return rebuild(graph.function, replace=replace, after=after, read=read)
