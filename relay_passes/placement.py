"""Where quantisers go: the regions of a float graph that will compute in integers.

A region is what one integer kernel does between two quantisers:

    anchor    conv/matmul [+ bias] {relu|clip}* [+ residual {relu|clip}*]
    table     a DAG of elementwise operators of one tensor (hard-swish, SiLU, ...)
    binary    add/sub/mul of two tensors {relu|clip}*
    sum       two matmuls or products {relu|clip}* added: the gates and states of recurrent cells
    pool      average pooling or mean {relu|clip}*
    movement  max-pool, reshape, concat, pad, ...: integers pass through, parameters are shared
    normalise softmax, layer norm

A value is quantised once, where it is produced, and only if an integer region reads it: the integer
domain starts at the input of the first quantised layer and ends behind the last one.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from .graph import Graph
from .ir import dtype_of, op_name, shape_of, wide_inputs
from .op_kinds import (
    ANCHORS,
    BINARY,
    CLAMPS,
    CONSTANT_CLAMPS,
    MOVEMENT,
    NORMALISERS,
    POOLS,
    TENSOR_BINARY,
    TENSOR_SUMS,
    UNARY,
)
from .quantize_config import QuantizeConfig
from .recurrence import tied_values
from .select import describe_layer


@dataclass(frozen=True)
class LeftFloat:
    """A layer or operator among quantised ones that stays float, and why."""

    name: str
    op: str
    reason: str


@dataclass
class Placement:
    """The plan. `quantized` maps each value to be quantised to the config that asks for it;
    `shares` maps a value to the one whose scale and zero point it must have;
    `moved` are results of movement operators;
    `fused` are (reader, value) pairs that stay inside a region and so read the float value.
    """

    layers: dict[relax.Var, QuantizeConfig]
    quantized: dict[relax.Var, QuantizeConfig] = field(default_factory=dict)
    shares: dict[relax.Var, relax.Var] = field(default_factory=dict)
    moved: set[relax.Var] = field(default_factory=set)
    fused: set[tuple[relax.Var, relax.Var]] = field(default_factory=set)
    left_float: list[LeftFloat] = field(default_factory=list)

    def leader(self, variable: relax.Var) -> relax.Var:
        """The value that decides the parameters of `variable`."""
        while variable in self.shares:
            variable = self.shares[variable]
        return variable

    def share(self, first: relax.Var, second: relax.Var) -> None:
        """`second` gets the parameters of `first`, and so do all that share with either."""
        first, second = self.leader(first), self.leader(second)
        if not first.same_as(second):
            self.shares[second] = first


def place(graph: Graph, schemes: Mapping[str, QuantizeConfig]) -> Placement:
    """Decide the regions of `graph`; `schemes` maps layer names to what is asked for them."""
    layers, refused = _quantizable_layers(graph, schemes)
    capable = {v: kind for v in graph.values if (kind := _region_kind(graph, v, layers))}
    while True:
        domain = _Domain(graph, layers, capable)
        dropped = {v for v in capable if v not in domain.members}
        if not dropped:
            break
        # An operator that nothing integer reads computes in float; its producers may follow.
        capable = {v: kind for v, kind in capable.items() if v not in dropped}
    placement = domain.placement()
    for parameter in graph.function.params:
        config = placement.quantized.get(parameter)
        if config is not None and parameter.name in wide_inputs(graph.function):
            # Only how the value is stored; its readers' weights are their own configs' matter.
            wide = QuantizeConfig(
                activations="int16", scales=config.scales, calibrate=config.calibrate
            )
            placement.quantized[parameter] = wide
    for members in tied_values(graph, layers):
        quantized = [member for member in members if member in placement.quantized]
        for member in quantized[1:]:
            placement.share(quantized[0], member)
    placement.left_float = refused + _float_gaps(graph, layers, domain)
    return placement


def _quantizable_layers(
    graph: Graph, schemes: Mapping[str, QuantizeConfig]
) -> tuple[dict[relax.Var, QuantizeConfig], list[LeftFloat]]:
    layers: dict[relax.Var, QuantizeConfig] = {}
    refused = []
    for variable in graph.values:
        config = schemes.get(variable.name)
        if config is None or config.activations is None or graph.op(variable) not in ANCHORS:
            continue
        op = ANCHORS[graph.op(variable) or ""]
        layer = describe_layer(graph, variable)
        if layer is None:
            refused.append(LeftFloat(variable.name, op, "its shapes are not known"))
        elif layer.is_quantized:
            refused.append(LeftFloat(variable.name, op, "its weight is already compressed"))
        elif dtype_of(variable) != "float32":
            refused.append(LeftFloat(variable.name, op, f"it computes in {dtype_of(variable)}"))
        elif layer.op.startswith("conv") and layer.weight_shape is None:
            refused.append(LeftFloat(variable.name, op, "its weight is computed, not constant"))
        elif graph.constant(graph.values[variable].args[0]) is not None:
            refused.append(LeftFloat(variable.name, op, "its input is constant"))
        else:
            layers[variable] = config
    return layers, refused


def _region_kind(
    graph: Graph, variable: relax.Var, layers: Mapping[relax.Var, QuantizeConfig]
) -> str | None:
    """The kind of region the operator could belong to; `None` when it has no integer form."""
    if variable in layers:
        return "anchor"
    value = graph.values[variable]
    if isinstance(value, relax.TupleGetItem):
        return "movement" if graph.op(value.tuple_value) == "relax.split" else None
    name = op_name(value)
    if name is None or name in ANCHORS:
        return None
    operands = graph.tensor_operands(variable)
    if not operands or any(not _is_float(item) for item in operands):
        return None
    if name in MOVEMENT:
        return "movement" if _moves_integers(graph, value) else None
    if name in POOLS:
        return "pool"
    if name in NORMALISERS:
        return "normalise" if len(operands) == 1 else None
    if name in UNARY:
        return "table"
    if name in BINARY:
        constants = [graph.constant(item) for item in graph.operands(variable)]
        sizes = [array.size for array in constants if array is not None]
        if sizes and sizes[0] == 1:
            return "table"
        if sizes and _is_bias(graph, variable, layers):
            return "bias"
        if not sizes and (name in TENSOR_BINARY or len(set(operands)) == 1):
            return "binary"
    return None


def _is_float(variable: relax.Var) -> bool:
    if isinstance(variable.ty, relax.TupleType):
        return True
    return isinstance(variable.ty, relax.TensorType) and dtype_of(variable) == "float32"


def _moves_integers(graph: Graph, call: relax.Call) -> bool:
    """Guards: movement operators whose attributes make them compute, or mix in other numbers."""
    name = op_name(call)
    if name == "relax.image.resize2d":
        return str(call.attrs.method) == "nearest_neighbor"
    if name == "relax.nn.pad":
        return str(call.attrs.pad_mode) != "constant" or float(call.attrs.pad_value) == 0.0
    if name == "relax.take":
        return graph.constant(call.args[1]) is not None and graph.constant(call.args[0]) is None
    if name == "relax.concat":
        tensors = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else []
        return bool(tensors) and all(graph.constant(item) is None for item in tensors)
    return True


def _is_bias(graph: Graph, variable: relax.Var, layers: Container[relax.Var]) -> bool:
    """add(layer, constant) with one number for each output channel."""
    if graph.op(variable) != "relax.add":
        return False
    tensors = graph.tensor_operands(variable)
    if len(tensors) != 1 or tensors[0] not in layers:
        return False
    array = next(a for e in graph.operands(variable) if (a := graph.constant(e)) is not None)
    return bias_vector(array, graph.values[tensors[0]], tensors[0]) is not None


def channel_axis(call: relax.Call) -> int:
    """Index of the output-channel axis in an anchor's result."""
    if op_name(call) == "relax.matmul":
        rank = len(shape_of(call) or ())
        return rank - 1
    return str(call.attrs.out_layout).index("C")


def bias_vector(array: np.ndarray, call: relax.Call, variable: relax.Var) -> np.ndarray | None:
    """The constant as one number for each output channel; `None` when it varies otherwise."""
    shape = shape_of(variable)
    if shape is None or array.ndim > len(shape):
        return None
    axis = channel_axis(call)
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    others = [side for index, side in enumerate(full.shape) if index != axis]
    if any(side != 1 for side in others):
        return None
    return np.broadcast_to(full.reshape(-1), (shape[axis],))


def spread_bias(array: np.ndarray, call: relax.Call, variable: relax.Var) -> np.ndarray:
    """A bias constant with a number for every output channel, still broadcasting as it did."""
    vector = bias_vector(array, call, variable)
    assert vector is not None
    if array.size == vector.size:
        return array
    shape, axis = shape_of(variable) or (), channel_axis(call)
    return vector.reshape([side if index == axis else 1 for index, side in enumerate(shape)])


def _float_gaps(
    graph: Graph, layers: Mapping[relax.Var, QuantizeConfig], domain: _Domain
) -> list[LeftFloat]:
    """Operators between two quantised layers that stay float."""
    above: set[relax.Var] = set()
    for variable in graph.values:
        operands = [v for v in graph.operands(variable) if isinstance(v, relax.Var)]
        if variable in layers or any(item in above for item in operands):
            above.add(variable)
    epilogues = _float_epilogues(graph)
    below: set[relax.Var] = set()
    gaps = []
    for variable in reversed(graph.values):
        readers = [item for item in graph.readers[variable] if item is not None]
        if any(item in layers or item in below for item in readers):
            below.add(variable)
        is_between = variable in above and variable in below and variable not in layers
        if is_between and variable not in domain.members and variable not in epilogues:
            op = graph.op(variable) or type(graph.values[variable]).__name__
            reason = _float_reason(graph, variable)
            if reason is not None:
                gaps.append(LeftFloat(variable.name, op.removeprefix("relax."), reason))
    return gaps[::-1]


def _float_epilogues(graph: Graph) -> set[relax.Var]:
    """Bias and clamps behind a layer with a float result: part of the layer's own kernel."""
    anchors = {item for item in graph.values if graph.op(item) in ANCHORS}
    found: set[relax.Var] = set()
    for variable in graph.values:
        operands = graph.tensor_operands(variable)
        continues = len(operands) == 1 and (operands[0] in anchors or operands[0] in found)
        if continues and (graph.op(variable) in CLAMPS or _is_bias(graph, variable, anchors)):
            found.add(variable)
    return found


def _float_reason(graph: Graph, variable: relax.Var) -> str | None:
    value = graph.values[variable]
    if isinstance(value, relax.If):
        return "values enter and leave branches in float"
    name = graph.op(variable)
    if name is None or name in ("relax.quantize", "relax.dequantize"):
        return None
    if not all(_is_float(item) for item in graph.tensor_operands(variable)):
        return None
    if name in ANCHORS:
        return "not selected, or its weight is already compressed"
    if name in BINARY and any(graph.constant(e) is not None for e in graph.operands(variable)):
        return "its constant operand differs by position or channel"
    if name in MOVEMENT | POOLS | UNARY | BINARY | NORMALISERS:
        return "one of its inputs is float"
    return "the operator has no integer form"


class _Domain:
    """One pass over the graph with a fixed set of capable operators; finds regions and readers."""

    def __init__(
        self,
        graph: Graph,
        layers: Mapping[relax.Var, QuantizeConfig],
        capable: Mapping[relax.Var, str],
    ) -> None:
        self.graph = graph
        self.layers = layers
        self.capable = capable
        self.members: set[relax.Var] = set()
        self._fused: set[tuple[relax.Var, relax.Var]] = set()
        self._demanded: dict[relax.Var, set[relax.Var]] = {}  # value -> integer readers
        self._tips: dict[relax.Var, _Chain] = {}  # last value of a chain that may still grow
        self._table_root: dict[relax.Var, relax.Var] = {}
        self._useful = self._find_useful()
        self._wanted = self._find_wanted()
        for variable in graph.values:
            if variable in capable and variable in self._useful:
                self._visit(variable, capable[variable])

    def _find_useful(self) -> set[relax.Var]:
        """Capable operators whose result reaches a quantised layer through capable operators."""
        useful: set[relax.Var] = set()
        for variable in reversed(self.graph.values):
            readers = [item for item in self.graph.readers[variable] if item is not None]
            if variable in self.layers or any(
                item in self.layers or (item in self.capable and item in useful) for item in readers
            ):
                useful.add(variable)
        return useful

    def _find_wanted(self) -> set[relax.Var]:
        """Values that are quantised wherever they come from: a layer reads them, maybe moved."""
        wanted: set[relax.Var] = set()
        for variable in reversed(self.graph.values):
            is_moved = self.capable.get(variable) == "movement" and variable in wanted
            if variable in self.layers or is_moved:
                wanted.update(self.graph.tensor_operands(variable))
        return wanted

    def _is_available(self, variable: relax.Var) -> bool:
        return variable in self.members or variable in self._wanted

    def _visit(self, variable: relax.Var, kind: str) -> None:
        operands = self.graph.tensor_operands(variable)
        if kind == "anchor":
            self._demand(variable, operands)
            self._tips[variable] = _Chain(variable)
        elif self._extends_chain(variable, operands):
            pass
        elif kind == "bias" or not all(self._is_available(item) for item in operands):
            return
        elif kind in ("table", "binary"):
            roots = {self._table_root.get(item, item) for item in operands}
            if len(roots) == 1:
                self._table(variable, operands, roots.pop())
            elif kind == "binary" and self.graph.op(variable) in TENSOR_BINARY:
                self._demand(variable, operands)
                is_product = self.graph.op(variable) == "relax.multiply"
                self._tips[variable] = _Chain(variable, has_residual=not is_product, is_bare=False)
            else:
                return
        else:
            self._demand(variable, operands)
            if kind == "pool":
                self._tips[variable] = _Chain(variable, has_residual=True)
        self.members.add(variable)

    def _demand(self, reader: relax.Var, operands: list[relax.Var]) -> None:
        for operand in operands:
            self._demanded.setdefault(operand, set()).add(reader)

    def _table(self, variable: relax.Var, operands: list[relax.Var], root: relax.Var) -> None:
        self._table_root[variable] = root
        for operand in operands:
            if operand.same_as(root):
                self._demand(variable, [operand])
            else:
                self._fused.add((variable, operand))

    def _extends_chain(self, variable: relax.Var, operands: list[relax.Var]) -> bool:
        """Whether the operator joins the region of the one value it continues."""
        tips = [item for item in operands if item in self._tips and self._only_reader(item)]
        if not tips:
            return False
        tip = tips[-1]
        for candidate in tips:  # of two open chains the later one is continued
            if self._order(candidate) > self._order(tip):
                tip = candidate
        chain = self._tips[tip]
        if len(operands) == 1:
            if not self._is_clamp(variable) and not (
                chain.is_bare and _is_bias(self.graph, variable, self.layers)
            ):
                return False
            self._tips[variable] = _Chain(chain.anchor, chain.has_residual, is_bare=False)
        else:
            other = next((item for item in operands if not item.same_as(tip)), None)
            if (
                other is None
                or chain.has_residual
                or self.graph.op(variable) not in TENSOR_SUMS
                or not self._is_available(other)
                or shape_of(other) != shape_of(tip)
            ):
                return False
            if other in tips and self._is_short(chain) and self._is_short(self._tips[other]):
                self._fused.add((variable, other))
            else:
                self._demand(variable, [other])
            self._tips[variable] = _Chain(chain.anchor, has_residual=True, is_bare=False)
        self._fused.add((variable, tip))
        return True

    def _is_short(self, chain: _Chain) -> bool:
        """Whether the region's integers may wait in 32 bits for another region to be added: the
        sums of a convolution are too many for that."""
        name = self.graph.op(chain.anchor)
        return not chain.has_residual and name in ("relax.matmul", "relax.multiply")

    def _order(self, variable: relax.Var) -> int:
        if not hasattr(self, "_positions"):
            self._positions = {item: index for index, item in enumerate(self.graph.values)}
        return self._positions[variable]

    def _only_reader(self, variable: relax.Var) -> bool:
        return len(self.graph.readers[variable]) == 1 and variable not in self._demanded

    def _is_clamp(self, variable: relax.Var) -> bool:
        name = self.graph.op(variable)
        if name in CLAMPS:
            return True
        if name not in CONSTANT_CLAMPS:
            return False
        arrays = [self.graph.constant(item) for item in self.graph.operands(variable)]
        return any(array is not None and array.size == 1 for array in arrays)

    def placement(self) -> Placement:
        """The plan that this pass arrived at. Valid once every capable operator is a member."""
        graph, placement = self.graph, Placement(dict(self.layers), fused=self._fused)
        wants: dict[relax.Var, QuantizeConfig] = {}
        for variable in reversed([*graph.function.params, *graph.values]):
            config = self._config_wanted(variable, wants)
            if config is not None:
                wants[variable] = config
                if variable in self._demanded and isinstance(variable.ty, relax.TensorType):
                    placement.quantized[variable] = config
        placement.quantized = dict(reversed(placement.quantized.items()))
        for variable in graph.values:
            if variable in self.members and self.capable[variable] == "movement":
                placement.moved.add(variable)
                operands = graph.tensor_operands(variable)
                for operand in operands[1:]:
                    placement.share(operands[0], operand)
                placement.share(operands[0], variable)
        return placement

    def _config_wanted(
        self, variable: relax.Var, wants: Mapping[relax.Var, QuantizeConfig]
    ) -> QuantizeConfig | None:
        """The config of the layers that read the value, directly or through integer operators."""
        best: QuantizeConfig | None = None
        for reader in self.graph.readers[variable]:
            if reader is None or reader not in self.members:
                continue
            config = self.layers[reader] if reader in self.layers else wants.get(reader)
            # 16-bit activations serve an 8-bit reader too; the reverse would lose what was asked.
            if config is not None and (best is None or config.activations == "int16"):
                best = config
        return best


@dataclass(frozen=True)
class _Chain:
    """A region that may still take in what follows its last value."""

    anchor: relax.Var
    has_residual: bool = False
    is_bare: bool = True
