# SPDX-License-Identifier: MIT
"""Random decode batches: small ones that hypothesis can shrink, large ones from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from cases import CHAINY
from hypothesis import strategies as st

from pat_sglang.cost import A100, H100, H200, CostModel
from pat_sglang.forest import Forest
from pat_sglang.layout import Capacity, capacity_for
from pat_sglang.packing import MAX_HORIZON, Shape

TILE_ROWS = (16, 64, 128)  # written out: the tests must not trust the code's own table


@dataclass(frozen=True)
class Batch:
    """A decode batch as the planner sees it.

    ``path_of_row`` are the nodes of each row from its root, ``depth`` where each node ends.
    """

    forest: Forest
    leaf_of_row: np.ndarray
    host_lens: np.ndarray
    path_of_row: list[list[int]]
    depth: list[int]

    @property
    def rows(self) -> int:
        """Request rows."""
        return len(self.host_lens)

    def __repr__(self) -> str:
        return (
            f"Batch(parent={self.forest.parent.tolist()}, length={self.forest.length.tolist()}, "
            f"leaf_of_row={self.leaf_of_row.tolist()}, host_lens={self.host_lens.tolist()})"
        )


@dataclass(frozen=True)
class Setup:
    """What a planner is made with."""

    shape: Shape
    model: CostModel
    capacity: Capacity


def make_batch(parent: list[int], length: list[int], leaves: list[int], lens: list[int]) -> Batch:
    """Batch of plain lists; walks the parents the slow way."""
    path_of_node: dict[int, list[int]] = {-1: []}
    for leaf in [*range(len(parent)), *leaves]:
        chain = []
        at = leaf
        while at not in path_of_node:
            chain.append(at)
            at = parent[at]
        for node in reversed(chain):
            path_of_node[node] = [*path_of_node[parent[node]], node]
    depth = [sum(length[n] for n in path_of_node[node]) for node in range(len(parent))]
    paths = [path_of_node[leaf] for leaf in leaves]
    forest = Forest(np.array(parent, np.int32), np.array(length, np.int32))
    return Batch(forest, np.array(leaves, np.int32), np.array(lens, np.int32), paths, depth)


def shuffled(
    parent: list[int], length: list[int], leaves: list[int], order: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """The same forest with node i at place ``order[i]``."""
    new_parent, new_length = [0] * len(parent), [0] * len(parent)
    for node, place in enumerate(order):
        new_parent[place] = order[parent[node]] if parent[node] >= 0 else -1
        new_length[place] = length[node]
    return new_parent, new_length, [order[leaf] if leaf >= 0 else -1 for leaf in leaves]


_EDGES = (0, 0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129)
_lengths = st.one_of(st.sampled_from(_EDGES), st.integers(0, 600), st.integers(600, 9000))
_tails = st.one_of(st.just(0), st.just(1), st.integers(0, 90), st.integers(0, 4000))
_lags = st.one_of(st.just(0), st.integers(0, 8), st.integers(0, 3000))


@st.composite
def batches(draw: st.DrawFn, max_nodes: int = 8, max_rows: int = 10, deep: bool = False) -> Batch:
    """Small batches: several roots, empty nodes, equal rows, tails of no token, lagging lengths.

    ``deep``: few branches, rows at every level.
    """
    num_nodes = draw(st.integers(0, max_nodes))
    parent = [
        draw(st.integers(max(node - 2, 0) - 1 if deep else -1, node - 1))
        for node in range(num_nodes)
    ]
    length = [draw(_lengths) for _ in parent]
    rows = draw(st.integers(max_rows // 2 if deep else 1, max_rows))
    anywhere = st.integers(-1, num_nodes - 1)
    last = anywhere if deep else st.integers(max(num_nodes - 2, -1), num_nodes - 1)
    leaves = draw(st.lists(st.one_of(last, anywhere), min_size=rows, max_size=rows))
    depth = [0] * num_nodes
    for node, above in enumerate(parent):
        depth[node] = length[node] + (depth[above] if above >= 0 else 0)
    tails = draw(st.lists(_tails, min_size=rows, max_size=rows))
    lags = draw(st.one_of(st.just([0] * rows), st.lists(_lags, min_size=rows, max_size=rows)))
    lens = [
        max((depth[leaf] if leaf >= 0 else 0) + tail - lag, 0)
        for leaf, tail, lag in zip(leaves, tails, lags, strict=True)
    ]
    if draw(st.booleans()):
        order = draw(st.permutations(range(num_nodes)))
        parent, length, leaves = shuffled(parent, length, leaves, order)
    return make_batch(parent, length, leaves, lens)


def large_batch(seed: int, rows: int, num_nodes: int, kind: str) -> Batch:
    """A batch of many rows.

    Args:
        seed: of everything random.
        rows: request rows.
        num_nodes: distinct nodes.
        kind: "tree" (random), "chain" (one path as deep as there are nodes), "star" (one root),
            "levels" (three levels of equal fan-out).
    """
    rng = np.random.default_rng(seed)
    node = np.arange(num_nodes)
    if kind == "chain":
        parent = node - 1
        length = rng.integers(0, 4, num_nodes)
    elif kind == "star":
        parent = np.where(node == 0, -1, 0)
        length = rng.integers(0, 700, num_nodes)
    elif kind == "levels":
        parent = np.where(node == 0, -1, np.where(node <= 8, 0, 1 + node % 8))
        length = rng.integers(1, 900, num_nodes)
    else:
        parent = np.array([rng.integers(-1, i) if rng.random() < 0.95 else -1 for i in node])
        length = rng.integers(0, 400, num_nodes) * (rng.random(num_nodes) < 0.9)
    leaves = rng.integers(-1, num_nodes, rows)
    batch = make_batch(parent.tolist(), length.tolist(), leaves.tolist(), [0] * rows)
    tails = rng.integers(0, 300, rows) * (rng.random(rows) < 0.9)
    tails[rng.integers(0, rows)] += rng.integers(0, 20000)  # one long row
    lag = rng.integers(0, 9, rows) * (rng.random(rows) < 0.3)
    lens = [
        max((batch.depth[leaf] if leaf >= 0 else 0) + int(tail) - int(late), 0)
        for leaf, tail, late in zip(leaves.tolist(), tails, lag, strict=True)
    ]
    order = rng.permutation(num_nodes).tolist() if seed % 2 else list(range(num_nodes))
    moved = shuffled(parent.tolist(), length.tolist(), leaves.tolist(), order)
    return make_batch(*moved, lens)


large_batches = st.builds(
    large_batch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from((48, 100, 256, 512)),
    num_nodes=st.sampled_from((1, 20, 200, 600)),
    kind=st.sampled_from(("tree", "chain", "star", "levels")),
)

_prices = st.tuples(*[st.integers(1, 4_000_000)] * 3)
_tokens = st.tuples(*[st.integers(1, 100_000)] * 3)
models = st.one_of(
    st.sampled_from((H100, H200, A100, H100.scaled_to(64), CHAINY, replace(CHAINY, num_sms=3))),
    st.builds(
        CostModel,
        num_sms=st.integers(1, 200),
        item_ps=_prices,
        token_ps=_tokens,
        reread_ps=_tokens,
        solo_item_ps=_prices,
        solo_token_ps=_tokens,
        private_token_ps=st.integers(1, 200_000),
        part_ps=st.integers(1, 500_000),
        step_ps=st.one_of(st.integers(1, 1000), st.integers(1, 1_000_000)),
        merge_ps=st.integers(1, 4_000_000),
        provenance=st.just("random"),
    ),
)


def tiles_needed(query_rows: int) -> int:
    """Work items a set of query rows is computed with: full tiles and one for the rest."""
    return -(-query_rows // TILE_ROWS[-1])


@st.composite
def setups(draw: st.DrawFn, batch: Batch, sharing: str | None = None) -> Setup:
    """A planner's setup for a batch, from generous down to the least that is legal."""
    group = draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16, 17, 64, 129, 300)))
    tight = draw(st.integers(0, 3)) == 0
    parts = draw(st.sampled_from((0, 1, 2, 7, 20, 100) if tight else (100, 3000, 100_000)))
    tokens = int(batch.host_lens.astype(np.int64).sum())
    capacity = capacity_for(batch.rows, max(tokens, 1), parts, group, MAX_HORIZON)
    least = batch.rows * tiles_needed(group)
    items = draw(st.sampled_from((least, least + 1, 2 * least))) if tight else capacity.items
    shape = Shape(
        group_size=group,
        num_kv_heads=draw(st.sampled_from((1, 2, 3, 8))),
        max_parts=parts,
        max_items=min(max(items, least), capacity.items),
        sharing=sharing or draw(st.sampled_from(("auto", "auto", "auto", "on", "on", "off"))),
    )
    return Setup(shape, draw(models), capacity)
