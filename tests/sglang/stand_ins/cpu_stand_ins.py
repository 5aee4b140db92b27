# SPDX-License-Identifier: MIT
"""An SGLang plug-in of the tests: what LoRA and the sizing of the KV pool miss on a CPU machine.

A server loads it when this folder is on its PYTHONPATH (the metadata beside it is its entry point).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import psutil
import torch

FREE = 8 << 30


def register() -> None:
    _keep_free_memory_still()
    _pin_nothing()


def _keep_free_memory_still() -> None:
    """SGLang sizes the KV pool by the free memory, which on a shared machine never is the same."""
    seen = psutil.virtual_memory()._replace(available=FREE)
    psutil.virtual_memory = lambda: seen


def _pin_nothing() -> None:
    """SGLang's LoRA pins its host tensors; torch without an accelerator refuses to."""

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapper(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return make(*args, **kwargs)

        return wrapper

    for name in ("tensor", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
