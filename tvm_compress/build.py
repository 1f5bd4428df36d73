"""Compile a module in graph or kernel form for a target, and account for what was emitted."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import ModelError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import tvm
    from tvm import relax, tirx

    from .bare.build import BareBuilt, Planned
    from .compile_kernels import CompiledKernels, KernelCounts, Scheduling
    from .kernel_cache import KernelCache
    from .kernels import Call
    from .schedules import Choice
    from .targets import Target
    from .tuning.database import TunedChoices


@dataclass(frozen=True)
class ConstantBytes:
    """Bytes of one emitted constant: role is weights, bias, scales, table or other."""

    role: str
    layer: str
    bytes: int


@dataclass(frozen=True)
class Lowered:
    """A module whose kernels are only to be scheduled and compiled, and the facts about it that
    reports need."""

    module: tvm.IRModule
    target: Target
    choices: Mapping[str, Choice | None]
    """Tuned choices by kernel, None for those that get their default."""
    reference_module: tvm.IRModule
    calls: tuple[Call, ...]
    constants: tuple[ConstantBytes, ...]
    plan_bytes: int
    left_float: tuple[dict[str, str], ...]
    decoded_per_call: tuple[str, ...]
    """Layers whose codes are decoded to floats by a kernel of its own before every call."""
    sparse_kernels: Mapping[str, float] = field(default_factory=dict)
    """Layers whose kernel skips zeros, with the share of the weights that is stored."""
    layer_macs: Mapping[str, int] = field(default_factory=dict)
    """Multiply-accumulates that the layers' kernels execute: of a sparse one those of the weights
    that it stores."""
    generic_layers: tuple[str, ...] = ()
    """Layers that the target has no kernel of its own for."""
    dead_channels: Mapping[str, str] = field(default_factory=dict)
    """Layers without channels that say nothing, with how many are left, in words."""
    tuned_kernels: int = 0
    tunable_kernels: int = 0
    """Different kernels whose schedules leave choices open; `tuned_kernels` of them used tuned
    ones."""


@dataclass(frozen=True)
class Built(Lowered):
    """A compiled module; the symbols of its `calls` are those in the library."""

    executable: relax.VMExecutable = field(kw_only=True)
    kernels: KernelCounts = field(kw_only=True)

    def export(self, path: Path) -> None:
        """Write the shared library; it needs TVM's runtime and nothing of ours."""
        export_library(self.executable, path)


def export_library(executable: relax.VMExecutable, path: Path) -> None:
    """Link a shared library that TVM's runtime loads."""
    # -s: without LLVM's debug sections, which were a quarter of a small library.
    # --gc-sections: every kernel brings its own copies of TVM's float16 conversions.
    executable.export_library(str(path), options=["-s", "-Wl,--gc-sections"])


def require_linker() -> None:
    """Raise `TargetError` where there is no compiler to link a shared library with."""
    from tvm.support.cc import get_cc

    if get_cc() is None:
        raise TargetError(
            "no C++ compiler to link the compiled model with; install one (Debian: apt-get install "
            "g++) or name it in CXX"
        )


def build(
    module: tvm.IRModule,
    target: Target,
    choose: TunedChoices | None = None,
    cached: KernelCache | None = None,
) -> Built:
    """Graph form (float or quantised) => executable with scheduled kernels for `target`.

    `choose` looks up tuned choices; without it every kernel gets its default. Kernels that are in
    `cached` are taken from there, others are put there; without it all are compiled.

    Raises `ModelError` when the model cannot be compiled.
    """
    return compile_lowered(lower(module, target, choose), cached)


def lower(module: tvm.IRModule, target: Target, choose: TunedChoices | None = None) -> Lowered:
    """The first half of `build`: everything but scheduling and compiling the kernels.

    For a cross target, of which artefacts are C projects, inputs and outputs become integers, and
    memory is planned later, when the kernels' own is known.
    """
    from .pipeline import (
        destination_pipeline,
        edges_pipeline,
        fusion_pipeline,
        memory_pipeline,
        packing_pipeline,
        reference_pipeline,
        runtime_pipeline,
        shrinking_pipeline,
        storage_pipeline,
    )
    from .relay_passes.branches import functions_in_order
    from .relay_passes.dead_channels import DEAD_CHANNELS_ATTR
    from .relay_passes.lower import LEFT_FLOAT_ATTR
    from .relay_passes.pack_weights import DECODED_ATTR, SPARSE_ATTR

    with target.tvm_target():
        if target.is_cross:
            module = edges_pipeline()(module)
        reference = shipped = reference_pipeline()(storage_pipeline(target)(module))
        smaller = shrinking_pipeline(target)(module)
        if not smaller.same_as(module):
            # Not so the reference, which what ships is compared with.
            shipped = reference_pipeline()(storage_pipeline(target)(smaller))
        packed = packing_pipeline(target)(shipped)
        fused = fusion_pipeline()(packed)
        with _as_model_error(target.name):
            if target.is_cross:
                planned = lowered = destination_pipeline()(fused)
            else:
                planned = memory_pipeline()(fused)
                lowered = runtime_pipeline()(planned)
    calls = _calls(fused)
    choices: dict[str, Choice | None] = {}
    if choose is not None:
        choices = {var.name_hint: choose(func) for var, func in _kernels(lowered).items()}
    return Lowered(
        module=lowered,
        target=target,
        choices=choices,
        reference_module=reference,
        calls=calls,
        constants=_constants(packed),
        plan_bytes=0 if target.is_cross else _plan_bytes(planned),
        left_float=tuple(
            entry
            for global_var in functions_in_order(reference)
            for entry in json.loads(str(reference[global_var].attrs.get(LEFT_FLOAT_ATTR, "[]")))
        ),
        decoded_per_call=tuple(json.loads(str(packed["main"].attrs[DECODED_ATTR]))),
        sparse_kernels=json.loads(str(packed["main"].attrs[SPARSE_ATTR])),
        layer_macs=_layer_macs(packed),
        generic_layers=_generic_layers(_kernels(lowered), calls, target),
        dead_channels=json.loads(str((smaller["main"].attrs or {}).get(DEAD_CHANNELS_ATTR, "{}"))),
        tuned_kernels=choose.tuned if choose is not None else 0,
        tunable_kernels=choose.tunable if choose is not None else 0,
    )


def _generic_layers(
    kernels: Mapping[tvm.ir.GlobalVar, tirx.PrimFunc], calls: Iterable[Call], target: Target
) -> tuple[str, ...]:
    from .schedules import is_generic

    generic = {var.name_hint for var, func in kernels.items() if is_generic(func, target)}
    return tuple(layer for call in calls if call.symbol in generic for layer in call.layers)


def compile_lowered(lowered: Lowered, cached: KernelCache | None = None) -> Built:
    """The second half of `build`."""
    from .compile_kernels import Scheduling

    target = lowered.target
    with _as_model_error(target.name):
        executable, compiled = _link(
            lowered.module, target.tvm_target(), Scheduling(target, lowered.choices), cached
        )
    facts = {f.name: getattr(lowered, f.name) for f in fields(Lowered)}
    facts["calls"] = tuple(
        replace(call, symbol=compiled.symbols[call.symbol]) for call in lowered.calls
    )
    return Built(**facts, executable=executable, kernels=compiled.counts)


@dataclass(frozen=True)
class BuiltProject(Lowered):
    """All that a C project is written from."""

    project: BareBuilt = field(kw_only=True)


def plan_project(
    lowered: Lowered, form: str = "object", cached: KernelCache | None = None
) -> Planned:
    """All of a C project but its kernels' code; `form` is one of `bare.build.FORMS`.

    Raises `TargetError` where weights or arena do not fit the target.
    """
    from .bare.build import plan_program
    from .contents import require_weights_fit
    from .relay_passes.integer_edges import edges_of

    target = lowered.target
    require_weights_fit(lowered)
    with target.tvm_target(), _as_model_error(target.name):
        return plan_program(
            lowered.module,
            edges_of(lowered.module),
            lowered.calls,
            target,
            form,
            lowered.choices,
            cached,
        )


def compile_project(
    lowered: Lowered,
    form: str = "object",
    cached: KernelCache | None = None,
    planned: Planned | None = None,
) -> BuiltProject:
    """The second half of `build` for a cross target; `planned` comes from `plan_project`."""
    target = lowered.target
    planned = planned or plan_project(lowered, form, cached)
    with target.tvm_target(), _as_model_error(target.name):
        project = planned.built(cached)
    facts = {f.name: getattr(lowered, f.name) for f in fields(Lowered)}
    facts["plan_bytes"] = project.arena_bytes
    symbols = {call.output: call.symbol for call in project.program.calls}
    facts["calls"] = tuple(
        replace(call, symbol=symbols.get(call.output, call.symbol)) for call in lowered.calls
    )
    return BuiltProject(**facts, project=project)


def compile_module(
    module: tvm.IRModule, target: Target, cached: KernelCache | None = None
) -> relax.VMExecutable:
    """`build` for those who only want to run the result."""
    return build(module, target, cached=cached).executable


def compile_reference(
    module: tvm.IRModule, cached: KernelCache | None = None
) -> relax.VMExecutable:
    """Compile a module as it is, with naive kernels, for the machine at hand: slow, and a different
    code path from what ships."""
    import tvm
    from tvm import relax

    target = tvm.target.Target("llvm")
    with target:
        module = relax.get_pipeline("default")(module)
    return _link(module, target, None, cached)[0]


def _link(
    module: tvm.IRModule,
    target: tvm.target.Target,
    scheduling: Scheduling | None,
    cached: KernelCache | None,
) -> tuple[relax.VMExecutable, CompiledKernels]:
    """A module of runtime calls and kernels => executable over the kernels' object files."""
    import tvm
    from tvm import relax

    from .compile_kernels import compile_kernels

    kernels = _kernels(module)
    compiled = compile_kernels(kernels, target, scheduling, cached)
    module = module.clone()
    for var in kernels:
        module.update_func(var, relax.ExternFunc(compiled.symbols[var.name_hint]))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        libraries = []
        for item in compiled.objects:
            path.write_bytes(item.content)
            libraries.append(tvm.runtime.load_static_library(str(path), list(item.symbols)))
    # The attribute in which Relax hands compiled code of other code generators to its linker.
    others = list((module.attrs or {}).get("external_mods", []))
    module = module.with_attr("external_mods", [*others, *libraries])
    return tvm.compile(module, target=target, relax_pipeline=None), compiled


def _kernels(module: tvm.IRModule) -> dict[tvm.ir.GlobalVar, tirx.PrimFunc]:
    from tvm import tirx

    return {var: f for var, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}


@contextmanager
def _as_model_error(target_name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        raise ModelError(f"TVM could not compile the model for {target_name}: {line}") from error


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


def _layer_macs(packed: tvm.IRModule) -> dict[str, int]:
    from .profiling import macs_of
    from .relay_passes import ir
    from .relay_passes.branches import walk

    found: dict[str, int] = {}
    for _, binding in walk(packed):
        value, name = binding.value, binding.var.name
        if ir.op_name(value) == "relax.call_tir":
            macs = getattr(ir.anchor_spec(packed[value.args[0]]), "macs", None)
        else:
            macs = macs_of(value)
        if macs is not None:
            found[name] = found.get(name, 0) + macs
    return found


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
