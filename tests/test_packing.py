# SPDX-License-Identifier: MIT
"""Packs and cuts of the Python planner: right on any batch, within any capacity, never dearer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plan_oracle
import pytest
from cases import CHAINY, MODEL
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from plan_oracle import chain_cut, check_plan, predicted_ps
from strategies import (
    TILE_ROWS,
    Batch,
    Setup,
    batches,
    large_batch,
    make_batch,
    models,
    setups,
)

from pat_sglang import layout
from pat_sglang.cost import H100, TILES, CostModel, cost_model_for, tiles_of
from pat_sglang.forest import SegmentTree, build_segment_tree
from pat_sglang.layout import PlanTables, capacity_for, lay_out
from pat_sglang.packing import (
    MAX_HORIZON,
    WALLS,
    Load,
    Pack,
    Packing,
    Search,
    Shape,
    pack_rows,
    predict,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import trees

PLAIN = Search(chains=False)
CHAINED = Search(without_chains=False)


def packing_of(batch: Batch, setup: Setup, search: Search | None = None) -> Packing:
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    return pack_rows(tree, setup.shape, setup.model, search)


def words_of(batch: Batch, setup: Setup, search: Search | None = None) -> np.ndarray:
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    packing = pack_rows(tree, setup.shape, setup.model, search)
    return lay_out(tree, packing, setup.shape, setup.capacity)


def generous(
    batch: Batch, group: int = 4, heads: int = 8, sharing: str = "auto", model: CostModel = MODEL
) -> Setup:
    tokens = max(int(batch.host_lens.astype(np.int64).sum()), 1)
    capacity = capacity_for(max(batch.rows, 1), tokens, 100_000, group, MAX_HORIZON)
    shape = Shape(group, heads, capacity.parts, capacity.items, sharing)
    return Setup(shape, model, capacity)


def with_sharing(setup: Setup, sharing: str) -> Setup:
    shape = Shape(**{**setup.shape.__dict__, "sharing": sharing})
    return Setup(shape, setup.model, setup.capacity)


@settings(max_examples=300)
@given(st.data())
def test_every_token_once_however_far_each_row_has_grown(data: st.DataObject) -> None:
    # Growth of its own for every row; test_planner.py checks plans that did not grow.
    batch = data.draw(batches())
    setup = data.draw(setups(batch))
    words = words_of(batch, setup)
    event(f"sharing {bool(words[layout.H_SHARING])}, cut {bool(words[layout.H_SPLITS])}")
    event(f"coarsened {words[layout.H_COARSENED]}")
    event(f"chains {bool(words[layout.H_CHAINS])}, partials {bool(words[layout.H_PARTS])}")
    group, horizon = setup.shape.group_size, int(words[layout.H_HORIZON])
    growth = data.draw(st.lists(st.integers(0, horizon), min_size=batch.rows, max_size=batch.rows))
    check_plan(words, batch, group, batch.host_lens + np.array(growth, np.int32))


@settings(max_examples=500)
@given(st.data())
def test_capacity_holds_and_sharing_never_costs(data: st.DataObject) -> None:
    batch = data.draw(batches(max_nodes=6))
    setup = data.draw(setups(batch, sharing="auto"))
    words = words_of(batch, setup)
    items = words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3].sum()
    assert words[layout.H_PARTS] <= setup.shape.max_parts
    assert items <= setup.shape.max_items
    assert words[layout.H_SLOTS] <= setup.capacity.slots
    assert words.size <= setup.capacity.words

    fragments_of_a_row = 1 + -(-setup.shape.group_size // 16)
    assert words[layout.H_STEPS] <= 5 * batch.rows * fragments_of_a_row
    assert words[layout.H_FRAGMENTS] <= batch.rows * fragments_of_a_row

    plain = words_of(batch, with_sharing(setup, "off"))
    assert not plain[layout.H_SHARING]
    assert not plain[layout.H_SHARED_PACKS]
    assert not plain[layout.H_CHAINS]
    assert words[layout.H_PREDICTED_NS] <= plain[layout.H_PREDICTED_NS]
    assert (
        packing_of(batch, setup).predicted_ps
        <= packing_of(batch, with_sharing(setup, "off")).predicted_ps
    )
    np.testing.assert_array_equal(words, words_of(batch, setup))


@settings(max_examples=300)
@given(st.data())
def test_predicted_time_is_that_of_the_items(data: st.DataObject) -> None:
    batch = data.draw(batches(max_nodes=6))
    setup = data.draw(setups(batch))
    packing = packing_of(batch, setup)
    event(f"chains {any(pack.is_chain for pack in packing.packs)}")
    assert packing.predicted_ps == predicted_ps(words_of(batch, setup), batch, setup)


@pytest.mark.parametrize("block", [8, 16])
def test_deep_comb_with_few_partials_is_shared(block: int) -> None:
    # One row ends at each of the 64 levels of a chain. The yardstick is made by hand: a pack for
    # each `block` levels of all rows that have them, the levels below are the row's own.
    levels, tokens, tail = 64, 256, 10
    lens = [tokens * depth + tail for depth in range(1, levels + 1)]
    batch = make_batch(list(range(-1, levels - 1)), [tokens] * levels, list(range(levels)), lens)
    by_hand = levels * tail
    max_parts = 0
    for depth in range(1, levels + 1):
        packs, own = divmod(depth, block)
        max_parts += packs + 1 if packs else 0
        by_hand += own * tokens
    for end in range(block, levels + 1, block):
        rows = levels + 1 - end  # at 4 query heads a row, 32 fill the largest tile
        by_hand += -(-rows // 32) * block * tokens

    setup = generous(batch, group=4, model=H100)
    setup = replace(setup, shape=replace(setup.shape, max_parts=max_parts))
    words = words_of(batch, setup)
    check_plan(words, batch, 4)
    check_plan(words, batch, 4, batch.host_lens + 7)
    assert words[layout.H_SHARING]
    assert words[layout.H_COARSENED] >= 4, "packs of five levels fit: this tests nothing"
    assert words[layout.H_PARTS] <= max_parts
    assert words[layout.H_PLANNED_TOKENS] <= 1.5 * by_hand
    assert 1.5 * by_hand < sum(lens) / 2


@settings(max_examples=200)
@given(st.data())
def test_search_narrows_the_plan(data: st.DataObject) -> None:
    batch = data.draw(batches())
    group = data.draw(st.sampled_from((1, 3, 4, 8, 16, 40)))
    sharing = data.draw(st.sampled_from(("auto", "on")))
    setup = generous(batch, group, sharing=sharing, model=data.draw(models))

    every_wall = [packing_of(batch, setup, Search(walls=(e,))).predicted_ps for e in WALLS]
    assert packing_of(batch, setup).predicted_ps == min(every_wall)
    assert words_of(batch, setup, Search(walls=(0,)))[layout.H_SPLITS] == 0

    plain = words_of(batch, setup, PLAIN)
    assert plain[layout.H_CHAINS] == plain[layout.H_STEPS] == plain[layout.H_FRAGMENTS] == 0
    check_plan(plain, batch, group)

    for query_rows in (16, 64, 128):
        packing = packing_of(batch, setup, Search(chain_rows=(query_rows,)))
        per_item = [cut.rows_per_item for cut in packing.cuts if cut.rows_per_item]
        assert all(rows * group <= query_rows for rows in per_item)

    for tiles in ((0,), (1,), (2,), (0, 2)):
        words = words_of(batch, setup, Search(tiles=tiles))
        allowed = tuple(rows if k in tiles else 0 for k, rows in enumerate(TILE_ROWS))
        check_plan(words, batch, group, tile_rows=allowed)


@settings(max_examples=400)
@given(st.data())
def test_chains_are_kept_only_if_they_are_faster(data: st.DataObject) -> None:
    batch = data.draw(batches())
    group = data.draw(st.sampled_from((1, 4, 5, 16)))
    sharing = data.draw(st.sampled_from(("auto", "on")))
    setup = generous(batch, group, sharing=sharing, model=data.draw(models))
    chained, plain = (packing_of(batch, setup, search) for search in (CHAINED, PLAIN))
    best = CHAINED if chained.predicted_ps <= plain.predicted_ps else PLAIN
    has_chains = any(pack.is_chain for pack in chained.packs)
    event(f"chains {has_chains}, kept {best is CHAINED}")
    np.testing.assert_array_equal(words_of(batch, setup), words_of(batch, setup, best))


@st.composite
def one_chain(draw: st.DrawFn) -> Batch:
    """A root with two rows or more, above groups of rows."""
    groups = draw(st.lists(st.tuples(st.integers(1, 400), st.integers(2, 9)), max_size=4))
    own_rows = draw(st.integers(2, 12))
    length = [draw(st.integers(1, 3000)), *[length for length, _ in groups]]
    sizes = [rows for _, rows in groups]
    leaves = [1 + i for i, rows in enumerate(sizes) for _ in range(rows)] + [0] * own_rows
    tail = st.sampled_from(draw(st.sampled_from(((0, 5, 40), (90, 300), (5, 3000), (700, 4000)))))
    depth = [length[0], *[length[0] + own for own in length[1:]]]
    lens = [depth[leaf] + draw(tail) for leaf in leaves]
    return make_batch([-1] + [0] * len(groups), length, leaves, lens)


@settings(max_examples=600)
@given(st.data())
def test_a_chain_has_the_rows_an_item_of_least_work(data: st.DataObject) -> None:
    batch = data.draw(one_chain())
    group = data.draw(st.sampled_from((1, 3, 4, 8, 10, 16, 40, 64)))
    model = replace(data.draw(models), part_ps=data.draw(st.sampled_from((100_000, 2_000_000))))
    heads, sharing = data.draw(st.sampled_from((1, 8))), data.draw(st.sampled_from(("auto", "on")))
    setup = generous(batch, group, heads, sharing, model)
    wall = data.draw(st.sampled_from(WALLS))
    search = Search(walls=(wall,), without_chains=False)
    packing = packing_of(batch, setup, search)
    wanted = chain_cut(batch, setup, wall)
    shared = [i for i, pack in enumerate(packing.packs) if not pack.is_tail]
    packs = [packing.packs[i] for i in shared]
    # Not if packs that are no chains cost less, or reading without sharing is faster.
    assume([pack.rows for pack in packs] == [tuple(range(batch.rows))])
    kind = tiles_of(group)[0]
    must_chain = model.step_ps <= model.item_ps[kind] and model.token_ps[0] <= model.token_ps[kind]
    assume(packs[0].is_chain or (must_chain and sharing == "on"))
    (cut,) = (packing.cuts[i] for i in shared)
    event(f"{wanted.rows_per_item * group // 16} fragments, separated {bool(wanted.separated)}")
    assert packs[0].is_chain == (wanted.rows_per_item > 0)
    assert min(cut.rows_per_item, batch.rows) == min(wanted.rows_per_item, batch.rows)
    assert cut.separated == (wanted.separated if packs[0].is_chain else set())
    assert packing.predicted_ps == wanted.predicted_ps
    assert predicted_ps(words_of(batch, setup, search), batch, setup) == wanted.predicted_ps


@settings(max_examples=300)
@given(st.data())
def test_chains_are_no_deeper_than_allowed(data: st.DataObject) -> None:
    batch = data.draw(batches(max_nodes=10, max_rows=12, deep=True))
    group = data.draw(st.sampled_from((1, 4, 16, 64, 65)))
    setup = generous(batch, group, sharing="on", model=CHAINY)
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    chains = [pack for pack in packing_of(batch, setup).packs if pack.is_chain]
    assert group <= 64 or not chains
    deepest = 0
    for pack in chains:
        for row in pack.rows:
            levels, at = 0, tree.home[row]
            while at != pack.segment:
                levels, at = levels + 1, tree.segments[at].parent
            assert levels <= 4
            deepest = max(deepest, levels)
        below = [
            row for row, home in enumerate(tree.home) if home >= 0 and _is_below(tree, home, pack)
        ]
        assert sorted(pack.rows) == below
    event(f"deepest {deepest}")
    check_plan(words_of(batch, setup), batch, group)


def _is_below(tree: SegmentTree, segment: int, pack: Pack) -> bool:
    while segment >= 0 and segment != pack.segment:
        segment = tree.segments[segment].parent
    return segment >= 0


@settings(max_examples=150)
@given(st.data())
def test_one_slot_less_than_the_best_plan_needs(data: st.DataObject) -> None:
    batch = data.draw(batches())
    setup = generous(batch, group=data.draw(st.sampled_from((1, 5, 40))))
    best = words_of(batch, setup)
    parts = int(best[layout.H_PARTS])
    items = int(best[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3].sum())
    for less in ({"max_parts": max(parts - 1, 0)}, {"max_items": max(items - 1, batch.rows)}):
        shape = Shape(**{**setup.shape.__dict__, **less})
        words = words_of(batch, Setup(shape, setup.model, setup.capacity))
        assert words[layout.H_PARTS] <= shape.max_parts
        assert words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3].sum() <= shape.max_items
        check_plan(words, batch, shape.group_size)
        exact = Shape(**{**setup.shape.__dict__, "max_parts": parts, "max_items": items})
        again = words_of(batch, Setup(exact, setup.model, setup.capacity))
        np.testing.assert_array_equal(again, best)


@pytest.mark.parametrize("parts", [0, 1, 100, 700, 3000])
@pytest.mark.parametrize("kind", ["tree", "levels"])
def test_less_workspace_gives_a_coarser_plan(kind: str, parts: int) -> None:
    batch = large_batch(3, 256, 120, kind)
    capacity = capacity_for(256, int(batch.host_lens.sum()), parts, 4, MAX_HORIZON)
    words = words_of(batch, Setup(Shape(4, 8, parts, capacity.items), MODEL, capacity))
    assert words[layout.H_PARTS] <= parts
    check_plan(words, batch, 4)
    if parts == 0:
        assert words[layout.H_SPLITS] == 0
        assert words[layout.H_CHAINS] > 0  # the only way to share without a partial


def test_no_workspace_at_all_is_one_item_a_row() -> None:
    batch = make_batch([-1], [5000], [0] * 40, [5100] * 40)
    capacity = capacity_for(40, 300_000, 0, 8, MAX_HORIZON)
    words = words_of(batch, Setup(Shape(8, 1, 0, 40), MODEL, capacity), PLAIN)
    assert words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3].tolist() == [40, 0, 0]
    assert words[layout.H_PARTS] == 0
    assert words[layout.H_COARSENED] > 0
    check_plan(words, batch, 8)


def test_shared_prompt_is_read_once() -> None:
    batch = make_batch([-1], [8192], [0] * 32, [8200 + i for i in range(32)])
    words = words_of(batch, generous(batch), PLAIN)
    assert words[layout.H_SHARING] == 1
    assert words[layout.H_SHARED_PACKS] == 1
    assert words[layout.H_PLANNED_TOKENS] == 8192 + sum(8 + i for i in range(32))
    # 32 rows x 4 heads fill exactly the largest tile.
    assert words[layout.H_ITEM_COUNT + 2] > 1


def test_short_shared_prefix_is_not_worth_a_partial() -> None:
    batch = make_batch([-1], [2], [0, 0], [2000, 2000])
    words = words_of(batch, generous(batch))
    assert words[layout.H_SHARING] == 0
    assert words[layout.H_PLANNED_TOKENS] == 4000


def test_short_middle_level_is_merged_into_its_neighbours() -> None:
    # root 4096 of all, 8 groups of 4 rows with 4 tokens of their own: a pack for 4 tokens costs
    # more than reading them with every row's tail.
    parent, length = [-1] + [0] * 8, [4096] + [4] * 8
    leaves = [1 + i // 4 for i in range(32)]
    batch = make_batch(parent, length, leaves, [4600] * 32)
    words = words_of(batch, generous(batch), PLAIN)
    assert words[layout.H_RUNS] == 9
    assert words[layout.H_SHARED_PACKS] == 1
    assert words[layout.H_PLANNED_TOKENS] == 4096 + 32 * (4600 - 4096)
    check_plan(words, batch, 4)


def test_short_root_is_taken_along_by_the_groups_below() -> None:
    # 4 tokens of all rows above two groups with 4000 tokens each: each group reads the 4 itself.
    batch = make_batch([-1, 0, 0], [4, 4000, 4000], [1] * 16 + [2] * 16, [4100] * 32)
    words = words_of(batch, generous(batch), PLAIN)
    assert words[layout.H_RUNS] == 3
    assert words[layout.H_SHARED_PACKS] == 2
    assert words[layout.H_PLANNED_TOKENS] == 2 * 4004 + 32 * (4100 - 4004)
    check_plan(words, batch, 4)


# With 10 SMs; loads are (tile, items, solo ps, SM time of all items).
@pytest.mark.parametrize(
    ("loads", "heads", "wanted"),
    [
        ([], 1, 0),
        ([(2, 10, 500, 1000)], 1, 500),  # one a SM, all at once
        ([(2, 11, 500, 1100)], 1, (1100 - 100) // 10 + 500),  # the last waits
        ([(2, 5, 500, 500)], 2, 500),  # five items of two KV heads
        ([(2, 6, 500, 600)], 2, (1200 - 100) // 10 + 500),
        ([(1, 20, 500, 1000)], 1, 500),  # two a SM
        ([(0, 20, 500, 1000)], 1, 500),
        ([(0, 21, 500, 210)], 1, (210 - 10) // 10 + 500),
        ([(2, 10, 500, 9000)], 1, 900),  # never faster than all work spread over the SMs
        # What starts at once lasts longer while memory is busy: up to 900 here.
        ([(2, 10, 880, 9000)], 1, 880 + 110),
        ([(2, 10, 1000, 9000)], 1, 900 * 9 // 8),
        ([(2, 10, 1013, 9000)], 1, 1013),
        # Shorter items wait for longer ones, longer ones for none: 448 and 511 are of one bucket.
        ([(2, 10, 512, 1000), (2, 10, 511, 1000)], 1, 1000 // 10 + 511),
        ([(2, 10, 100, 1000), (2, 10, 512, 1000)], 1, 512),
        ([(2, 10, 511, 1000), (2, 10, 448, 2000)], 1, (3000 - 150) // 10 + 511),
        ([(2, 10, 511, 1000), (2, 10, 447, 2000)], 1, 1000 // 10 + 447),
        ([(2, 9, 900, 900), (1, 2, 500, 100)], 1, 900),  # two share the SM that is left
        ([(2, 9, 900, 900), (1, 3, 500, 9000)], 1, 900 + 112),
        ([(2, 9, 900, 900), (1, 3, 500, 9900)], 1, 10800 // 10 + 500 // 64),
        ([(0, 20, 1, 80), (0, 20, 9, 80)], 1, 2 * 9),  # up to 9 ps one bucket
        # Narrow items that have their SM to themselves.
        ([(0, 10, 500, 100)], 1, 375),
        ([(0, 5, 501, 100)], 2, 375),
        ([(0, 11, 500, 100)], 1, 500),
        ([(0, 10, 500, 5000)], 1, 500),  # the mean of all work, nevertheless
        ([(0, 6, 1000, 60), (2, 2, 700, 60)], 1, 750),
        ([(0, 6, 1000, 60), (2, 2, 800, 60)], 1, 800),
        ([(0, 6, 1000, 60), (2, 3, 700, 60)], 1, 1000),
        ([(1, 10, 500, 100)], 1, 500),  # wide ones have their tensor cores to wait for
        ([(2, 20, 500, 9000)], 1, 2 * 500),  # two waves
        ([(2, 10, 900, 2000), (2, 20, 500, 9000)], 1, 2000 // 10 + 2 * 500),
        # Out of step after many waves: the last ends an eighth of its time behind all work.
        ([(2, 80, 640, 90_000)], 1, 9000 + 80),
        ([(2, 200, 640, 2_000_000)], 4, 800_000 + 80),
        ([(0, 79, 640, 90_000)], 1, 9000 + 40),  # four waves, two a SM
        ([(2, 20, 640, 90_000)], 1, 9000 + 20),
        ([(2, 80, 640, 90_000), (2, 10, 10, 10)], 1, 9000 + 80),
    ],
)
def test_items_start_at_once_or_behind_the_longer_ones(
    loads: list[tuple[int, int, int, int]], heads: int, wanted: int
) -> None:
    assert predict([Load(*load) for load in loads], heads, num_sms=10) == wanted
    of_oracle = [plan_oracle.Load(*load) for load in reversed(loads)]
    setup = generous(make_batch([], [], [], []), heads=heads, model=replace(ROUND, num_sms=10))
    assert plan_oracle.bound_ps(of_oracle, setup) == wanted


# Round numbers, so that the prices below can be added up by hand.
ROUND = CostModel(
    num_sms=1, item_ps=(10, 20, 30), token_ps=(3, 3, 3), reread_ps=(1, 1, 1),
    solo_item_ps=(100, 200, 300), solo_token_ps=(2, 2, 2), private_token_ps=2, part_ps=1000,
    step_ps=7, merge_ps=50, provenance="for tests",
)  # fmt: skip


def test_a_chain_leaves_no_partial() -> None:
    # Four rows on a group of 64 tokens below the root, four on the root itself.
    lens = [640 + 64 + 10] * 4 + [640 + 20] * 4
    batch = make_batch([-1, 0], [640, 64], [1] * 4 + [0] * 4, lens)
    setup = generous(batch, heads=1, model=ROUND)
    words = words_of(batch, setup)
    check_plan(words, batch, 4)
    assert words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3].tolist() == [0, 1, 0]
    assert words[layout.H_CHAINS] == 1
    assert words[layout.H_FRAGMENTS] == 2
    assert words[layout.H_STEPS] == 1 + 4 + 4
    assert words[layout.H_PARTS] == 0
    assert words[layout.H_PLANNED_TOKENS] == 640 + 64 + 4 * 10 + 4 * 20
    work = 20 + 640 * 3 + (64 + 40 + 80) * 3 + 9 * 7
    solo = 200 + 640 * 2 + 4 * (64 + 40) * 2  # a warp alone reads the longer fragment
    assert solo < work < solo * 9 // 8  # it starts at once, and others keep the memory busy
    assert packing_of(batch, setup).predicted_ps == solo * 9 // 8


@pytest.mark.parametrize("group", [1, 3, 8, 40, 64])
def test_forced_chains_do_share(group: int) -> None:
    # Few tokens on many SMs: one row an item would be fastest, and share nothing.
    batch = make_batch([-1], [300], [0] * 12, [360] * 12)
    words = words_of(batch, generous(batch, group, model=CHAINY, sharing="on"), CHAINED)
    assert words[layout.H_CHAINS] > 0
    fragments_of_a_row = 1 + -(-group // 16)
    assert words[layout.H_PLANNED_TOKENS] <= 300 * 6 + 60 * 12 * fragments_of_a_row
    check_plan(words, batch, group)


def test_a_chain_gives_way_to_items_side_by_side() -> None:
    # A chain saves partials, worth their price on one SM; on many SMs a tail is read meanwhile,
    # unless merging takes longer than that. Either way all items start at once.
    batch = make_batch([-1], [100], [0, 0], [200, 200])
    long, short = 100 + 100 * 2 + 200 * 2, 100 + 100 * 2
    for num_sms, merge_ps, solo in (
        (1, 50, long), (1000, 50, short * 3 // 4), (1000, 500, long * 3 // 4),
    ):  # fmt: skip
        model = replace(ROUND, num_sms=num_sms, merge_ps=merge_ps)
        setup = generous(batch, group=1, heads=1, sharing="on", model=model)
        uncut = Search(walls=(0,))
        packing = packing_of(batch, setup, uncut)
        has_chains = any(pack.is_chain for pack in packing.packs)
        assert has_chains == (num_sms == 1 or merge_ps == 500)
        parts = 0 if has_chains else 4
        items, steps = (1, 2) if has_chains else (3, 0)
        work = items * 10 + 300 * 3 + parts * 1000 + steps * 7
        merge = merge_ps if parts else 0
        assert packing.predicted_ps == max(work // num_sms, solo) + merge
        check_plan(words_of(batch, setup, uncut), batch, 1)


def test_a_chain_wins_a_tie() -> None:
    # Tails of no token take no time beside the last chunk of the shared run, everything else rounds
    # to nothing, and the run is cut in two, so that either way there are partials to merge.
    batch = make_batch([-1], [128], [0, 0], [128, 128])
    model = replace(ROUND, num_sms=10**6)
    setup = generous(batch, group=1, heads=1, sharing="on", model=model)
    with_chains, without = (
        packing_of(batch, setup, Search(chains=chains, walls=(1,))) for chains in (True, False)
    )
    assert with_chains.predicted_ps == without.predicted_ps == (100 + 64 * 2) * 3 // 4 + 50
    assert [pack.is_chain for pack in with_chains.packs] == [True]


def test_a_chain_that_lost_its_steps_is_a_plain_pack() -> None:
    # Every tail would be waited for on many SMs. With a level between, its step is left.
    lens = [1500 + 4000] * 20
    for parent, length, leaves, chains in (
        ([-1], [1500], [0] * 20, False),
        ([-1, 0], [1400, 100], [1] * 10 + [0] * 10, True),
    ):
        batch = make_batch(parent, length, leaves, lens)
        setup = generous(batch, sharing="on", model=CHAINY)
        search = Search(walls=(8,), without_chains=False)
        packing = packing_of(batch, setup, search)
        wanted = chain_cut(batch, setup, 8)
        assert wanted.separated == set(range(20))
        assert packing.predicted_ps == wanted.predicted_ps
        assert packing.packs[0].is_chain == chains
        assert packing.packs[0].rows == tuple(range(20))
        assert [pack.rows for pack in packing.packs[1:]] == [(row,) for row in range(20)]
        words = words_of(batch, setup, search)
        assert (words[layout.H_CHAINS] > 0) == (words[layout.H_STEPS] > 0) == chains
        assert predicted_ps(words, batch, setup) == packing.predicted_ps
        check_plan(words, batch, 4)


@pytest.mark.parametrize(
    ("narrow_ps", "shared", "rows_per_item"), [(10, 100, 4), (100, 100, 32), (10, 1000, 32)]
)
def test_narrow_items_when_they_are_less_work(
    narrow_ps: int, shared: int, rows_per_item: int
) -> None:
    # 32 rows as 1, 2, 8, 16 or 32 items: 1500 + 3 a token, 1800 + 4, 8 narrow items + 10, 16 + 18,
    # 32 + 34. At 100 ps and 100 tokens 8 narrow ones are as much work as a wide one, which wins.
    batch = make_batch([-1], [shared], [0] * 32, [shared + 10] * 32)
    setup = generous(batch, heads=1, model=replace(ROUND, item_ps=(narrow_ps, 900, 1500)))
    search = Search(walls=(0,))
    packing = packing_of(batch, setup, search)
    (cut,) = packing.cuts
    assert cut.rows_per_item == rows_per_item
    # Four warps read the four tails of a narrow item, one alone eight of a wide one.
    work, solo = (
        (8 * narrow_ps + 10 * shared, 4 * (100 + shared * 2 + 4 * 10 * 2))
        if rows_per_item == 4
        else (1500 + 3 * shared, 300 + shared * 2 + 4 * 8 * 10 * 2)
    )
    work += 32 * (10 * 3 + 7)
    # Eight narrow items are four waves.
    behind = 4 * (solo // 4 // 64) if rows_per_item == 4 else 0
    assert max(work, solo) == work
    assert packing.predicted_ps == work + behind
    check_plan(words_of(batch, setup, search), batch, 4)


def test_rows_of_a_chain_are_depth_first() -> None:
    # Rows alternate between two groups; a chain puts each group's rows side by side.
    lens = [300, 340, 300, 340, 205]
    batch = make_batch([-1, 0, 0], [200, 50, 90], [1, 2, 1, 2, 0], lens)
    setup, uncut = generous(batch, group=3, heads=1, model=ROUND), Search(walls=(0,))
    (pack,) = packing_of(batch, setup, uncut).packs
    assert pack.is_chain
    assert pack.rows == (0, 2, 1, 3, 4)
    words = words_of(batch, setup, uncut)
    check_plan(words, batch, 3)
    # 15 query rows are one fragment: both groups, each before the tails of its rows.
    at = words[layout.H_OFF_STEPS]
    steps = words[at : at + 4 * words[layout.H_STEPS]].reshape(-1, 4)
    rows = [(lo_hi % 256, lo_hi // 256) for lo_hi in steps[:, 2].tolist()]
    assert rows == [(0, 6), (0, 3), (3, 6), (6, 12), (6, 9), (9, 12), (12, 15)]
    assert steps[:, 3].tolist() == [-1, 250, 250, -1, 290, 290, 200]


def test_a_row_in_two_fragments_reads_its_tail_in_both() -> None:
    batch = make_batch([-1], [200], [0, 0], [210, 220])
    setup = generous(batch, group=10, heads=1, model=ROUND)
    words = words_of(batch, setup)
    check_plan(words, batch, 10)
    at = words[layout.H_OFF_STEPS]
    steps = words[at : at + 4 * words[layout.H_STEPS]].reshape(-1, 4)
    rows = [(lo_hi % 256, lo_hi // 256) for lo_hi in steps[:, 2].tolist()]
    assert rows == [(0, 10), (10, 16), (0, 4)]
    assert words[layout.H_PLANNED_TOKENS] == 200 + 10 + 20 + 20


def test_a_long_tail_leaves_its_chain() -> None:
    # Alone on many SMs, so that the tail of row 3 would be what the step waits for.
    lens = [2100] * 3 + [20_000] + [2100] * 28
    batch = make_batch([-1], [2000], [0] * 32, lens)
    setup = generous(batch, model=CHAINY, sharing="on")
    packing = packing_of(batch, setup)
    (cut,) = [cut for cut in packing.cuts if cut.rows_per_item]
    assert cut.separated == {3}
    assert [pack.rows for pack in packing.packs if pack.is_tail] == [(3,)]
    words = words_of(batch, setup)
    check_plan(words, batch, 4)
    parts = np.diff(PlanTables.parse(words).part_ptr)
    assert np.nonzero(parts)[0].tolist() == ([3] if cut.num_chunks == 1 else list(range(32)))


def test_long_private_steps_get_smaller_items() -> None:
    # One tile of 128 query rows has two fragments a warp, each with four tails of 40 tokens:
    # 4 x 320 tokens x 2 ps are within 8/16 of the mean (30 + 3000 + 32 x 127 ps), not within 4/16.
    batch = make_batch([-1], [1000], [0] * 32, [1040] * 32)
    setup = generous(batch, heads=1, model=ROUND, sharing="on")
    for wall, rows_per_item in ((8, 32), (4, 16)):
        search = Search(walls=(wall,))
        (cut,) = packing_of(batch, setup, search).cuts
        assert cut.rows_per_item == rows_per_item
        assert not cut.separated
        check_plan(words_of(batch, setup, search), batch, 4)


@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (64, 8)])
@pytest.mark.parametrize("number", [2, 3, 10, 12, 15, 17])
def test_deep_published_trees_get_chains(number: int, heads: tuple[int, int]) -> None:
    tree = trees.published(number)
    leaves, lens = tree.leaf.tolist(), tree.seq_lens.tolist()
    batch = make_batch(tree.parent.tolist(), tree.length.tolist(), leaves, lens)
    setup = generous(batch, group=heads[0] // heads[1], heads=heads[1])
    words = words_of(batch, setup)
    assert words[layout.H_CHAINS] > 0
    assert words[layout.H_PARTS] == 0
    assert words[layout.H_PREDICTED_NS] < words_of(batch, setup, PLAIN)[layout.H_PREDICTED_NS]
    check_plan(words, batch, setup.shape.group_size)


@pytest.mark.parametrize("long", [32768, 131072])
def test_one_long_row_is_cut(long: int) -> None:
    batch = make_batch([], [], [-1] * 64, [long] + [100] * 63)
    words = words_of(batch, generous(batch))
    begin = layout.HEADER_WORDS
    longest = words[begin : begin + layout.ITEM_WORDS][4]
    assert words[layout.H_SPLITS] > 8
    assert longest < long // 8
    check_plan(words, batch, 4)


def test_a_single_row_uses_the_whole_gpu() -> None:
    batch = make_batch([], [], [-1], [32768])
    words = words_of(batch, generous(batch, group=8, heads=1))
    assert words[layout.H_ITEM_COUNT] > MODEL.num_sms // 2


def test_rows_of_length_zero_and_one() -> None:
    batch = make_batch([-1], [1], [0, 0, -1, -1], [1, 1, 0, 1])
    for sharing in ("auto", "on", "off"):
        words = words_of(batch, generous(batch, sharing=sharing))
        check_plan(words, batch, 4)
        check_plan(words, batch, 4, batch.host_lens + 64)


def test_sharing_can_be_forced_and_forbidden() -> None:
    worth_it = make_batch([-1], [4000], [0] * 9, [5000] * 9)
    not_worth_it = make_batch([-1], [2], [0, 0], [2000, 2000])
    for batch, best in ((worth_it, 1), (not_worth_it, 0)):
        for sharing, shares in (("auto", best), ("on", 1), ("off", 0)):
            words = words_of(batch, generous(batch, sharing=sharing))
            assert words[layout.H_SHARING] == shares
            check_plan(words, batch, 4)


@pytest.mark.parametrize(
    ("shortest", "horizon"), [(0, 64), (31, 64), (32, 65), (6144, 256), (10**6, MAX_HORIZON)]
)
def test_horizon_follows_the_shortest_row(shortest: int, horizon: int) -> None:
    batch = make_batch([], [], [-1, -1], [shortest, 10**6])
    assert words_of(batch, generous(batch))[layout.H_HORIZON] == horizon


@pytest.mark.parametrize("query_rows", [1, 16, 17, 64, 65, 128, 129, 160, 256, 300, 1000])
def test_tiles_hold_all_query_rows(query_rows: int) -> None:
    sizes = [TILES[kind].rows for kind in tiles_of(query_rows)]
    assert sum(sizes) >= query_rows
    assert sum(sizes[:-1]) < query_rows
    smaller = [tile.rows for tile in TILES if tile.rows < sizes[-1]]
    assert all(query_rows - sum(sizes[:-1]) > rows for rows in smaller)


def test_cost_models() -> None:
    assert cost_model_for("NVIDIA H100 80GB HBM3", 132, 128) == H100
    small = cost_model_for("NVIDIA H100 PCIe", 114, 64)
    assert small.num_sms == 114
    assert small.token_ps == tuple(ps // 2 for ps in H100.token_ps)
    assert small.private_token_ps == H100.private_token_ps // 2
    assert len(small.words()) == 20
    assert isinstance(cost_model_for("something new", 8, 256), CostModel)
