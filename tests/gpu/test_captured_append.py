# SPDX-License-Identifier: MIT
"""The backend in SGLang's steps, its append captured in a real CUDA graph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_host

from pat_sglang.metrics import METRICS


def test_what_the_graph_appends_is_what_req_to_token_holds():
    bed = bench_host.Bed(rows=140, levels=3)
    bed.changed()
    METRICS.reset()
    steps = bench_host.GROWTH - 4  # the lengths do not begin anew
    for step in range(steps):
        bed.appended()
        bed.graph.replay()
        (plan,) = bed.backend._pat.plans.values()
        assert torch.equal(plan.live_lens[:140].long(), bed.seq_lens)
        if step % 10 == 0 or step == steps - 1:
            rows = torch.tensor([bed.scheduler.row(req) for req in bed.reqs], device="cuda")
            plan.validate(bed.scheduler.pool.req_to_token, rows, bed.seq_lens)
    assert METRICS.get("plans_kept") == steps
    assert METRICS.get("appends_launched") == 0
    bed.unchanged()
    bed.graph.replay()  # appends nothing twice
    assert torch.equal(plan.live_lens[:140].long(), bed.seq_lens)
    assert METRICS.get("appends_launched") == 1
