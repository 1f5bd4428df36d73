"""Vet a `.pt2` archive before torch reads it.

`torch.export.load` unpickles parts of the archive, evaluates its symbolic shapes as Python
expressions, looks operators up by dotted name anywhere in torch and loads compiled libraries found
inside. None of that is needed for a network: a file that asks for it is refused, with what asked.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from ..errors import ModelError

MAX_BYTES = 16 * 2**30

# What a node may call: tensor operators, and the arithmetic on sizes.
_TARGETS = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed|higher_order)\.\w+(\.\w+)?"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_(int|float|max|min|not|sum)"
    r"|math\.(ceil|floor|trunc)"
)
# Sympy's notation for sums, products and the like of size symbols: `Add(Symbol('s0', integer=True),
# Integer(1))` or `s0 + 1`. No attributes, no other strings, no other functions.
_EXPRESSION = re.compile(
    r"(?:Symbol\('[A-Za-z]\w{0,40}'(?:, (?:positive|integer|nonnegative|real|nonzero)=True)*\)"
    r"|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|ModularIndexing"
    r"|Eq|Equality|Ne|Unequality|Lt|Le|Gt|Ge|int_oo|oo|[su]\d+|\d+|[-+*/%(), <>=])*"
)
_COMPILED = ("data/aotinductor/", "data/custom_ops/")


def vetted_bytes(path: Path) -> bytes:
    """The archive's content, to be loaded from memory: what was checked is what is read."""
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path}: larger than {MAX_BYTES} bytes")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _vet(path, archive)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: not a torch.export archive, or a damaged one ({error})"
        ) from None
    return content


def _vet(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"{path}: has compressed members, which torch.export.save never writes")
    models = []
    for member in members:
        inner = member.filename.partition("/")[2]  # the archive's own top folder
        if inner.startswith(_COMPILED) or inner.endswith((".so", ".cubin", ".pkl")):
            raise ModelError(f"{path}: contains compiled or pickled code ({member.filename})")
        if inner.startswith("models/"):
            models.append(member.filename)
            _vet_program(path, json.loads(archive.read(member)))
        elif inner.startswith("data/") and inner.endswith("_config.json"):
            for name, entry in json.loads(archive.read(member)).get("config", {}).items():
                if entry.get("use_pickle") is not False:
                    raise ModelError(
                        f"{path}: tensor {name!r} is stored as a pickle, which may run code; pass "
                        "the program itself to load_model"
                    )
        elif inner.startswith("data/sample_inputs/"):
            _vet_sample_inputs(path, archive.read(member))
    if not models:
        raise ModelError(f"{path}: holds no exported program; save it with torch.export.save")


def _vet_program(path: Path, program: Any) -> None:
    pending = [program]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
            target, expression = value.get("target"), value.get("expr_str")
            if isinstance(target, str) and "inputs" in value and not _TARGETS.fullmatch(target):
                raise ModelError(f"{path}: calls {target!r}, which is no tensor operator")
            if expression is not None and not _harmless(expression):
                raise ModelError(f"{path}: symbolic size {str(expression)[:60]!r} is not accepted")
            for symbol in value.get("range_constraints") or {}:
                if not _harmless(symbol):
                    raise ModelError(f"{path}: symbolic size {symbol[:60]!r} is not accepted")


def _harmless(expression: Any) -> bool:
    return isinstance(expression, str) and _EXPRESSION.fullmatch(expression) is not None


def _vet_sample_inputs(path: Path, content: bytes) -> None:
    """torch falls back to a full unpickle when the safe one fails: refuse in that case."""
    import torch

    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it raises, torch would go on to unpickle
        raise ModelError(
            f"{path}: its sample inputs are more than tensors and would have to be unpickled; "
            "export with plain tensors as example inputs"
        ) from None
