# SPDX-License-Identifier: MIT
"""The C++ planner: the oracle's words on every batch, and plans that are right on their own."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CHAINY
from hypothesis import event, given, settings
from hypothesis import strategies as st
from plan_oracle import check_plan
from strategies import (
    Batch,
    Setup,
    batches,
    large_batch,
    large_batches,
    make_batch,
    setups,
)

from pat_sglang import cost, jit, layout, packing
from pat_sglang.cost import H100, CostModel
from pat_sglang.forest import Forest, build_segment_tree
from pat_sglang.host import HostPlanner
from pat_sglang.layout import Capacity, CapacityError, capacity_for, lay_out
from pat_sglang.packing import MAX_HORIZON, Search, Shape, pack_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import trees

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The tests of this file are about C++: a fallback to Python must not make them green."""
    jit.load_host()


def oracle_words(batch: Batch, setup: Setup) -> np.ndarray:
    """The plan of the readable Python planner."""
    tree = build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)
    return lay_out(tree, pack_rows(tree, setup.shape, setup.model), setup.shape, setup.capacity)


def native_words(batch: Batch, setup: Setup, planner: HostPlanner | None = None) -> np.ndarray:
    """The plan of the C++ planner; also that it keeps to its words."""
    planner = planner or HostPlanner(setup.shape, setup.model, setup.capacity)
    assert planner.is_native
    out = np.full(setup.capacity.words + 3, -7, np.int32)
    count = planner.plan(batch.forest, batch.leaf_of_row, batch.host_lens, out[:-3])
    assert (out[count:] == -7).all()
    return out[:count]


def check(batch: Batch, setup: Setup, growth: int) -> None:
    words = native_words(batch, setup)
    np.testing.assert_array_equal(words, oracle_words(batch, setup))
    group = setup.shape.group_size
    check_plan(words, batch, group)
    if growth:
        grown = np.minimum(growth, words[layout.H_HORIZON]) * (np.arange(batch.rows) % 3 > 0)
        check_plan(words, batch, group, batch.host_lens + grown)


@settings(max_examples=1200)
@given(st.data())
def test_equals_oracle_on_small_batches(data: st.DataObject) -> None:
    batch = data.draw(batches())
    check(batch, data.draw(setups(batch)), data.draw(st.sampled_from((0, 1, 60, MAX_HORIZON))))


@settings(max_examples=150)
@given(st.data())
def test_equals_oracle_on_large_batches(data: st.DataObject) -> None:
    batch = data.draw(large_batches)
    setup = data.draw(setups(batch))
    if batch.rows * setup.shape.group_size <= 4000:  # following every head takes its time
        check(batch, setup, growth=30)
    else:
        np.testing.assert_array_equal(native_words(batch, setup), oracle_words(batch, setup))


@settings(max_examples=200)
@given(st.data())
def test_equals_oracle_on_deep_trees_with_few_partials(data: st.DataObject) -> None:
    batch = data.draw(batches(max_nodes=40, max_rows=24, deep=True))
    setup = data.draw(setups(batch))
    parts = min(data.draw(st.integers(0, 4 * batch.rows)), setup.shape.max_parts)
    few = replace(setup, shape=replace(setup.shape, max_parts=parts))
    words = native_words(batch, few)
    event(f"coarsened {words[layout.H_COARSENED]}, sharing {bool(words[layout.H_SHARING])}")
    assert words[layout.H_PARTS] <= parts
    check(batch, few, growth=30)


@pytest.mark.parametrize("sharing", ["auto", "on"])
def test_high_prices_of_partials_fit_64_bits(sharing: str) -> None:
    # Python's numbers have no end. No partial fits and there are no chains, so that prices rise
    # until every row reads its whole path by itself.
    levels, group = 600, packing.MAX_CHAIN_GROUP + 1
    lens = [9 * depth for depth in range(1, levels + 1)]
    batch = make_batch(list(range(-1, levels - 1)), [9] * levels, list(range(levels)), lens)
    model = replace(H100, part_ps=2**24 - 1)
    capacity = capacity_for(levels, sum(lens) + levels, 0, group, MAX_HORIZON)
    setup = Setup(Shape(group, 1, 0, capacity.items, sharing), model, capacity)
    words = native_words(batch, setup)
    assert words[layout.H_COARSENED] >= 16 and words[layout.H_PARTS] == 0
    np.testing.assert_array_equal(words, oracle_words(batch, setup))


def test_price_of_partials_beyond_what_is_checked() -> None:
    with pytest.raises(ValueError, match=r"part_ps = 16777216 is out of range \[1, 2\^24\)"):
        HostPlanner(Shape(2, 1, 8, 8), replace(H100, part_ps=2**24), SMALL)


@pytest.mark.parametrize("model", [H100, CHAINY], ids=["h100", "chainy"])
@pytest.mark.parametrize("kind", ["tree", "chain", "star", "levels"])
def test_large_plan_is_right(kind: str, model: CostModel) -> None:
    batch = large_batch(7, 512, 300, kind)
    capacity = capacity_for(512, int(batch.host_lens.sum()), 8000, 4, MAX_HORIZON)
    shape = Shape(4, 8, capacity.parts, capacity.items)
    check(batch, Setup(shape, model, capacity), 64)


@pytest.mark.parametrize("heads", [(32, 32), (16, 8), (32, 8), (64, 8), (8, 1), (20, 4)])
def test_equals_oracle_on_published_trees(heads: tuple[int, int]) -> None:
    group, kv_heads = heads[0] // heads[1], heads[1]
    for number in range(1, len(trees.PUBLISHED) + 1):
        tree = trees.published(number)
        forest = Forest(tree.parent, tree.length)
        rows, tokens = tree.num_rows, tree.unique_tokens()
        capacity = capacity_for(rows, tokens, 6 * rows + 4096, group, MAX_HORIZON)
        shape = Shape(group, kv_heads, capacity.parts, capacity.items)
        out = [np.zeros(capacity.words, np.int32) for _ in range(2)]
        for native in (True, False):
            planner = HostPlanner(shape, H100, capacity, native=native)
            planner.plan(forest, tree.leaf, tree.seq_lens, out[native])
        np.testing.assert_array_equal(*out)


def test_scratch_memory_leaves_no_trace() -> None:
    # One planner for batches of all sizes gives what a new planner gives, whatever came before.
    capacity = capacity_for(256, 4_000_000, 3000, 5, MAX_HORIZON)
    setup = Setup(Shape(5, 2, capacity.parts, capacity.items), H100, capacity)
    planner = HostPlanner(setup.shape, setup.model, setup.capacity)
    kinds = ("tree", "chain", "star", "levels")
    for seed in range(40):
        rows = (1, 3, 256, 17, 90)[seed % 5]
        batch = large_batch(seed, rows, (1, 5, 150, 40)[seed % 4], kinds[seed % 3])
        again = native_words(batch, setup, planner)
        np.testing.assert_array_equal(again, native_words(batch, setup))
        np.testing.assert_array_equal(again, native_words(batch, setup, planner))


@pytest.mark.parametrize("rows", [2, 1024])
@pytest.mark.parametrize("backwards", [False, True])
def test_chain_of_depth_1024(rows: int, backwards: bool) -> None:
    nodes = 1024
    parent, length = list(range(-1, nodes - 1)), [1 + i % 3 for i in range(nodes)]
    leaves = [(nodes - 1 - i) % nodes for i in range(rows)]
    if backwards:  # children before their parents
        parent = [above + 1 if above < nodes else -1 for above in range(nodes)]
        parent[-1] = -1
        leaves = [nodes - 1 - leaf for leaf in leaves]
    batch = make_batch(parent, length, leaves, [0] * rows)
    lens = [batch.depth[leaf] + 1 for leaf in leaves]
    batch = make_batch(parent, length, leaves, lens)
    capacity = capacity_for(rows, int(batch.host_lens.sum()), 100_000, 1, MAX_HORIZON)
    setup = Setup(Shape(1, 8, capacity.parts, capacity.items), H100, capacity)
    words = native_words(batch, setup)
    check_plan(words, batch, 1)
    if rows == 2:
        np.testing.assert_array_equal(words, oracle_words(batch, setup))


@pytest.mark.parametrize("sharing", ["auto", "on"])
@pytest.mark.parametrize("num_sms", [1, 3, 10, 132])
def test_chains_that_lose_their_steps(num_sms: int, sharing: str) -> None:
    # Forests whose private tails are as long as what they share, so that chains lose most of them.
    model = CostModel(**{**CHAINY.__dict__, "num_sms": num_sms})
    for groups in (0, 1, 3):
        parent, length = [-1] + [0] * groups, [900] + [60] * groups
        leaves = [row % (groups + 1) for row in range(24)]
        for tail in (0, 70, 300, 1500):
            lens = [900 + 60 * (leaf > 0) + tail + row % 3 for row, leaf in enumerate(leaves)]
            batch = make_batch(parent, length, leaves, lens)
            capacity = capacity_for(24, sum(lens), 10_000, 4, MAX_HORIZON)
            shape = Shape(4, 8, capacity.parts, capacity.items, sharing)
            check(batch, Setup(shape, model, capacity), growth=20)


def test_no_rows() -> None:
    batch = make_batch([-1], [10], [], [])
    capacity = capacity_for(1, 100, 0, 4, MAX_HORIZON)
    setup = Setup(Shape(4, 1, 0, capacity.items), H100, capacity)
    np.testing.assert_array_equal(native_words(batch, setup), oracle_words(batch, setup))


def test_lengths_near_the_end_of_int32() -> None:
    # Costs of such lengths times the KV heads pass 64 bits; capacity is what refuses the batch.
    batch = make_batch([-1, 0, 0], [2**30, 2**30, 5], [1, 1, 2], [2**31 - 1, 2**31 - 1, 2**30 + 9])
    capacity = Capacity(rows=3, parts=10_000, items=10_000, slots=2**31 - 1, words=200_000)
    for heads in (1, 8, 2**31 - 1):
        shape = Shape(8, heads, capacity.parts, capacity.items)
        with pytest.raises(CapacityError, match="unique KV tokens"):
            native_words(batch, Setup(shape, H100, capacity))
        with pytest.raises(CapacityError, match="unique KV tokens"):
            oracle_words(batch, Setup(shape, H100, capacity))


SMALL = capacity_for(4, 1000, 8, 2, MAX_HORIZON)


def planners() -> list[HostPlanner]:
    shape = Shape(2, 1, SMALL.parts, SMALL.items)
    return [HostPlanner(shape, H100, SMALL, native=native) for native in (True, False)]


@pytest.mark.parametrize(
    ("parent", "length", "leaves", "lens", "error", "message"),
    [
        ([-1], [5], [1], [9], ValueError, "leaf_of_row.* out of range"),
        ([-1], [5], [-2], [9], ValueError, "leaf_of_row.* out of range"),
        ([-1], [5], [0], [-1], ValueError, "sequence length is negative"),
        ([-1], [5], [0, 0], [9], ValueError, "leaf_of_row has 2 rows, host_lens has 1"),
        ([1, 0], [5, 5], [0], [9], ValueError, "cycle"),
        ([-1, 2, 3, 1], [5] * 4, [0], [9], ValueError, "cycle"),
        ([0], [5], [0], [9], ValueError, "cycle"),
        ([], [], [-1] * 5, [9] * 5, CapacityError, "5 rows.* 4"),
        ([], [], [-1], [10_000], CapacityError, "10000 unique KV tokens.*raise max_tokens"),
    ],
)
def test_errors_are_the_same(parent, length, leaves, lens, error, message) -> None:
    of_batch = Forest(np.array(parent, np.int32), np.array(length, np.int32))
    out = np.full(SMALL.words, -7, np.int32)
    for planner in planners():
        with pytest.raises(error, match=message) as raised:
            planner.plan(of_batch, leaves, lens, out)
        assert raised.type is error
        assert (out == -7).all()


def test_too_few_items_for_any_plan() -> None:
    for native in (True, False):
        planner = HostPlanner(Shape(300, 1, 0, 2), H100, SMALL, native=native)
        with pytest.raises(ValueError, match=r"1 rows of 300 query heads .* holds 2: raise"):
            planner.plan(Forest.empty(), [-1], [9], np.zeros(SMALL.words, np.int32))


def test_short_or_wrong_output_buffer() -> None:
    for planner in planners():
        with pytest.raises(CapacityError, match="the buffer holds 40"):
            planner.plan(Forest.empty(), [-1], [9], np.zeros(40, np.int32))
    native, _ = planners()
    with pytest.raises(TypeError, match="out has dtype int64"):
        native.plan(Forest.empty(), [-1], [9], np.zeros(100, np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out is not a contiguous"):
        native.plan(Forest.empty(), [-1], [9], np.zeros(200, np.int32)[::2])


def test_read_only_input() -> None:
    batch = make_batch([-1], [64], [0, 0], [70, 80])
    for array in (batch.forest.parent, batch.forest.length, batch.leaf_of_row, batch.host_lens):
        array.flags.writeable = False
    setup = Setup(Shape(2, 1, SMALL.parts, SMALL.items), H100, SMALL)
    np.testing.assert_array_equal(native_words(batch, setup), oracle_words(batch, setup))


@pytest.mark.parametrize("field", ["group_size", "num_kv_heads"])
def test_bad_shape_is_named(field: str) -> None:
    values = {"group_size": 1, "num_kv_heads": 1, field: 0}
    with pytest.raises(ValueError, match=f"{field} = 0 "):
        HostPlanner(Shape(**values, max_parts=1, max_items=1), H100, SMALL)


def test_a_search_is_for_python_only() -> None:
    shape = Shape(2, 1, SMALL.parts, SMALL.items)
    with pytest.raises(ValueError, match="native=False"):
        HostPlanner(shape, H100, SMALL, search=Search())
    plain = HostPlanner(shape, CHAINY, SMALL, native=False, search=Search(chains=False))
    out = np.zeros(SMALL.words, np.int32)
    plain.plan(Forest(np.array([-1]), np.array([500])), [0, 0], [510, 520], out)
    assert out[layout.H_CHAINS] == 0


def test_fallback_to_python_is_logged_once(monkeypatch, caplog) -> None:
    def no_compiler() -> None:
        raise jit.BuildError("no compiler here")

    monkeypatch.setattr(jit, "load_host", no_compiler)
    monkeypatch.setattr("pat_sglang.host._missing_logged", False)
    with caplog.at_level("WARNING"):
        found = [HostPlanner(Shape(2, 1, 8, 8), H100, SMALL).is_native for _ in range(2)]
    assert found == [False, False]
    assert [r.message for r in caplog.records if "no compiler here" in r.message] == [
        "pat_sglang: planning in Python, about 100x slower: no compiler here"
    ]


def constants(*files: Path) -> dict[str, int]:
    """Plain integer constants of C++ files."""
    text = "".join(path.read_text() for path in files)
    return {n: int(v) for n, v in re.findall(r"constexpr int\w* k(\w+) = (\d+);", text)}


def test_layout_constants_are_the_same_in_both_languages() -> None:
    found = constants(CSRC / "plan_layout.h")
    header = {
        re.sub(r"(?<!^)([A-Z])", r"_\1", name[6:]).upper(): value
        for name, value in found.items()
        if name.startswith("Header") and name != "HeaderWords"
    }
    header["WORDS"] = header.pop("WORD_COUNT")
    assert header == {n[2:]: v for n, v in vars(layout).items() if n.startswith("H_")}
    for table in ("Header", "Item", "Fragment", "Step", "Entry", "Run", "Tail"):
        assert found[f"{table}Words"] == getattr(layout, f"{table.upper()}_WORDS")
    assert found["SlotAlign"] == layout.SLOT_ALIGN
    assert found["TableAlign"] == layout.TABLE_ALIGN
    assert found["FragmentRows"] == cost.FRAGMENT_ROWS
    assert found["ItemWarps"] == cost.ITEM_WARPS
    assert found["StepHiShift"] == layout.STEP_HI_SHIFT
    tiles = re.search(r"kTiles\[kNumTiles\] = \{(.*)\};", (CSRC / "plan_layout.h").read_text())
    assert tiles is not None
    numbers = [int(n) for n in re.findall(r"\d+", tiles[1])]
    assert list(zip(numbers[::2], numbers[1::2], strict=True)) == [tuple(t) for t in cost.TILES]


def test_packing_constants_are_the_same_in_both_languages() -> None:
    files = sorted((CSRC / "host").glob("*.*"))
    found = constants(*files)
    assert found["MaxInherit"] == packing.MAX_INHERIT
    assert found["MaxChainDepth"] == packing.MAX_CHAIN_DEPTH
    assert found["MaxChainGroup"] == packing.MAX_CHAIN_GROUP
    assert found["MinChunk"] == packing.MIN_CHUNK
    assert found["ChunkAlign"] == packing.CHUNK_ALIGN
    assert found["MaxHorizon"] == packing.MAX_HORIZON
    assert found["WavesInStep"] == packing.WAVES_IN_STEP
    assert found["StrideFactor"] == packing.STRIDE_FACTOR
    assert found["MaxPartScale"] == packing.MAX_PART_SCALE
    text = "".join(path.read_text() for path in files)
    lists = dict(re.findall(r"constexpr int\w* k(\w+)\[\] = \{(.*)\};", text))
    assert tuple(map(int, lists["PiecesPerSm"].split(","))) == packing.PIECES_PER_SM
    assert tuple(map(int, lists["PartScales"].split(","))) == packing.PART_SCALES
    assert tuple(map(int, lists["Walls"].split(","))) == packing.WALLS
    assert tuple(map(int, lists["ChainRows"].split(","))) == packing.Search().chain_rows
