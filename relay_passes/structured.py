"""matmul(x, w) => fast transforms with a few trained numbers between them

Block-circulant, with p and q blocks of inputs and outputs and f frequencies:

    x [.., p b] => matmul(x, dft) => conv, 1x1 in f groups, of (re, im) => matmul(.., inverse dft)

Diagonals between Hadamard transforms (Fastfood):

    x * first => H => take(order) => * middle => H => * last

A transform is a product with a constant matrix, or with two smaller ones (H_ab is the Kronecker
product of H_a and H_b). All parts are ordinary layers, called NAME_dft, NAME_frequencies,
NAME_inverse, and NAME_hadamard1 to 4; later steps but `quantize` leave the transforms alone.
Sources: `numerics/structured.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax import op

from ..schedules import MatmulSpec
from .costs import INSISTED, LayerCosts, LayerUse
from .graph import Graph, rebuild
from .ir import noted_words, shape_of, variable_beside
from .layer_spec import LayerSpec, layer_spec
from .numerics.second_order import damped
from .numerics.statistics import Statistics
from .numerics.structured import (
    Fastfood,
    FrequencyFactors,
    circulant_matrix,
    frequency_factors,
    hadamard,
    nearest_circulant,
    nearest_fastfood,
)
from .observations import Observations
from .structured_config import Circulant, StructuredConfig
from .weight_layers import FIXED_ATTR, WeightLayer, read_fixed, weight_layers

STRUCTURED_ATTR = "tvm_compress.structured"

Layer = WeightLayer[StructuredConfig]
Array = NDArray[np.float64]


@tvm.transform.module_pass(opt_level=0, name="Structured")
class Structured:
    """Give the linear layers in `schemes` structured weights.

    `statistics` holds what `observe` lists, gathered on this very module; `costs` says what layers
    take on the target, without it multiply-accumulates are counted. Layers that would not be
    faster stay as they are, unless their config insists. What became of each is in the attribute
    `tvm_compress.structured` of `main` (JSON: layer => words). Raises `DataError` when statistics
    are missing.
    """

    def __init__(
        self,
        schemes: Mapping[str, StructuredConfig],
        statistics: Statistics,
        costs: LayerCosts | None = None,
    ) -> None:
        self.schemes = dict(schemes)
        self.statistics = statistics
        self.costs = costs

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        before: dict[relax.Var, list[relax.VarBinding]] = {}
        replace: dict[relax.Var, tvm.ir.Expr] = {}
        notes, fixed = read_structured(module), set(read_fixed(module["main"]))
        for layer in _layers(graph, self.schemes):
            found = _structure(layer, self.statistics)
            if found is None:
                note = "whole: no block divides its inputs and outputs"
                notes |= {variable.name: note for variable in layer.variables}
                continue
            constants: list[relax.Constant] = []  # one for all steps of a loop
            chains = {
                v: found.emit(_Chain(v, graph.values[v].args[0], constants))
                for v in layer.variables
            }
            chain = chains[layer.variables[0]]
            loss = _why_loss(layer, chain.specs, self.costs)
            stays = loss is not None and not layer.config.insist
            note = f"whole: {loss}" if stays else found.words
            if loss is not None and layer.config.insist:
                note += f"; {INSISTED}{loss}"
            notes |= {variable.name: note for variable in chains}
            if not stays:
                for variable, own in chains.items():
                    before[variable], replace[variable] = own.bindings[:-1], own.bindings[-1].value
                    fixed.update(own.transforms)
        main = rebuild(graph.function, replace=replace, before=before)
        module = module.clone()
        attributes = {STRUCTURED_ATTR: json.dumps(notes), FIXED_ATTR: json.dumps(sorted(fixed))}
        module["main"] = main.with_attrs(attributes)
        return relax.transform.Normalize()(module)


def observe(module: tvm.IRModule, schemes: Mapping[str, StructuredConfig]) -> Observations | None:
    """X·Xᵀ of the layers that are fitted to the data."""
    layers = _layers(Graph(module["main"]), schemes)
    names = [v.name for layer in layers if layer.config.data_aware for v in layer.variables]
    return Observations(second_moments=frozenset(names)) if names else None


def read_structured(module: tvm.IRModule) -> dict[str, str]:
    """Layer => what it became, in words, of all steps `structured` so far."""
    return noted_words(module, STRUCTURED_ATTR)


def _layers(graph: Graph, schemes: Mapping[str, StructuredConfig]) -> list[Layer]:
    """The linear ones."""
    layers = weight_layers(graph, schemes)
    return [layer for layer in layers if isinstance(layer_spec(layer.call), MatmulSpec)]


def _why_loss(layer: Layer, specs: list[LayerSpec], costs: LayerCosts | None) -> str | None:
    """What to note of a layer that had better stay as it is."""
    spec = layer_spec(layer.call)
    assert spec is not None
    if costs is None:
        share = sum(part.macs for part in specs) / spec.macs
        return f"its parts take {share:.2f}x of its operations" if share >= 1 else None
    chains = [[spec], specs]
    whole, parts = costs.totals([[LayerUse(layer.name, own) for own in chain] for chain in chains])
    if parts.pays(whole):
        return None
    return f"its parts take {parts.words(whole)}; {parts.rule(whole)}"


# --- fits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Circulant:
    """A layer as a block-circulant one."""

    factors: FrequencyFactors
    words: str

    def emit(self, chain: _Chain) -> _Chain:
        """The calls in the frequency domain."""
        count, blocks_in, _, blocks_out = self.factors.weight.shape
        size = self.factors.inverse.shape[-1]
        shape = shape_of(chain.value)
        assert shape is not None
        rows = math.prod(shape[:-1])
        chain.reshape((rows, blocks_in, size))
        chain.matmul("dft", self.factors.forward)
        chain.reshape((rows, blocks_in, 2, count)).permute((3, 1, 0, 2))
        chain.reshape((1, count * blocks_in, rows, 2))
        chain.conv("frequencies", self.factors.weight.transpose(0, 2, 3, 1), count)
        chain.reshape((count, 2, blocks_out, rows, 2)).permute((3, 2, 4, 1, 0))
        chain.reshape((rows, blocks_out, 4 * count))
        chain.matmul("inverse", self.factors.inverse.reshape(4 * count, size))
        return chain.reshape((*shape[:-1], blocks_out * size))


@dataclass(frozen=True)
class _Hadamard:
    """A layer as diagonals between Hadamard transforms."""

    fitted: Fastfood
    outputs: int
    words: str

    def emit(self, chain: _Chain) -> _Chain:
        """The diagonals and, for each transform, products with two small matrices."""
        shape = shape_of(chain.value)
        assert shape is not None
        rows, inputs, size = math.prod(shape[:-1]), shape[-1], len(self.fitted.first)
        chain.reshape((rows, inputs))
        chain.multiply(self.fitted.first[:inputs])
        if size > inputs:
            chain.pad(size - inputs)
        self._transform(chain, rows, 1)
        chain.take(self.fitted.order)
        chain.multiply(self.fitted.middle)
        self._transform(chain, rows, 3)
        if size > self.outputs:
            chain.cut(self.outputs)
        chain.multiply(self.fitted.last[: self.outputs])
        return chain.reshape((*shape[:-1], self.outputs))

    def _transform(self, chain: _Chain, rows: int, number: int) -> None:
        size = len(self.fitted.first)
        inner = 1 << (size.bit_length() // 2)
        outer = size // inner
        chain.reshape((rows, outer, inner)).matmul(f"hadamard{number}", hadamard(inner))
        chain.permute((0, 2, 1)).matmul(f"hadamard{number + 1}", hadamard(outer))
        chain.permute((0, 2, 1)).reshape((rows, size))


def _structure(layer: Layer, statistics: Statistics) -> _Circulant | _Hadamard | None:
    """The nearest weight of the form asked for; `None`: no block divides inputs and outputs."""
    config, weight = layer.config, layer.matrices()[0]
    hessian = None
    if config.data_aware:
        hessian = damped(layer.moments(statistics)[0][0])
    inputs, outputs = weight.shape
    if isinstance(config.form, Circulant):
        common = math.gcd(inputs, outputs)
        sizes = [n for n in range(2, config.form.block + 1) if common % n == 0]
        if not sizes:
            return None
        rows = nearest_circulant(weight, sizes[-1], hessian)
        lost = _lost(weight, circulant_matrix(rows), hessian)
        return _Circulant(frequency_factors(rows), f"circulant {sizes[-1]}, {lost}")
    fitted = nearest_fastfood(weight, config.form.seed, hessian)
    lost = _lost(weight, fitted.matrix(inputs, outputs), hessian)
    return _Hadamard(fitted, outputs, f"hadamard {len(fitted.first)}, {lost}")


def _lost(weight: Array, fitted: Array, hessian: Array | None) -> str:
    """Squared error in words."""
    norm = np.eye(len(weight)) if hessian is None else hessian
    change = weight - fitted
    share = float(np.sum(change * (norm @ change)) / np.sum(weight * (norm @ weight)))
    return f"{100 * share:.0f} % of its {'weight' if hessian is None else 'outputs'} lost"


# --- calls ----------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """Calls one behind the other that take the place of `variable`; `constants` are what they read
    in order, those of the first chain of a layer."""

    variable: relax.Var
    value: tvm.ir.Expr
    constants: list[relax.Constant]
    used: int = 0
    bindings: list[relax.VarBinding] = field(default_factory=list)
    specs: list[LayerSpec] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    """Layers whose weights are not learnt."""
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)

    def add(self, value: tvm.ir.Expr, part: str = "") -> _Chain:
        """Bind a value; `part` names a layer."""
        value = self.builder.normalize(value)
        name = f"{self.variable.name}_{part or f'step{len(self.bindings)}'}"
        if part:
            spec = layer_spec(value)
            assert spec is not None
            self.specs.append(spec)
        bound = variable_beside(self.variable, name, value.ty)
        self.bindings.append(relax.VarBinding(bound, value))
        self.value = bound
        return self

    def reshape(self, shape: Sequence[int]) -> _Chain:
        return self.add(op.reshape(self.value, tuple(shape)))

    def permute(self, axes: Sequence[int]) -> _Chain:
        return self.add(op.permute_dims(self.value, list(axes)))

    def multiply(self, factors: Array) -> _Chain:
        return self.add(op.multiply(self.value, self.constant(factors)))

    def take(self, order: NDArray[np.int64]) -> _Chain:
        return self.add(op.take(self.value, self.constant(order, "int64"), axis=1, mode="fast"))

    def pad(self, count: int) -> _Chain:
        return self.add(op.nn.pad(self.value, (0, 0, 0, count)))

    def cut(self, count: int) -> _Chain:
        return self.add(op.strided_slice(self.value, [1], [0], [count]))

    def matmul(self, part: str, weight: Array) -> _Chain:
        self.transforms.append(f"{self.variable.name}_{part}")
        return self.add(op.matmul(self.value, self.constant(weight)), part)

    def conv(self, part: str, weight: Array, groups: int) -> _Chain:
        """1x1, `weight` [groups, .., inputs of a group]."""
        kernel = self.constant(weight.reshape(-1, weight.shape[-1], 1, 1))
        return self.add(op.nn.conv2d(self.value, kernel, groups=groups), part)

    def constant(self, array: NDArray[Any], dtype: str = "float32") -> relax.Constant:
        """The next one of the layer."""
        if self.used == len(self.constants):
            self.constants.append(relax.const(np.ascontiguousarray(array, dtype=dtype)))
        self.used += 1
        return self.constants[self.used - 1]
