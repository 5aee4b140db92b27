# SPDX-License-Identifier: MIT
"""What PAT does not serve, as static properties: of the server, of the KV pool, of a layer.

Each function returns why not (a short, countable reason) or None. Nothing here may depend on the
batch: which kernel a layer runs is frozen into the CUDA graph when it is captured.
"""

from __future__ import annotations

from typing import Any

import torch

from pat_sglang.jit import SUPPORTED_HEAD_DIMS

from . import compat

Geometry = tuple[int, int, int]  # query heads, KV heads, head dim, on this rank

# Server options under which decode has another shape or must not be touched.
_SERVER_FLAGS = {
    "enable_deterministic_inference": "deterministic inference (needs batch-invariant kernels)",
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_pdmux": "PD multiplexing",
    "enable_hisparse": "HiSparse",
    "dllm_algorithm": "diffusion LLM decoding",
    "speculative_algorithm": "speculative decoding (its verify steps are not decode steps)",
}


def runner_reason(runner: Any) -> str | None:
    """Why PAT must leave this whole model runner to the base."""
    args = runner.server_args
    for flag, reason in _SERVER_FLAGS.items():
        if getattr(args, flag, None):
            return reason
    if (getattr(args, "dcp_size", 1) or 1) > 1:
        return "decode context parallelism"
    if compat.switched_on("SGLANG_ENABLE_METADATA_GLUE_GRAPH"):
        return "SGLANG_ENABLE_METADATA_GLUE_GRAPH=1 would freeze the plans; unset it"
    # These may keep shared slots that no node shows. Without sharing such a batch need not fit the
    # plan's slot snapshot, which is as large as the KV pool; and PAT would gain nothing.
    if compat.switched_on("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE"):
        return "the C++ radix tree cannot be read"
    if getattr(args, "radix_cache_backend", None):
        return f"the tree of --radix-cache-backend {args.radix_cache_backend} cannot be read"
    if getattr(args, "enable_streaming_session", False):
        return "the nodes of streaming sessions cannot be read"
    if getattr(runner, "prefill_aware_swa", False):
        return "prefill-aware sliding window (fa3 cuts the pages of every layer)"
    if getattr(runner, "use_mla_backend", False):
        return "MLA model"
    if getattr(runner.model_config, "is_encoder_decoder", False):
        return "encoder-decoder model"
    if compat.translates_slots(runner):
        return "KV pool with virtual slots"
    return pool_reason(runner.token_to_kv_pool)


def pool_reason(pool: Any) -> str | None:
    """Why PAT cannot read this KV pool. Exact types: subclasses change the layout."""
    kind = type(pool).__name__
    if kind in ("SWAKVPool", "HybridLinearKVPool"):
        pool = pool.full_kv_pool
        if type(pool).__name__ != "MHATokenToKVPool":
            return f"KV pool {type(pool).__name__} inside {kind}"
    elif kind != "MHATokenToKVPool":
        return f"KV pool {kind}"
    layout = getattr(pool, "kv_cache_layout", None)
    if getattr(pool, "use_hnd", False) or layout in ("hnd", "vectorized_5d"):
        return f"KV cache layout {layout or 'hnd'}"
    if getattr(pool, "is_quantized_kv_cache", False):
        return "quantised KV cache"
    dtypes = {torch.bfloat16, torch.float16}
    if torch.device(pool.device).type == "cpu":
        dtypes.add(torch.float32)
    if pool.dtype not in dtypes or getattr(pool, "store_dtype", pool.dtype) != pool.dtype:
        return f"KV cache dtype {pool.dtype}"
    return None


def layer_reason(layer: Any) -> str | None:
    """Why this attention layer stays on the base."""
    if getattr(layer, "is_cross_attention", False):
        return "cross attention"
    kind = getattr(layer, "attn_type", None)
    if kind is not None and kind.name != "DECODER":
        return f"attention type {kind.name.lower()}"
    window = getattr(layer, "sliding_window_size", None)
    if window is not None and window > -1:
        return "sliding window"
    if getattr(layer, "use_irope", False):
        return "chunked local attention"
    if (getattr(layer, "logit_cap", 0) or 0) > 0:
        return "logit soft cap"
    if (getattr(layer, "xai_temperature_len", -1) or -1) > 0:
        return "xai temperature"
    if layer.qk_head_dim != layer.v_head_dim:
        return "head dims of K and V differ"
    if layer.qk_head_dim not in SUPPORTED_HEAD_DIMS:
        return f"head dim {layer.qk_head_dim}"
    if layer.tp_k_head_num != layer.tp_v_head_num or layer.tp_q_head_num % layer.tp_k_head_num:
        return "head counts"
    if _is_scaled(layer, "k") or _is_scaled(layer, "v"):
        return "K/V scales"
    return None


def _is_scaled(layer: Any, side: str) -> bool:
    """Whether K or V has a scale; FP8 weights give every layer one, 1 if none is stored."""
    scale = getattr(layer, f"{side}_scale")
    return scale is not None and getattr(layer, f"{side}_scale_float", None) != 1.0


def arguments_reason(kwargs: dict[str, Any]) -> str | None:
    """Why a call with these extra arguments (sinks, score_mod, ...) stays on the base."""
    for name, value in kwargs.items():
        if value is not None:
            return f"argument {name}"
    return None


def geometry(layer: Any) -> Geometry:
    """Geometry of an eligible layer."""
    return layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim
