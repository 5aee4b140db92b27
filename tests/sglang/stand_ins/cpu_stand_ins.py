# SPDX-License-Identifier: MIT
"""An SGLang plug-in of the tests: what LoRA, DP attention and the KV pool's size miss on a CPU.

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
    _data_parallel_attention()


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


def _data_parallel_attention() -> None:
    """What pads batches, copies rows by a Triton kernel, and gathers by custom operators."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def copy(
        dst: torch.Tensor, src: torch.Tensor, dim: int, offset: Any, rows: Any, offset_src: bool
    ) -> None:
        there = slice(int(offset), int(offset) + int(rows))
        if offset_src:
            dst[: int(rows)] = src[there]
        else:
            dst[there] = src[: int(rows)]

    dp_attention.memcpy_triton = copy
    GroupCoordinator.all_gather_into_tensor = GroupCoordinator._all_gather_into_tensor
    GroupCoordinator.reduce_scatter_tensor = GroupCoordinator._reduce_scatter_tensor
    for kind in ("cuda", "cpu"):  # 0.5.23 asks for that of the device
        setattr(TorchNativeAttnBackend, f"get_{kind}_graph_seq_len_fill_value", lambda self: 1)
