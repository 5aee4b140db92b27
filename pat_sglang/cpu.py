# SPDX-License-Identifier: MIT
"""The CPU path: the same work items, partials and merge as the kernels, in PyTorch.

It exists so that real SGLang on a machine without a GPU runs the whole chain; it is not fast.
Float32 throughout; log-sum-exp in base e (it never leaves this file).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import H_PARTS, H_ROWS
from .plan import DecodePlan


@dataclass(frozen=True)
class _Item:
    """A work item with its indices resolved, good for every layer of one step."""

    rows: torch.Tensor  # int64 [query rows]
    heads: torch.Tensor  # int64 [query rows], head of the group
    parts: torch.Tensor  # int64 [query rows], partial slot or -1
    # Query rows [lo, hi) and the slots of the KV cache they read, int64 [tokens].
    steps: list[tuple[int, int, torch.Tensor]]


def _resolve(plan: DecodePlan) -> list[_Item]:
    """Items of the current step, cached on the plan until the next change of it."""
    cached = getattr(plan, "_cpu_items", None)
    if cached is not None and cached[0] == plan.version:
        return cached[1]
    tables, group = plan.tables, plan.layer.group_size
    lens = plan.live_lens.numpy()
    items = []
    for index in range(len(tables.items)):
        rows, heads, parts = zip(*tables.rows_of_item(index, group), strict=True)
        steps = [
            (lo, hi, plan.slots[torch.from_numpy(offsets)].long())
            for lo, hi, offsets in tables.steps_of_item(index, group, lens)
            if offsets.size
        ]
        items.append(_Item(torch.tensor(rows), torch.tensor(heads), torch.tensor(parts), steps))
    plan._cpu_items = (plan.version, items)  # type: ignore[attr-defined]
    return items


def decode_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DecodePlan,
    sm_scale: float,
    out: torch.Tensor,
) -> None:
    """See ``pat_decode``."""
    layer = plan.layer
    shape = (layer.num_q_heads, layer.head_dim)
    if q.ndim != 3 or tuple(q.shape[1:]) != shape or out.shape != q.shape:
        raise ValueError(f"q and out must be [rows, {shape[0]}, {shape[1]}], got {tuple(q.shape)}")
    kv_shape = (layer.num_kv_heads, layer.head_dim)
    if tuple(k_cache.shape[1:]) != kv_shape or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must be [slots, {kv_shape[0]}, {kv_shape[1]}], got "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    rows, parts = plan.header[H_ROWS], plan.header[H_PARTS]
    if q.shape[0] < rows:
        raise ValueError(f"q has {q.shape[0]} rows, the plan {rows}")

    kv_heads, group, head_dim = layer.num_kv_heads, layer.group_size, layer.head_dim
    queries = q.view(q.shape[0], kv_heads, group, head_dim).float()
    result = torch.zeros(q.shape[0], kv_heads, group, head_dim)
    partial_out = torch.zeros(parts, kv_heads, group, head_dim)
    partial_lse = torch.full((parts, kv_heads, group), -torch.inf)
    for item in _resolve(plan):
        tile = queries[item.rows, :, item.heads].transpose(0, 1)  # [kv_heads, query rows, d]
        value, lse = _attend(tile, item.steps, k_cache, v_cache, sm_scale)
        direct = item.parts < 0
        result[item.rows[direct], :, item.heads[direct]] = value[direct]
        partial_out[item.parts[~direct], :, item.heads[~direct]] = value[~direct]
        partial_lse[item.parts[~direct], :, item.heads[~direct]] = lse[~direct]
    if parts:
        _merge(plan, partial_out, partial_lse, result)
    result[:rows][plan.live_lens[:rows] < 0] = torch.nan  # outgrew the horizon unseen
    out.copy_(result.view(q.shape))


def _attend(
    tile: torch.Tensor,
    steps: list[tuple[int, int, torch.Tensor]],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[query rows, kv_heads, d]`` and log-sum-exp ``[query rows, kv_heads]`` of an item.

    Each step's softmax is taken by itself and joined with what its rows have so far.
    """
    value = torch.zeros_like(tile)
    lse = torch.full(tile.shape[:2], -torch.inf)
    for lo, hi, slots in steps:
        keys = k_cache[slots].float().permute(1, 2, 0)  # [kv_heads, d, tokens]
        values = v_cache[slots].float().transpose(0, 1)  # [kv_heads, tokens, d]
        scores = tile[:, lo:hi] @ keys * sm_scale
        of_step = torch.logsumexp(scores, dim=-1)  # [kv_heads, hi - lo]
        both = torch.logaddexp(lse[:, lo:hi], of_step)
        value[:, lo:hi] *= torch.exp(lse[:, lo:hi] - both)[..., None]
        value[:, lo:hi] += torch.exp(scores - both[..., None]) @ values
        lse[:, lo:hi] = both
    return value.transpose(0, 1), lse.T


def _merge(
    plan: DecodePlan, partial_out: torch.Tensor, partial_lse: torch.Tensor, result: torch.Tensor
) -> None:
    """Online-softmax merge of every row's partials into ``result``."""
    ptr = torch.from_numpy(plan.tables.part_ptr.astype("int64"))
    counts = ptr[1:] - ptr[:-1]
    row_of_part = torch.repeat_interleave(torch.arange(len(counts)), counts)
    shape = (len(counts), *partial_lse.shape[1:])
    index = row_of_part[:, None, None].expand_as(partial_lse)
    top = torch.full(shape, -torch.inf).scatter_reduce(0, index, partial_lse, "amax")
    weight = torch.exp(partial_lse - top.clamp(min=torch.finfo(torch.float32).min)[row_of_part])
    total = torch.zeros(shape).index_add(0, row_of_part, weight)
    value = torch.zeros(*shape, partial_out.shape[-1]).index_add(
        0, row_of_part, weight[..., None] * partial_out
    )
    merged = (counts > 0).nonzero()[:, 0]
    result[merged] = value[merged] / total[merged][..., None].clamp(min=1e-38)
