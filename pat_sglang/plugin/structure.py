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
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
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
            self._reader.forget()
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
        self.forget()
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
        if self._paths is not None:
            nodes = self._paths.follow(nodes)
        try:
            return (*self._builder.build(nodes, lens), None)
        except AttributeError:  # some are no nodes: ids, opaque handles
            nodes, unknown = self._walkable_nodes(nodes)
        forest, leaf_of_row = self._builder.build(nodes, lens)
        if unknown is not None and forest is None:
            return None, None, unknown
        return forest, leaf_of_row, None

    def forget(self) -> None:
        """Starts anew, as after a reading that failed halfway."""
        self._paths = None if self._collect is None else _KnownPaths(self._collect)
        self._builder = ForestBuilder()

    def warn_once(self, message: str) -> None:
        """One line a tree, however often it goes wrong."""
        if not self._warned:
            self._warned = True
            logger.warning("pat-sglang: %s; decoding without sharing", message)

    def _walkable_nodes(self, nodes: list[Any]) -> tuple[list[Any], str | None]:
        """Nodes with parent, key and children, None for those that have not, and why not."""
        unknown = None
        if self._resolve is not None:
            resolve = self._resolve
            nodes = [resolve(node) if type(node) is int else node for node in nodes]
        for kind in set(map(type, nodes)):
            if kind not in self._walkable:
                example = next(node for node in nodes if type(node) is kind)
                self._walkable[kind] = all(
                    hasattr(example, name) for name in ("parent", "key", "children")
                )
            if not self._walkable[kind]:
                nodes = [None if type(node) is kind else node for node in nodes]
                if kind is not type(None):
                    unknown = f"nodes of type {kind.__name__} are opaque"
        return nodes, unknown


class _KnownPaths:
    """Stand-ins for the nodes that rows pass in a tree core without node objects (Rust).

    The core is asked only for the paths of last nodes that are new. What it said of others stays
    true: it gives ids in ascending order and none twice, a node ends where it always did, nodes of
    running rows are not evicted, and a split puts a new node above the old one, which keeps its id.
    So all that a known path can lack are nodes which splits have put into it since. They part no
    two known paths, for a split node was on both or on one of them. A new path may end in such a
    node or leave there: then the known nodes below it are asked for again.
    """

    def __init__(self, collect: Any) -> None:
        self._collect = collect
        self._root = _PathNode(-1, 0)
        self._nodes: dict[int, _PathNode] = {}
        self._last: dict[Any, _PathNode] = {}  # the last nodes of rows

    def follow(self, nodes: list[Any]) -> list[Any]:
        """Stand-ins for the ids among the last nodes of a batch; forgets what no row passes."""
        # Forgotten first: ids of rows that are gone may be unknown to the core by now.
        for last in self._last.keys() - set(nodes):
            self._forget(self._last.pop(last))
        new = [node for node in nodes if node not in self._last and type(node) is int]
        if new:
            self._add(list(dict.fromkeys(new)))
        return [self._last.get(node, node) for node in nodes]

    def _forget(self, node: _PathNode) -> None:
        """``node`` and what is above it, as far as no row passes."""
        while node.parent is not None and not node.children and node.id not in self._last:
            del self._nodes[node.id]
            node.parent.children.remove(node)
            node = node.parent

    def _add(self, ids: list[int]) -> None:
        new: dict[_PathNode, float] = {}
        for last, path in zip(ids, self._collect(ids), strict=True):
            self._last[last] = self._hang(path, new)
        newest: dict[_PathNode, int] = {}
        for node, num_children in new.items():
            if num_children > len(node.children):  # and known nodes may be among the others
                top, above = node, node.parent
                while above in new:
                    top, above = above, above.parent
                assert above is not None
                newest[above] = max(top.id, newest.get(above, -1))
        # Known nodes below a new one hang where its topmost new ancestor does, and are older: else
        # that one would have been on their paths.
        stale = [
            node.id
            for above, newest_id in newest.items()
            for node in above.children
            if node.id < newest_id and node not in new
        ]
        for path in self._collect(stale) if stale else ():
            self._hang(path, new)

    def _hang(self, path: Sequence[Any], new: dict[_PathNode, float]) -> _PathNode:
        """Puts each node of a path below the one before it; returns the last.

        Args:
            path: TreePathNodeInfo from the top.
            new: takes the number of children in the tree of each node not known before.
        """
        above = self._root
        for info in path:
            node = self._nodes.get(info.node_id)
            if node is None:
                node = self._nodes[info.node_id] = _PathNode(info.node_id, info.path_end)
                new[node] = getattr(info, "num_children", math.inf)  # 0.5.22 does not say
            if node.parent is not above:
                if node.parent is not None:
                    node.parent.children.remove(node)
                node.parent = above
                above.children.add(node)
            above = node
        return above


@dataclass(eq=False, slots=True)
class _PathNode:
    """What a forest needs of a tree node."""

    id: int
    end: int  # tokens from the root
    parent: _PathNode | None = None  # the root's alone stays None
    children: set[_PathNode] = field(default_factory=set)  # that rows pass

    @property
    def key(self) -> range:
        """As long as the node's key, given the nodes that are known."""
        return range(0 if self.parent is None else self.parent.end, self.end)


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
        """Takes in a row that ends in a node of ours, or below one in nodes that only it passes.

        Nodes that are not ours are its own if none has another child and no row ends in one.
        """
        node, below = last, 0
        while node not in self._index:
            if len(node.children) > below or node in self.leaf:
                return False
            node, below = node.parent, 1
        self.leaf[last] = self._index[node]
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
