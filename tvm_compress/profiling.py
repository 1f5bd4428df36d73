"""Where a model's work and bytes are: MACs, parameters and activations of every layer.

A layer is one operator with multiplications and its weight (conv, matmul, embedding); a bias that
is added to its result counts with it. Everything else (pooling, activations, adds) is counted by
operator type. Sizes are those of one inference with the model's own batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm
    from tvm import relax

    from .model import Model

VIEWS = {
    "relax.reshape",
    "relax.flatten",
    "relax.squeeze",
    "relax.expand_dims",
}  # the same bytes under another shape
ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "clip", "abs",
    "negative", "exp", "log", "sqrt", "rsqrt", "round", "sign", "sigmoid", "tanh", "erf", "where",
    "nn.relu", "nn.relu6", "nn.leakyrelu", "nn.prelu", "nn.gelu", "nn.silu", "nn.softplus",
    "quantize", "dequantize", "greater", "less", "equal",
}  # may overwrite an argument  # fmt: skip
PREPARATION = VIEWS | {"relax.dequantize", "relax.permute_dims", "relax.astype"}  # of weights


@dataclass(frozen=True)
class LayerProfile:
    """One layer with multiplications."""

    name: str
    type: str  # "conv2d", "depthwise conv2d", "matmul", ...
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class TypeProfile:
    """All operators of one type together."""

    type: str
    count: int
    macs: int
    parameters: int
    weight_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Profile:
    """What `profile_model` found."""

    model: str
    layers: tuple[LayerProfile, ...]  # in order of execution
    types: tuple[TypeProfile, ...]  # most MACs first
    macs: int
    parameters: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    peak_activation_bytes: int
    peak_at: str  # the operator during which the peak is reached

    def sentence(self) -> str:
        """Which types hold most parameters and most operations, in one line."""
        if not self.macs or not self.parameters:
            return "No layer of this model multiplies by a weight."
        by_macs = max(self.types, key=lambda row: row.macs)
        by_parameters = max(self.types, key=lambda row: row.parameters)
        operations = f"{by_macs.macs / self.macs:.0%} of the operations"
        parameters = f"{by_parameters.parameters / self.parameters:.0%} of the parameters"
        if by_macs is by_parameters:
            return f"{by_macs.type} layers do {operations} and hold {parameters}."
        return (
            f"{parameters} sit in the {by_parameters.type} layers, "
            f"{operations} in the {by_macs.type} layers."
        )


@dataclass(frozen=True)
class _Constant:
    """An expression made of constants alone."""

    parameters: int
    bytes: int


def profile_model(model: Model) -> Profile:
    """Count layers, bytes and the peak of live activations of a model in graph form.

    The peak assumes the order of the graph, that a result which only renames its argument
    (reshape) shares its bytes, and that an elementwise operator overwrites an argument that nobody
    needs any more.
    """
    function = model.module["main"]
    walk = _Walk(model.module)
    walk.visit(function.body)
    peak, peak_at = _peak(model.module, function)
    return Profile(
        model=model.name,
        layers=tuple(walk.layers),
        types=_by_type(walk),
        macs=sum(layer.macs for layer in walk.layers),
        parameters=walk.parameters,
        weight_bytes=walk.weight_bytes,
        input_bytes=sum(_bytes(param.ty) for param in function.params),
        output_bytes=_bytes(function.ret_ty),
        peak_activation_bytes=peak,
        peak_at=peak_at,
    )


class _Walk:
    """Collects layers and operators over all bindings, branches included."""

    def __init__(self, module: tvm.IRModule) -> None:
        self._module = module
        self.layers: list[LayerProfile] = []
        self.others: dict[str, list[int]] = {}  # type -> [count, parameters, bytes, output bytes]
        self.parameters = 0
        self.weight_bytes = 0
        self._constants: dict[relax.Var, _Constant] = {}
        self._layer_of: dict[relax.Var, int] = {}
        self._seen: list[Any] = []

    def visit(self, body: relax.Expr) -> None:
        import tvm
        from tvm import relax

        if not isinstance(body, relax.SeqExpr):
            return
        for block in body.blocks:
            for binding in block.bindings:
                value = binding.value
                if isinstance(value, relax.If):
                    self.visit(value.true_branch)
                    self.visit(value.false_branch)
                elif isinstance(getattr(value, "op", None), tvm.ir.GlobalVar):
                    callee = self._module[value.op]
                    if isinstance(callee, relax.Function) and not callee.attrs:
                        self.visit(callee.body)
                    else:
                        self._visit_call(binding.var, value)
                elif hasattr(value, "op"):
                    self._visit_call(binding.var, value)

    def _visit_call(self, var: relax.Var, call: tvm.ir.Call) -> None:
        from .relay_passes.ir import op_name

        name = op_name(call) or "call"
        arguments = _flat(call.args)
        constants = [self._as_constant(argument) for argument in arguments]
        known = [constant for constant in constants if constant is not None]
        tensors = [a for a, c in zip(arguments, constants, strict=True) if c is None]
        if not tensors and known and (name in PREPARATION or name == "call"):
            total = _Constant(sum(c.parameters for c in known[:1]), sum(c.bytes for c in known))
            self._constants[var] = total
            return
        parameters = sum(constant.parameters for constant in known)
        size = sum(constant.bytes for constant in known)
        self.parameters += parameters
        self.weight_bytes += size
        macs = macs_of(call)
        if macs is not None:
            self._layer_of[var] = len(self.layers)
            self.layers.append(
                LayerProfile(
                    name=var.name,
                    type=_type_name(name, call),
                    output_shape=_shape(var.ty),
                    macs=macs,
                    parameters=parameters,
                    weight_bytes=size,
                    input_bytes=sum(_bytes(tensor.ty) for tensor in tensors),
                    output_bytes=_bytes(var.ty),
                )
            )
            return
        producer = self._layer_of.get(tensors[0]) if len(tensors) == 1 else None
        if name == "relax.add" and producer is not None and known:  # the layer's bias
            old = self.layers[producer]
            self.layers[producer] = LayerProfile(
                **{
                    **old.__dict__,
                    "parameters": old.parameters + parameters,
                    "weight_bytes": old.weight_bytes + size,
                }
            )
            return
        if name in VIEWS:
            return
        row = self.others.setdefault(_type_name(name, call), [0, 0, 0, 0])
        for place, amount in enumerate((1, parameters, size, _bytes(var.ty))):
            row[place] += amount

    def _as_constant(self, expr: Any) -> _Constant | None:
        """Counts every constant once, however often it is used."""
        import tvm
        from tvm import relax

        if isinstance(expr, relax.Var):
            found = self._constants.get(expr)
        elif isinstance(expr, tvm.ir.GenericConst) and hasattr(expr.ty, "shape"):
            found = _Constant(math.prod(_shape(expr.ty)), _bytes(expr.ty))
        else:
            return _Constant(0, 0) if not hasattr(expr.ty, "dtype") else None
        if found is None:
            return None
        if any(expr.same_as(other) for other in self._seen):
            return _Constant(0, 0)
        self._seen.append(expr)
        return found


def _by_type(walk: _Walk) -> tuple[TypeProfile, ...]:
    rows: dict[str, list[int]] = {}
    for layer in walk.layers:
        row = rows.setdefault(layer.type, [0, 0, 0, 0, 0])
        amounts = (1, layer.macs, layer.parameters, layer.weight_bytes, layer.output_bytes)
        for place, amount in enumerate(amounts):
            row[place] += amount
    for name, (count, parameters, size, output) in walk.others.items():
        row = rows.setdefault(name, [0, 0, 0, 0, 0])
        for place, amount in enumerate((count, 0, parameters, size, output)):
            row[place] += amount
    types = [TypeProfile(name, *row) for name, row in rows.items()]
    return tuple(sorted(types, key=lambda row: (-row.macs, -row.parameters, -row.output_bytes)))


def macs_of(call: Any) -> int | None:
    """Multiply-accumulates of one call, `None` for what is no layer."""
    from .relay_passes.ir import op_name

    kind = (op_name(call) or "").removeprefix("relax.").removeprefix("nn.")
    if kind in ("conv1d", "conv2d", "conv3d"):
        weight = _shape(call.args[1].ty)
        outputs = weight[str(call.attrs.kernel_layout).index("O")]
        return math.prod(_shape(call.ty)) * math.prod(weight) // outputs
    if kind in ("conv1d_transpose", "conv2d_transpose", "conv3d_transpose"):
        weight = _shape(call.args[1].ty)
        inputs = weight[str(call.attrs.kernel_layout).index("I")]
        return math.prod(_shape(call.args[0].ty)) * math.prod(weight) // inputs
    if kind == "matmul":
        return math.prod(_shape(call.ty)) * _shape(call.args[0].ty)[-1]
    if kind == "take" and _constant_weight(call):
        return 0  # an embedding: bytes without multiplications
    return None


def _constant_weight(call: tvm.ir.Call) -> bool:
    import tvm

    table = call.args[0]
    return isinstance(table, tvm.ir.GenericConst) and len(_shape(table.ty)) == 2


def _type_name(name: str, call: tvm.ir.Call) -> str:
    kind = name.removeprefix("relax.").removeprefix("nn.")
    if kind.startswith("conv") and not kind.endswith("transpose"):
        groups = int(call.attrs.groups)
        layout = str(call.attrs.data_layout)
        if groups > 1:
            channels = _shape(call.args[0].ty)[layout.index("C")]
            return f"depthwise {kind}" if groups == channels else f"grouped {kind}"
    if kind == "matmul":
        import tvm
        from tvm import relax

        weight = call.args[1]
        is_constant = isinstance(weight, tvm.ir.GenericConst)
        return "fully connected" if is_constant or (isinstance(weight, relax.Var) and len(
            _shape(weight.ty)
        ) == 2) else "matmul"  # fmt: skip
    return "embedding" if kind == "take" and _constant_weight(call) else kind


def _peak(module: tvm.IRModule, function: relax.Function) -> tuple[int, str]:
    """Largest sum of tensors that are alive at once, and during which operator."""
    from tvm import relax

    from .relay_passes.ir import op_name

    blocks = function.body.blocks if isinstance(function.body, relax.SeqExpr) else []
    bindings = [binding for block in blocks for binding in block.bindings]
    root: dict[relax.Var, relax.Var] = {param: param for param in function.params}
    sizes: dict[relax.Var, int] = {param: _bytes(param.ty) for param in function.params}
    uses: list[tuple[str, relax.Var, list[relax.Var], int, bool]] = []
    for binding in bindings:
        value = binding.value
        used = [root[var] for var in _variables(value) if var in root]
        name = op_name(value) or type(value).__name__
        if name in VIEWS or isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem):
            if used:
                root[binding.var] = used[0]
                uses.append((binding.var.name, used[0], used, 0, False))
            continue
        if not used:  # made of constants alone: stored weights
            continue
        inner = _peak_of_branches(module, value) if isinstance(value, relax.If) else 0
        root[binding.var] = binding.var
        sizes[binding.var] = _bytes(binding.var.ty)
        uses.append(
            (binding.var.name, binding.var, used, inner, name.removeprefix("relax.") in ELEMENTWISE)
        )
    results = [root[var] for var in _variables(function.body.body) if var in root]
    last = {var: index for index, (_, _, used, _, _) in enumerate(uses) for var in used}
    last.update(dict.fromkeys(results, len(uses)))

    live = {param: sizes[param] for param in function.params}
    peak, peak_at = sum(live.values()), "the input"
    for index, (name, var, used, inner, elementwise) in enumerate(uses):
        dying = [v for v in set(used) if last[v] == index and v in live]
        reused = max((live[v] for v in dying), default=0) if elementwise else 0
        added = max(0, sizes[var] - reused) if var not in live else 0
        now = sum(live.values()) + added + inner
        if now > peak:
            peak, peak_at = now, name
        live[var] = sizes[var]
        for gone in dying:
            if gone is not var:
                live.pop(gone, None)
        if last.get(var, -1) < index:
            live.pop(var, None)
    return peak, peak_at


def _peak_of_branches(module: tvm.IRModule, branches: relax.If) -> int:
    """Both branches are never alive together; each is counted without its outer tensors."""
    from tvm import relax

    from .relay_passes.branches import branch_call

    peaks = [0]
    for branch in (branches.true_branch, branches.false_branch):
        call = branch_call(module, branch)
        if call is not None:
            callee = module[call.op]
            outer = sum(_bytes(param.ty) for param in callee.params)
            peaks.append(_peak(module, callee)[0] - outer)
        elif isinstance(branch, relax.SeqExpr):
            peaks += [_bytes(b.var.ty) for block in branch.blocks for b in block.bindings]
    return max(peaks)


def _variables(expr: Any) -> list[relax.Var]:
    from tvm.relax.analysis import free_vars

    return list(free_vars(expr))


def _flat(arguments: Iterable[Any]) -> list[Any]:
    from tvm import relax

    flat: list[Any] = []
    for argument in arguments:
        flat += _flat(argument.fields) if isinstance(argument, relax.Tuple) else [argument]
    return flat


def _shape(ty: Any) -> tuple[int, ...]:
    values = getattr(getattr(ty, "shape", None), "values", None)
    return tuple(int(value) for value in values) if values is not None else ()


def _bytes(ty: Any) -> int:
    """Size of a tensor type or of all fields of a tuple type."""
    if hasattr(ty, "fields"):
        return sum(_bytes(field) for field in ty.fields)
    if not hasattr(ty, "dtype") or getattr(ty, "shape", None) is None:
        return 0
    bits = 8 if str(ty.dtype) == "bool" else int("".join(c for c in str(ty.dtype) if c.isdigit()))
    return math.prod(_shape(ty)) * ((bits + 7) // 8)
