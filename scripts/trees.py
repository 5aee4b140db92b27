# SPDX-License-Identifier: MIT
"""Batches with known sharing for benchmarks and checks: the 20 published trees and random forests.

A `Tree` says which rows share which tokens; a `Layout` puts its tokens into the slots of a paged KV
pool. numpy only, everything from a seed, so that a case can be named and made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

# Nodes a level, then tokens of a node a level; the last level holds the requests' own tokens.
# These are the 20 trees of PAT's kernel benchmark (pat.md 5.2), pat01 to pat20.
PUBLISHED = [
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
]
NUM_SHARING = 18  # pat19 and pat20 share nothing


@dataclass(frozen=True)
class Tree:
    """Who shares what. Tokens of a row below its deepest node are the row's own.

    Nodes come parents first. A page that is shared only in part belongs to the deeper node, as in
    an engine whose prefix cache holds whole pages; `at_page_size` says what is left to share.
    """

    name: str
    parent: Ints  # [nodes], -1: a root
    length: Ints  # [nodes] tokens
    leaf: Ints  # [rows] deepest node, -1: the row shares nothing
    seq_lens: Ints  # [rows]

    @property
    def num_rows(self) -> int:
        return len(self.leaf)

    def ends(self) -> Ints:
        """Token position one past each node."""
        end = np.zeros(len(self.parent), np.int32)
        for node, above in enumerate(self.parent):
            end[node] = self.length[node] + (end[above] if above >= 0 else 0)
        return end

    def tail_begins(self) -> Ints:
        """First own token position of each row."""
        end = np.append(self.ends(), np.int32(0))  # leaf -1 reads the last entry
        return end[self.leaf]

    def unique_tokens(self) -> int:
        """KV tokens with every node that a row reaches counted once."""
        shared = self.length[self.reached()].sum()
        return int(shared + (self.seq_lens - self.tail_begins()).sum())

    def reached(self) -> NDArray[np.bool_]:
        """Nodes on the path of some row; a forest may hold others."""
        on_path = np.zeros(len(self.parent), bool)
        on_path[self.leaf[self.leaf >= 0]] = True
        for node in range(len(self.parent) - 1, -1, -1):
            if on_path[node] and self.parent[node] >= 0:
                on_path[self.parent[node]] = True
        return on_path

    def total_tokens(self) -> int:
        """KV tokens as a kernel without sharing reads them."""
        return int(self.seq_lens.sum())

    def at_page_size(self, page_size: int) -> Tree:
        """The sharing that is left when only whole pages are shared."""
        end = self.ends() // page_size * page_size
        begin = (self.ends() - self.length) // page_size * page_size
        return replace(self, length=(end - begin).astype(np.int32))

    def path(self, node: int) -> list[int]:
        """Nodes from the root down to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def levels(self) -> list[tuple[Ints, list[tuple[int, int, int]]]]:
        """Levels of a uniform tree whose rows are in depth-first order.

        For each level: the first row of every node plus the number of rows (qo_indptr), and for
        every node (representative row, begin, end). The last level is the rows' own tokens.
        """
        paths = [self.path(int(leaf)) for leaf in self.leaf]
        depth = len(paths[0])
        if any(len(path) != depth for path in paths):
            raise ValueError(f"{self.name}: rows have paths of different depth")
        ends, levels = self.ends(), []
        for level in range(depth):
            nodes = [path[level] for path in paths]
            first = [row for row in range(len(nodes)) if row == 0 or nodes[row] != nodes[row - 1]]
            if len(set(nodes)) != len(first):
                raise ValueError(f"{self.name}: rows are not in depth-first order")
            spans = [
                (row, int(ends[nodes[row]] - self.length[nodes[row]]), int(ends[nodes[row]]))
                for row in first
            ]
            levels.append((np.array([*first, len(nodes)], np.int32), spans))
        tails = self.tail_begins()
        own = [(row, int(tails[row]), int(self.seq_lens[row])) for row in range(self.num_rows)]
        levels.append((np.arange(self.num_rows + 1, dtype=np.int32), own))
        return levels


@dataclass(frozen=True)
class Layout:
    """Slots of a tree's tokens. Page 0 of the pool is never used (SGLang's padding page)."""

    page_size: int
    num_slots: int  # slots of a pool that holds it, page 0 included
    req_to_token: Ints  # [rows, longest row + reserve], 0 beyond a row's reserved tokens

    def used_slots(self, seq_lens: Ints) -> Ints:
        """Slots that hold a token of a row, each once."""
        columns = np.arange(self.req_to_token.shape[1])
        return np.unique(self.req_to_token[columns < seq_lens[:, None]])

    def stream_slots(self, tree: Tree) -> Ints:
        """Every slot of `tree` that holds a token, once: nodes in their order, then own tokens.

        `tree` is what the layout was made of. This is the order in which a stream reads the cache.
        """
        ends, tails = tree.ends(), tree.tail_begins()
        reader = np.full(len(tree.parent), -1)  # some row below each node
        reader[tree.leaf[tree.leaf >= 0]] = np.flatnonzero(tree.leaf >= 0)
        for node in range(len(tree.parent) - 1, -1, -1):
            if tree.parent[node] >= 0 and reader[node] >= 0:
                reader[tree.parent[node]] = reader[node]
        parts = [
            self.req_to_token[row, end - length : end]
            for row, end, length in zip(reader, ends, tree.length, strict=True)
            if row >= 0
        ]
        parts += [
            self.req_to_token[row, begin:end]
            for row, (begin, end) in enumerate(zip(tails, tree.seq_lens, strict=True))
        ]
        return np.concatenate(parts)

    def page_table(self) -> Ints:
        """[rows, pages]: the page of every page_size-th token."""
        return np.ascontiguousarray(self.req_to_token[:, :: self.page_size] // self.page_size)


def make_layout(
    tree: Tree,
    page_size: int = 1,
    seed: int = 0,
    reserve: int = 0,
    pool_slots: int | None = None,
) -> Layout:
    """Random pages for every node and tail; rows get `reserve` more own tokens to grow into.

    `tree` must be aligned (`at_page_size`). Pages are a random permutation of exactly the pages
    needed, or a random choice among those of a pool of `pool_slots` slots.
    """
    ends, tails = tree.ends(), tree.tail_begins()
    begins = ends - tree.length
    if (ends % page_size).any() or (begins % page_size).any():
        raise ValueError(f"{tree.name}: not aligned to pages of {page_size}; use at_page_size")
    node_pages = np.where(tree.reached(), tree.length, 0) // page_size
    tail_pages = -((tails - tree.seq_lens - reserve) // page_size)
    need = int(node_pages.sum() + tail_pages.sum())
    have = need if pool_slots is None else pool_slots // page_size - 1
    if need > have:
        raise ValueError(f"{tree.name}: needs {need} pages of {page_size}, the pool has {have}")
    pages = np.random.default_rng(seed).permutation(have)[:need].astype(np.int32) + 1
    slots = (pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)).reshape(-1)

    table = np.zeros((tree.num_rows, int(tree.seq_lens.max()) + reserve), np.int32)
    at, node_slots = 0, []
    for count in node_pages:
        node_slots.append(slots[at : at + count * page_size])
        at += count * page_size
    prefix: dict[int, Ints] = {-1: np.empty(0, np.int32)}
    for node, above in enumerate(tree.parent):
        prefix[node] = np.concatenate([prefix[int(above)], node_slots[node]])
    for row, leaf in enumerate(tree.leaf):
        shared, own = prefix[int(leaf)], int(tree.seq_lens[row]) + reserve - int(tails[row])
        table[row, : len(shared)] = shared
        table[row, len(shared) : len(shared) + own] = slots[at : at + own]
        at += int(tail_pages[row]) * page_size
    return Layout(page_size, (have + 1) * page_size, table)


def parse(text: str, name: str | None = None) -> Tree:
    """A tree of the published notation, `nodes a level_tokens a level`; rows depth first."""
    counts, tokens = ([int(x) for x in part.split(",")] for part in text.split("_"))
    if len(counts) != len(tokens) or any(b % a for a, b in pairwise(counts)):
        raise ValueError(f"bad tree {text!r}")
    parent: list[int] = []
    length: list[int] = []
    above = [-1] * counts[0]
    for level, (count, size) in enumerate(zip(counts[:-1], tokens[:-1], strict=True)):
        first = len(parent)
        parent += above
        length += [size] * count
        fan_out = counts[level + 1] // count
        above = [first + i // fan_out for i in range(counts[level + 1])]
    return Tree(
        name or text,
        np.array(parent, np.int32),
        np.array(length, np.int32),
        np.array(above, np.int32),
        np.full(counts[-1], sum(tokens), np.int32),
    )


def published(number: int) -> Tree:
    """Tree 1 to 20 of the published benchmark, named pat01 to pat20."""
    return parse(PUBLISHED[number - 1], f"pat{number:02d}")


def plain(rows: int, tokens: int) -> Tree:
    """Rows of equal length that share nothing."""
    none = np.empty(0, np.int32)
    return Tree(
        f"plain{rows}x{tokens}", none, none, np.full(rows, -1, np.int32),
        np.full(rows, tokens, np.int32),
    )  # fmt: skip


# Random forests


class Builder:
    """Collects nodes and rows, then shuffles the rows."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.parent: list[int] = []
        self.length: list[int] = []
        self.depth: list[int] = []
        self.leaf: list[int] = []
        self.seq_len: list[int] = []

    def node(self, above: int, length: int) -> int:
        self.parent.append(above)
        self.length.append(length)
        self.depth.append(length + (self.depth[above] if above >= 0 else 0))
        return len(self.parent) - 1

    def row(self, leaf: int, tail: int) -> None:
        total = tail + (self.depth[leaf] if leaf >= 0 else 0)
        self.leaf.append(leaf)
        self.seq_len.append(max(total, 1))  # a decode row has at least the token it just wrote

    def log_int(self, low: int, high: int) -> int:
        """Log-uniform in [low, high]: short lengths are as likely as long ones."""
        return round(float(np.exp(self.rng.uniform(np.log(low), np.log(high)))))

    def tree(self, name: str) -> Tree:
        order = self.rng.permutation(len(self.leaf))
        return Tree(
            name,
            np.array(self.parent, np.int32),
            np.array(self.length, np.int32),
            np.array(self.leaf, np.int32)[order],
            np.array(self.seq_len, np.int32)[order],
        )


def _uniform(b: Builder, rows: int) -> None:
    levels = int(b.rng.integers(1, 5))
    above = [-1] * int(b.rng.integers(1, 4))
    for _ in range(levels):
        length, fan_out = b.log_int(1, 700), int(b.rng.integers(1, 5))
        above = [b.node(node, length) for node in above for _ in range(fan_out)]
        if len(above) * 2 > rows:
            break
    tail = int(b.rng.integers(0, 200))
    for row in range(rows):
        b.row(above[row % len(above)], tail)


def _ragged(b: Builder, rows: int) -> None:
    for _ in range(int(b.rng.integers(1, 40))):
        above = int(b.rng.integers(-1, len(b.parent))) if b.parent else -1
        if above >= 0 and b.depth[above] > 3000:
            above = -1
        b.node(above, 0 if b.rng.random() < 0.05 else b.log_int(1, 900))
    for _ in range(rows):
        tail = 0 if b.rng.random() < 0.1 else b.log_int(1, 600)
        b.row(int(b.rng.integers(-1, len(b.parent))), tail)


def _rl_groups(b: Builder, rows: int) -> None:
    system = b.node(-1, b.log_int(16, 800))
    group = int(b.rng.choice([2, 4, 8, 16, 32]))
    prompt = -1
    for row in range(rows):
        if row % group == 0:
            prompt = b.node(system, b.log_int(8, 1500))
        b.row(prompt, b.log_int(1, 900))


def _agents(b: Builder, rows: int) -> None:
    """A trunk of tools and system text; agents fork off it and carry long chains of short turns."""
    trunk = b.node(b.node(-1, b.log_int(100, 1500)), b.log_int(50, 500))
    agents = max(1, rows // int(b.rng.integers(2, 9)))
    tips = []
    for _ in range(agents):
        tip = trunk
        for _ in range(int(b.rng.integers(0, 12))):
            tip = b.node(tip, b.log_int(1, 120))
        tips.append(tip)
    for row in range(rows):
        b.row(tips[row % agents], b.log_int(1, 200))


def _one_long(b: Builder, rows: int) -> None:
    """One row of 32K tokens among short ones, some of which share."""
    prefix = b.node(-1, b.log_int(8, 200))
    for _ in range(rows - 1):
        b.row(prefix if b.rng.random() < 0.5 else -1, b.log_int(1, 200))
    b.row(prefix if b.rng.random() < 0.5 else -1, 32500 - int(b.rng.integers(0, 300)))


def _all_shared(b: Builder, rows: int) -> None:
    """Everything but a last token or so is shared by everybody."""
    node = b.node(-1, b.log_int(64, 8000))
    most = int(b.rng.integers(0, 3))
    for _ in range(rows):
        b.row(node, int(b.rng.integers(0, most + 1)))


def _nothing_shared(b: Builder, rows: int) -> None:
    for _ in range(rows):
        b.row(-1, b.log_int(1, 1500))


def _tails_from_zero(b: Builder, rows: int) -> None:
    """Requests whose whole prompt is cached: tails of length 0, at leaves and at inner nodes."""
    root = b.node(-1, b.log_int(16, 1200))
    inner = [b.node(root, b.log_int(1, 400)) for _ in range(int(b.rng.integers(1, 6)))]
    places = [root, *inner, *[b.node(node, b.log_int(1, 100)) for node in inner]]
    for _ in range(rows):
        b.row(int(b.rng.choice(places)), 0)


def _duplicates(b: Builder, rows: int) -> None:
    """The same prompt many times, with nodes that only one row reaches in between."""
    node = b.node(b.node(-1, b.log_int(1, 300)), b.log_int(1, 300))
    for row in range(rows):
        own = b.node(node, b.log_int(1, 64)) if row % 3 == 0 else node
        b.row(own, int(b.rng.integers(0, 40)))


def _many_roots(b: Builder, rows: int) -> None:
    roots = [b.node(-1, b.log_int(1, 1000)) for _ in range(max(1, rows // 3))]
    for _ in range(rows):
        b.row(int(b.rng.choice([-1, *roots])), b.log_int(1, 500))


def _long_shared(b: Builder, rows: int) -> None:
    node = b.node(b.node(-1, b.log_int(4000, 12000)), b.log_int(1, 3000))
    for _ in range(rows):
        b.row(node, b.log_int(1, 100))


KINDS: dict[str, Callable[[Builder, int], None]] = {
    "uniform": _uniform,
    "ragged": _ragged,
    "rl_groups": _rl_groups,
    "agents": _agents,
    "one_long": _one_long,
    "all_shared": _all_shared,
    "nothing_shared": _nothing_shared,
    "tails_from_zero": _tails_from_zero,
    "duplicates": _duplicates,
    "many_roots": _many_roots,
    "long_shared": _long_shared,
}


def random_tree(kind: str, rows: int, seed: int) -> Tree:
    """A forest of one of KINDS with exactly `rows` rows, in random row order."""
    builder = Builder(np.random.default_rng([seed, *kind.encode()]))
    KINDS[kind](builder, rows)
    return builder.tree(f"{kind}-r{rows}-s{seed}")
