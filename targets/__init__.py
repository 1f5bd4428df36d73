"""Targets: boards as data. See README.md of this folder."""

from .spec import Target
from .table import get_target, list_targets
from .x86 import as_board

__all__ = ["Target", "as_board", "get_target", "list_targets"]
