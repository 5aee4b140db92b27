# SPDX-License-Identifier: MIT
"""Segments -> packs -> work items: which rows read which KV run together, and how it is cut.

This is the readable oracle of ``csrc/host``; both give equal words for equal input
(tests/test_planner.py). All arithmetic is on integers.

A *pack* is a set of rows and a range of token positions ``[start, end)`` on the path they share;
the range may span several consecutive segments (levels that were merged). Every row also has one
*tail* pack of its own, which starts where the last pack above it ended and grows while the row
decodes. A pack is cut into tiles of query rows, and along the tokens into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cost import CostModel, tiles_of
from .forest import SegmentTree

MAX_INHERIT = 4  # how many levels of a tree one pack may span, beyond its own
MIN_CHUNK = 64  # tokens: no run is cut finer, and every cut is a multiple of CHUNK_ALIGN
CHUNK_ALIGN = 32
PART_SCALES = (1, 4, 16, 64)  # price of partials, raised until a plan fits the workspace
WALL_EIGHTHS = (16, 8, 4, 2, 1)  # tried limits of a work item's solo time, in 1/8 of the mean
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
class Pack:
    """Rows that read the token positions ``[start, end)`` of one path together.

    ``segment`` is the deepest segment of the range (the home segment of the row for a tail, -1 if
    it has none). A tail covers ``[start, end + horizon)`` as its row grows.
    """

    rows: tuple[int, ...]
    start: int
    end: int
    segment: int
    is_tail: bool


@dataclass(frozen=True)
class Packing:
    """Packs and how each is cut along the tokens.

    ``chunk[i]`` is the length of pack i's chunks and ``num_chunks[i]`` their number; a tail that is
    cut has extra chunks, empty at first, that cover the horizon.
    """

    packs: list[Pack]
    chunk: list[int]
    num_chunks: list[int]
    horizon: int
    sharing: bool
    coarsened: int
    predicted_ps: int

    @property
    def num_splits(self) -> int:
        """Chunks beyond the first of every pack."""
        return sum(n - 1 for n in self.num_chunks)


class _Pricer:
    """Integer cost of packs under one price of partials."""

    def __init__(self, shape: Shape, model: CostModel, part_scale: int) -> None:
        self.group = shape.group_size
        self.model = model
        self.part_ps = model.part_ps * part_scale * self.group  # one part of one row
        self._item: list[int] = [0]  # by rows of the pack
        self._token: list[int] = [0]

    def _extend(self, rows: int) -> None:
        for n in range(len(self._item), rows + 1):
            kinds = tiles_of(n * self.group)
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


def choose_packs(tree: SegmentTree, pricer: _Pricer, forced: bool = False) -> list[Pack]:
    """Packs of least additive cost: for every segment, which children take its run along.

    ``cost[u][j]`` is the least cost of everything below and including segment u when its pack
    starts at the j-th segment above it (0: at itself). A child that *merges* extends its own pack
    (or tail) upwards and leaves the pack of its parent; children are taken in the order of what
    merging costs a row, and the best number of them is kept. ``forced``: no row takes a shared run
    into its tail, whatever it costs.
    """
    segments = tree.segments
    starts: list[list[int]] = []
    for segment in segments:
        above = starts[segment.parent][:MAX_INHERIT] if segment.parent >= 0 else []
        starts.append([segment.begin, *above])

    cost: list[list[int]] = [[0] * len(s) for s in starts]
    merges_segment: list[list[bool]] = [[False] * (len(s) + 1) for s in starts]  # [v][j of parent]
    merged_rows: list[list[int]] = [[0] * len(s) for s in starts]  # how many own rows merge
    for u in range(len(segments) - 1, -1, -1):
        segment = segments[u]
        for j, start in enumerate(starts[u]):
            tokens = segment.end - start
            total = 0
            # (extra cost a row, kind, index, extra cost, rows): ties go to segments, then by index
            options: list[tuple[int, int, int, int, int]] = []
            for v in segment.child_segments:
                total += cost[v][0]
                if j + 1 < len(starts[v]):
                    extra = cost[v][j + 1] - cost[v][0]
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
            cost[u][j] = best
            for _, kind, index, _, _ in options[:best_count]:
                if kind == 0:
                    merges_segment[index][j] = True
                else:
                    merged_rows[u][j] += 1

    # Top-down: with which start each segment is computed, then which packs each row is in.
    level = [0] * len(segments)
    for v, segment in enumerate(segments):
        u = segment.parent
        level[v] = level[u] + 1 if u >= 0 and merges_segment[v][level[u]] else 0
    in_pack: list[list[int]] = [[] for _ in segments]
    tail_start = [0] * len(tree.lens)
    own_seen = [0] * len(segments)
    for row, home in enumerate(tree.home):
        if home < 0:
            continue
        own_seen[home] += 1
        below_merged = own_seen[home] <= merged_rows[home][level[home]]
        tail_start[row] = starts[home][level[home]] if below_merged else segments[home].end
        u = home
        while u >= 0:
            if not below_merged:
                in_pack[u].append(row)
            below_merged = level[u] > 0
            u = segments[u].parent
    packs = [
        Pack(tuple(rows), starts[u][level[u]], segments[u].end, u, False)
        for u, rows in enumerate(in_pack)
        if rows
    ]
    for row, home in enumerate(tree.home):
        packs.append(Pack((row,), tail_start[row], tree.lens[row], home, True))
    return packs


def unshared_packs(tree: SegmentTree) -> list[Pack]:
    """One tail a row that covers all its tokens: the plan of a kernel that knows no prefixes."""
    return [Pack((row,), 0, n, tree.home[row], True) for row, n in enumerate(tree.lens)]


def _cut(tokens: int, limit_ps: int, fixed_ps: int, token_ps: int) -> tuple[int, int]:
    """(chunk length, chunks) so that a chunk's solo time stays near the limit."""
    room = max((limit_ps - fixed_ps) // token_ps, MIN_CHUNK)
    if tokens <= room:
        return tokens, 1
    count = -(-tokens // room)
    chunk = -(-tokens // count)
    chunk = -(-chunk // CHUNK_ALIGN) * CHUNK_ALIGN
    return chunk, -(-tokens // chunk)


def choose_split(
    packs: list[Pack], shape: Shape, model: CostModel, pricer: _Pricer, horizon: int
) -> tuple[int, list[int], list[int]] | None:
    """Best of a few limits on the solo time of a work item: (predicted ps, chunk, num_chunks).

    Predicted time: SM time of everything spread over all SMs, plus the solo time of the longest
    item, since the last one to start starts before the mean and then runs alone. None: no cut fits
    the workspace.
    """
    kinds = [tiles_of(len(p.rows) * pricer.group) for p in packs]
    tokens = [max(p.end - p.start, 0) for p in packs]
    base_ps = 0
    for pack, length in zip(packs, tokens, strict=True):
        base_ps += pricer.item(len(pack.rows)) + length * pricer.token(len(pack.rows))
    mean_ps = base_ps * shape.num_kv_heads // model.num_sms
    best: tuple[int, list[int], list[int]] | None = None
    for eighths in (0, *WALL_EIGHTHS):  # 0: no cut at all
        chunk, num_chunks = [0] * len(packs), [1] * len(packs)
        work_ps, wall_ps, parts, items = base_ps, 0, 0, 0
        for i, pack in enumerate(packs):
            rows, k = len(pack.rows), kinds[i][0]
            fixed_ps, token_ps = model.solo_item_ps[k], model.solo_token_ps[k]
            chunk[i] = tokens[i]
            if eighths:
                chunk[i], num_chunks[i] = _cut(
                    tokens[i], fixed_ps + mean_ps * eighths // 8, fixed_ps, token_ps
                )
            if pack.is_tail and num_chunks[i] > 1:  # cut the horizon as well, empty at first
                num_chunks[i] = -(-(tokens[i] + horizon) // chunk[i])
            direct = pack.is_tail and pack.start == 0 and num_chunks[i] == 1
            pack_parts = 0 if direct else rows * num_chunks[i]
            parts += pack_parts
            items += len(kinds[i]) * num_chunks[i]
            work_ps += (num_chunks[i] - 1) * pricer.item(rows) + pack_parts * pricer.part_ps
            wall_ps = max(wall_ps, fixed_ps + chunk[i] * token_ps)
        if parts > shape.max_parts or items > shape.max_items:
            continue
        predicted = work_ps * shape.num_kv_heads // model.num_sms + wall_ps
        if best is None or predicted < best[0]:
            best = (predicted, chunk, num_chunks)
    return best


def horizon_of(lens: list[int]) -> int:
    """Tokens a row may grow before a new plan: small beside the shortest row, so that a plan stays
    within a few percent of a fresh one, large enough that planning is rare."""
    return min(64 + min(lens, default=0) // 32, MAX_HORIZON)


def pack_rows(tree: SegmentTree, shape: Shape, model: CostModel) -> Packing:
    """Packs and cuts of a batch; always finds a plan that fits the workspace.

    Raises:
        ValueError: not even one item a row fits (the caller's capacity is below the minimum).
    """
    horizon = horizon_of(tree.lens)
    chosen: tuple[int, list[int], list[int]] | None = None
    packs: list[Pack] = []
    coarsened, sharing = 0, False
    if shape.sharing != "off" and tree.segments:
        for part_scale in PART_SCALES:
            pricer = _Pricer(shape, model, part_scale)
            packs = choose_packs(tree, pricer, shape.sharing == "on" and part_scale == 1)
            chosen = choose_split(packs, shape, model, _Pricer(shape, model, 1), horizon)
            if chosen is not None:
                sharing = True
                break
            coarsened += 1
    if shape.sharing != "on" or chosen is None:
        plain = unshared_packs(tree)
        alone = choose_split(plain, shape, model, _Pricer(shape, model, 1), horizon)
        if alone is not None and (chosen is None or alone[0] <= chosen[0]):
            packs, chosen, sharing = plain, alone, False
    if chosen is None:
        raise ValueError(
            f"{len(tree.lens)} rows of {shape.group_size} query heads per KV head need at least "
            f"that many work items, but the plan holds {shape.max_items}: raise max_rows"
        )
    predicted, chunk, num_chunks = chosen
    return Packing(packs, chunk, num_chunks, horizon, sharing, coarsened, predicted)
