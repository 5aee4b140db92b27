# SPDX-License-Identifier: MIT
"""scripts/bench_host.py measures the steps it says it does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import versions

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_host

from pat_sglang.metrics import METRICS
from pat_sglang.plugin import structure


@pytest.fixture(params=[2, 3, 4])
def bed(request):
    return bench_host.Bed(rows=140, levels=request.param)  # on 4 levels, at least 2 a group


@pytest.fixture
def calls(monkeypatch):
    """How often a row joined the tracker's nodes, with success or not, and they were made anew."""
    counted = Counter()
    joins, init = structure._SharedNodes._joins, structure._SharedNodes.__init__

    def count_joins(self, last):
        joined = joins(self, last)
        counted["joined" if joined else "turned away"] += 1
        return joined

    def count_made(self, nodes):
        counted["made"] += 1
        init(self, nodes)

    monkeypatch.setattr(structure._SharedNodes, "_joins", count_joins)
    monkeypatch.setattr(structure._SharedNodes, "__init__", count_made)
    return counted


def counted():
    return tuple(METRICS.get(name) for name in ("plans_made", "plans_kept", "appends_launched"))


def test_steps_are_what_their_names_say(bed):
    bed.changed()
    METRICS.reset()
    for _ in range(5):
        bed.changed()
    assert counted() == (5, 0, 0)
    METRICS.reset()
    for _ in range(bench_host.GROWTH):  # once the lengths begin anew, with a step of its own
        bed.appended()
    assert counted() == (1, bench_host.GROWTH, 1)  # then they are no token longer
    METRICS.reset()
    for _ in range(5):
        bed.unchanged()
    assert counted() == (0, 5, 5)


def test_a_new_request_joins_in_every_changed_step(bed, calls):
    bed.changed()
    calls.clear()
    for _ in range(50):
        bed.changed()
    assert calls == {"joined": 50}


def test_another_shape_is_made_anew_in_every_step(bed, calls):
    bed.changed()
    calls.clear()
    for _ in range(50):
        bed.reshaped()
    if versions.server_tree() == "radix":
        assert calls == {"turned away": 50, "made": 50}
    else:  # paths of ids do not show what the request that is gone left behind
        assert calls == {"joined": 50}


def test_the_memory_of_what_is_gone_is_used_again(bed):
    for _ in range(100):  # more tokens than there are spare slots
        bed.changed()
        bed.reshaped()
    assert bed.scheduler.pool.available_size() == 0
    assert len(bed.scheduler.lens) == len(bed.reqs) == 140
    scheduler = bed.scheduler
    assert len({req.last_node for req in bed.reqs}) == 140
    prompts = [scheduler.slots(req)[: len(req.origin_input_ids)] for req in bed.reqs]
    assert scheduler.tree.protected_size() == len(set(np.concatenate(prompts).tolist()))
    for req in bed.reqs:
        scheduler.finish(req)
    assert scheduler.tree.protected_size() == 0  # nothing was locked twice


def test_the_last_level_is_private(bed):
    bed.changed()
    parent = bed.backend._pat.feed.tracker._structure.forest.parent.tolist()
    depths = []
    for above in parent:
        depths.append(1 + (depths[above] if above >= 0 else 0))
    assert max(depths) == bed.levels - 1
