"""What is inside an exported library: bytes by role and layer, kernel calls, tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tvm

    from .build import Built, BuiltProject, Lowered
    from .kernels import LibraryInfo
    from .targets import Target


def describe_library(built: Built, library: Path) -> LibraryInfo:
    """Bytes, kernel calls and tensors of one exported library."""
    from .sections import section_bytes

    return _describe(built, library.stat().st_size, section_bytes(library).get(".text", 0))


def describe_project(built: BuiltProject) -> LibraryInfo:
    """The same of a C project: the bytes that it takes in flash, without start-up code and C
    library, and the arena.
    """
    code = built.project.kernel_bytes()
    return _describe(built, sum(c.bytes for c in built.constants) + code, code)


def _describe(built: Lowered, total: int, code: int) -> LibraryInfo:
    from .kernels import LibraryInfo, TensorInfo
    from .report.rows import Bytes

    by_role: dict[str, int] = {}
    by_layer: dict[str, int] = {}
    for constant in built.constants:
        by_role[constant.role] = by_role.get(constant.role, 0) + constant.bytes
        by_layer[constant.layer] = by_layer.get(constant.layer, 0) + constant.bytes
    known = {role: by_role.get(role, 0) for role in ("weights", "scales", "bias", "table")}
    tensors = _tensors(built.reference_module)
    return LibraryInfo(
        calls=built.calls,
        tensors={
            name: TensorInfo(
                tuple(t["shape"]), tuple(t["perm"]), t["source"], t["scale"], t["zero_point"]
            )
            for name, t in tensors.items()
        },
        layer_bytes=by_layer,
        bytes=Bytes(
            total=total,
            weights=known["weights"],
            scales=known["scales"],
            biases=known["bias"],
            tables=known["table"],
            indices=by_role.get("indices", 0),
            code=code,
            other=total - sum(known.values()) - by_role.get("indices", 0) - code,
        ),
        plan_bytes=built.plan_bytes,
        tuned_kernels=built.tuned_kernels,
        tunable_kernels=built.tunable_kernels,
        layer_macs=built.layer_macs,
    )


def _tensors(module: tvm.IRModule) -> dict[str, Any]:
    """What lowering noted about tensors, of `main` and of branches; `main` names them first."""
    from .relay_passes.branches import functions_in_order
    from .relay_passes.lower import TENSORS_ATTR

    tensors: dict[str, Any] = {}
    for global_var in functions_in_order(module):
        noted = json.loads(str(module[global_var].attrs[TENSORS_ATTR]))
        tensors = noted | tensors
    return tensors


def require_weights_fit(lowered: Lowered) -> None:
    """Raise `TargetError` where the constants alone are too many for the target's flash."""
    by_layer: dict[str, int] = {}
    for constant in lowered.constants:
        by_layer[constant.layer] = by_layer.get(constant.layer, 0) + constant.bytes
    _require_flash(lowered.target, by_layer, 0)


def require_project_fits(built: BuiltProject, info: LibraryInfo) -> None:
    """Raise `TargetError` where a C project is too big for its target's flash, with its code."""
    code = info.bytes.total - sum(info.layer_bytes.values())
    _require_flash(built.target, info.layer_bytes, code)


def _require_flash(target: Target, layer_bytes: Mapping[str, int], code_bytes: int) -> None:
    from .bare.arena import flash_shortage

    message = flash_shortage(target.name, layer_bytes, code_bytes, target.flash_bytes)
    if message is not None:
        raise TargetError(message)


def require_fits(info: LibraryInfo, target: Target) -> None:
    """Raise `TargetError` where the library is too big for the target's memories."""
    for what, needed, room in (
        ("flash", info.bytes.total, target.flash_bytes),
        ("RAM for activations", info.plan_bytes, target.ram_bytes),
    ):
        if room is None or needed <= room:
            continue
        largest = sorted(info.layer_bytes, key=lambda name: -info.layer_bytes[name])[:3]
        named = ", ".join(f"{name} {info.layer_bytes[name]}" for name in largest)
        where = f"; the largest layers in bytes: {named}" if what == "flash" else ""
        raise TargetError(
            f"the model does not fit {target.name}: it needs {needed} bytes of {what}, "
            f"{needed - room} more than the {room} there are{where}"
        )
