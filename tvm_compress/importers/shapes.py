"""Give every input a static shape: what the model declares, what the user says, batch 1."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from ..errors import ModelError

Dim = int | str | None  # a size, a symbol shared between inputs, or unknown


def resolve_shapes(
    declared: Mapping[str, Sequence[Dim]], given: Mapping[str, tuple[int, ...]] | None
) -> dict[str, tuple[int, ...]]:
    """Static shape of each input.

    Sizes in `given` come first; a symbol that they fix (`batch`) is fixed for all inputs. A
    dimension that is still unknown becomes 1 when it is the first of its input and the only unknown
    one (a batch). Raises `ModelError` naming the input and what to pass.
    """
    given = dict(given or {})
    for name in given:
        if name not in declared:
            raise ModelError(unknown_input(name, declared))
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        _match(name, declared[name], shape, symbols)

    for name, dims in declared.items():
        unknown = _unknown(dims, symbols)
        if name not in given and unknown == [0] and isinstance(dims[0], str):
            symbols[dims[0]] = 1
    resolved = {}
    for name, dims in declared.items():
        if name in given:
            resolved[name] = given[name]
            continue
        if _unknown(dims, symbols) not in ([], [0]):
            raise ModelError(
                f"input {name!r} has dynamic shape {_show(dims)}; pass its size, for example "
                f"--shape {name}={_example(dims, symbols)}"
            )
        resolved[name] = tuple(_size(dim, symbols) or 1 for dim in dims)
    for name, shape in resolved.items():
        if any(size < 1 for size in shape):
            raise ModelError(f"input {name!r} has an empty shape {'x'.join(map(str, shape))}")
    return resolved


def unknown_input(name: str, known: Mapping[str, object]) -> str:
    """Message for an input name that the model does not have."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"the model has no input {name!r}{hint} (inputs: {', '.join(known) or 'none'})"


def _match(name: str, dims: Sequence[Dim], shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    fits = len(dims) == len(shape)
    for dim, size in zip(dims, shape, strict=False):
        if isinstance(dim, str):
            fits &= symbols.setdefault(dim, size) == size
        elif dim is not None:
            fits &= dim == size
    if not fits:
        raise ModelError(
            f"input {name!r} is declared {_show(dims)}, "
            f"which {'x'.join(map(str, shape))} does not fit"
        )


def _size(dim: Dim, symbols: Mapping[str, int]) -> int | None:
    return symbols.get(dim) if isinstance(dim, str) else dim


def _unknown(dims: Sequence[Dim], symbols: Mapping[str, int]) -> list[int]:
    return [axis for axis, dim in enumerate(dims) if _size(dim, symbols) is None]


def _show(dims: Sequence[Dim]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"


def _example(dims: Sequence[Dim], symbols: Mapping[str, int]) -> str:
    sizes = [_size(dim, symbols) for dim in dims]
    return "x".join(str(size or (1 if axis == 0 else "SIZE")) for axis, size in enumerate(sizes))
