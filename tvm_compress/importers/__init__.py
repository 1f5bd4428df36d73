"""Import a trained network into graph form: canonical Relax, weights as constants."""

from __future__ import annotations

from .load import load_model

__all__ = ["load_model"]
