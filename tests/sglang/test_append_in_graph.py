# SPDX-License-Identifier: MIT
"""Graphs that append the new slots: when the host launches nothing, and that tokens stay right."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from backends import SYSTEM, Fixture, GraphRunner, counts, graph_base

from pat_sglang.metrics import METRICS
from pat_sglang.plugin import compat
from pat_sglang.plugin.feed import on_init_new


@pytest.fixture(autouse=True)
def _packed(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_FORCE", "on")  # the cost model alone would not pack so little


def captured(rows=3, **options):
    """A fixture, its graphs and requests that share a prompt; counts begin here."""
    fixture = Fixture(graph_base([]), **options)
    graphs = GraphRunner(fixture).capture()
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(rows)]
    METRICS.reset()
    return fixture, graphs, reqs


def launched():
    return METRICS.get("appends_launched")


@pytest.mark.parametrize("heads", [(6, 6), (6, 4)], ids=["one planner", "two planners"])
def test_kept_steps_launch_nothing(heads):
    fixture, graphs, reqs = captured(5, heads=heads)
    assert len(fixture.backend._pat.planners) == len(set(heads))
    for _ in range(100):  # beyond a horizon
        outs = graphs.replay(fixture.scheduler.decode(reqs))
        assert all(torch.equal(out[5:], torch.zeros_like(out[5:])) for out in outs)
    made, kept = counts("plans_made", "plans_kept")
    assert 2 <= made <= 4 and made + kept == 100
    assert launched() == 0


def test_random_serving():
    """Arrivals, ends, retractions, reorderings, mixed, eager and unseen steps; equal outputs."""
    fixture, graphs, running = captured(4)
    chance = random.Random(5)
    for step in range(160):
        if len(running) < 12 and chance.random() < 0.1:
            tail = [chance.randrange(1000) for _ in range(chance.randrange(12))]
            running = [*running, fixture.serve([*SYSTEM, *tail])]
        if len(running) > 1 and chance.random() < 0.06:
            running = fixture.lose_one(chance, running)
        if chance.random() < 0.05:
            running = chance.sample(running, len(running))
        batch, kind = fixture.scheduler.decode(running, token=step), chance.random()
        if kind < 0.05:
            batch.forward_mode = type(batch.forward_mode)["MIXED"]
            on_init_new(None, None, batch, fixture.runner)
        if kind < 0.1:  # the rows advance outside of PAT
            for req in running:
                fixture.prefill(req)
        elif kind < 0.2:
            fixture.decode(batch)
        else:
            graphs.replay(batch)
    made, kept = counts("plans_made", "plans_kept")
    assert made > 20 and kept > 60
    assert 5 < launched() < kept / 2


def test_eager_steps_and_those_after_an_unseen_one_launch():
    fixture, graphs, reqs = captured()
    graphs.replay(fixture.scheduler.decode(reqs))
    fixture.decode(fixture.scheduler.decode(reqs))
    assert launched() == 1
    graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 1
    fixture.scheduler.decode(reqs)
    for req in reqs:
        fixture.prefill(req)
    graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 2
    assert counts("plans_made", "plans_kept") == (1, 3)


def test_steps_without_host_lengths_launch():
    fixture, graphs, reqs = captured()
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs), seq_lens_cpu=None)
    assert launched() == 2


def test_lengths_that_no_graph_reads_launch():
    fixture, graphs, reqs = captured()
    graphs.replay(fixture.scheduler.decode(reqs))
    batch = fixture.scheduler.decode(reqs)
    lens = torch.cat([batch.seq_lens_cpu, torch.ones(1, dtype=torch.int64)])
    graphs.replay(batch, seq_lens=lens)
    assert launched() == 1


def test_plans_that_are_validated_launch(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_VALIDATE", "1")
    fixture, graphs, reqs = captured()
    for _ in range(4):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 3


def test_graphs_that_do_not_append_launch():
    """As on a version of SGLang that puts no metadata into its graphs."""
    fixture = Fixture(graph_base([]))
    graphs = GraphRunner(fixture).capture(appends=False)
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    for _ in range(4):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 3


@pytest.mark.parametrize("appends", [(True, False), (False, True), (True, True)])
def test_two_graphs_of_one_size(appends):
    """Which of them is replayed cannot be seen, so both must append."""
    fixture = Fixture(graph_base([]))
    graphs = GraphRunner(fixture)
    for each in appends:
        graphs.capture(each)
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    for _ in range(4):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == (0 if all(appends) else 3)


def test_a_graph_that_appends_twice_stands_for_itself_alone():
    """Appending again changes nothing on the device; it must not excuse a graph that never does."""
    fixture, graphs, reqs = captured()
    batch, _ = graphs.captured[4]
    with mock.patch.object(compat, "is_capturing", return_value=True):
        fixture.backend.init_forward_metadata_out_graph(batch, in_capture=True)
        for _ in range(2):
            fixture.backend.init_forward_metadata_in_graph(batch)
        fixture.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 2


def test_slots_that_are_not_one_a_row_are_not_captured():
    fixture, graphs, reqs = captured()
    batch, _ = graphs.captured[4]
    fixture.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    for slots in (None, batch.out_cache_loc[:3]):
        batch.out_cache_loc = slots
        fixture.backend.init_forward_metadata_in_graph(batch)
    batch.out_cache_loc = graphs.out_cache_loc[:4]
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 2  # a capture has begun that does not append


def test_recapture_while_requests_run():
    fixture, graphs, reqs = captured()
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    graphs.capture()
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert counts("plans_made", "plans_kept", "appends_launched") == (2, 4, 0)


def test_graphs_of_buffers_that_are_gone_count_no_more():
    fixture, graphs, reqs = captured()
    graphs.replay(fixture.scheduler.decode(reqs))
    planners = fixture.backend._pat.planners
    fixture.backend.init_cuda_graph_state(100, 100)
    assert fixture.backend._pat.planners is not planners
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 2
    graphs.capture()
    for _ in range(3):
        graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 2


def test_another_batch_and_an_idle_rank_between():
    fixture, graphs, reqs = captured(4)
    for between in (reqs[:2], []):
        for _ in range(3):
            graphs.replay(fixture.scheduler.decode(reqs))
        if between:
            graphs.replay(fixture.scheduler.decode(between))
        else:  # data-parallel padding only
            batch = fixture.scheduler.batch([], "IDLE")
            on_init_new(None, None, batch, fixture.runner)
            batch.forward_mode = type(batch.forward_mode)["DECODE"]
            graphs.replay(batch)
    graphs.replay(fixture.scheduler.decode(reqs))
    assert launched() == 0


def test_lengths_that_the_device_does_not_confirm_are_nan():
    """The host says one token more, the device two: loud, and right after the next new plan."""
    fixture, graphs, reqs = captured()
    graphs.replay(fixture.scheduler.decode(reqs))
    fixture.scheduler.decode(reqs[:1])
    batch = fixture.scheduler.decode(reqs)
    batch.seq_lens_cpu[0] -= 1
    on_init_new(None, None, batch, fixture.runner)
    for req in reqs:
        fixture.prefill(req)
    live = fixture.forward_batch(batch, padded_rows=4)
    view, _ = graphs.captured[4]
    view.num_padding = 1
    view.seq_lens_cpu.copy_(live.seq_lens_cpu)
    view.seq_lens.copy_(live.seq_lens)
    view.seq_lens[0] += 1
    view.req_pool_indices.copy_(live.req_pool_indices)
    view.out_cache_loc.copy_(live.out_cache_loc)
    fixture.backend.init_forward_metadata_out_graph(view)
    fixture.backend.init_forward_metadata_in_graph(view)
    layer = fixture.layers[0]
    q = torch.randn(4, layer.tp_q_head_num * layer.qk_head_dim)
    out = fixture.backend.forward_decode(q, None, None, layer, view)
    assert out[0].isnan().all() and out[1:].isfinite().all()
    assert launched() == 0
    graphs.replay(fixture.scheduler.decode(list(reqs)))
