"""Which layers ship without their zeros, decided by cost before anything is lowered.

The choice is noted in `tvm_compress.sparse_choices` of `main` (JSON: target => layer =>
`SparseChoice`), so that everything behind it, tuning and building, sees the same kernels:
`PackWeights` follows it. Layers that nobody decided on for a target get the form that is expected
to be best there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import tvm
from tvm import relax

from ..schedules.stored_weight import STORED
from .costs import INSISTED, Comparison, Decoder, LayerCosts, vain_decoders
from .encodings import kernel_order
from .graph import Graph
from .ir import dtype_of, op_name
from .layer_spec import LayerSpec, layer_spec
from .op_kinds import ANCHORS
from .quantize_weights import weight_layout
from .sparsify import read_sparsified

CHOICES_ATTR = "tvm_compress.sparse_choices"
_ANY_TARGET = "*"
_MOVES = {"relax.reshape", "relax.permute_dims", "relax.flatten"}
# Codes of few bits are zero as often as this by chance.
_BY_CHANCE = 0.25


@dataclass(frozen=True)
class SparseChoice:
    """How one layer with zeros ships, and what that was decided by."""

    form: str
    """`SparseForm.words`; `STORED`: a dense kernel, whose weight is stored without its zeros;
    empty: dense."""
    reason: str
    """Why it is dense, or that it was insisted on; empty: it pays."""
    cost: float
    dense_cost: float
    unit: str


@tvm.transform.module_pass(opt_level=0, name="ChooseSparse")
class ChooseSparse:
    """Decide for every layer of `main` that has zeros in its weight, behind the recipe's last step.

    `target` names what `costs` are of. Layers named in `insisted` are sparse wherever it has a
    kernel for that.
    """

    def __init__(self, target: str, costs: LayerCosts, insisted: Collection[str] = ()) -> None:
        self.target = target
        self.costs = costs
        self.insisted = frozenset(insisted)

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        graph = Graph(module["main"])
        compared: dict[str, Comparison] = {}
        sparsified = read_sparsified(module)
        for variable, call in graph.values.items():
            if graph.op(variable) not in ANCHORS:
                continue
            spec, kept = layer_spec(call), kept_weights(graph, call)
            if spec is None or kept is None or kept.all():
                continue
            if variable.name not in sparsified and kept.mean() > 1 - _BY_CHANCE:
                continue
            found = self.costs.sparse(variable.name, _as_stored(graph, call, spec), kept)
            if found.sparse or found.stored or variable.name in self.insisted:
                compared[variable.name] = found
        insisted = {name for name in self.insisted if name in compared and compared[name].sparse}
        vain = vain_decoders(found for name, found in compared.items() if name not in insisted)
        choices = {name: _choice(found, name in insisted, vain) for name, found in compared.items()}
        if not choices:
            return module
        module = module.clone()
        by_layer = {name: asdict(choice) for name, choice in choices.items()}
        noted = json.dumps({self.target: by_layer})
        module["main"] = module["main"].with_attr(CHOICES_ATTR, noted)
        return module


def _choice(compared: Comparison, is_insisted: bool, vain: Mapping[Decoder, int]) -> SparseChoice:
    """The best form, or the sparse one that is insisted on. `vain`: decoding functions that save so
    few bytes in all that nothing is to be decoded by them."""
    code = ""
    if compared.best == "stored" and compared.stored and compared.stored.decoder in vain:
        decoder = compared.stored.decoder
        code = f"decoding per call would save {vain[decoder]} bytes in all such layers, "
        code += f"and its code takes {decoder.bytes}"
        compared = replace(compared, stored=None)
    dense, best = compared.dense, compared.best
    if compared.sparse is not None and (best == "sparse" or is_insisted):
        cost = compared.sparse.cost
        reason = "" if compared.pays else INSISTED + compared.words
        return SparseChoice(compared.sparse.form.words, reason, cost.time, dense.time, dense.unit)
    if compared.stored is not None and best == "stored":
        return SparseChoice(STORED, "", compared.stored.cost.time, dense.time, dense.unit)
    time = dense.time if compared.sparse is None else compared.sparse.cost.time
    reason = "; ".join(filter(None, (compared.words, code)))
    return SparseChoice("", reason, time, dense.time, dense.unit)


def read_choices(function: relax.Function, target: str) -> dict[str, SparseChoice]:
    """What `ChooseSparse` noted for a target, by its name; layers that it did not look at are
    missing."""
    noted = json.loads(str((function.attrs or {}).get(CHOICES_ATTR, "{}")))
    by_layer = noted.get(target, noted.get(_ANY_TARGET, {}))
    return {name: SparseChoice(**fields) for name, fields in by_layer.items()}


def all_dense(function: relax.Function) -> relax.Function:
    """The same with dense kernels for all its layers: nothing is gained by sparse ones where a
    module runs a few times."""
    graph = Graph(function)
    dense = asdict(SparseChoice("", "not shipped", 0.0, 0.0, ""))
    layers = [item.name for item in graph.values if graph.op(item) in ANCHORS]
    return function.with_attr(CHOICES_ATTR, json.dumps({_ANY_TARGET: dict.fromkeys(layers, dense)}))


def _as_stored(graph: Graph, call: relax.Call, spec: LayerSpec) -> LayerSpec:
    """A float kernel's spec with the dtypes that a quantised layer's codes have."""
    weight, data = call.args[1], call.args[0]
    while data in graph.values and graph.op(data) in _MOVES:
        data = graph.values[data].args[0]
    found = [graph.values.get(expr, expr) for expr in (data, weight)]
    if any(op_name(value) != "relax.dequantize" for value in found):
        return spec  # weight-only layers compute in float
    data_dtype, weight_dtype = (str(dtype_of(value.args[0])) for value in found)
    return spec.replace(data_dtype=data_dtype, weight_dtype=weight_dtype, acc_dtype="int32")


def kept_weights(graph: Graph, call: relax.Call) -> np.ndarray | None:
    """[groups, K, N], K in the order of kernels (rows, columns, inputs): which weights of a layer
    are not zero; `None` where the weight is computed, has a batch axis or is not plain codes."""
    weight = call.args[1]
    values = graph.constant(weight)
    if values is None:
        stored = graph.values.get(weight, weight)
        if op_name(stored) != "relax.dequantize":
            return None
        values, zero_point = (graph.constant(stored.args[i]) for i in (0, 2))
        if values is None or zero_point is None or zero_point.any():
            return None
    if op_name(call) == "relax.matmul":
        return None if values.ndim != 2 else (values != 0)[None]
    layout = weight_layout(call)
    ordered = values.transpose([layout.index(axis) for axis in kernel_order(layout)])
    groups, outputs = int(call.attrs.groups), ordered.shape[-1]
    split = (ordered != 0).reshape(-1, groups, outputs // groups)  # [K, G, N]
    return np.ascontiguousarray(split.transpose(1, 0, 2))
