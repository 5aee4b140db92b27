# SPDX-License-Identifier: MIT
"""What differs between SGLang versions, found by looking, and the one message when it cannot work.

Supported: SGLang 0.5.13.post1 and newer (the three-method metadata contract). Tested: 0.5.17.
Versions nobody has tried run when everything probed here is in place.
"""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

OLDEST = Version("0.5.13.post1")
TESTED = ("0.5.17",)


def switched_on(name: str) -> bool:
    """An SGLANG_* switch, as SGLang's own environ.py reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y")


def sglang_version() -> str:
    """Version of the installed SGLang."""
    return version("sglang")


def unsupported_version(installed: str) -> str | None:
    """Why this SGLang cannot run PAT, judged by its number alone; None when it may."""
    try:
        parsed = Version(installed)
    except InvalidVersion:
        return None  # a local build: the probes decide
    if parsed < OLDEST:
        return f"SGLang {installed} is older than {OLDEST}; upgrade SGLang"
    return None


def missing_seams() -> str | None:
    """Why this SGLang cannot run PAT, judged by its code; None when every seam is in place."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    missing = [
        f"AttentionBackend.{name}"
        for name in ("init_forward_metadata_out_graph", "forward_decode", "init_forward_metadata")
        if not hasattr(AttentionBackend, name)
    ]
    try:
        parameters = set(inspect.signature(ForwardBatch.init_new).parameters)
    except (AttributeError, TypeError, ValueError):
        parameters = set()
    if not {"batch", "model_runner"} <= parameters:
        missing.append("ForwardBatch.init_new(batch, model_runner)")
    if not missing:
        return None
    return (
        f"SGLang {sglang_version()} has no {', '.join(missing)}; "
        f"use a tested version ({', '.join(TESTED)})"
    )


def load_plugins() -> None:
    """What SGLang's launchers do first and its benchmark tools forget."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def registered_backends() -> list[str]:
    """Names of the attention backends of this SGLang."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return list(ATTENTION_BACKENDS)


def kv_write_loc(forward_batch: Any) -> Any:
    """Where this step's K and V go, as the base backends of this version say it.

    Without the sliding-window location: layers that have one stay on the base.
    """
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    for_batch = getattr(KVWriteLoc, "for_batch", None)
    if for_batch is not None:  # 0.5.22+: carries the mark that the ids are physical
        return for_batch(forward_batch)
    return KVWriteLoc(forward_batch.out_cache_loc)


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def reads_end_before_replay() -> Any | None:
    """SharedReadEnds.PRE_REPLAY where it exists (0.5.18+), else None."""
    from sglang.srt.layers.attention import base_attn_backend

    ends = getattr(base_attn_backend, "SharedReadEnds", None)
    return None if ends is None else ends.PRE_REPLAY


def backend_names(runner: Any) -> tuple[str | None, str | None]:
    """(prefill, decode) backend names this runner was resolved to."""
    prefill = getattr(runner, "prefill_attention_backend_str", None)
    decode = getattr(runner, "decode_attention_backend_str", None)
    if isinstance(prefill, str) and isinstance(decode, str):  # 0.5.2x stamps them before building
        return prefill, decode
    getter = getattr(runner.server_args, "get_attention_backends", None)
    return (None, None) if getter is None else getter()


def static_fraction(runner: Any) -> tuple[float | None, int | None]:
    """``--mem-fraction-static`` and the bytes it is a fraction of; None: not known."""
    free_at_start = getattr(runner, "pre_model_load_memory", None)  # GiB, before the weights
    return (
        getattr(runner.server_args, "mem_fraction_static", None),
        int(free_at_start * (1 << 30)) if free_at_start else None,
    )


def translates_slots(runner: Any) -> bool:
    """Whether req_to_token holds virtual ids that PAT must not use as slots (unified pools)."""
    translator = getattr(runner, "kv_index_translator", None)
    if translator is not None and getattr(translator, "is_translating", False):
        return True
    return hasattr(getattr(runner, "token_to_kv_pool_allocator", None), "translate_kv_loc")
