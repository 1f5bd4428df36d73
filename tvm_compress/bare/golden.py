"""Samples whose results the reference graph has computed, for the project's self-test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..model import TensorSpec
from .emit import GOLDEN_SAMPLES, Golden
from .session import PortSpec

if TYPE_CHECKING:
    from pathlib import Path

    from ..relay_passes.integer_edges import Edge
    from .build import BareBuilt


def golden_samples(
    built: BareBuilt,
    reference: Path,
    taps: Sequence[TensorSpec],
    sources: tuple[Sequence[str], Sequence[str]],
    probes: Mapping[str, np.ndarray],
    samples: int = GOLDEN_SAMPLES,
) -> Golden:
    """The first `samples` of `probes`, [number, *shape] by the model's input names, run through the
    shared library `reference`, which takes and gives what the C function does, and then `taps`."""
    from ..runtime import Session

    inputs = _ports(built, built.program.inputs, sources[0], built.inputs)
    outputs = _ports(built, built.program.outputs, sources[1], built.outputs)
    results = (*(port.spec for port in outputs), *taps)
    session = Session(reference, tuple(port.spec for port in inputs), results)
    taken: list[list[np.ndarray]] = []
    given: list[list[np.ndarray]] = []
    for index in range(samples):
        feed = {port.spec.name: port.codes(probes[port.spec.name][index]) for port in inputs}
        found = session.run(feed)
        taken.append([feed[port.spec.name] for port in inputs])
        given.append([found[port.spec.name] for port in outputs])
    return Golden(_stacked(taken), _stacked(given))


def _ports(
    built: BareBuilt, tensors: Sequence[str], sources: Sequence[str], edges: Sequence[Edge]
) -> list[PortSpec]:
    found = []
    for name, source, edge in zip(tensors, sources, edges, strict=True):
        tensor = built.program.tensors[name]
        spec = TensorSpec(source, tensor.shape, tensor.dtype)
        found.append(PortSpec(spec, edge.scale, edge.zero_point, edge.converted, edge.ties_away))
    return found


def _stacked(samples: list[list[np.ndarray]]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(arrays) for arrays in zip(*samples, strict=True))
