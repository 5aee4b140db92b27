# SPDX-License-Identifier: MIT
"""PAT behind the interface of its peers: the library API and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from gpu_common import Row
from peers import Case, Peer
from suites import HEAD_DIM


class Planners:
    """One planner per head layout, made when first asked for; they serve all cells."""

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self._made: dict[Any, Any] = {}

    def of(self, q_heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> Any:
        from pat_sglang import DecodePlanner

        key = (q_heads, kv_heads)
        if key not in self._made:
            self._made[key] = DecodePlanner(
                num_q_heads=q_heads,
                num_kv_heads=kv_heads,
                head_dim=HEAD_DIM,
                dtype=dtype,
                device=device,
                max_rows=self.max_rows,
                max_tokens=self.max_tokens,
            )
        return self._made[key]


class Pat(Peer):
    """PAT at one page size: pages that are shared in part belong to their rows, as for peers."""

    def __init__(self, page_size: int, planners: Planners) -> None:
        super().__init__(page_size)
        self.planners = planners

    def prepare(self, case: Case) -> None:
        from pat_sglang import Forest, pat_decode

        self.case, self.decode = case, pat_decode
        self.planner = self.planners.of(*case.heads, case.q.dtype, case.q.device.type)
        self.forest = Forest(case.tree.parent, case.tree.length)
        self.rows = torch.arange(case.tree.num_rows, dtype=torch.int64, device=case.q.device)
        self.out = torch.empty_like(case.q)
        self.plan()

    def plan(self) -> None:
        self.current = self.planner.plan(
            self.forest,
            self.case.tree.leaf,
            self.case.tree.seq_lens,
            self.case.seq_lens,
            self.case.req_to_token,
            self.rows,
        )

    def run(self) -> torch.Tensor:
        return self.decode(
            self.case.q,
            self.case.k,
            self.case.v,
            self.current,
            sm_scale=self.case.sm_scale,
            out=self.out,
        )

    def facts(self) -> Row:
        """What the plan does, for whoever reads the numbers."""
        stats = self.current.stats
        names = (
            "planned_tokens", "unique_tokens", "items", "chains", "partial_slots", "splits",
            "coarsened", "predicted_us",
        )  # fmt: skip
        facts = {name: getattr(stats, name, None) for name in names}
        facts["workspace_mb"] = round(self.planner.workspace_bytes / 1e6, 1)
        return facts
