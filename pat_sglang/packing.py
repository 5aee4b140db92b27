# SPDX-License-Identifier: MIT
"""Segments -> packs -> work items: which rows read which KV run together, and how it is cut.

This is the readable oracle of ``csrc/host``; both give equal words for equal input
(tests/test_planner.py). All arithmetic is on integers.

A *pack* is a set of rows and a range of token positions ``[start, end)`` on the path they share;
the range may span several consecutive segments (levels that were merged). A pack is cut into tiles
of query rows, and along the tokens into chunks. Three kinds of packs cover all tokens of all rows:

* A *plain* pack reads a shared run for all its rows.
* A *chain* pack has all rows below its segment. It reads the run they share, and then, 16 query
  rows (a *fragment*) at a time, everything below that run: each deeper segment and each tail is a
  *step* of the fragments whose rows own it. The softmax state stays on the chip, so a row of a
  chain that starts at position 0 has no partial. Rows are in depth-first order of the segments,
  so that the rows of a segment lie side by side.
* A *tail* pack has one row. It starts where the last pack above it ended and grows while the row
  decodes. The tail of a row in a chain is a step of the chain, unless it is so long that it would
  delay the chain: then it is *separated*, a tail pack like those of rows outside chains. A chain
  that is left without a step is a plain pack.

Packs are ordered: shared packs (plain or chain) by segment, then tail packs by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

from .cost import ALL_TILES, FRAGMENT_ROWS, ITEM_WARPS, TILES, CostModel, tiles_of
from .forest import SegmentTree

MAX_INHERIT = 4  # how many stops of a tree one pack may span, beyond its own segment
MAX_CHAIN_DEPTH = 4  # levels of segments a chain may have below its shared run
MAX_CHAIN_GROUP = 64  # query heads per KV head beyond which there are no chains
MIN_CHUNK = 64  # tokens: no run is cut finer, and every cut is a multiple of CHUNK_ALIGN
CHUNK_ALIGN = 64
PART_SCALES = (1, 4, 16, 64)  # price of partials, raised until a plan fits the workspace
MAX_PART_SCALE = 16_384  # beyond it no run is worth a partial, and sums would pass 64 bits
STRIDE_FACTOR = 4  # how much farther apart stops are placed when no price is enough (2: slower)
WALLS = (0, 32, 24, 16, 12, 8, 4, 2, 1)  # tried limits of an item's solo time, 1/16 of the mean
NO_LIMIT = 1 << 100  # ps; wall 0
PIECES_PER_SM = (2, 2, 1)  # work items of each tile that an SM computes side by side
WAVES_IN_STEP = 8  # after so many waves, items of one length end at any time
MAX_HORIZON = 256  # tokens


@dataclass(frozen=True)
class Shape:
    """What the planner must know of the attention layer and the buffers.

    Attributes:
        group_size: query heads per KV head.
        num_kv_heads: KV heads; every work item is computed once for each.
        max_parts: partial slots of the workspace (one slot: all query heads of one row).
        max_items: work items the plan buffer holds.
        sharing: "auto" (cheaper of shared and unshared), "on" (every shared run is read by packs,
            unless that does not fit the workspace) or "off".
    """

    group_size: int
    num_kv_heads: int
    max_parts: int
    max_items: int
    sharing: str = "auto"


@dataclass(frozen=True)
class Search:
    """What the planner may choose from; benchmarks narrow it to see what a choice is worth.

    Attributes:
        chains: whether there may be chains.
        walls: limits of a work item's solo time that are tried, in 1/16 of the mean; 0: none.
        chain_rows: query rows of a chain's work items that are tried, largest first, and (unless
            sharing is "on") halvings of the last.
        tiles: indices of the tiles that may be used, ascending.
        without_chains: whether packs without any chain are tried too where chains were chosen.
    """

    chains: bool = True
    walls: tuple[int, ...] = WALLS
    chain_rows: tuple[int, ...] = (128, 64, 16)
    tiles: tuple[int, ...] = ALL_TILES
    without_chains: bool = True


@dataclass(frozen=True)
class Pack:
    """Rows that read the token positions ``[start, end)`` of one path together.

    ``segment`` is the deepest segment of the range (the home segment of the row for a tail, -1 if
    it has none). A tail covers ``[start, end + horizon)`` as its row grows. For a chain the range
    is its shared run, the rows are all rows of the segment, depth first.
    """

    rows: tuple[int, ...]
    start: int
    end: int
    segment: int
    is_tail: bool = False
    is_chain: bool = False


@dataclass(frozen=True)
class Cut:
    """How a pack is cut: along the tokens, and a chain also along its rows.

    Attributes:
        chunk: tokens of a chunk; the last one is shorter, or takes what a tail grows. A tail that
            is cut short has extra chunks, empty at first, for that.
        num_chunks: chunks. All but the last of a chain are those of a plain pack.
        rows_per_item: request rows of a chain's work item; 0: not a chain.
        separated: rows of a chain whose tails are packs of their own.
    """

    chunk: int
    num_chunks: int
    rows_per_item: int = 0
    separated: frozenset[int] = frozenset()


class Step(NamedTuple):
    """One private run of a fragment, read by query rows ``[lo, hi)`` of the fragment."""

    segment: int  # -1: the tail of `row`
    row: int  # first request row
    lo: int
    hi: int


@dataclass(frozen=True)
class Packing:
    """Packs, ordered, and how each is cut."""

    packs: list[Pack]
    cuts: list[Cut]
    tiles: tuple[int, ...]
    horizon: int
    sharing: bool
    coarsened: int
    predicted_ps: int

    @property
    def num_splits(self) -> int:
        """Chunks beyond the first of every pack."""
        return sum(cut.num_chunks - 1 for cut in self.cuts)


def chain_items(
    tree: SegmentTree, pack: Pack, cut: Cut, group: int
) -> list[tuple[tuple[int, ...], list[list[Step]]]]:
    """Work items of a chain: their request rows, and for each fragment its steps.

    Items are consecutive rows of the pack, fragments 16 consecutive query rows of an item (a row
    may lie in two). Steps are in the order of the rows: for each row the segments of its path that
    the fragment has not had yet, from the top down, then its tail, also if that is empty so far.
    """
    paths: dict[int, list[int]] = {pack.segment: []}
    items = []
    for first in range(0, len(pack.rows), cut.rows_per_item):
        rows = pack.rows[first : first + cut.rows_per_item]
        fragments = []
        for begin in range(0, len(rows) * group, FRAGMENT_ROWS):
            end = min(begin + FRAGMENT_ROWS, len(rows) * group)
            steps: list[Step] = []
            step_of: dict[int, int] = {}  # of a segment
            for i in range(begin // group, (end - 1) // group + 1):
                row = rows[i]
                lo, hi = max(i * group, begin) - begin, min((i + 1) * group, end) - begin
                for segment in _path_below(tree, pack.segment, tree.home[row], paths):
                    at = step_of.setdefault(segment, len(steps))
                    if at == len(steps):
                        steps.append(Step(segment, row, lo, hi))
                    else:
                        steps[at] = steps[at]._replace(hi=hi)
                if row not in cut.separated:
                    steps.append(Step(-1, row, lo, hi))
            fragments.append(steps)
        items.append((rows, fragments))
    return items


def _path_below(tree: SegmentTree, top: int, home: int, known: dict[int, list[int]]) -> list[int]:
    """Segments strictly below ``top`` down to ``home``."""
    if home not in known:
        above = _path_below(tree, top, tree.segments[home].parent, known)
        known[home] = [*above, home]
    return known[home]


def step_tokens(tree: SegmentTree, step: Step) -> int:
    """Tokens of a step, without the horizon."""
    if step.segment < 0:
        return tree.lens[step.row] - tree.tail_begin[step.row]
    segment = tree.segments[step.segment]
    return segment.end - segment.begin


def private_span(tree: SegmentTree, fragments: list[list[Step]], kind: int) -> int:
    """Time that the steps of a work item take, in tokens of the narrow tile.

    The warps of a narrow item (``kind`` 0) share its steps. Of any other item each fragment is
    computed by one warp, which alone is as many times slower as there are warps: the one with most
    tokens counts.
    """
    of_warp = [0] * ITEM_WARPS
    for f, steps in enumerate(fragments):
        of_warp[f % ITEM_WARPS] += sum(step_tokens(tree, step) for step in steps)
    return of_warp[0] if kind == 0 else ITEM_WARPS * max(of_warp)


class Load(NamedTuple):
    """Equal work items, for one KV head.

    Attributes:
        tile: tile index.
        items: their number.
        solo_ps: solo time of the longest.
        work_ps: SM time of all of them, with their partials.
    """

    tile: int
    items: int
    solo_ps: int
    work_ps: int


def _bucket(solo_ps: int) -> int:
    """Quarter octave of a solo time, ascending."""
    x = max(solo_ps, 8)
    bits = x.bit_length()
    return 4 * bits + (x >> (bits - 3) & 3)


def predict(loads: list[Load], num_kv_heads: int, num_sms: int) -> int:
    """Time (ps) in which the GPU is done with all work items, longest first, for every KV head.

    A bound of list scheduling. No plan is faster than its SM time spread over all SMs. And an item
    ends no later than it starts, plus its solo time. It starts at once if it fits on the GPU
    beside all that are as long or longer; else when the work of those before it is spread over
    the SMs. While others keep the memory busy, up to the mean of all work, it lasts an eighth
    longer than its solo time: without that, plans with long items seemed as good as those with
    short ones, and took up to 7 % longer (csrc/README.md). Where all items together fill at most
    half of the GPU, none shares its SM, and narrow ones, which wait for memory more than for the
    SM, last three quarters of their solo time. Items of one length run in waves, which
    is the better bound when the GPU holds many of them at a time. They fall out of step: after many
    waves the last of them ends about an eighth of its solo time behind the mean, as too few are
    left by then to keep the memory busy (csrc/README.md). Adding the longest solo time to the mean
    of all work instead would be right only if the longest item started last: much too pessimistic
    for long items that start first.

    To be spared a sort, items are as long as each other if their solo times are in the same quarter
    octave; the last of them then starts behind all the others, and is the longest.
    """
    buckets: dict[int, list[Load]] = {}
    for load in loads:
        buckets.setdefault(_bucket(load.solo_ps), []).append(load)
    at_once_ps = end_ps = 0  # the longest that starts at once; the last end of the others
    eighths = work_ps = 0  # eighths of an SM; of the longer buckets
    for _, bucket in sorted(buckets.items(), reverse=True):
        longest_ps = max(load.solo_ps for load in bucket)
        of_bucket = sum(load.items * 8 // PIECES_PER_SM[load.tile] for load in bucket)
        of_bucket_ps = sum(load.work_ps for load in bucket)
        before_ps = work_ps * num_kv_heads // num_sms
        eighths += of_bucket
        work_ps += of_bucket_ps
        if eighths * num_kv_heads <= 8 * num_sms:
            at_once_ps = max(at_once_ps, longest_ps)
            continue
        last_ps = of_bucket_ps // sum(load.items for load in bucket)
        start_ps = (work_ps * num_kv_heads - last_ps) // num_sms
        waves = -(-of_bucket * num_kv_heads // (8 * num_sms))
        done_ps = work_ps * num_kv_heads // num_sms
        drain_ps = longest_ps // (8 * WAVES_IN_STEP) * min(waves, WAVES_IN_STEP)
        by_wave_ps = min(start_ps + longest_ps, before_ps + waves * longest_ps)
        end_ps = max(end_ps, by_wave_ps, done_ps + drain_ps)
    if eighths * num_kv_heads <= 4 * num_sms:
        at_once_ps = max(
            (load.solo_ps if load.tile else load.solo_ps * 3 // 4 for load in loads), default=0
        )
    mean_ps = work_ps * num_kv_heads // num_sms
    return max(mean_ps, at_once_ps, min(mean_ps, at_once_ps) * 9 // 8, end_ps)


class _Pricer:
    """Integer cost of packs under one price of partials."""

    def __init__(self, shape: Shape, model: CostModel, search: Search, part_scale: int) -> None:
        self.group = shape.group_size
        self.model = model
        self.tiles = search.tiles
        self.query_part_ps = model.part_ps * part_scale  # one part of one query row
        self.part_ps = self.query_part_ps * self.group  # one part of one row
        most = TILES[search.tiles[-1]].rows
        caps = [rows // self.group for rows in search.chain_rows if rows <= most]
        if shape.sharing == "on":  # an item of one row would share nothing
            caps = [rows for rows in caps if rows > 1]
        else:
            caps = [rows for rows in caps if rows > 0]
            while caps and caps[-1] > 1:
                caps.append(caps[-1] // 2)
        self.chain_rows = caps  # request rows of a chain's items, widest first
        self.has_chains = search.chains and self.group <= MAX_CHAIN_GROUP and bool(caps)
        self._item: list[int] = [0]  # by rows of the pack
        self._token: list[int] = [0]

    def kinds(self, rows: int) -> list[int]:
        """Tile index of each work item of a chunk."""
        return tiles_of(rows * self.group, self.tiles)

    def _extend(self, rows: int) -> None:
        for n in range(len(self._item), rows + 1):
            kinds = self.kinds(n)
            self._item.append(sum(self.model.item_ps[k] for k in kinds))
            first, *others = kinds
            self._token.append(
                self.model.token_ps[first] + sum(self.model.reread_ps[k] for k in others)
            )

    def item(self, rows: int) -> int:
        """SM time of a pack before its first token."""
        self._extend(rows)
        return self._item[rows]

    def token(self, rows: int) -> int:
        """SM time a token of a pack."""
        self._extend(rows)
        return self._token[rows]

    def shared(self, rows: int, tokens: int) -> int:
        """A shared pack with the partials it leaves; nothing when no row is left in it."""
        if rows == 0:
            return 0
        return self.item(rows) + tokens * self.token(rows) + rows * self.part_ps

    def tail(self, start: int, end: int) -> int:
        """A row's own pack; it leaves a partial only if the row has parts above ``start``."""
        return (
            self.item(1) + max(end - start, 0) * self.token(1) + (self.part_ps if start > 0 else 0)
        )

    def chain(self, rows: int, tokens: int, below_ps: int) -> int:
        """A chain without its partials; ``below_ps`` is what its steps cost."""
        return self.item(rows) + tokens * self.token(rows) + below_ps

    def steps_below(self, tree: SegmentTree) -> list[int]:
        """For each segment the steps a chain has below it, as if nothing were cut."""
        model, below = self.model, [0] * len(tree.segments)
        for u in range(len(tree.segments) - 1, -1, -1):
            segment = tree.segments[u]
            for row in segment.own_rows:
                tail = tree.lens[row] - segment.end
                below[u] += tail * model.token_ps[0] + model.step_ps
            for v in segment.child_segments:
                child = tree.segments[v]
                fragments = -(-child.num_rows * self.group // FRAGMENT_ROWS)
                token_ps = model.token_ps[0] + (fragments - 1) * model.reread_ps[0]
                below[u] += (child.end - child.begin) * token_ps
                below[u] += fragments * model.step_ps + below[v]
        return below


def choose_packs(
    tree: SegmentTree, pricer: _Pricer, forced: bool = False, stride: int = 1
) -> list[Pack]:
    """Packs of least additive cost: for every segment, which children take its run along.

    The segments of every ``stride``-th level are *stops*: a pack starts at its own segment or at
    one of the nearest ``MAX_INHERIT`` stops above it. ``cost[u][j]`` is the least cost of
    everything below and including segment u when its pack starts at the j-th of them (0: at u
    itself). Either u starts a chain, which takes all rows below u; or the pack is a plain one: a
    child that *merges* then extends its own pack (or tail) upwards and leaves the pack of its
    parent; children are taken in the order of what merging costs a row, and the best number of
    them is kept. A plain pack wins a tie. ``forced``: no row takes a shared run into its tail,
    whatever it costs.

    Returns:
        Shared packs by segment, then the tails of the rows outside chains.
    """
    segments = tree.segments
    starts: list[list[int]] = []
    is_stop = [depth % stride == 0 for depth in _depths(tree)]
    for segment in segments:
        above: list[int] = []
        if (above_u := segment.parent) >= 0:
            above = starts[above_u][0 if is_stop[above_u] else 1 :][:MAX_INHERIT]
        starts.append([segment.begin, *above])
    depth_below = [0] * len(segments)  # levels of segments
    for u in range(len(segments) - 1, 0, -1):
        if (above_u := segments[u].parent) >= 0:
            depth_below[above_u] = max(depth_below[above_u], depth_below[u] + 1)
    below = pricer.steps_below(tree)

    cost: list[list[int]] = [[0] * len(s) for s in starts]
    merges_segment: list[list[bool]] = [[False] * (len(s) + 1) for s in starts]  # [v][j of parent]
    merged_rows: list[list[int]] = [[0] * len(s) for s in starts]  # how many own rows merge
    is_chain: list[list[bool]] = [[False] * len(s) for s in starts]
    for u in range(len(segments) - 1, -1, -1):
        segment = segments[u]
        for j, start in enumerate(starts[u]):
            below_j = j + is_stop[u]  # which of a child's starts this is, 0: none
            tokens = segment.end - start
            total = 0
            # (extra cost a row, kind, index, extra cost, rows): ties go to segments, then by index
            options: list[tuple[int, int, int, int, int]] = []
            for v in segment.child_segments:
                total += cost[v][0]
                if 0 < below_j < len(starts[v]):
                    extra = cost[v][below_j] - cost[v][0]
                    rows = segments[v].num_rows
                    options.append((extra // rows, 0, v, extra, rows))
            for row in segment.own_rows:
                split = pricer.tail(segment.end, tree.lens[row])
                total += split
                if not forced:
                    extra = pricer.tail(start, tree.lens[row]) - split
                    options.append((extra, 1, row, extra, 1))
            options.sort()
            left = segment.num_rows
            best, best_count = total + pricer.shared(left, tokens), 0
            for count, (_, _, _, extra, rows) in enumerate(options, 1):
                total += extra
                left -= rows
                candidate = total + pricer.shared(left, tokens)
                if candidate < best:
                    best, best_count = candidate, count
            for _, kind, index, _, _ in options[:best_count]:
                if kind == 0:
                    merges_segment[index][j] = True
                else:
                    merged_rows[u][j] += 1
            if pricer.has_chains and depth_below[u] <= MAX_CHAIN_DEPTH:
                chain = pricer.chain(segment.num_rows, tokens, below[u])
                chain += segment.num_rows * pricer.part_ps if start > 0 else 0
                if chain < best:
                    best, is_chain[u][j] = chain, True
            cost[u][j] = best

    # Top-down: with which start each segment is computed, then which packs each row is in.
    level = [0] * len(segments)
    chain_of = [-1] * len(segments)  # segment whose chain takes this one along
    for v, segment in enumerate(segments):
        u = segment.parent
        level[v] = level[u] + is_stop[u] if u >= 0 and merges_segment[v][level[u]] else 0
        chain_of[v] = chain_of[u] if u >= 0 else -1
        if chain_of[v] < 0 and is_chain[v][level[v]]:
            chain_of[v] = v
    in_pack: list[list[int]] = [[] for _ in segments]
    tail_packs: list[Pack] = []
    own_seen = [0] * len(segments)
    for row, home in enumerate(tree.home):
        if home < 0:
            tail_packs.append(Pack((row,), 0, tree.lens[row], -1, is_tail=True))
            continue
        below_merged = False
        u = chain_of[home]
        if u < 0:
            u = home
            own_seen[u] += 1
            below_merged = own_seen[u] <= merged_rows[u][level[u]]
            start = starts[u][level[u]] if below_merged else segments[u].end
            tail_packs.append(Pack((row,), start, tree.lens[row], u, is_tail=True))
        while u >= 0:
            if not below_merged:
                in_pack[u].append(row)
            below_merged = level[u] > 0
            u = segments[u].parent
    packs = []
    for u, rows_of_u in enumerate(in_pack):
        if rows_of_u:
            is_one = chain_of[u] == u
            rows_of_u = _depth_first(tree, u) if is_one else rows_of_u
            start = starts[u][level[u]]
            packs.append(Pack(tuple(rows_of_u), start, segments[u].end, u, is_chain=is_one))
    return packs + tail_packs


def _depths(tree: SegmentTree) -> list[int]:
    """Levels of segments above each segment."""
    depths: list[int] = []
    for segment in tree.segments:
        depths.append(depths[segment.parent] + 1 if segment.parent >= 0 else 0)
    return depths


def _depth_first(tree: SegmentTree, u: int) -> list[int]:
    """All rows below a segment: those of its child segments, one after the other, then its own."""
    segment = tree.segments[u]
    below = [row for v in segment.child_segments for row in _depth_first(tree, v)]
    return below + segment.own_rows


def unshared_packs(tree: SegmentTree) -> list[Pack]:
    """One tail a row that covers all its tokens: the plan of a kernel that knows no prefixes."""
    return [Pack((row,), 0, n, tree.home[row], is_tail=True) for row, n in enumerate(tree.lens)]


def _cut(tokens: int, room: int) -> tuple[int, int]:
    """(chunk length, chunks) so that no chunk is much longer than ``room`` tokens."""
    if tokens <= room:
        return tokens, 1
    count = -(-tokens // room)
    chunk = -(-tokens // count)
    chunk = -(-chunk // CHUNK_ALIGN) * CHUNK_ALIGN
    return chunk, -(-tokens // chunk)


def _empty_chunks(tokens: int, horizon: int, chunk: int) -> int:
    """Chunks of a tail, empty at first, for what it may grow beyond those of its tokens.

    None where the last of those grows by a quarter of a chunk at most: where chunks are that long,
    a further item costs every worker more than one item that becomes a little longer.
    """
    beyond = horizon - -tokens % chunk
    return -(-beyond // chunk) if 4 * beyond > chunk else 0


@dataclass
class _Split:
    """Packs cut under one limit, and what that costs."""

    packs: list[Pack]
    cuts: list[Cut]
    loads: list[Load] = field(default_factory=list)
    parts: int = 0

    @property
    def work_ps(self) -> int:
        """SM time of all work items."""
        return sum(load.work_ps for load in self.loads)

    @property
    def items(self) -> int:
        """Work items."""
        return sum(load.items for load in self.loads)

    def add(self, other: _Split) -> None:
        """Packs behind those that are there."""
        self.packs += other.packs
        self.cuts += other.cuts
        self.loads += other.loads
        self.parts += other.parts


class _Splitter:
    """Cuts packs so that no work item lasts much longer than a limit."""

    def __init__(self, tree: SegmentTree, pricer: _Pricer, horizon: int) -> None:
        self.tree, self.pricer, self.horizon = tree, pricer, horizon
        # What _steps found, by segment, rows an item and separated rows.
        self._known: dict[tuple[int, int, frozenset[int]], tuple[int, int]] = {}

    def _room(self, kind: int, limit_ps: int) -> int:
        """Tokens of the longest chunk a tile computes within the limit."""
        return max(limit_ps // self.pricer.model.solo_token_ps[kind], MIN_CHUNK)

    def _tail_room(self, limit_ps: int) -> int:
        """Tokens of the longest tail in a chain, which one warp may have to compute alone."""
        return max(limit_ps // (ITEM_WARPS * self.pricer.model.private_token_ps), MIN_CHUNK)

    def split(self, packs: list[Pack], limit_ps: int) -> _Split:
        """Packs with the separated tails, and their cuts."""
        tree, room = self.tree, self._tail_room(limit_ps)
        tails = [pack for pack in packs if pack.is_tail]
        result = _Split([], [])
        for pack in packs:
            if pack.is_chain:
                separated = frozenset(
                    row for row in pack.rows if tree.lens[row] - tree.tail_begin[row] > room
                )
                tails += [
                    Pack((row,), tree.tail_begin[row], tree.lens[row], tree.home[row], is_tail=True)
                    for row in separated
                ]
                if len(separated) < len(pack.rows) or tree.segments[pack.segment].child_segments:
                    result.add(self._chain(pack, separated, limit_ps))
                else:  # no step is left
                    result.add(self._plain(replace(pack, is_chain=False), limit_ps))
            elif not pack.is_tail:
                result.add(self._plain(pack, limit_ps))
        for pack in sorted(tails, key=lambda pack: pack.rows):
            result.add(self._plain(pack, limit_ps))
        return result

    def _add_chunks(
        self,
        result: _Split,
        rows: int,
        chunks: int,
        chunk: int,
        tokens: int,
        has_parts: bool,
        empty: int = 0,
    ) -> None:
        """Chunks of a plain pack: ``tokens`` in all; the last is taken for as long as the others.

        Items of the same tile are one load, those of ``empty`` further chunks another. The first
        tile of all reads device memory.
        """
        pricer, model = self.pricer, self.pricer.model
        query_rows = rows * pricer.group
        for number, (kind, same) in enumerate(groupby(pricer.kinds(rows))):
            tiles = len(list(same))
            in_tiles = min(query_rows, tiles * TILES[kind].rows)
            query_rows -= in_tiles
            token_ps = tiles * model.reread_ps[kind]
            if number == 0:
                token_ps += model.token_ps[kind] - model.reread_ps[kind]
            empty_ps = tiles * model.item_ps[kind]  # a chunk without a token
            empty_ps += in_tiles * pricer.query_part_ps if has_parts else 0
            solo_ps = model.solo_item_ps[kind]
            if empty > 0:
                result.loads.append(Load(kind, empty * tiles, solo_ps, empty * empty_ps))
            solo_ps += chunk * model.solo_token_ps[kind]
            work_ps = chunks * empty_ps + tokens * token_ps
            result.loads.append(Load(kind, chunks * tiles, solo_ps, work_ps))
        result.parts += rows * (chunks + empty) if has_parts else 0

    def _plain(self, pack: Pack, limit_ps: int) -> _Split:
        """A pack that is no chain."""
        rows, tokens = len(pack.rows), max(pack.end - pack.start, 0)
        chunk, chunks = _cut(tokens, self._room(self.pricer.kinds(rows)[0], limit_ps))
        empty = _empty_chunks(tokens, self.horizon, chunk) if pack.is_tail and chunks > 1 else 0
        result = _Split([pack], [Cut(chunk, chunks + empty)])
        is_direct = pack.is_tail and pack.start == 0 and chunks == 1
        self._add_chunks(result, rows, chunks, chunk, tokens, not is_direct, empty)
        return result

    def _chain(self, pack: Pack, separated: frozenset[int], limit_ps: int) -> _Split:
        """Of the rows an item whose steps are within the limit, those of least work.

        None is: the fewest rows.
        """
        token_ps, tries = self.pricer.model.private_token_ps, self.pricer.chain_rows
        private = {rows: self._steps(pack, rows, separated)[0] * token_ps for rows in tries}
        within = [rows for rows in tries if private[rows] <= limit_ps]
        splits = [self._chain_of(pack, rows, separated, limit_ps) for rows in within or tries[-1:]]
        return min(splits, key=lambda split: split.work_ps)  # ties: the widest

    def _chain_of(
        self, pack: Pack, rows_per_item: int, separated: frozenset[int], limit_ps: int
    ) -> _Split:
        """A chain whose items have ``rows_per_item`` request rows."""
        pricer, model = self.pricer, self.pricer.model
        private, step_work_ps = self._steps(pack, rows_per_item, separated)
        rows, tokens = len(pack.rows), pack.end - pack.start
        num_items = -(-rows // rows_per_item)
        kind = pricer.kinds(min(rows_per_item, rows))[0]
        chunk, chunks = _cut(tokens, self._room(kind, limit_ps))
        result = _Split([pack], [Cut(chunk, chunks, rows_per_item, separated)])
        above = (chunks - 1) * chunk  # tokens of the plain chunks
        if chunks > 1:
            self._add_chunks(result, rows, chunks - 1, chunk, above, True)
        parts = rows if chunks > 1 or pack.start > 0 else len(separated)
        token_ps = model.token_ps[kind] + (num_items - 1) * model.reread_ps[kind]
        work_ps = num_items * model.item_ps[kind] + (tokens - above) * token_ps
        work_ps += step_work_ps + parts * pricer.part_ps
        solo_ps = model.solo_item_ps[kind] + (tokens - above) * model.solo_token_ps[kind]
        solo_ps += private * model.private_token_ps
        result.loads.append(Load(kind, num_items, solo_ps, work_ps))
        result.parts += parts
        return result

    def _steps(self, pack: Pack, rows_per_item: int, separated: frozenset[int]) -> tuple[int, int]:
        """(longest private span of an item, SM time of all steps) of a chain."""
        tree, model = self.tree, self.pricer.model
        key = (pack.segment, min(rows_per_item, len(pack.rows)), separated)
        if key not in self._known:
            cut = Cut(0, 1, rows_per_item, separated)
            items = chain_items(tree, pack, cut, self.pricer.group)
            private = max(
                private_span(tree, fragments, self.pricer.kinds(len(rows))[0])
                for rows, fragments in items
            )
            steps = [s for _, fragments in items for steps in fragments for s in steps]
            once = {(step.segment, step.row if step.segment < 0 else -1): step for step in steps}
            tokens = sum(step_tokens(tree, step) for step in steps)
            unique = sum(step_tokens(tree, step) for step in once.values())
            work_ps = unique * model.token_ps[0] + (tokens - unique) * model.reread_ps[0]
            self._known[key] = (private, work_ps + len(steps) * model.step_ps)
        return self._known[key]


def choose_split(
    tree: SegmentTree,
    packs: list[Pack],
    shape: Shape,
    pricer: _Pricer,
    walls: tuple[int, ...],
    horizon: int,
) -> tuple[int, _Split] | None:
    """Best of a few limits on the solo time of a work item: (predicted ps, split).

    None: no cut fits the workspace. The limits are fractions of the mean time of an SM when
    nothing is cut and partials are free.
    """
    model = pricer.model
    below = pricer.steps_below(tree)
    base_ps = 0
    for pack in packs:
        base_ps += pricer.chain(
            len(pack.rows),
            max(pack.end - pack.start, 0),
            below[pack.segment] if pack.is_chain else 0,
        )
    mean_ps = base_ps * shape.num_kv_heads // model.num_sms
    splitter = _Splitter(tree, pricer, horizon)
    best: tuple[int, _Split] | None = None
    for wall in walls:
        split = splitter.split(packs, mean_ps * wall // 16 if wall else NO_LIMIT)
        if split.parts > shape.max_parts or split.items > shape.max_items:
            continue
        predicted = predict(split.loads, shape.num_kv_heads, model.num_sms)
        predicted += model.merge_ps if split.parts else 0
        if best is None or predicted < best[0]:
            best = (predicted, split)
    return best


def horizon_of(lens: list[int]) -> int:
    """Tokens a row may grow before a new plan: small beside the shortest row, so that a plan stays
    within a few percent of a fresh one (scripts/gpu_growth_check.py), large enough that planning is
    rare."""
    return min(64 + min(lens, default=0) // 32, MAX_HORIZON)


def _shared_split(
    tree: SegmentTree,
    shape: Shape,
    model: CostModel,
    search: Search,
    stride: int,
    part_scale: int,
) -> tuple[int, _Split] | None:
    """Best plan that shares, with packs chosen under one stride and one price of partials.

    The cost by which packs are chosen is a sum, blind to how evenly their items load the GPU, and
    chains are the coarser ones: where they were chosen, a plan without any is tried as well.
    """
    forced = shape.sharing == "on" and part_scale == 1
    true_pricer, horizon = _Pricer(shape, model, search, 1), horizon_of(tree.lens)
    best: tuple[int, _Split] | None = None
    for tried in (search, replace(search, chains=False)):
        packs = choose_packs(tree, _Pricer(shape, model, tried, part_scale), forced, stride)
        found = choose_split(tree, packs, shape, true_pricer, search.walls, horizon)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
        if not (search.without_chains and any(pack.is_chain for pack in packs)):
            break
    return best


def _prices(num_levels: int) -> Iterator[tuple[int, int]]:
    """(stride, price of partials) to be tried until a plan fits the workspace.

    A pack spans few stops, so that a row of a deep tree has many partials whatever they cost: then
    stops are placed farther apart. A partial is worth more where packs are longer, so that its
    price is raised as much. The last stride leaves only the roots as stops.
    """
    stride = 1
    while stride < STRIDE_FACTOR * num_levels:
        for scale in PART_SCALES:
            price = min(stride * scale, MAX_PART_SCALE)
            yield stride, price
            if price == MAX_PART_SCALE:
                break
        stride *= STRIDE_FACTOR


def pack_rows(
    tree: SegmentTree, shape: Shape, model: CostModel, search: Search | None = None
) -> Packing:
    """Packs and cuts of a batch; always finds a plan that fits the workspace.

    Args:
        tree: segments of the batch.
        shape: the layer and the sizes of the plan.
        model: constants of the GPU.
        search: what the planner may choose from; None: everything.

    Raises:
        ValueError: not even one item a row fits (the caller's capacity is below the minimum).
    """
    search = search or Search()
    horizon = horizon_of(tree.lens)
    chosen: tuple[int, _Split] | None = None
    coarsened, sharing = 0, False
    if shape.sharing != "off" and tree.segments:
        for stride, part_scale in _prices(max(_depths(tree)) + 1):
            chosen = _shared_split(tree, shape, model, search, stride, part_scale)
            if chosen is not None:
                sharing = True
                break
            coarsened += 1
    if shape.sharing != "on" or chosen is None:
        pricer = _Pricer(shape, model, search, 1)
        packs = unshared_packs(tree)
        alone = choose_split(tree, packs, shape, pricer, search.walls, horizon)
        if alone is not None and (chosen is None or alone[0] <= chosen[0]):
            chosen, sharing = alone, False
    if chosen is None:
        raise ValueError(
            f"{len(tree.lens)} rows of {shape.group_size} query heads per KV head need at least "
            f"that many work items, but the plan holds {shape.max_items}: raise max_rows"
        )
    predicted, split = chosen
    return Packing(split.packs, split.cuts, search.tiles, horizon, sharing, coarsened, predicted)
