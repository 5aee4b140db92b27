# SPDX-License-Identifier: MIT
"""``doctor --calibrate`` on the GPU it is for."""

from __future__ import annotations

import torch

from pat_sglang import DecodePlanner, saved_cost
from pat_sglang.calibrate import calibrate


def test_what_was_measured_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_cost, "path_of", lambda *gpu: tmp_path / "cost.json")
    told = calibrate(1.0)
    planner = DecodePlanner(
        num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda",
        max_rows=4, max_tokens=100,
    )  # fmt: skip
    assert planner.host.model.provenance in told
    assert "doctor --calibrate" in told
