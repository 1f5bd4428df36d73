"""Graph form => kernel form: quantised regions become calls of naive integer kernels.

    quantize(relu(conv2d(dq(x), dq(w)) + b)) => requantize(conv2d_codes(x, w), bias, multiplier)

The result is still an ordinary Relax module and is the executable reference of everything that is
scheduled later. Floats convs and products become kernels of the same families. What had quantised
operands and stays float is listed in the attribute `tvm_compress.left_float` of `main` (JSON).
"""

from __future__ import annotations

import json

import tvm
from tvm import relax

from ...errors import ModelError
from .. import ir
from ..numerics.requantize import RULES, Rule
from . import anchors, elementwise, movement, normalise, pooling, quantise, tflite
from .context import FORMS, Lowering
from .values import Constant, Many, Other, Tensor, Value

LEFT_FLOAT_ATTR = "tvm_compress.left_float"
TENSORS_ATTR = "tvm_compress.tensors"
REQUANTIZE_ATTR = "tvm_compress.requantize"
KERNEL_FORM_ATTR = "tvm_compress.kernel_form"

HANDLERS = {
    **quantise.HANDLERS,
    **elementwise.HANDLERS,
    **anchors.HANDLERS,
    **pooling.HANDLERS,
    **movement.HANDLERS,
    **normalise.HANDLERS,
}
# Handlers and forms by requantisation rule.
TABLES: dict[Rule, tuple[dict, dict]] = {
    "float32": (HANDLERS, FORMS),
    "tflite": (HANDLERS | tflite.HANDLERS, FORMS | tflite.FORMS),
}


@tvm.transform.module_pass(opt_level=0, name="LowerToKernels")
class LowerToKernels:
    """The pass. `rule` overrides the module's requantisation rule (default float32)."""

    def __init__(self, rule: Rule | None = None) -> None:
        if rule is not None and rule not in RULES:
            raise ValueError(f"unknown requantisation rule {rule!r}; known: {', '.join(RULES)}")
        self.rule = rule

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        main = module["main"]
        attrs = dict(main.attrs or {})
        if attrs.get(KERNEL_FORM_ATTR):
            return module
        rule = self.rule or attrs.get(REQUANTIZE_ATTR) or "float32"
        return _lower(module, main, attrs, str(rule))  # type: ignore[arg-type]


def _lower(module: tvm.IRModule, main: relax.Function, attrs: dict, rule: Rule) -> tvm.IRModule:
    rest = tvm.IRModule({gv: f for gv, f in module.functions.items() if gv.name_hint != "main"})
    builder = relax.BlockBuilder(rest)
    ctx = Lowering(module, builder, rule, *TABLES[rule], came_quantised=REQUANTIZE_ATTR in attrs)
    pure = all(isinstance(block, relax.DataflowBlock) for block in main.body.blocks)
    for param in main.params:
        shape = ir.shape_of(param)
        if shape is not None:
            ctx.env[param] = Tensor(
                param, shape, ir.dtype_of(param), ir.renormalise_perm(len(shape))
            )
    with builder.function("main", list(main.params)):
        if pure:
            with builder.dataflow():
                result = builder.emit_output(_walk(ctx, main))
        else:
            result = builder.emit(_walk(ctx, main))
        builder.emit_func_output(result)
    lowered = builder.finalize()
    attrs = {k: v for k, v in attrs.items() if k != "global_symbol"}
    # Quantize has its own list; an operator is named once, with the earlier reason. A layer that
    # Quantize left alone because it came quantised is an integer layer all the same.
    left = {entry["name"]: entry for entry in ctx.left_float}
    for entry in json.loads(str(attrs.get(LEFT_FLOAT_ATTR, "[]"))):
        if entry["name"] not in ctx.integer_layers:
            left[entry["name"]] = entry
    attrs |= {
        LEFT_FLOAT_ATTR: json.dumps(list(left.values())),
        TENSORS_ATTR: json.dumps(_tensors(ctx)),
        KERNEL_FORM_ATTR: 1,
    }
    lowered["main"] = lowered["main"].with_attrs(attrs)
    return relax.transform.DeadCodeElimination(["main"])(lowered)


def _tensors(ctx: Lowering) -> dict[str, dict]:
    """Variable of kernel form => the tensor of graph form that it holds, and how.

    Physical axis i is logical axis `perm[i]`; codes mean `scale * (code - zero_point)`.
    """
    table: dict[str, dict] = {}
    for expr, value in [*ctx.env.items(), *ctx.floats.items()]:
        if not isinstance(value, Tensor) or not isinstance(value.expr, relax.Var):
            continue
        source, call = expr, ctx.origin.get(expr)
        if call is not None and ir.op_name(call) == "relax.quantize":
            source = call.args[0]
        table.setdefault(
            value.expr.name,
            {
                "source": getattr(source, "name", value.expr.name),
                "shape": list(value.shape),
                "perm": list(value.perm),
                "scale": None if value.quant is None else float(value.quant.scale),
                "zero_point": 0 if value.quant is None else int(value.quant.zero_point),
            },
        )
    return table


def _walk(ctx: Lowering, main: relax.Function) -> tvm.ir.Expr:
    for binding in ir.bindings(main):
        if not isinstance(binding, relax.VarBinding):
            raise ModelError(
                f"{binding.var.name}: shapes that are only known at run time; give --shape"
            )
        ctx.env[binding.var] = _bind(ctx, binding.var, binding.value)
    return _output(ctx, main.body.body)


def _bind(ctx: Lowering, var: relax.Var, value: tvm.ir.Expr) -> Value:
    if isinstance(value, tvm.ir.Call):
        ctx.bind(var, value)
        return ctx.env[var]
    if isinstance(value, relax.TupleGetItem):
        fields = ctx.value(value.tuple_value)
        if isinstance(fields, Many):
            return fields.values[value.index]
    elif not isinstance(value, relax.If):
        known = ctx.value(value)  # another name, a tuple, a constant
        if not isinstance(known, Other):
            ctx.origin[var] = value
            return known
        if isinstance(value, relax.ShapeExpr):
            return known
    if isinstance(value, relax.If):
        value = _Branches(ctx).visit_expr(value)
        expr = ctx.emit(value, var.name)
        shape = ir.shape_of(var)
        if shape is None:
            return Other(expr)
        return Tensor(expr, shape, ir.dtype_of(var), ir.renormalise_perm(len(shape)))
    return ctx.fallback(var, value)


@relax.expr_functor.mutator
class _Branches(relax.PyExprMutator):
    """The inside of an `If` stays as it is; outer variables become their lowered selves."""

    def __init__(self, ctx: Lowering) -> None:
        super().__init__()
        self.ctx = ctx

    def visit_var_(self, var: relax.Var) -> tvm.ir.Expr:
        return self.ctx.native(var) if var in self.ctx.env else var

    def visit_dataflow_var_(self, var: relax.Var) -> tvm.ir.Expr:
        return self.visit_var_(var)


def _output(ctx: Lowering, expr: tvm.ir.Expr) -> tvm.ir.Expr:
    """The function's result with every field in graph form's own order."""
    value = ctx.value(expr)
    if isinstance(value, Many):
        source = ctx.origin.get(expr, expr)
        return relax.Tuple([_output(ctx, field) for field in source.fields])
    if isinstance(value, Constant):
        return value.expr
    return ctx.native(expr)


__all__ = ["HANDLERS", "KERNEL_FORM_ATTR", "LEFT_FLOAT_ATTR", "TENSORS_ATTR", "LowerToKernels"]
