"""Graph passes over Relax modules, and the table of those that a recipe can name."""

from __future__ import annotations

from .passes import PASSES, PassEntry

__all__ = ["PASSES", "PassEntry"]
