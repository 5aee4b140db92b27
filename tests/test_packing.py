# SPDX-License-Identifier: MIT
"""Packs and cuts of the Python planner: right on any batch, within any capacity, never dearer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from plan_oracle import check_plan
from strategies import Batch, Setup, batches, large_batch, make_batch, setups

from pat_sglang import layout
from pat_sglang.cost import H100, TILES, CostModel, cost_model_for, tiles_of
from pat_sglang.forest import build_segment_tree
from pat_sglang.layout import capacity_for, lay_out
from pat_sglang.packing import MAX_HORIZON, Packing, Shape, pack_rows


def packing_of(batch: Batch, setup: Setup) -> Packing:
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    return pack_rows(tree, setup.shape, setup.model)


def words_of(batch: Batch, setup: Setup) -> np.ndarray:
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    return lay_out(tree, pack_rows(tree, setup.shape, setup.model), setup.shape, setup.capacity)


def generous(batch: Batch, group: int = 4, heads: int = 8, sharing: str = "auto") -> Setup:
    tokens = max(int(batch.host_lens.astype(np.int64).sum()), 1)
    capacity = capacity_for(max(batch.rows, 1), tokens, 100_000, group, MAX_HORIZON)
    shape = Shape(group, heads, capacity.parts, capacity.items, sharing)
    return Setup(shape, H100, capacity)


def with_sharing(setup: Setup, sharing: str) -> Setup:
    shape = Shape(**{**setup.shape.__dict__, "sharing": sharing})
    return Setup(shape, setup.model, setup.capacity)


@settings(max_examples=800)
@given(st.data())
def test_every_token_once_also_after_growth(data: st.DataObject) -> None:
    batch = data.draw(batches())
    setup = data.draw(setups(batch))
    words = words_of(batch, setup)
    event(f"sharing {bool(words[layout.H_SHARING])}, cut {bool(words[layout.H_SPLITS])}")
    event(f"coarsened {words[layout.H_COARSENED]}")
    group, horizon = setup.shape.group_size, int(words[layout.H_HORIZON])
    check_plan(words, batch, group)
    growth = data.draw(st.lists(st.integers(0, horizon), min_size=batch.rows, max_size=batch.rows))
    check_plan(words, batch, group, batch.host_lens + np.array(growth, np.int32))


@settings(max_examples=500)
@given(st.data())
def test_capacity_holds_and_sharing_never_costs(data: st.DataObject) -> None:
    batch = data.draw(batches(max_nodes=6))
    setup = data.draw(setups(batch, sharing="auto"))
    words = words_of(batch, setup)
    items = words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4].sum()
    assert words[layout.H_PARTS] <= setup.shape.max_parts
    assert items <= setup.shape.max_items
    assert words[layout.H_SLOTS] <= setup.capacity.slots
    assert words.size <= setup.capacity.words

    plain = words_of(batch, with_sharing(setup, "off"))
    assert not plain[layout.H_SHARING]
    assert not plain[layout.H_SHARED_PACKS]
    assert words[layout.H_PREDICTED_NS] <= plain[layout.H_PREDICTED_NS]
    assert (
        packing_of(batch, setup).predicted_ps
        <= packing_of(batch, with_sharing(setup, "off")).predicted_ps
    )
    np.testing.assert_array_equal(words, words_of(batch, setup))


@settings(max_examples=150)
@given(st.data())
def test_one_slot_less_than_the_best_plan_needs(data: st.DataObject) -> None:
    batch = data.draw(batches())
    setup = generous(batch, group=data.draw(st.sampled_from((1, 5, 40))))
    best = words_of(batch, setup)
    parts = int(best[layout.H_PARTS])
    items = int(best[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4].sum())
    for less in ({"max_parts": max(parts - 1, 0)}, {"max_items": max(items - 1, batch.rows)}):
        shape = Shape(**{**setup.shape.__dict__, **less})
        words = words_of(batch, Setup(shape, setup.model, setup.capacity))
        assert words[layout.H_PARTS] <= shape.max_parts
        assert words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4].sum() <= shape.max_items
        check_plan(words, batch, shape.group_size)
        exact = Shape(**{**setup.shape.__dict__, "max_parts": parts, "max_items": items})
        again = words_of(batch, Setup(exact, setup.model, setup.capacity))
        np.testing.assert_array_equal(again, best)


@pytest.mark.parametrize("parts", [0, 1, 100, 700, 3000])
@pytest.mark.parametrize("kind", ["tree", "levels"])
def test_less_workspace_gives_a_coarser_plan(kind: str, parts: int) -> None:
    batch = large_batch(3, 256, 120, kind)
    capacity = capacity_for(256, int(batch.host_lens.sum()), parts, 4, MAX_HORIZON)
    words = words_of(batch, Setup(Shape(4, 8, parts, capacity.items), H100, capacity))
    assert words[layout.H_PARTS] <= parts
    check_plan(words, batch, 4)
    if parts == 0:
        assert words[layout.H_SPLITS] == words[layout.H_SHARING] == 0


def test_no_workspace_at_all_is_one_item_a_row() -> None:
    batch = make_batch([-1], [5000], [0] * 40, [5100] * 40)
    capacity = capacity_for(40, 300_000, 0, 8, MAX_HORIZON)
    words = words_of(batch, Setup(Shape(8, 1, 0, 40), H100, capacity))
    assert words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4].tolist() == [40, 0, 0, 0]
    assert words[layout.H_PARTS] == 0
    assert words[layout.H_COARSENED] > 0
    check_plan(words, batch, 8)


def test_shared_prompt_is_read_once() -> None:
    batch = make_batch([-1], [8192], [0] * 32, [8200 + i for i in range(32)])
    words = words_of(batch, generous(batch))
    assert words[layout.H_SHARING] == 1
    assert words[layout.H_SHARED_PACKS] == 1
    assert words[layout.H_PLANNED_TOKENS] == 8192 + sum(8 + i for i in range(32))
    # 32 rows x 4 heads fill exactly the largest tile.
    assert words[layout.H_ITEM_COUNT + 3] > 1


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
    words = words_of(batch, generous(batch))
    assert words[layout.H_RUNS] == 9
    assert words[layout.H_SHARED_PACKS] == 1
    assert words[layout.H_PLANNED_TOKENS] == 4096 + 32 * (4600 - 4096)
    check_plan(words, batch, 4)


def test_short_root_is_taken_along_by_the_groups_below() -> None:
    # 4 tokens of all rows above two groups with 4000 tokens each: each group reads the 4 itself.
    batch = make_batch([-1, 0, 0], [4, 4000, 4000], [1] * 16 + [2] * 16, [4100] * 32)
    words = words_of(batch, generous(batch))
    assert words[layout.H_RUNS] == 3
    assert words[layout.H_SHARED_PACKS] == 2
    assert words[layout.H_PLANNED_TOKENS] == 2 * 4004 + 32 * (4100 - 4004)
    check_plan(words, batch, 4)


@pytest.mark.parametrize("long", [32768, 131072])
def test_one_long_row_is_cut(long: int) -> None:
    batch = make_batch([], [], [-1] * 64, [long] + [100] * 63)
    words = words_of(batch, generous(batch))
    begin = layout.HEADER_WORDS
    longest = words[begin : begin + 8][4]
    assert words[layout.H_SPLITS] > 8
    assert longest < long // 8
    check_plan(words, batch, 4)


def test_a_single_row_uses_the_whole_gpu() -> None:
    batch = make_batch([], [], [-1], [32768])
    words = words_of(batch, generous(batch, group=8, heads=1))
    assert words[layout.H_ITEM_COUNT] > H100.num_sms // 2


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


@pytest.mark.parametrize("query_rows", [1, 16, 17, 32, 33, 64, 65, 128, 129, 160, 256, 300, 1000])
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
    assert len(small.words()) == 22
    assert isinstance(cost_model_for("something new", 8, 256), CostModel)
