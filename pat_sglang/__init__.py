# SPDX-License-Identifier: MIT
"""Prefix-aware decode attention: read every shared prefix once per group of requests."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import pat_decode
    from .forest import Forest
    from .plan import DecodePlan, DecodePlanner, PlanStats

__version__ = "0.1.0"
__all__ = ["DecodePlan", "DecodePlanner", "Forest", "PlanStats", "pat_decode"]

_HOME = {
    "DecodePlan": "plan",
    "DecodePlanner": "plan",
    "Forest": "forest",
    "PlanStats": "plan",
    "pat_decode": "decode",
}


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: SGLang loads the entry point in every process, and
    most of them never decode."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
