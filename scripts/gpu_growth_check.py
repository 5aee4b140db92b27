# SPDX-License-Identifier: MIT
"""Does a kept plan stay as fast as a fresh one while rows decode from 1K to 32K tokens?

    python scripts/gpu_growth_check.py          one request and 64 requests, heads 32/8, bf16, d 128

Rows grow by one token a step through `advance()`, as a server does, and are planned anew only when
`advance()` says so; membership never changes. At every power of two, one step before it and in the
middle of every octave, the replay of the kept plan is timed against that of a fresh plan made by a
second planner on the same tensors: interleaved, cold (256 MB written before each replay), median of
30. The two outputs are compared as well.
Writes results/growth_check-<gpu>.jsonl.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import gpu_common as common
import numpy as np
import torch

from pat_sglang import DecodePlanner, pat_decode

HEADS, HEAD_DIM, DTYPE = (32, 8), 128, torch.bfloat16
FIRST, LAST = 1024, 32768
REPLAYS = 30


class Side:
    """A planner with its captured graph; both sides read the same tensors."""

    def __init__(self, shared: Any, rows: int) -> None:
        self.shared, self.rows = shared, rows
        self.planner = DecodePlanner(
            num_q_heads=HEADS[0],
            num_kv_heads=HEADS[1],
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            device="cuda",
            max_rows=rows,
            max_tokens=shared["k"].shape[0],
        )
        self.out = torch.empty_like(shared["q"])
        self.replan()
        self.decode()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.decode()

    def replan(self) -> None:
        s = self.shared
        lens = s["host_lens"]
        self.plan = self.planner.plan(None, None, lens, s["lens"], s["table"], s["rows"])

    def decode(self) -> None:
        s = self.shared
        pat_decode(s["q"], s["k"], s["v"], self.plan, sm_scale=HEAD_DIM**-0.5, out=self.out)


def times(sides: list[Side], flush: torch.Tensor) -> list[float]:
    """Median cold microseconds of each side, replays interleaved."""
    measured: list[list[float]] = [[] for _ in sides]
    for _ in range(REPLAYS):
        for side, into in zip(sides, measured, strict=True):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            side.graph.replay()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) * 1e3)
    return [statistics.median(m) for m in measured]


def check(rows: int, flush: torch.Tensor) -> list[dict[str, Any]]:
    generator = torch.Generator(device="cuda").manual_seed(rows)
    slots = rows * (LAST + 8) + 1
    shared: dict[str, Any] = {
        "q": torch.randn(rows, HEADS[0], HEAD_DIM, device="cuda", generator=generator).to(DTYPE),
        "lens": torch.full((rows,), FIRST, dtype=torch.int64, device="cuda"),
        "host_lens": np.full(rows, FIRST, np.int32),
        "rows": torch.arange(rows, device="cuda"),
    }
    shape = (slots, HEADS[1], HEAD_DIM)
    shared["k"], shared["v"] = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
    for cache in (shared["k"], shared["v"]):
        cache.normal_(generator=generator)
    order = torch.randperm(slots - 1, device="cuda", generator=generator) + 1
    shared["table"] = order.view(rows, -1).to(torch.int32)
    kept, fresh = Side(shared, rows), Side(shared, rows)
    found, plans, length = [], 1, FIRST
    while length < LAST:
        length += 1
        shared["lens"] += 1
        shared["host_lens"] += 1
        renewed = not kept.planner.advance(kept.plan, host_lens=shared["host_lens"])
        if renewed:
            kept.replan()
            plans += 1
        # A power of two, and the step before it as well as one in the middle of an octave.
        if not any(length in (p - 1, p, p + p // 2) for p in (2048, 4096, 8192, 16384, 32768)):
            continue
        fresh.replan()
        kept_us, fresh_us = times([kept, fresh], flush)
        a, b = kept.out.float(), fresh.out.float()
        row = {
            "rows": rows,
            "tokens": length,
            "plans_so_far": plans,
            "kept_us": round(kept_us, 2),
            "fresh_us": round(fresh_us, 2),
            "ratio": round(kept_us / fresh_us, 4),
            "outputs_rel_diff": float((a - b).norm() / b.norm()),
        }
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    found = [row for rows in (1, 64) for row in check(rows, flush)]
    provenance = common.provenance()
    for path in common.result_paths(f"growth_check-{common.gpu_slug()}.jsonl"):
        path.write_text("".join(json.dumps({**row, **provenance}) + "\n" for row in found))
    worst = max(row["ratio"] for row in found)
    print(f"worst ratio of a kept plan to a fresh one: {worst:.3f}")


if __name__ == "__main__":
    main()
