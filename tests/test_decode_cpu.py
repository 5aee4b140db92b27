# SPDX-License-Identifier: MIT
"""The CPU path against the plan-free reference: same plan, same partials, same merge."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CHAINY, make_case, random_forest

from pat_sglang import DecodePlanner, Forest, pat_decode
from pat_sglang.host import HostPlanner
from pat_sglang.metrics import METRICS
from pat_sglang.packing import Search
from pat_sglang.plan import workspace_for
from pat_sglang.reference import attention

GEOMETRIES = [(4, 4, 16), (6, 2, 16), (5, 1, 8), (16, 1, 8)]


def check(planner, case, rows_padded=0):
    plan = planner.plan(
        case.forest, case.leaf_of_row, case.seq_lens.numpy(), case.seq_lens, case.req_to_token,
        case.req_pool_indices,
    )  # fmt: skip
    check_output(plan, case, rows_padded)
    return plan


def check_output(plan, case, rows_padded=0):
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    q = torch.cat([case.q, torch.full((rows_padded, *case.q.shape[1:]), torch.nan)])
    out = torch.full_like(q, torch.nan)
    pat_decode(q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale, out=out)
    want = attention(
        case.q, case.k_cache, case.v_cache, case.req_to_token, case.req_pool_indices,
        case.seq_lens, case.sm_scale, torch.float64,
    )  # fmt: skip
    rows = case.q.shape[0]
    torch.testing.assert_close(out[:rows].double(), want, atol=2e-5, rtol=2e-5)
    assert not out[rows:].any()


def planner_for(geometry, **kwargs):
    q_heads, kv_heads, head_dim = geometry
    return DecodePlanner(
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32,
        device="cpu", max_rows=64, max_tokens=1 << 16, **kwargs,
    )  # fmt: skip


def case_for(geometry, forest, leaves, lens, **kwargs):
    q_heads, kv_heads, head_dim = geometry
    return make_case(
        forest, leaves, lens, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim,
        **kwargs,
    )  # fmt: skip


def chain_planner_for(geometry, num_sms=1):
    """A planner that makes chains wherever it can, and cuts the less the fewer SMs there are."""
    planner = planner_for(geometry, sharing="on")
    host = planner.host
    model, search = replace(CHAINY, num_sms=num_sms), Search(without_chains=False)
    planner.host = HostPlanner(host.shape, model, host.capacity, native=False, search=search)
    return planner


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("geometry", [*GEOMETRIES, (40, 1, 8)])
def test_chains_on_random_forests(geometry, num_sms):
    rng = np.random.default_rng(3)
    planner = chain_planner_for(geometry, num_sms)
    chains = partials = 0
    for seed in range(12):
        forest = random_forest(rng, int(rng.integers(2, 24)), max_len=200)
        plan = check(planner, case_for(geometry, *forest, seed=seed), rows_padded=seed % 3)
        chains += plan.stats.chains
        partials += plan.stats.partial_slots
    assert chains > 6
    assert (partials > 0) == (num_sms > 1)


@pytest.mark.parametrize("geometry", [(6, 2, 16), (16, 1, 8)])
def test_tails_of_chains_grow_without_a_new_plan(geometry):
    forest = Forest(np.array([-1, 0, 0]), np.array([300, 70, 40]))
    leaves, lens = np.array([1, 2, 0, 1, 1, 2, -1]), np.array([370, 350, 300, 371, 380, 345, 9])
    case = case_for(geometry, forest, leaves, lens, spare=64)
    planner = chain_planner_for(geometry)
    plan = check(planner, case)
    assert plan.stats.chains > 0
    for step in range(40):
        case.grow(np.sign((np.arange(7) + step) % 3))
        assert planner.advance(plan, host_lens=case.seq_lens.numpy())
        check_output(plan, case)


def test_one_row_of_a_chain_that_outgrows_its_tail_unseen_is_nan():
    geometry, forest = (6, 2, 16), Forest(np.array([-1]), np.array([200]))
    case = case_for(geometry, forest, np.zeros(5, np.int32), np.full(5, 210), spare=300)
    planner = chain_planner_for(geometry)
    plan = check(planner, case)
    assert plan.stats.chains == 1
    case.grow(np.array([1, 1, 200, 1, 0]))
    assert planner.advance(plan)  # the host counted one token
    out = pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale)
    want = attention(
        case.q, case.k_cache, case.v_cache, case.req_to_token, case.req_pool_indices,
        case.seq_lens, case.sm_scale,
    )  # fmt: skip
    assert torch.isnan(out[2]).all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(out[others], want[others], atol=2e-5, rtol=2e-5)


def test_explain_tells_of_chains():
    geometry, forest = (4, 4, 16), Forest(np.array([-1]), np.array([300]))
    case = case_for(geometry, forest, np.zeros(4, np.int32), np.full(4, 310))
    text = check(chain_planner_for(geometry), case).explain()
    assert "s0: [0, 300) under root" in text
    assert "chains: 1 of the items, 4 private steps in 1 fragments of 16 query rows" in text
    assert "chains" not in check(planner_for(geometry, sharing="off"), case).explain()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("sharing", ["auto", "on", "off"])
def test_random_forests(geometry, sharing):
    rng = np.random.default_rng(1)
    planner = planner_for(geometry, sharing=sharing)
    for seed in range(12):
        case = case_for(geometry, *random_forest(rng, int(rng.integers(1, 24))), seed=seed)
        check(planner, case, rows_padded=seed % 3)


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_tails_grow_without_a_new_plan(sharing):
    geometry = (6, 2, 16)
    rng = np.random.default_rng(2)
    forest, leaves, lens = random_forest(rng, 9)
    case = case_for(geometry, forest, leaves, lens, spare=96)
    planner = planner_for(geometry, sharing=sharing)
    plan = check(planner, case)
    for step in range(40):
        case.grow(np.ones(9, np.int64))
        assert planner.advance(plan, host_lens=case.seq_lens.numpy() - (step % 2))
        check_output(plan, case)


def test_a_skipped_advance_heals():
    """Slots of steps the planner did not see are fetched by the next advance."""
    geometry = (4, 4, 16)
    case = case_for(geometry, *random_forest(np.random.default_rng(5), 6), spare=64)
    planner = planner_for(geometry)
    plan = check(planner, case)
    case.grow(np.array([7, 1, 3, 0, 2, 9]))
    assert planner.advance(plan)
    check_output(plan, case)


def append_in_graph(planner, case, padded=0):
    """A replay's part of a step: as far as the graph goes before its layers."""
    planner.append_one(*case.graph_inputs(padded))


@pytest.fixture
def launches():
    """How often advance() has launched since this was last asked, or since the test began."""
    before = [METRICS.get("appends_launched")]

    def since():
        before.append(METRICS.get("appends_launched"))
        return before[-1] - before[-2]

    return since


@pytest.mark.parametrize("make_planner", [planner_for, chain_planner_for])
@pytest.mark.parametrize("padded", [0, 3])
def test_a_graph_that_appends_spares_the_launch(make_planner, padded, launches):
    geometry = (6, 2, 16)
    planner = make_planner(geometry)
    for rows in (9, 1, 14):  # one graph for all plans
        case = case_for(geometry, *random_forest(np.random.default_rng(6), rows), spare=64)
        plan = check(planner, case, padded)
        for _ in range(40):
            append_in_graph(planner, case, padded)  # in the first step everything is there
            check_output(plan, case, padded)
            case.grow(np.ones(rows, np.int64))
            assert planner.advance(plan, case.seq_lens.numpy(), in_graph=True)
    assert launches() == 0


def test_the_host_launches_unless_it_knows_that_each_row_has_grown_by_one(launches):
    geometry, rows = (4, 4, 16), 6
    case = case_for(geometry, *random_forest(np.random.default_rng(5), rows), spare=64)
    planner = planner_for(geometry)
    plan = check(planner, case)
    one, uneven = np.ones(rows, np.int64), np.array([1, 1, 0, 1, 1, 1])
    for grown, told, in_graph, expected in [
        (one, True, True, 0),
        (one * 2, True, True, 1),  # a step was not seen
        (one, True, True, 0),
        (uneven, True, True, 1),
        (one, True, True, 0),
        (one * 0, True, True, 1),
        (one, True, False, 1),  # an eager step
        (one, True, True, 0),
        (one, False, True, 1),  # no lengths
        (one, True, True, 1),  # two tokens since the last
        (one * 0, False, True, 1),
        (one, True, True, 0),
    ]:
        case.grow(grown)
        lens = case.seq_lens.numpy() if told else None
        assert planner.advance(plan, lens, in_graph=in_graph)
        append_in_graph(planner, case)  # after a launch it changes nothing
        assert launches() == expected
        check_output(plan, case)


def test_a_row_that_the_graph_cannot_append_to_is_nan_until_it_is_filled():
    """Of one a step was not seen, the other has shrunk: never a plausible wrong value."""
    geometry, lens = (4, 4, 16), np.array([50, 95, 70, 40])
    case = case_for(geometry, Forest.empty(), np.full(4, -1), lens, spare=64)
    planner = planner_for(geometry)
    plan = check(planner, case)
    case.grow(np.array([1, 2, 0, 1]))
    for step in range(2):  # a later step does not forget
        seq_lens, new_slots = case.graph_inputs()
        seq_lens[2] -= int(step == 0)
        planner.append_one(seq_lens, new_slots)
        out = pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale)
        assert torch.isnan(out[[1, 2]]).all() and torch.isfinite(out[[0, 3]]).all()
        case.grow(np.ones(4, np.int64))
    assert planner.advance(plan)
    check_output(plan, case)


def test_a_row_that_outgrows_its_tail_in_the_graph_is_nan():
    """Its neighbours' slots in the snapshot are not touched."""
    case = case_for((4, 4, 16), Forest.empty(), np.full(3, -1), np.array([5, 9, 3]), spare=300)
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    room = plan.tables.tails[0, 2] - 5
    for grown in range(1, room + 5):
        case.grow(np.array([1, 1, 0]))
        append_in_graph(planner, case)
        out = pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale)
        want = attention(
            case.q, case.k_cache, case.v_cache, case.req_to_token, case.req_pool_indices,
            case.seq_lens, case.sm_scale, torch.float64,
        )  # fmt: skip
        alive = [0, 1, 2] if grown <= room else [2]
        torch.testing.assert_close(out[alive].double(), want[alive], atol=2e-5, rtol=2e-5)
        assert torch.isnan(out[[row for row in range(3) if row not in alive]]).all()


def test_the_horizon_ends_as_early_without_launches():
    """As many steps as with them, and no step of a plan that has passed it."""
    steps = []
    for in_graph in (False, True):
        case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]), spare=128)
        planner = planner_for((4, 4, 16))
        plan = check(planner, case)
        steps.append(0)
        while True:
            case.grow(np.ones(2, np.int64))
            if not planner.advance(plan, case.seq_lens.numpy(), in_graph=in_graph):
                break
            append_in_graph(planner, case)
            steps[-1] += 1
        check(planner, case)
    assert 32 <= steps[0] == steps[1] <= 64


def test_slots_that_are_no_rows_of_the_lengths_are_refused():
    planner = planner_for((4, 4, 16))
    with pytest.raises(ValueError, match="seq_lens has 3 rows, new_slots 2"):
        planner.append_one(torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.int64))


def test_the_horizon_ends():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]), spare=128)
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    steps = 0
    while True:
        case.grow(np.ones(2, np.int64))
        if not planner.advance(plan):
            break
        steps += 1
    assert 32 <= steps <= 64
    check(planner, case)


def test_a_row_that_outgrows_its_tail_unseen_is_nan():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]), spare=300)
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    case.grow(np.array([200, 1]))
    assert planner.advance(plan)  # the host counted one token
    out = pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=1.0)
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize(
    "given",
    [list, lambda lens: lens, lambda lens: lens.astype(np.int32), torch.from_numpy],
    ids=["list", "int64", "int32", "tensor"],
)
def test_a_row_that_shrank_ends_the_plan(given):
    """Another request has taken its place: what the others have grown must not hide it."""
    geometry, lens = (4, 4, 16), np.array([50, 95, 70])
    case = case_for(geometry, Forest.empty(), np.full(3, -1), lens, spare=64)
    planner = planner_for(geometry)
    plan = check(planner, case)
    assert planner.advance(plan, given(lens))
    assert planner.advance(plan, given(lens + 1))
    assert not planner.advance(plan, given(lens + np.array([-1, 2, 2])))
    with pytest.raises(ValueError, match="rows"):
        planner.advance(plan, given(lens[1:]))


def test_host_lengths_counted_up_in_place_still_end_the_horizon():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]), spare=128)
    planner = planner_for((4, 4, 16))
    lens = np.array([5, 9], np.int32)
    plan = planner.plan(None, None, lens, case.seq_lens, case.req_to_token, case.req_pool_indices)
    lens += 100
    assert not planner.advance(plan, host_lens=lens)


def test_a_fill_of_other_rows_does_no_harm_to_the_next_plan():
    """advance() launches before it sees that these are not the rows of the plan."""
    geometry, forest = (4, 4, 16), Forest(np.array([-1]), np.array([40]))
    planner = planner_for(geometry, sharing="on")
    plan = check(planner, case_for(geometry, forest, np.zeros(3), np.array([90, 60, 70])))
    case = case_for(geometry, forest, np.zeros(3), np.array([50, 95, 400]))
    given = (case.seq_lens, case.req_to_token, case.req_pool_indices)
    assert not planner.advance(plan, case.seq_lens.numpy(), *given)
    check(planner, case)


def test_statistics_are_of_the_plan_they_were_asked_of():
    geometry = (4, 4, 16)
    planner = planner_for(geometry)
    assert planner._plan.stats is None and planner._plan.explain() == "no plan yet"
    first = check(planner, case_for(geometry, Forest.empty(), np.full(2, -1), np.array([5, 9])))
    stats = first.stats
    assert stats is first.stats and stats.unshared_tokens == stats.unique_tokens == 14
    second = check(planner, case_for(geometry, Forest.empty(), np.full(3, -1), np.full(3, 20)))
    assert (stats.rows, second.stats.rows, second.stats.unshared_tokens) == (2, 3, 60)
    assert stats.plan_us > 0


def test_tails_that_start_empty():
    forest = Forest(np.array([-1, 0]), np.array([330, 200]))
    case = case_for(
        (6, 2, 16), forest, np.array([1, 1, 0, 0]), np.array([530, 530, 330, 330]), spare=9
    )
    planner = planner_for((6, 2, 16), sharing="on")
    plan = check(planner, case)
    assert plan.stats.shared_segments > 0
    for _ in range(5):
        case.grow(np.ones(4, np.int64))
        assert planner.advance(plan)
        check_output(plan, case)


def test_long_rows_are_cut():
    lens = np.array([3000, 2, 5, 1])
    case = case_for((4, 2, 16), Forest.empty(), np.full(4, -1), lens)
    plan = check(planner_for((4, 2, 16)), case)
    assert plan.stats.splits > 0 and plan.stats.partial_slots > 0


def test_shared_tokens_are_read_once():
    forest = Forest(np.array([-1]), np.array([2000]))
    case = case_for((4, 4, 16), forest, np.zeros(16, np.int32), np.full(16, 2010))
    plan = check(planner_for((4, 4, 16)), case)
    assert plan.stats.sharing
    assert plan.stats.unique_tokens == 2000 + 16 * 10
    assert plan.stats.planned_tokens < 1.1 * plan.stats.unique_tokens
    assert plan.stats.unshared_tokens == 16 * 2010


def test_validate_catches_a_wrong_slot():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    plan = check(planner_for((4, 4, 16)), case)
    plan.slots[0] += 1
    with pytest.raises(AssertionError, match="row 0"):
        plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)


def test_workspace_below_the_minimum_names_it():
    with pytest.raises(ValueError, match=r"below the minimum \d+"):
        planner_for((4, 4, 16), max_workspace_bytes=1000)


def test_the_workspace_is_known_before_it_is_allocated():
    capacity, size = workspace_for(4, 4, 16, 32, 3000, 8 << 20)
    planner = DecodePlanner(
        num_q_heads=4,
        num_kv_heads=4,
        head_dim=16,
        dtype=torch.float32,
        device="cpu",
        max_rows=32,
        max_tokens=3000,
        max_workspace_bytes=8 << 20,
    )
    partials = capacity.parts * 4 * (16 + 1) * 4  # the CPU holds none
    assert capacity.parts > 0 and size <= 8 << 20
    assert planner.workspace_bytes == size - partials


@pytest.mark.parametrize("heads", [(4, 4), (32, 32), (32, 8), (64, 8), (28, 4), (8, 1)])
def test_the_workspace_never_passes_its_cap(heads):
    for rows in (1, 7, 64, 2048):
        for tokens in (100, 5003, 1 << 20):
            fixed = workspace_for(*heads, 128, rows, tokens, 1 << 40)[0]
            for cap in (8 << 20, (8 << 20) + 4, 30_000_001, 256 << 20):
                try:
                    capacity, size = workspace_for(*heads, 128, rows, tokens, cap)
                except ValueError:  # below the minimum
                    continue
                assert size <= cap
                assert 0 <= capacity.parts <= fixed.parts
                part = 4 * heads[0] * 129
                room = cap - size
                assert capacity.parts == fixed.parts or room < 2 * part, "a part more would fit"


def test_a_plan_is_gone_with_its_planner():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    planner = planner_for((4, 4, 16))
    plan = weakref.ref(check(planner, case))
    gc.disable()  # a GPU's memory must not wait for the collector
    try:
        del planner
        assert plan() is None
    finally:
        gc.enable()


def test_an_advance_that_is_refused_changes_nothing():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    with pytest.raises(ValueError, match=r"2 rows, but req_pool_indices .* seq_lens 1"):
        planner.advance(plan, seq_lens=case.seq_lens[:1])
    with pytest.raises(ValueError, match="the plan has 2 rows, but req_pool_indices has 1"):
        planner.plan(
            None, None, np.array([3, 3]), case.seq_lens, case.req_to_token,
            case.req_pool_indices[:1],
        )  # fmt: skip
    assert planner.advance(plan)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)


def test_a_small_workspace_gives_a_coarser_plan():
    geometry = (4, 4, 16)
    forest = Forest(np.array([-1, 0, 0]), np.array([400, 300, 300]))
    case = case_for(geometry, forest, np.array([1, 1, 2, 2] * 8), np.full(32, 720))
    roomy = planner_for(geometry, sharing="on")
    assert check(roomy, case).stats.partial_slots > 0
    minimum = 0
    try:
        planner_for(geometry, max_workspace_bytes=1)
    except ValueError as error:
        minimum = int(str(error).split("minimum ")[1].split()[0])
    tight = planner_for(geometry, sharing="on", max_workspace_bytes=minimum)
    plan = check(tight, case)
    assert plan.stats.partial_slots == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_q_heads": 5, "num_kv_heads": 2}, "not a multiple"),
        ({"sharing": "maybe"}, "sharing"),
        ({"max_rows": 0}, "positive"),
    ],
)
def test_bad_planner_arguments(change, message):
    arguments = {
        "num_q_heads": 4, "num_kv_heads": 4, "head_dim": 16, "dtype": torch.float32,
        "device": "cpu", "max_rows": 8, "max_tokens": 100,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        DecodePlanner(**{**arguments, **change})


def test_sharing_nobody_told_of_is_found_when_it_does_not_fit():
    forest, leaves = Forest(np.array([-1, 0]), np.array([900, 300])), np.array([1, 1, 0] * 8)
    lens = np.array([1210, 1204, 930] * 8)
    case = case_for((4, 2, 16), forest, leaves, lens)
    planner = DecodePlanner(
        num_q_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu",
        max_rows=24, max_tokens=1500, sharing="on",
    )  # fmt: skip
    case.forest, case.leaf_of_row = Forest.empty(), np.full(24, -1)
    plan = check(planner, case)
    assert plan.stats.slots_compared
    assert plan.stats.unique_tokens == 900 + 300 + 8 * (10 + 4 + 30)
    assert plan.stats.shared_segments > 0


def test_forest_from_slots_finds_every_shared_slot():
    rng = np.random.default_rng(8)
    planner = planner_for((4, 4, 16))
    for seed in range(40):
        case = case_for((4, 4, 16), *random_forest(rng, int(rng.integers(1, 20))), seed=seed)
        table = case.req_to_token[case.req_pool_indices].numpy()
        lens = case.seq_lens.numpy()
        distinct = {int(s) for row, n in zip(table, lens, strict=True) for s in row[:n]}
        case.forest, case.leaf_of_row = Forest.from_slots(table, lens)
        plan = check(planner, case)
        assert plan.stats.unique_tokens == len(distinct)


def test_bad_decode_arguments():
    case = case_for((4, 2, 16), Forest.empty(), np.full(3, -1), np.array([5, 9, 2]))
    plan = check(planner_for((4, 2, 16)), case)
    good = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "sm_scale": 1.0}
    for change, message in [
        ({"q": case.q[:2]}, "q has 2 rows"),
        ({"k_cache": case.k_cache[:, :1], "v_cache": case.v_cache[:, :1]}, "the 2 KV heads"),
        ({"sm_scale": 0.0}, "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            pat_decode(**{**good, **change}, plan=plan)


def test_a_refused_batch_leaves_the_plan_alone():
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    for _ in range(6):
        with pytest.raises(ValueError, match="leaf_of_row"):
            planner.plan(
                Forest.empty(), np.array([3, 3]), case.seq_lens.numpy(), case.seq_lens,
                case.req_to_token, case.req_pool_indices,
            )  # fmt: skip
    check_output(plan, case)


def test_too_many_rows_and_too_many_tokens():
    planner = planner_for((4, 4, 16))
    lens = torch.ones(65, dtype=torch.int64)
    table = torch.zeros(65, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="65 rows"):
        planner.plan(None, None, lens.numpy(), lens, table, torch.arange(65))
    huge = np.full(1, 1 << 20)
    with pytest.raises(ValueError, match="max_tokens"):
        planner.plan(None, None, huge, torch.from_numpy(huge), table, torch.arange(1))


def test_uploads_by_the_copy_engine_are_counted_and_logged_once(caplog):
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    planner = planner_for((4, 4, 16))
    upload = planner.transfer.upload
    planner.transfer = planner.transfer._replace(upload=lambda *args: upload(*args) and False)
    METRICS.reset()
    for copied in (1, 2):
        check(planner, case)
        assert METRICS.get("uploads_copied") == copied
    assert ["copy engine" in record.getMessage() for record in caplog.records] == [True]


def test_kernels_without_tensor_maps_are_counted_and_logged_once(caplog):
    case = case_for((4, 4, 16), Forest.empty(), np.full(2, -1), np.array([5, 9]))
    planner = planner_for((4, 4, 16))
    plan = check(planner, case)
    answers = iter([True, False, False])
    planner.layer.module = SimpleNamespace(decode=lambda *args: next(answers))
    METRICS.reset()
    for refused in (0, 1, 2):
        pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale)
        assert METRICS.get("maps_refused") == refused
    assert ["tensor maps" in record.getMessage() for record in caplog.records] == [True]
