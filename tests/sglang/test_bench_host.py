# SPDX-License-Identifier: MIT
"""scripts/bench_host.py measures the steps it says it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_host

from pat_sglang.metrics import METRICS


@pytest.fixture(params=[2, 3, 4])
def bed(request):
    return bench_host.Bed(rows=70, levels=request.param)


def made_and_kept():
    return METRICS.get("plans_made"), METRICS.get("plans_kept")


def test_steps_are_what_their_names_say(bed):
    bed.changed()
    METRICS.reset()
    for _ in range(5):
        bed.changed()
    assert made_and_kept() == (5, 0)
    METRICS.reset()
    for _ in range(bench_host.GROWTH):  # once the lengths begin anew, with a step of its own
        bed.unchanged()
    assert made_and_kept() == (1, bench_host.GROWTH)


def test_the_last_level_is_private(bed):
    bed.changed()
    parent = bed.backend._pat.feed.tracker._structure.forest.parent.tolist()
    depths = []
    for above in parent:
        depths.append(1 + (depths[above] if above >= 0 else 0))
    assert max(depths) == bed.levels - 1
