# SPDX-License-Identifier: MIT
"""The sharing structure of a decode batch: nodes of a prefix tree, and the segments they form.

A *forest* is what the caller knows (nodes, parents, lengths). A *segment tree* is what the
planner needs: maximal runs of tokens shared by exactly one set of at least two request rows.
Every array is a host array; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ._types import Int32Array


@dataclass(frozen=True)
class Forest:
    """Distinct prefix-tree nodes of a batch.

    Args:
        parent: int32 ``[nodes]``, index of each node's parent, ``-1`` for a root. Any order.
        length: int32 ``[nodes]``, tokens of each node, at least 0.

    Raises:
        ValueError: shapes differ, a parent is out of range, a length is negative, or the parents
            form a cycle.
    """

    parent: Int32Array
    length: Int32Array

    def __post_init__(self) -> None:
        parent = np.ascontiguousarray(self.parent, dtype=np.int32)
        length = np.ascontiguousarray(self.length, dtype=np.int32)
        object.__setattr__(self, "parent", parent)
        object.__setattr__(self, "length", length)
        if parent.ndim != 1 or parent.shape != length.shape:
            raise ValueError(
                f"parent and length must be 1-D of equal size, got {parent.shape}, {length.shape}"
            )
        if parent.size and (parent.min() < -1 or parent.max() >= parent.size):
            raise ValueError("a parent index is out of range [-1, nodes)")
        if length.size and length.min() < 0:
            raise ValueError("a node has a negative length")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return int(self.parent.size)

    @classmethod
    def empty(cls) -> Forest:
        """The forest of a batch that shares nothing."""
        return cls(np.empty(0, np.int32), np.empty(0, np.int32))

    @classmethod
    def from_paths(
        cls, paths: Sequence[Sequence[tuple[Hashable, int, int]]]
    ) -> tuple[Forest, Int32Array]:
        """Forest of per-row paths: the convenient, slow way.

        Args:
            paths: for each row its nodes from the root, ``(id, begin, end)`` with token positions.
                Equal ids mean equal nodes.

        Returns:
            ``(forest, leaf_of_row)``; ``leaf_of_row`` is int32 ``[rows]``, -1 for an empty path.

        Raises:
            ValueError: a path has a gap, or one id occurs with two different places.
        """
        index: dict[Hashable, int] = {}
        parent: list[int] = []
        begin_end: list[tuple[int, int]] = []
        leaves: list[int] = []
        for row, path in enumerate(paths):
            above, depth = -1, 0
            for node, begin, end in path:
                if begin != depth or end < begin:
                    raise ValueError(f"row {row}: node {node!r} covers [{begin}, {end}) at {depth}")
                at = index.setdefault(node, len(parent))
                if at == len(parent):
                    parent.append(above)
                    begin_end.append((begin, end))
                elif (parent[at], begin_end[at]) != (above, (begin, end)):
                    raise ValueError(f"row {row}: node {node!r} has two different places")
                above, depth = at, end
            leaves.append(above)
        lengths = np.array([end - begin for begin, end in begin_end], np.int32)
        forest = cls(np.array(parent, np.int32), lengths)
        return forest, np.array(leaves, np.int32)

    @classmethod
    def from_slots(
        cls, req_to_token: Int32Array, lens: Sequence[int] | Int32Array
    ) -> tuple[Forest, Int32Array]:
        """Forest of rows that begin with the same KV slots, found by comparing them: milliseconds.

        For batches whose structure is not known but that share so much that, taken as private,
        they would not fit.

        Args:
            req_to_token: int32 ``[rows, >= longest]``, slots of each row.
            lens: ``[rows]``.

        Returns:
            ``(forest, leaf_of_row)`` as ``from_paths``.
        """
        # Neighbours in lexicographic order (big-endian bytes sort like numbers) share the longest
        # prefixes, so a stack of open nodes is enough.
        slots = [
            np.asarray(line[:n], dtype=">u4") for line, n in zip(req_to_token, lens, strict=True)
        ]
        order = sorted(range(len(slots)), key=lambda row: slots[row].tobytes())
        paths: list[list[tuple[Hashable, int, int]]] = [[] for _ in slots]
        open_nodes: list[list[int]] = []  # [begin, end, first member in `order`]
        closed: list[tuple[int, int, int, int]] = []  # begin, end, members [first, last)

        def close_to(depth: int, member: int) -> None:
            while open_nodes and open_nodes[-1][1] > depth:
                begin, end, first = open_nodes.pop()
                cut = max(begin, depth)
                closed.append((cut, end, first, member))
                if begin < depth:
                    open_nodes.append([begin, depth, first])

        for member in range(1, len(order)):
            a, b = slots[order[member - 1]], slots[order[member]]
            size = min(a.size, b.size)
            differ = np.flatnonzero(a[:size] != b[:size])
            shared = int(differ[0]) if differ.size else size
            close_to(shared, member)
            above = open_nodes[-1][1] if open_nodes else 0
            if shared > above:
                open_nodes.append([above, shared, member - 1])
        close_to(0, len(order))
        for index, (begin, end, first, last) in enumerate(sorted(closed)):
            for row in order[first:last]:
                paths[row].append((index, begin, end))
        return cls.from_paths(paths)

    def topological_order(self) -> list[int]:
        """Node indices, every parent before its children, otherwise by index.

        Raises:
            ValueError: the parents form a cycle.
        """
        parent = self.parent.tolist()
        if all(above < node for node, above in enumerate(parent)):
            return list(range(len(parent)))
        children: list[list[int]] = [[] for _ in parent]
        order = []
        for node, above in enumerate(parent):
            if above < 0:
                order.append(node)
            else:
                children[above].append(node)
        for node in order:
            order.extend(children[node])
        if len(order) != len(parent):
            raise ValueError("the parents of the forest form a cycle")
        return order


@dataclass
class Segment:
    """A run of token positions shared by exactly one set of rows (two or more)."""

    parent: int  # index of the segment above, -1: a root
    begin: int  # first token position
    end: int  # one past the last token position
    num_rows: int  # rows below
    first_row: int  # smallest row below: the representative the slots are gathered from
    child_segments: list[int]
    own_rows: list[int]  # rows whose private tail starts where this segment ends


@dataclass
class SegmentTree:
    """Segments in an order in which parents come before children, and the rows' private tails."""

    segments: list[Segment]
    home: list[int]  # [rows] deepest segment of each row, -1: the row shares nothing
    tail_begin: list[int]  # [rows] first private token position
    lens: list[int]  # [rows] planned sequence length

    @property
    def unique_tokens(self) -> int:
        """KV tokens of the batch, every shared token counted once."""
        shared = sum(s.end - s.begin for s in self.segments)
        return shared + sum(self.lens) - sum(self.tail_begin)


def node_ends(forest: Forest, order: Sequence[int]) -> list[int]:
    """Tokens from the root to the end of each node; ``order`` has parents before their children."""
    parent, length = forest.parent.tolist(), forest.length.tolist()
    ends = [0] * len(parent)
    for node in order:
        ends[node] = length[node] + (ends[parent[node]] if parent[node] >= 0 else 0)
    return ends


def build_segment_tree(
    forest: Forest, leaf_of_row: Sequence[int] | Int32Array, host_lens: Sequence[int] | Int32Array
) -> SegmentTree:
    """Segments of a forest.

    Nodes below which only one row lives become part of that row's private tail; consecutive nodes
    with the same rows become one segment. A row whose path is longer than its length is lifted to
    the deepest node that still fits, so a lagging host length can cost sharing, never correctness.

    Raises:
        ValueError: sizes differ, a leaf is out of range, a length is negative, or a cycle.
    """
    leaves, lens = [int(x) for x in leaf_of_row], [int(x) for x in host_lens]
    if len(leaves) != len(lens):
        raise ValueError(f"leaf_of_row has {len(leaves)} rows, host_lens has {len(lens)}")
    if any(leaf < -1 or leaf >= forest.num_nodes for leaf in leaves):
        raise ValueError("leaf_of_row is out of range [-1, nodes)")
    if any(n < 0 for n in lens):
        raise ValueError("a sequence length is negative")
    order = forest.topological_order()
    parent, length = forest.parent.tolist(), forest.length.tolist()

    depth = node_ends(forest, order)
    for row, leaf in enumerate(leaves):
        while leaf >= 0 and depth[leaf] > lens[row]:
            leaf = parent[leaf]
        leaves[row] = leaf

    count = [0] * len(parent)
    first = [len(leaves)] * len(parent)
    for row, leaf in enumerate(leaves):
        if leaf >= 0:
            count[leaf] += 1
            first[leaf] = min(first[leaf], row)
    for node in reversed(order):
        above = parent[node]
        if above >= 0:
            count[above] += count[node]
            first[above] = min(first[above], first[node])

    segments: list[Segment] = []
    segment_of = [-1] * len(parent)  # deepest segment at or above the node
    for node in order:
        at = segment_of[parent[node]] if parent[node] >= 0 else -1
        if count[node] >= 2 and length[node] > 0:
            if at >= 0 and segments[at].num_rows == count[node]:
                segments[at].end = depth[node]
            else:
                begin = depth[node] - length[node]
                segments.append(Segment(at, begin, depth[node], count[node], first[node], [], []))
                at = len(segments) - 1
        segment_of[node] = at
    home = [segment_of[leaf] if leaf >= 0 else -1 for leaf in leaves]
    for index, segment in enumerate(segments):
        if segment.parent >= 0:
            segments[segment.parent].child_segments.append(index)
    for row, at in enumerate(home):
        if at >= 0:
            segments[at].own_rows.append(row)
    tail_begin = [segments[at].end if at >= 0 else 0 for at in home]
    return SegmentTree(segments, home, tail_begin, lens)
