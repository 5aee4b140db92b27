# SPDX-License-Identifier: MIT
"""``doctor --calibrate`` on the GPU it is for."""

from __future__ import annotations

import torch

from pat_sglang import DecodePlanner, saved_cost
from pat_sglang.calibrate import FLUSH_BYTES, HEAD_DIM, _Timed, batches, calibrate


def make_planner(max_rows, max_tokens):
    return DecodePlanner(
        num_q_heads=8, num_kv_heads=2, head_dim=HEAD_DIM, dtype=torch.bfloat16, device="cuda",
        max_rows=max_rows, max_tokens=max_tokens,
    )  # fmt: skip


def test_what_was_measured_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_cost, "path_of", lambda *gpu: tmp_path / "cost.json")
    told = calibrate(1.0)
    assert make_planner(4, 100).host.model.provenance in told
    assert "doctor --calibrate" in told


def test_a_replay_writes_nobody_elses_memory():
    batch = min(batches(), key=lambda batch: batch.tokens)
    rows = len(batch.lens)
    kv = [torch.randn(batch.tokens, 2, HEAD_DIM, device="cuda").bfloat16() for _ in range(2)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    timed = _Timed(batch, make_planner(rows, batch.tokens), *kv, flush)
    # As large as the output: had it been freed, one of these would be in its place.
    others = [
        torch.zeros(rows, 8, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(64)
    ]
    us = timed.measure(again=False)
    assert us > 0
    assert not any(other.any() for other in others)
    assert timed.measure(again=False) == us
