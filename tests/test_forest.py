# SPDX-License-Identifier: MIT
"""Forests and their segments, against sets of rows counted token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, batches, large_batch, make_batch

from pat_sglang.forest import Forest, SegmentTree, build_segment_tree


def tree_of(batch: Batch) -> SegmentTree:
    return build_segment_tree(batch.forest, batch.leaf_of_row, batch.host_lens)


def segments_of(batch: Batch) -> list[tuple[int, int, int]]:
    return [(s.begin, s.end, s.num_rows) for s in tree_of(batch).segments]


def expected_segments(batch: Batch) -> set[tuple[frozenset[int], int, int]]:
    """(rows, begin, end) of every maximal run shared by exactly these two or more rows."""
    rows_of_node: dict[int, set[int]] = {}
    place: dict[int, tuple[int, int]] = {}
    for row, path in enumerate(batch.path_of_row):
        for node in path:
            end = batch.depth[node]
            if end > batch.host_lens[row]:
                break  # the row is lifted: the host does not know yet that it has this node
            rows_of_node.setdefault(node, set()).add(row)
            place[node] = (end - int(batch.forest.length[node]), end)
    span: dict[frozenset[int], list[tuple[int, int]]] = {}
    for node, rows in rows_of_node.items():
        if len(rows) >= 2 and place[node][0] < place[node][1]:
            span.setdefault(frozenset(rows), []).append(place[node])
    found = set()
    for rows, pieces in span.items():
        pieces.sort()
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
        found.add((rows, pieces[0][0], pieces[-1][1]))
    return found


@settings(max_examples=400)
@given(batches(max_nodes=10, max_rows=12))
def test_segments_are_the_maximal_shared_runs(batch: Batch) -> None:
    check_segments(batch)


@pytest.mark.parametrize("kind", ["tree", "chain", "star", "levels"])
@pytest.mark.parametrize("seed", [0, 1])
def test_segments_of_large_batches(kind: str, seed: int) -> None:
    check_segments(large_batch(seed, 300, 200, kind))


def check_segments(batch: Batch) -> None:
    tree = tree_of(batch)
    rows_below: list[set[int]] = [set() for _ in tree.segments]
    for row, home in enumerate(tree.home):
        u = home
        while u >= 0:
            rows_below[u].add(row)
            u = tree.segments[u].parent
    got = {
        (frozenset(rows), s.begin, s.end) for rows, s in zip(rows_below, tree.segments, strict=True)
    }
    assert len(got) == len(tree.segments)
    assert got == expected_segments(batch)

    for index, (rows, segment) in enumerate(zip(rows_below, tree.segments, strict=True)):
        assert segment.parent < index
        assert segment.num_rows == len(rows)
        assert segment.first_row == min(rows)
        above = tree.segments[segment.parent].end if segment.parent >= 0 else 0
        assert segment.begin == above
        assert segment.own_rows == [r for r in range(batch.rows) if tree.home[r] == index]
        children = [v for v, s in enumerate(tree.segments) if s.parent == index]
        assert segment.child_segments == children
    shared = sum(end - begin for _, begin, end in got)
    tails = sum(int(n) - begin for n, begin in zip(tree.lens, tree.tail_begin, strict=True))
    assert tree.unique_tokens == shared + tails
    for row, home in enumerate(tree.home):
        assert tree.tail_begin[row] == (tree.segments[home].end if home >= 0 else 0)
        assert tree.tail_begin[row] <= tree.lens[row]


@settings(max_examples=150)
@given(st.data())
def test_order_of_nodes_does_not_matter(data: st.DataObject) -> None:
    batch = data.draw(batches())
    order = data.draw(st.permutations(range(batch.forest.num_nodes)))
    parent = [0] * len(order)
    length = [0] * len(order)
    for node, at in enumerate(order):
        above = int(batch.forest.parent[node])
        parent[at] = order[above] if above >= 0 else -1
        length[at] = int(batch.forest.length[node])
    leaves = [order[leaf] if leaf >= 0 else -1 for leaf in batch.leaf_of_row.tolist()]
    moved = make_batch(parent, length, leaves, batch.host_lens.tolist())
    assert sorted(segments_of(moved)) == sorted(segments_of(batch))


@settings(max_examples=150)
@given(batches())
def test_from_paths_gives_the_forest_back(batch: Batch) -> None:
    paths = [
        [
            (f"node {node}", batch.depth[node] - int(batch.forest.length[node]), batch.depth[node])
            for node in path
        ]
        for path in batch.path_of_row
    ]
    forest, leaf_of_row = Forest.from_paths(paths)
    assert forest.num_nodes == len({node for path in batch.path_of_row for node in path})
    again = build_segment_tree(forest, leaf_of_row, batch.host_lens)
    assert sorted((s.begin, s.end, s.num_rows) for s in again.segments) == sorted(
        segments_of(batch)
    )


def test_equal_rows_make_one_segment() -> None:
    # 0 -> 1 -> 2 with the same three rows below all of them; node 3 is private.
    batch = make_batch([-1, 0, 1, 2], [10, 0, 5, 7], [3, 2, 2], [30, 20, 16])
    assert segments_of(batch) == [(0, 15, 3)]
    tree = tree_of(batch)
    assert tree.tail_begin == [15, 15, 15]
    assert tree.unique_tokens == 15 + 15 + 5 + 1


def test_a_row_that_ends_in_the_middle_splits_the_run() -> None:
    batch = make_batch([-1, 0], [10, 6], [1, 1, 0], [16, 20, 10])
    assert segments_of(batch) == [(0, 10, 3), (10, 16, 2)]
    assert tree_of(batch).home == [1, 1, 0]


def test_several_roots_and_rows_without_a_node() -> None:
    batch = make_batch([-1, -1], [8, 9], [0, 1, -1, 0, 1], [8, 9, 5, 10, 12])
    assert segments_of(batch) == [(0, 8, 2), (0, 9, 2)]
    assert tree_of(batch).home == [0, 1, -1, 0, 1]
    assert tree_of(batch).tail_begin == [8, 9, 0, 8, 9]


def test_a_node_with_one_row_is_private() -> None:
    batch = make_batch([-1, 0], [8, 8], [1], [20])
    assert segments_of(batch) == []
    assert tree_of(batch).tail_begin == [0]


def test_rows_are_lifted_to_what_the_host_knows() -> None:
    # Row 1 lags: 15 of the 16 tokens of its path are known, so it keeps only the root.
    batch = make_batch([-1, 0], [10, 6], [1, 1, 1], [17, 15, 16])
    assert segments_of(batch) == [(0, 10, 3), (10, 16, 2)]
    assert tree_of(batch).home == [1, 0, 1]
    batch = make_batch([-1, 0], [10, 6], [1, 1], [9, 40])
    assert segments_of(batch) == []
    assert tree_of(batch).home == [-1, -1]


def test_very_long_paths_do_not_overflow() -> None:
    batch = make_batch([-1, 0, 1, 2], [2**31 - 1] * 4, [3, 3, 0], [50, 2**31 - 1, 2**31 - 1])
    assert segments_of(batch) == [(0, 2**31 - 1, 2)]


def test_empty_forest() -> None:
    tree = build_segment_tree(Forest.empty(), [-1, -1], [3, 0])
    assert tree.segments == []
    assert tree.unique_tokens == 3
    assert build_segment_tree(Forest.empty(), [], []).unique_tokens == 0


@pytest.mark.parametrize(
    ("parent", "length", "message"),
    [
        ([-1, 2], [1, 1], "out of range"),
        ([-2], [1], "out of range"),
        ([-1], [-1], "negative length"),
        ([-1, 0], [1], "equal size"),
        ([[-1]], [[1]], "1-D"),
    ],
)
def test_forest_refuses(parent, length, message) -> None:
    with pytest.raises(ValueError, match=message):
        Forest(np.array(parent, np.int32), np.array(length, np.int32))


@pytest.mark.parametrize("parent", [[0], [1, 0], [-1, 2, 3, 1], [-1, 0, 3, 2]])
def test_cycles_are_refused(parent: list[int]) -> None:
    forest = Forest(np.array(parent, np.int32), np.ones(len(parent), np.int32))
    with pytest.raises(ValueError, match="cycle"):
        build_segment_tree(forest, [0], [9])


@pytest.mark.parametrize(
    ("leaves", "lens", "message"),
    [
        ([1], [5], "out of range"),
        ([-2], [5], "out of range"),
        ([0], [-5], "negative"),
        ([0, 0], [5], "2 rows"),
    ],
)
def test_rows_are_refused(leaves, lens, message) -> None:
    forest = Forest(np.array([-1], np.int32), np.array([4], np.int32))
    with pytest.raises(ValueError, match=message):
        build_segment_tree(forest, leaves, lens)


def test_from_paths() -> None:
    forest, leaf_of_row = Forest.from_paths(
        [[("a", 0, 4), ("b", 4, 9)], [], [("a", 0, 4)], [("a", 0, 4), ("c", 4, 5)], [("d", 0, 2)]]
    )
    assert forest.parent.tolist() == [-1, 0, 0, -1]
    assert forest.length.tolist() == [4, 5, 1, 2]
    assert leaf_of_row.tolist() == [1, -1, 0, 2, 3]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[("a", 1, 4)]], r"row 0: node 'a' covers \[1, 4\) at 0"),
        ([[("a", 0, 4), ("b", 5, 6)]], r"row 0: node 'b' covers \[5, 6\) at 4"),
        ([[("a", 0, 4), ("b", 4, 3)]], r"row 0: node 'b' covers \[4, 3\) at 4"),
        ([[("a", 0, 4)], [("a", 0, 5)]], "row 1: node 'a' has two different places"),
        ([[("a", 0, 4), ("c", 4, 5)], [("b", 0, 4), ("c", 4, 5)]], "row 1: node 'c' has two"),
        ([[("a", 0, 0), ("a", 0, 0)]], "row 0: node 'a' has two different places"),
    ],
)
def test_from_paths_refuses(paths, message) -> None:
    with pytest.raises(ValueError, match=message):
        Forest.from_paths(paths)
