# SPDX-License-Identifier: MIT
"""What the requests of a decode batch share, read from SGLang's prefix tree.

SGLang builds a ForwardBatch from its ScheduleBatch right before every forward, in the scheduler
thread. The hook in feed.py keeps the ScheduleBatch, and the backend has it read here in the same
step: ``reqs`` (the rows, in order) and ``tree_cache``. Sharing follows from node
identity alone; no token and no KV slot is compared. Rows of a running request are locked in the
tree, so their nodes stay.

Why an unchanged signature keeps a plan exact: for a row that stays in the batch, the slots below
its last node change only together with the last node; a node split makes a new *upper* node and
only refines boundaries inside ranges that are shared already.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pat_sglang import envs
from pat_sglang._types import Int32Array
from pat_sglang.forest import Forest

logger = logging.getLogger("pat_sglang")


class BatchStructure(NamedTuple):
    """Rows of one decode batch and the tree nodes that two or more of them share."""

    version: int  # equal versions: same rows, same nodes. Never used again after a change
    reqs: list[Any]  # the request of each row; held, so that identity means something
    forest: Forest | None  # None: nothing is known to be shared
    leaf_of_row: Int32Array | None  # [rows] deepest shared node, -1: none
    no_sharing: str | None  # why the structure is not known; None: it is


class StructureTracker:
    """Turns successive ScheduleBatches into BatchStructures; the same object while unchanged."""

    def __init__(self) -> None:
        self._version = 0
        self._list: list[Any] | None = None  # the scheduler's own list object
        self._reqs: list[Any] = []
        self._nodes: list[Any] = []
        self._members: set[Any] | None = None
        self._structure: BatchStructure | None = None
        self._reader: _TreeReader | None = None

    def expected(self, reqs: list[Any]) -> BatchStructure | None:
        """The last structure, if it was that of the same list: a guess that ``observe`` checks."""
        return self._structure if reqs is self._list and len(reqs) == len(self._reqs) else None

    def observe(self, batch: Any, lens: npt.NDArray[Any]) -> BatchStructure:
        """Structure of a decode ScheduleBatch.

        Args:
            batch: about to run.
            lens: [rows] sequence lengths on the host; a value too small only costs sharing.
        """
        reqs = batch.reqs
        nodes = [req.last_node for req in reqs]
        if reqs is self._list and nodes == self._nodes and reqs == self._reqs:
            # filter_batch and merge_batch bind a new list, and retraction takes a request out of
            # the batch: within one list object rows stay where they are in req_to_token.
            assert self._structure is not None
            return self._structure

        forest, leaf_of_row, unknown = self._read(batch.tree_cache, nodes, lens)
        self._version += 1
        self._list, self._reqs, self._nodes = reqs, list(reqs), nodes
        self._members = None
        self._structure = BatchStructure(self._version, self._reqs, forest, leaf_of_row, unknown)
        return self._structure

    def unknown(self, reason: str) -> BatchStructure:
        """Structure of a step of which nothing can be known; that of the last one is forgotten."""
        self.drop()
        self._version += 1
        return BatchStructure(self._version, [], None, None, reason)

    def drop(self) -> None:
        """Forget the signature: the next decode step plans anew."""
        self._structure = None
        self._list = None
        self._reqs, self._nodes = [], []

    def drop_if_touched(self, reqs: Sequence[Any]) -> None:
        """A forward other than a PAT decode step ran with these requests."""
        if self._structure is None:
            return
        if self._members is None:
            self._members = set(self._reqs)
        if not self._members.isdisjoint(reqs):
            self.drop()

    def _read(
        self, tree: Any, nodes: list[Any], lens: npt.NDArray[Any]
    ) -> tuple[Forest | None, Int32Array | None, str | None]:
        if self._reader is None or self._reader.tree is not tree:
            self._reader = _TreeReader(tree)
        try:
            return self._reader.read(nodes, lens)
        except Exception as error:
            # A wrong guess about a tree must not stop a server that the base would keep running.
            if envs.STRICT.get():
                raise
            reason = f"tree lookup failed: {type(error).__name__}"
            self._reader.warn_once(f"{reason}: {error}")
            return None, None, reason


class _TreeReader:
    """Finds the shared nodes under a list of last nodes, for whichever kind of tree this is."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        inner = getattr(tree, "inner", None)  # StreamingSession wraps the real tree
        self._tree = tree if inner is None else inner
        core = getattr(self._tree, "tree_core", None)
        self._collect = getattr(core, "collect_path_info", None)  # 0.5.22+, both tree cores
        self._resolve = getattr(self._tree, "resolve_node_handle", None)
        self._builder = ForestBuilder()
        self._walkable: dict[type, bool] = {type(None): False}
        self._warned = False

    def read(
        self, nodes: list[Any], lens: npt.NDArray[Any]
    ) -> tuple[Forest | None, Int32Array | None, str | None]:
        """Forest, leaf of each row, and why nothing is known (or None)."""
        if self._tree is None:
            return None, None, "no prefix tree"
        if getattr(self._tree, "disable", False):
            return None, None, "radix cache is off"
        try:
            return (*self._builder.build(nodes, lens), None)
        except AttributeError:  # some are no nodes: ids, opaque handles
            nodes, unknown = self._walkable_nodes(nodes)
        forest, leaf_of_row = self._builder.build(nodes, lens)
        if unknown is not None and forest is None:
            return None, None, unknown
        return forest, leaf_of_row, None

    def warn_once(self, message: str) -> None:
        """One line a tree, however often it goes wrong."""
        if not self._warned:
            self._warned = True
            logger.warning("pat-sglang: %s; decoding without sharing", message)

    def _walkable_nodes(self, nodes: list[Any]) -> tuple[list[Any], str | None]:
        """Nodes with ``parent`` and ``key``, None for those that cannot be walked, and why not."""
        unknown = None
        if any(type(node) is int for node in nodes):
            nodes = self._resolve_ids(nodes)
        for kind in set(map(type, nodes)):
            if kind not in self._walkable:
                example = next(node for node in nodes if type(node) is kind)
                self._walkable[kind] = hasattr(example, "parent") and hasattr(example, "key")
            if not self._walkable[kind]:
                nodes = [None if type(node) is kind else node for node in nodes]
                if kind is not type(None):
                    unknown = f"nodes of type {kind.__name__} are opaque"
        return nodes, unknown

    def _resolve_ids(self, nodes: list[Any]) -> list[Any]:
        """Node objects for the integer ids of the unified trees."""
        if self._collect is not None:
            return self._nodes_of_paths(nodes)
        if self._resolve is None:
            return [None if type(node) is int else node for node in nodes]
        resolve = self._resolve
        return [resolve(node) if type(node) is int else node for node in nodes]

    def _nodes_of_paths(self, nodes: list[Any]) -> list[Any]:
        """Stand-ins for nodes that live in a tree core without node objects (Rust)."""
        assert self._collect is not None
        ids = list(dict.fromkeys(node for node in nodes if type(node) is int))
        root = _PathNode(None, range(0))
        known: dict[int, _PathNode] = {}
        last: dict[int, _PathNode] = {}
        for node_id, path in zip(ids, self._collect(ids), strict=True):
            above = root
            for info in path:
                node = known.get(info.node_id)
                if node is None:
                    node = _PathNode(above, range(info.path_start, info.path_end))
                    known[info.node_id] = node
                above = node
            last[node_id] = above
        return [last[node] if type(node) is int else node for node in nodes]


@dataclass(frozen=True, eq=False)
class _PathNode:
    """What a forest needs of a tree node: its parent and the length of its key."""

    parent: _PathNode | None
    key: range


class ForestBuilder:
    """Makes forests of successive batches; keeps what a change of the batch leaves as it was.

    Rows come and go all the time, the nodes that several of them share far more rarely. The forest
    is kept while no row joins that shares a node it does not have, and may then have nodes that
    only one row is left to pass. For a row that stays nothing is done but to find it again.
    """

    def __init__(self) -> None:
        self._shared = _SharedNodes([])

    def build(
        self, nodes: Sequence[Any], lens: npt.NDArray[Any]
    ) -> tuple[Forest | None, Int32Array | None]:
        """The nodes that at least two rows pass through.

        Args:
            nodes: the last node of each row, with ``parent`` and ``key``; None: no path.
            lens: [rows] sequence lengths; a row's path ends at the deepest node that leaves at
                least the token being decoded outside.

        Returns:
            ``(None, None)`` when nothing is shared. Parents come before children in the forest.
        """
        shared = self._shared
        if not shared.follow(nodes):
            shared = self._shared = _SharedNodes(nodes)
        if shared.forest is None:  # rows meet at the root at most
            return None, None
        leaf_of_row = np.frombuffer(shared.leaf_of_row, np.int32)
        if lens[lens.argmin()] <= shared.deepest:  # min() goes a longer way
            leaf_of_row = leaf_of_row.copy()
            for row in np.flatnonzero(shared.depth[leaf_of_row] >= lens):
                leaf_of_row[row] = shared.lifted(int(leaf_of_row[row]), int(lens[row]) - 1)
        return shared.forest, leaf_of_row


class _SharedNodes:
    """The nodes that at least two rows of a batch pass, as a forest.

    Nodes of one row only are left out before their length is asked for: at 256 rows that is the
    difference between 9 and 265 calls of a Python ``__len__``.

    Attributes:
        forest: None when nothing is shared.
        leaf_of_row: index of the deepest shared node at or above each row's last node, -1: none.
        leaf: the same by last node, of the rows that are here and of some that were.
        depth: int64 ``[nodes + 1]``, tokens from the root to each node's end; the last one, which
            -1 picks, is 0.
        deepest: the largest of them.
    """

    def __init__(self, nodes: Sequence[Any]) -> None:
        # None, above every root, counts as seen: each walk then ends at exactly one test a node.
        seen: set[Any] = {None}
        meets = []  # where each row runs into the path of an earlier one
        for node in nodes:
            while node not in seen:
                seen.add(node)
                node = node.parent
            meets.append(node)

        self._index: dict[Any, int] = {None: -1}
        self._nodes: list[Any] = []
        self._parents: list[int] = []
        for node in dict.fromkeys(meets):
            self._add_path(node)
        self._lengths = self._read_lengths()
        depths: list[int] = []
        for parent, length in zip(self._parents, self._lengths, strict=True):
            depths.append(length + (depths[parent] if parent >= 0 else 0))
        self.depth = np.array([*depths, 0])
        self.deepest = max(depths, default=0)
        self.forest: Forest | None = None
        if self._nodes:
            parents = np.array(self._parents, np.int32)
            self.forest = Forest(parents, np.array(self._lengths, np.int32))

        self.leaf: dict[Any, int] = {}
        for last in nodes:
            node = last
            while node not in self._index:
                node = node.parent
            self.leaf[last] = self._index[node]
        self._most_leaves = 2 * len(self.leaf) + 64
        self._last_nodes = nodes
        self.leaf_of_row = array("i", [self.leaf[last] for last in nodes])

    def follow(self, nodes: Sequence[Any]) -> bool:
        """Takes in the rows of the next batch; False: they share other nodes, make them anew."""
        gone = _rows_gone(self._last_nodes, nodes)
        kept = len(self._last_nodes) - len(gone)
        if not (
            self._take_in(nodes, kept)
            and len(self.leaf) <= self._most_leaves  # most of those rows are gone
            and self._lengths == self._read_lengths()  # a node was split
        ):
            return False
        leaf_of_row = self.leaf_of_row[:]
        for row in reversed(gone):
            del leaf_of_row[row]
        leaf_of_row.extend([self.leaf[last] for last in nodes[kept:]])
        self._last_nodes, self.leaf_of_row = nodes, leaf_of_row
        return True

    def lifted(self, leaf: int, limit: int) -> int:
        """The deepest node at or above ``leaf`` that ends within ``limit`` tokens, -1: none."""
        while leaf >= 0 and self.depth[leaf] > max(limit, 0):
            leaf = self._parents[leaf]
        return leaf

    def _take_in(self, nodes: Sequence[Any], kept: int) -> bool:
        """Whether the rows after the first ``kept``, which are new, share no other nodes."""
        returns = False
        for last in nodes[kept:]:
            if last not in self.leaf:
                if not self._joins(last):
                    return False
            elif last not in self._index:
                returns = True
        return not returns or self._ends_differ(nodes)

    def _joins(self, last: Any) -> bool:
        """Takes in a row that ends in a node of ours, or in one of its own right below.

        Any other row passes a node that is not ours and may be another row's, and so does one
        whose last node has others below it.
        """
        if last not in self._index:
            if last.parent not in self._index or getattr(last, "children", True):
                return False
            self.leaf[last] = self._index[last.parent]
        else:
            self.leaf[last] = self._index[last]
        return True

    def _ends_differ(self, nodes: Sequence[Any]) -> bool:
        """Whether no two rows end in the same node that is not ours."""
        private = [node for node in nodes if node not in self._index]
        return len(set(private)) == len(private)

    def _add_path(self, node: Any) -> None:
        """``node`` and what is above it, from the top; the root holds no tokens."""
        path = []
        while node not in self._index:
            path.append(node)
            node = node.parent
        if node is None and path:
            self._index[path.pop()] = -1
        for at in reversed(path):
            self._parents.append(self._index[at.parent])
            self._index[at] = len(self._nodes)
            self._nodes.append(at)

    def _read_lengths(self) -> list[int]:
        return [len(node.key) for node in self._nodes]


def _rows_gone(before: Sequence[Any], now: Sequence[Any]) -> list[int]:
    """Indices in ``before`` of what ``now`` does not begin with: the others are its first rows.

    As filter_batch and merge_batch leave a batch: rows that stay keep their order, new ones come
    behind them. A row that is found anywhere else has gone and come back.
    """
    gone = []
    rest = iter(before)
    for node, other in zip(now, rest, strict=False):
        while other is not node:
            gone.append(len(before) - length_hint(rest) - 1)
            other = next(rest, node)
    gone.extend(range(len(before) - length_hint(rest), len(before)))
    return gone
