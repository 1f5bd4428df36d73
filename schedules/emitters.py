"""Which emitter writes a target's loops."""

from __future__ import annotations

from ..targets import Target
from .emit import Emitter


def emitter_for(target: Target) -> Emitter:
    """Vectors in TVM's own way, or with instructions that TVM and LLVM do not find."""
    if target.has("mve"):
        from .arm.mve_vector import VectorEmitter

        return VectorEmitter()
    return Emitter()
