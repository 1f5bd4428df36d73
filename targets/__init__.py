"""Targets: boards as data. See README.md of this folder."""

from .spec import Target
from .table import get_target, list_targets

__all__ = ["Target", "get_target", "list_targets"]
