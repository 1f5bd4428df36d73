"""Compile a module in graph or kernel form for a target, and account for what was emitted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ModelError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import tvm
    from tvm import relax

    from .kernels import Call
    from .targets import Target
    from .tuning.database import TunedChoices


@dataclass(frozen=True)
class ConstantBytes:
    """Bytes of one emitted constant: role is weights, bias, scales, table or other."""

    role: str
    layer: str
    bytes: int


@dataclass(frozen=True)
class Built:
    """A compiled module and the facts about it that reports need."""

    executable: relax.VMExecutable
    reference_module: tvm.IRModule
    calls: tuple[Call, ...]
    constants: tuple[ConstantBytes, ...]
    plan_bytes: int
    left_float: tuple[dict[str, str], ...]
    decoded_per_call: tuple[str, ...]
    """Layers whose codes are decoded to floats by a kernel of its own before every call."""
    tuned_kernels: int = 0
    tunable_kernels: int = 0
    """Different kernels whose schedules leave choices open; `tuned_kernels` of them used tuned
    ones."""

    def export(self, path: Path) -> None:
        """Write the shared library; it needs TVM's runtime and nothing of ours."""
        # -s: without LLVM's debug sections, which were a quarter of a small library.
        self.executable.export_library(str(path), options=["-s"])


def require_linker() -> None:
    """Raise `TargetError` where there is no compiler to link a shared library with."""
    from tvm.support.cc import get_cc

    if get_cc() is None:
        raise TargetError(
            "no C++ compiler to link the compiled model with; install one (Debian: apt-get install "
            "g++) or name it in CXX"
        )


def build(module: tvm.IRModule, target: Target, choose: TunedChoices | None = None) -> Built:
    """Graph form (float or quantised) => executable with scheduled kernels for `target`.

    `choose` looks up tuned choices; without it every kernel gets its default.

    Raises `ModelError` when the model cannot be compiled.
    """
    import tvm

    from .pipeline import (
        fusion_pipeline,
        memory_pipeline,
        packing_pipeline,
        reference_pipeline,
        schedule_pipeline,
        storage_pipeline,
    )
    from .relay_passes.branches import functions_in_order
    from .relay_passes.lower import LEFT_FLOAT_ATTR
    from .relay_passes.pack_weights import DECODED_ATTR

    with target.tvm_target():
        reference = reference_pipeline()(storage_pipeline(target)(module))
        packed = packing_pipeline(target)(reference)
        fused = fusion_pipeline()(packed)
        planned = memory_pipeline()(fused)
        try:
            executable = tvm.compile(
                planned,
                target=target.tvm_target(),
                relax_pipeline=schedule_pipeline(target, choose),
            )
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise ModelError(
                f"TVM could not compile the model for {target.name}: {line}"
            ) from error
    return Built(
        executable=executable,
        reference_module=reference,
        calls=_calls(fused),
        constants=_constants(packed),
        plan_bytes=_plan_bytes(planned),
        left_float=tuple(
            entry
            for global_var in functions_in_order(reference)
            for entry in json.loads(str(reference[global_var].attrs.get(LEFT_FLOAT_ATTR, "[]")))
        ),
        decoded_per_call=tuple(json.loads(str(packed["main"].attrs[DECODED_ATTR]))),
        tuned_kernels=choose.tuned if choose is not None else 0,
        tunable_kernels=choose.tunable if choose is not None else 0,
    )


def compile_module(module: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """`build` for those who only want to run the result."""
    return build(module, target).executable


def compile_reference(module: tvm.IRModule) -> relax.VMExecutable:
    """Compile a module as it is, with naive kernels, for the machine at hand: slow, and a different
    code path from what ships."""
    import tvm

    return tvm.compile(module, target=tvm.target.Target("llvm"))


def _calls(fused: tvm.IRModule) -> tuple[Call, ...]:
    """Pair the kernels of the built module with what FuseEpilogues recorded about them.

    In execution order, the calls of both branches at the place of an `If`.
    """
    from .kernels import Call
    from .relay_passes import ir
    from .relay_passes.branches import functions_in_order, walk
    from .relay_passes.fuse_epilogues import CALLS_ATTR

    recorded: dict[str, Iterator[dict[str, Any]]] = {}
    taken: set[str] = set()
    for global_var in functions_in_order(fused):
        name = global_var.name_hint
        entries = json.loads(str(fused[global_var].attrs[CALLS_ATTR]))
        for entry in entries:
            if entry["output"] in taken:  # a variable of that name is in another function as well
                entry["output"] = f"{name}.{entry['output']}"
            taken.add(entry["output"])
        recorded[name] = iter(entries)
    calls = []
    for global_var, binding in walk(fused):
        if ir.op_name(binding.value) == "relax.call_tir":
            function = global_var.name_hint
            entry = next(recorded[function])
            symbol = binding.value.args[0].name_hint
            calls.append(Call(symbol, tuple(entry["layers"]), entry["output"], function))
    left_over = sum(len(list(entries)) for entries in recorded.values())
    if left_over:
        raise AssertionError(f"{left_over} recorded calls are not in the built module")
    return tuple(calls)


def _constants(packed: tvm.IRModule) -> tuple[ConstantBytes, ...]:
    """Every different constant of the module, with the role that its kernel gives it."""
    import tvm

    from .relay_passes import ir
    from .relay_passes.branches import walk
    from .schedules.prim import ROLES_ATTR

    layer_of: dict[tvm.ir.Expr, str] = _decoded_weights(packed)
    found: list[ConstantBytes] = []
    emitted: set[tuple[str, tuple[int, ...], bytes]] = set()
    for _, binding in walk(packed):
        value = binding.value
        if not isinstance(value, tvm.ir.Call):
            continue
        arguments, roles = list(value.args), []
        layer = binding.var.name
        if ir.op_name(value) == "relax.call_tir":
            function = packed[value.args[0]]
            arguments = list(value.args[1].fields)
            roles = [str(role) for role in (function.attrs or {}).get(ROLES_ATTR, [])]
            if binding.var in layer_of:
                layer = layer_of[binding.var]
            elif ir.anchor_spec(function) is None:
                owners = [layer_of[a] for a in arguments if a in layer_of]
                layer = owners[0] if owners else layer
            else:
                layer_of[binding.var] = layer
        elif arguments and arguments[0] in layer_of:
            layer = layer_of[arguments[0]]
        if arguments and binding.var not in layer_of and arguments[0] in layer_of:
            same = ir.shape_of(arguments[0]) == ir.shape_of(binding.var)
            if same and ir.dtype_of(arguments[0]) != "int8":
                layer_of[binding.var] = layer
        for index, argument in enumerate(arguments):
            array = ir.constant(argument)
            if array is None:
                continue
            content = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
            if content not in emitted:  # the VM keeps equal constants once (unrolled LSTM cells)
                emitted.add(content)
                role = roles[index] if index < len(roles) and roles[index] != "data" else "other"
                found.append(ConstantBytes(role, layer, int(array.nbytes)))
    return tuple(found)


def _decoded_weights(packed: tvm.IRModule) -> dict[tvm.ir.Expr, str]:
    """Computed weights, with the layer that reads each of them."""
    from tvm import relax

    from .relay_passes import ir
    from .relay_passes.branches import walk
    from .schedules.prim import ROLES_ATTR

    layer_of: dict[tvm.ir.Expr, str] = {}
    for _, binding in walk(packed):
        if ir.op_name(binding.value) != "relax.call_tir":
            continue
        function = packed[binding.value.args[0]]
        roles = (function.attrs or {}).get(ROLES_ATTR, [])
        for role, argument in zip(roles, binding.value.args[1].fields, strict=False):
            if role == "weights" and isinstance(argument, relax.Var):
                layer_of[argument] = binding.var.name
    return layer_of


def _plan_bytes(planned: tvm.IRModule) -> int:
    """Bytes of the activation storages in TVM's static memory plan, inputs and outputs included.

    Of an `If` the larger branch counts: one of them runs, with storages of its own.
    """
    main = planned["main"]
    return _storage_bytes(planned, main) + sum(_tensor_bytes(param) for param in main.params)


def _storage_bytes(planned: tvm.IRModule, function: relax.Function) -> int:
    from tvm import relax

    from .relay_passes import ir
    from .relay_passes.branches import branch_callees

    total = 0
    branches = [0]
    for binding in ir.bindings(function):
        name = ir.op_name(binding.value)
        if name == "relax.memory.alloc_storage":
            size = binding.value.args[0]
            total += int(size.values[0].value)
        elif name == "relax.builtin.alloc_tensor":
            total += _tensor_bytes(binding.var)
        elif isinstance(binding.value, relax.If):
            callees = branch_callees(planned, binding.value)
            branches += [_storage_bytes(planned, planned[callee]) for callee in callees]
    return total + max(branches)


def _tensor_bytes(expr: tvm.ir.Expr) -> int:
    import numpy as np

    from .relay_passes import ir

    shape = ir.shape_of(expr)
    if shape is None:
        return 0
    dtype = ir.dtype_of(expr)
    return int(np.prod(shape)) * (1 if dtype == "bool" else np.dtype(dtype).itemsize)
