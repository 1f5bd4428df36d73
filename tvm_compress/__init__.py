"""tvm-compress: compression for Apache TVM, measured on what ships.

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {  # name => module; no module has the name of an export
    "compress": "flow",
    "load_model": "importers",
    "load_data": "data",
    "Model": "model",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Artefact": "artefact",
    "profile_model": "profiling",
    "tune": "tuning.tune",
    "verify": "verification",
    "benchmark": "benchmarking",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
