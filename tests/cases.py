# SPDX-License-Identifier: MIT
"""Decode cases: a forest, ragged tails, a poisoned KV pool with slots in random order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pat_sglang.cost import CostModel
from pat_sglang.forest import Forest

# Like a Hopper GPU, but fixed: tuning the shipped constants changes no expected plan.
MODEL = CostModel(
    num_sms=132,
    item_ps=(400_000, 900_000, 1_500_000),
    token_ps=(22_500, 22_500, 22_500),
    reread_ps=(12_000, 12_000, 12_000),
    solo_item_ps=(2_000_000, 3_500_000, 4_500_000),
    solo_token_ps=(18_000, 8_000, 12_000),
    private_token_ps=4_500,
    part_ps=83_000,
    step_ps=100_000,
    merge_ps=1_000_000,
    provenance="for tests",
)
# Partials are dear and steps are free: chains wherever they are possible, on any GPU.
CHAINY = replace(MODEL, part_ps=2_000_000, step_ps=1)

WILD_SLOT = 2**31 - 1  # in unused entries of req_to_token: reading it is a crash, not a guess


@dataclass
class DecodeCase:
    """Tensors of one decode step, and what the planner is told of them."""

    forest: Forest
    leaf_of_row: np.ndarray
    seq_lens: torch.Tensor  # int64 [rows]
    req_to_token: torch.Tensor  # int32 [requests, max_context]
    req_pool_indices: torch.Tensor  # int64 [rows]
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    free_slots: list[int] = field(default_factory=list)

    @property
    def sm_scale(self) -> float:
        """1 / sqrt(d)."""
        return self.q.shape[-1] ** -0.5

    def grow(self, tokens: np.ndarray) -> None:
        """Gives each row more tokens, with fresh slots, as decode steps would."""
        for row, count in enumerate(tokens.tolist()):
            at = int(self.seq_lens[row])
            new = [self.free_slots.pop() for _ in range(count)]
            line = int(self.req_pool_indices[row])
            self.req_to_token[line, at : at + count] = torch.tensor(new, dtype=torch.int32)
            for cache in (self.k_cache, self.v_cache):
                fresh = torch.randn(count, *cache.shape[1:], device=cache.device)
                cache[torch.tensor(new, dtype=torch.long)] = fresh.to(cache.dtype)
            self.seq_lens[row] += count

    def graph_inputs(self, padded: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What a graph that appends reads: int64 ``[rows + padded]`` lengths and last slots.

        Padded as SGLang's graph runner pads: rows of one token in slot 0.
        """
        last = self.req_to_token[self.req_pool_indices, self.seq_lens - 1].long()
        ones = self.seq_lens.new_ones(padded)
        return torch.cat([self.seq_lens, ones]), torch.cat([last, ones - 1])


def make_case(
    forest: Forest,
    leaf_of_row: np.ndarray,
    lens: np.ndarray,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    page_size: int = 1,
    spare: int = 0,
    seed: int = 0,
) -> DecodeCase:
    """A case with NaN in every KV slot nobody owns and wild slots in unused table entries.

    Args:
        forest, leaf_of_row, lens: as for the planner.
        spare: slots per row kept free for ``grow``.
        page_size: slots come in aligned runs of this many (private tails start on a new page).
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = len(lens)
    parent, length = forest.parent.tolist(), forest.length.tolist()

    def pages(tokens: int) -> int:
        return -(-tokens // page_size)

    need = sum(pages(n) for n in length) + sum(pages(int(n)) for n in lens) + rows * pages(spare)
    order = rng.permutation(need + 4) * page_size
    pool = [int(first) + i for first in order for i in range(page_size)]
    at = 0

    def take(tokens: int) -> list[int]:
        nonlocal at
        got = pool[at : at + tokens]
        at += pages(tokens) * page_size
        return got

    node_slots: dict[int, list[int]] = {}

    def slots_of(node: int) -> list[int]:
        if node < 0:
            return []
        if node not in node_slots:
            node_slots[node] = take(length[node])
        return slots_of(parent[node]) + node_slots[node]

    context = int(max(lens, default=0)) + spare + 1
    req_to_token = torch.full((rows + 3, context), WILD_SLOT, dtype=torch.int32)
    indices = torch.from_numpy(rng.permutation(rows + 3)[:rows].astype(np.int64))
    for row in range(rows):
        slots = slots_of(int(leaf_of_row[row]))
        slots = (slots + take(max(int(lens[row]) - len(slots), 0)))[: int(lens[row])]
        req_to_token[indices[row], : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    used = torch.tensor(pool[:at], dtype=torch.long)
    shape = (len(pool), num_kv_heads, head_dim)
    caches = []
    for _ in range(2):
        cache = torch.full(shape, torch.nan)
        cache[used] = torch.randn(len(used), *shape[1:], generator=generator)
        caches.append(cache.to(device=device, dtype=dtype))
    q = torch.randn(rows, num_q_heads, head_dim, generator=generator)
    return DecodeCase(
        forest=forest,
        leaf_of_row=leaf_of_row,
        seq_lens=torch.from_numpy(np.asarray(lens, np.int64)).to(device),
        req_to_token=req_to_token.to(device),
        req_pool_indices=indices.to(device),
        q=q.to(device=device, dtype=dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        free_slots=pool[at:],
    )


def random_forest(
    rng: np.random.Generator, rows: int, max_len: int = 64
) -> tuple[Forest, np.ndarray, np.ndarray]:
    """Random forest with several roots, duplicates and ragged tails (length 0 included)."""
    parent: list[int] = []
    length: list[int] = []
    for _ in range(int(rng.integers(0, 12))):
        deep = parent and rng.random() < 0.7
        parent.append(int(rng.integers(0, len(parent))) if deep else -1)
        length.append(int(rng.integers(1, max_len)))
    depth = []
    for above, own in zip(parent, length, strict=True):
        depth.append(own + (depth[above] if above >= 0 else 0))
    leaves, lens = [], []
    for _ in range(rows):
        leaf = int(rng.integers(-1, len(parent))) if parent else -1
        tail = int(rng.integers(0, max_len)) if rng.random() < 0.8 else 0
        total = (depth[leaf] if leaf >= 0 else 0) + tail
        leaves.append(leaf)
        lens.append(max(total, 1))
    forest = Forest(np.array(parent, np.int32), np.array(length, np.int32))
    return forest, np.array(leaves, np.int32), np.array(lens, np.int32)
