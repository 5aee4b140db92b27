# SPDX-License-Identifier: MIT
"""pat_decode(): the one operator, on CUDA by kernels and on the CPU by PyTorch."""

from __future__ import annotations

import logging

import torch

from .cpu import decode_cpu
from .layout import H_ROWS
from .metrics import METRICS
from .plan import DecodePlan

logger = logging.getLogger(__name__)


def pat_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DecodePlan,
    *,
    sm_scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode attention of a planned batch: pack, forward, merge.

    Launches on the current stream, allocates nothing when ``out`` is given, and reads all counts
    from the device: it can be captured in a CUDA graph once and replayed with later plans. All
    output is NaN if one has more rows than the captured q. Calls with plans of one planner share
    its buffers: they must not run at the same time on several streams.

    Args:
        q: ``[padded_rows, q_heads, d]``, last two dimensions contiguous; rows beyond the plan's are
            padding.
        k_cache, v_cache: ``[slots, kv_heads, d]`` of q's dtype, last two dimensions contiguous. A
            captured call knows their size: slots of later plans must lie below it.
        plan: of ``DecodePlanner.plan``.
        sm_scale: factor of the scores, normally ``d ** -0.5``.
        out: as q; None: allocated. Padding rows are set to zero.

    Returns:
        ``out``.

    Raises:
        ValueError, RuntimeError: a shape, dtype, stride or device does not fit; the message has the
            offending value.
    """
    layer = plan.layer
    if k_cache.shape[1:2] != (layer.num_kv_heads,):
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} does not have the {layer.num_kv_heads} KV heads of "
            "the plan"
        )
    if q.shape[0] < plan.header[H_ROWS]:
        raise ValueError(f"q has {q.shape[0]} rows, the plan {plan.header[H_ROWS]}")
    if not sm_scale > 0:  # the running maximum is taken before scaling
        raise ValueError(f"sm_scale {sm_scale} must be positive")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if layer.module is None:
        decode_cpu(q, k_cache, v_cache, plan, sm_scale, out)
        return out
    has_maps = layer.module.decode(
        q,
        k_cache,
        v_cache,
        out,
        plan.words,
        plan.slots,
        plan.live_lens,
        plan.partial_out,
        plan.partial_lse,
        plan.counters,
        float(sm_scale),
    )
    if not has_maps:
        if METRICS.get("maps_refused") == 0:
            logger.warning(
                "pat_sglang: the driver makes no tensor maps of the KV cache: slots side by side "
                "are copied one by one, more slowly"
            )
        METRICS.count("maps_refused")
    return out
