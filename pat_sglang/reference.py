# SPDX-License-Identifier: MIT
"""Slow, obvious decode attention: the numerics oracle. Knows nothing of plans."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """softmax(q K^T * sm_scale) V, one row at a time.

    Args:
        q: ``[rows, q_heads, d]``.
        k_cache, v_cache: ``[slots, kv_heads, d]``.
        req_to_token: int ``[requests, max_context]``, token position to slot.
        req_pool_indices: int ``[rows]``.
        seq_lens: int ``[rows]``; 0 gives zeros.
        sm_scale: factor of the scores.
        dtype: precision of the computation, float32 or float64.

    Returns:
        ``[rows, q_heads, d]`` in ``dtype``.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.zeros(rows, q_heads, head_dim, dtype=dtype, device=q.device)
    for row, length in enumerate(seq_lens[:rows].tolist()):
        if length == 0:
            continue
        slots = req_to_token[req_pool_indices[row], :length].long()
        keys = k_cache[slots].to(dtype).transpose(0, 1)  # [kv_heads, tokens, d]
        values = v_cache[slots].to(dtype).transpose(0, 1)
        queries = q[row].to(dtype).view(kv_heads, q_heads // kv_heads, head_dim)
        weights = torch.softmax(queries @ keys.transpose(1, 2) * sm_scale, dim=-1)
        out[row] = (weights @ values).reshape(q_heads, head_dim)
    return out
