# SPDX-License-Identifier: MIT
"""Trees in a KV pool: the tensors that the decode benchmarks hand to backends.

One pool of random values serves every cell of a run, seen with any number of KV heads; a layout
takes its first slots. So nothing is allocated or filled between cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from peers import Case
from suites import HEAD_DIM
from trees import Layout, Tree, make_layout

CHUNK = 1 << 26  # elements filled at a time: some lie beyond 2^31


def heads_of(heads: str) -> tuple[int, int]:
    """(query heads, KV heads) of "32/8"."""
    q_heads, kv_heads = heads.split("/")
    return int(q_heads), int(kv_heads)


def slots_needed(tree: Tree, page_size: int) -> int:
    """Slots of a pool that holds the tree page by page; no layout is made for it."""
    aligned = tree.at_page_size(page_size)
    own = aligned.seq_lens - aligned.tail_begins()
    shared = aligned.length[aligned.reached()].sum()
    pages = shared // page_size + (-(-own // page_size)).sum() + 1
    return int(pages) * page_size


def layout_of(tree: Tree, page_size: int) -> tuple[Tree, Layout]:
    """The aligned tree and random pages for it, from a seed that is the tree's name."""
    aligned = tree.at_page_size(page_size)
    return aligned, make_layout(aligned, page_size, sum(tree.name.encode()))


class Pool:
    """K and V for any of the given cells.

    Args:
        cells: (tree, "query heads/KV heads") that are to fit.
        page_sizes: at every one of these.
        device: "cuda" or "cpu"; bfloat16 on the first, float32 on the second.
    """

    def __init__(
        self, cells: Iterable[tuple[Tree, str]], page_sizes: Iterable[int], device: str
    ) -> None:
        self.device = device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        slots = max(
            slots_needed(tree, page_size) * heads_of(heads)[1]
            for tree, heads in cells
            for page_size in page_sizes
        )
        torch.manual_seed(1)
        self._k, self._v = (
            torch.empty(slots * HEAD_DIM, dtype=self.dtype, device=device) for _ in range(2)
        )
        for cache in (self._k, self._v):
            for part in cache.split(CHUNK):
                part.normal_()

    def case(self, tree: Tree, page_size: int) -> Case:
        """A tree in this pool; it has no heads and no queries yet."""
        aligned, layout = layout_of(tree, page_size)
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return Case(
            aligned,
            layout,
            *(nothing, nothing, nothing),
            torch.from_numpy(layout.req_to_token).to(self.device),
            torch.from_numpy(tree.seq_lens).to(self.device),
            HEAD_DIM**-0.5,
        )

    def with_heads(self, case: Case, heads: str, q: torch.Tensor | None = None) -> Case:
        """The case with its caches seen with these heads, and with queries."""
        q_heads, kv_heads = heads_of(heads)
        shape = (case.layout.num_slots, kv_heads, HEAD_DIM)
        k, v = (cache[: np.prod(shape)].view(shape) for cache in (self._k, self._v))
        if q is None:
            q = self.queries(case.tree.num_rows, q_heads)
        return replace(case, q=q, k=k, v=v)

    def queries(self, rows: int, q_heads: int) -> torch.Tensor:
        """Standard normal queries [rows, q_heads, d]."""
        return torch.randn(rows, q_heads, HEAD_DIM, dtype=self.dtype, device=self.device)
