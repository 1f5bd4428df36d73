"""Scheduled kernels => plain C functions: `void kernel(pointer, ..., pointer)`, no TVM runtime.

What a kernel needs beyond its arguments (a padded copy, sums) becomes further pointers, behind the
output: its *workspaces*, which the caller's memory plan places. A few small values stay on the
stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from .float_calls import with_own_names

if TYPE_CHECKING:
    import tvm
    from tvm import ir, tirx

    from ..targets import Target

LEAST_GAIN = 0.25
"""Less memory in common is not worth having LLVM expect it."""

STACK_BYTES = 64
"""A kernel's own buffer of more bytes than this is a workspace."""


@dataclass(frozen=True)
class Workspace:
    """Memory that a kernel needs during a call."""

    name: str
    bytes: int


@dataclass(frozen=True)
class BareKernel:
    """A kernel with a plain signature, ready for code generation."""

    function: tirx.PrimFunc
    parameters: tuple[str, ...]
    """What each pointer points to, as a C type; the workspaces' come last."""
    workspaces: tuple[Workspace, ...]
    leads: tuple[tuple[int, int, int], ...] = ()
    """(output, input, bytes): the output may lie over that input if it starts so many bytes or more
    before it."""


def scheduling_target(target: Target, is_c: bool) -> Target:
    """What kernels are scheduled for. C has no vectors and no intrinsics of ours."""
    if not is_c:
        return replace(target, threads=1)
    return replace(target, threads=1, vector_bits=8, capabilities=frozenset())


def to_bare(scheduled: tirx.PrimFunc, symbol: str, target: Target, is_c: bool) -> BareKernel:
    """Lower a scheduled kernel to loops over pointers under the name `symbol`."""
    import tvm
    from tvm import tirx
    from tvm.tirx.stmt import AllocBuffer, AttrStmt, Bind, DeclBuffer, SeqStmt

    from .in_place import leads
    from .rewrite_body import rewrite_statement
    from .rounding import rounder, without_library

    code = c_target() if is_c else target.tvm_target()
    lowered = _lower(scheduled, target, is_c)
    over = leads(lowered, int((lowered.attrs or {}).get("num_outputs", 1)), LEAST_GAIN)
    overlapping = {number for pair in over for number in pair}
    to_int32 = rounder(target, is_c)
    # With an operating system below, what a schedule wants in registers may spill to the stack.
    in_registers = not is_c and not target.is_bare_metal
    pointers: list[tirx.Var] = []
    types: list[str] = []
    declared: list[tirx.Stmt] = []
    workspaces: list[Workspace] = []

    def pointer(buffer: tirx.Buffer) -> tirx.Stmt:
        element = tvm.ir.PrimType(str(buffer.dtype))
        pointers.append(tirx.Var(buffer.name, tvm.ir.PointerType(element, "global")))
        types.append(c_type(str(buffer.dtype)))
        if is_c or len(pointers) - 1 not in overlapping:
            return DeclBuffer(buffer, data=pointers[-1])
        # Without "noalias", the code generator puts what is bound to a pointer into one class of
        # memory, so that LLVM keeps the order of loads and stores.
        bound = tirx.Var(f"{buffer.name}_bound", pointers[-1].ty)
        return SeqStmt([Bind(bound, pointers[-1]), DeclBuffer(buffer, data=bound)])

    def on_stack(buffer: tirx.Buffer) -> tirx.Stmt:
        # Or the code generator would be told to ask TVM's runtime for it.
        as_it_is = {"disable_lower_builtin": tirx.const(1, "int32")}
        if not is_c or buffer.scope() == "global":
            return AllocBuffer(buffer, as_it_is)
        # C knows no other scope.
        name = f"{buffer.name}_stack"
        plain = tirx.decl_buffer(buffer.shape, str(buffer.dtype), name)
        view = DeclBuffer(buffer, data=tirx.buffer_data(plain))
        return SeqStmt([AllocBuffer(plain, as_it_is), view])

    def alloc(stmt: Any) -> tirx.Stmt:
        size = _bytes(stmt.buffer)
        if size <= STACK_BYTES or (in_registers and stmt.buffer.scope() == "local"):
            return on_stack(stmt.buffer)
        workspaces.append(Workspace(str(stmt.buffer.name), size))
        return pointer(stmt.buffer)

    def expression(expr: ir.Expr) -> ir.Expr:
        if to_int32 is not None:
            expr = without_library(expr, to_int32)
        return shifted_unsigned(expr) if is_c else expr

    declared = [pointer(param) for param in lowered.params]
    body = rewrite_statement(lowered.body, expression, alloc)
    body = SeqStmt([*declared, body])
    zero, cpu = tirx.const(0, "int32"), tirx.const(1, "int32")
    # Lowering of builtins insists on knowing a device.
    body = AttrStmt(zero, "device_id", zero, AttrStmt(zero, "device_type", cpu, body))
    attributes = {
        "global_symbol": symbol,
        "tirx.noalias": not overlapping,
        "target": code.with_host(code),
        "calling_conv": 0,
    }
    function = tirx.PrimFunc(pointers, body).with_attr(attributes)
    found = tuple((*pair, lead) for pair, lead in over.items())
    return BareKernel(function, tuple(types), tuple(workspaces), found)


def shifted_unsigned(expr: ir.Expr) -> ir.Expr:
    """a << b => int(unsigned(a) << b): in C a negative number must not be shifted to the left."""
    from tvm import ir, tirx

    if not isinstance(expr, tirx.LShift):
        return expr
    dtype = str(expr.ty.dtype)
    if not dtype.startswith("int"):
        return expr
    unsigned = ir.PrimType(f"u{dtype}")
    bits = tirx.LShift(tirx.Cast(unsigned, expr.a), tirx.Cast(unsigned, expr.b))
    return tirx.Cast(expr.ty, bits)


def c_type(dtype: str) -> str:
    """int8 => int8_t."""
    known = {"bool": "bool", "float32": "float", "float64": "double", "float16": "uint16_t"}
    scalar = re.sub(r"x\d+$", "", dtype)  # of a vector, its elements
    return known.get(scalar, f"{scalar}_t")


def _bytes(buffer: tirx.Buffer) -> int:
    dtype = str(buffer.dtype)
    lanes = re.fullmatch(r"([a-z]+\d*)x(\d+)", dtype)
    name, count = (lanes[1], int(lanes[2])) if lanes else (dtype, 1)
    item = 1 if name == "bool" else np.dtype(name).itemsize
    return math.prod(int(extent) for extent in buffer.shape) * count * item


def c_target() -> tvm.target.Target:
    """C as TVM's code generator writes it."""
    import tvm

    return tvm.target.Target({"kind": "c"})


def _of_fixed_length(target: Target) -> Target:
    """The target as schedules see it: where vectors may have any length, TVM would write vectorised
    loops for a length that is known at run time only, and half of a kernel's accesses."""
    if not target.has("rvv"):
        return target
    attributes = [a for a in target.tvm_options["mattr"] if a != "+v"]
    return replace(target, tvm_options={**target.tvm_options, "mattr": attributes})


def _lower(scheduled: tirx.PrimFunc, target: Target, is_c: bool) -> tirx.PrimFunc:
    """TVM's own lowering, up to where it would make a packed function of the kernel."""
    import tvm
    from tvm import s_tir, tirx

    code = c_target() if is_c else _of_fixed_length(target).tvm_target()
    block, flat = s_tir.transform, tirx.transform
    passes = [
        flat.BindTarget(code.with_host(code)),
        block.CanonicalizeLoop(),
        block.LowerInitBlock(),
        block.PlanAndUpdateBufferAllocationLocation(),
        block.ConvertBlocksToOpaque(),
        block.CompactBufferAllocation(),
        block.LowerMatchBuffer(),
        block.StmtSimplify(),
        block.AnnotateIrregularLoop(),
        block.LowerOpaqueBlock(),
        flat.FlattenBuffer(),
        flat.BF16ComputeLegalize(),
        flat.NarrowDataType(32),
        block.LoopPartition(),
        flat.VectorizeLoop(True),
        flat.StorageRewrite(),
        block.HoistIfThenElse(),
        flat.UnrollLoop(),
        block.RenormalizeSplitPattern(),
        flat.StmtSimplify(),
        flat.RemoveNoOp(),
        block.RewriteUnsafeSelect(),
    ]
    if not is_c:
        # In C the same values would be computed in front of the conditions that guard them.
        passes.append(flat.CommonSubexprElim())
    passes.append(flat.VerifyMemory())
    function = scheduled.with_attr("global_symbol", "kernel")
    with code, tvm.transform.PassContext():
        module = tvm.transform.Sequential(passes)(tvm.IRModule({"kernel": function}))
    return module["kernel"]


def _generate(kernels: Sequence[BareKernel], code: tvm.target.Target) -> Any:
    """TVM's runtime module of the kernels."""
    import tvm
    from tvm import tirx

    functions = {str(k.function.attrs["global_symbol"]): k.function for k in kernels}
    with code, tvm.transform.PassContext():
        module = tvm.IRModule(functions)
        module = tirx.transform.LowerTVMBuiltin()(module)
        module = tirx.transform.LowerIntrin()(module)
        return tvm.get_global_func(f"target.build.{code.kind.name}")(module, code)


def object_file(kernel: BareKernel, target: Target) -> bytes:
    """Machine code of one kernel."""
    library = _generate([kernel], target.tvm_target())
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        library.write_to_file(str(path), "o")
        return with_own_names(path.read_bytes(), target)


def c_source(kernel: BareKernel) -> str:
    """One kernel as a C function; it needs <stdint.h> and <stdbool.h>."""
    text = str(_generate([kernel], c_target()).inspect_source())
    # In front stand includes of TVM's and of the mathematical library, none of which it needs.
    start = text.rindex("TVM_DLL void ")
    return text[start:].removeprefix("TVM_DLL ").rstrip() + "\n"
