# SPDX-License-Identifier: MIT
"""Word layout of a plan: what the planner writes and the kernels read, as int32 words.

The plan is one tight int32 array, so that one copy brings it to the device; the header says where
each table starts. ``csrc/device/plan.h`` is the same layout in C++.

========== ======================= ==============================================================
table      shape                   meaning
========== ======================= ==============================================================
header     ``[32]``                counts and offsets, fields ``H_*``
items      ``[items, 8]``          ``first entry, head offset, query rows, first slot, first length,
                                   next run, tokens beyond the first run, tail position or -1``
entries    ``[entries, 2]``        ``row, partial slot`` (-1: the item writes the output itself)
runs       ``[segments, 4]``       ``slot offset, length, next run (parent), first position``
reps       ``[segments]``          row whose ``req_to_token`` line holds the segment's slots
part_ptr   ``[rows + 1]``          first partial slot of each row; none for a row written directly
tails      ``[rows, 4]``           ``slot offset, first position, capacity, 0``
========== ======================= ==============================================================

A work item reads its *first run* and then walks up ``next run`` until it has read ``tokens beyond
the first run`` more; of the last run it reads the end. When the tail position is not -1 the first
run is a piece of the row's tail, its live length ``clamp(seq_len - position, 0, first length)``.
Slot offsets index the slot snapshot, an int32 device array owned by the planner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._types import Int32Array
from .cost import TILES, tiles_of
from .forest import SegmentTree
from .packing import Packing, Shape

HEADER_WORDS = 32
(
    H_ROWS,
    H_HORIZON,
    H_ITEM_BEGIN,  # one word a tile
    H_ITEM_COUNT,  # one word a tile
    H_OFF_ITEMS,
    H_OFF_ENTRIES,
    H_OFF_RUNS,
    H_OFF_REPS,
    H_OFF_PART_PTR,
    H_OFF_TAILS,
    H_RUNS,
    H_PARTS,
    H_SLOTS,
    H_WORDS,
    H_ENTRIES,
    H_SHARING,
    H_COARSENED,
    H_SPLITS,
    H_PLANNED_TOKENS,
    H_SHARED_PACKS,
    H_PREDICTED_NS,
) = (0, 1, 2, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)
ITEM_WORDS = 8
SLOT_ALIGN = 4


class CapacityError(ValueError):
    """The batch does not fit the buffers the planner was made with."""


@dataclass(frozen=True)
class Capacity:
    """Sizes of the fixed buffers of a planner."""

    rows: int
    parts: int
    items: int
    slots: int
    words: int


def capacity_for(
    max_rows: int, max_tokens: int, max_parts: int, group_size: int, max_horizon: int
) -> Capacity:
    """Buffer sizes that hold any plan of ``max_rows`` rows with ``max_parts`` partials.

    A plan has at most one entry a partial and one a direct row, at most ``1 + group // largest
    tile`` items an entry beyond its first tile, and fewer segments than rows.
    """
    entries = max_parts + max_rows
    items = entries * (1 + group_size // TILES[-1].rows) + max_rows
    slots = max_tokens + max_rows * (max_horizon + SLOT_ALIGN) + max_rows * SLOT_ALIGN
    words = HEADER_WORDS + ITEM_WORDS * items + 2 * entries + 5 * max_rows + max_rows + 1
    words += 4 * max_rows + 32
    return Capacity(max_rows, max_parts, items, slots, words)


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def lay_out(tree: SegmentTree, packing: Packing, shape: Shape, capacity: Capacity) -> Int32Array:
    """Tables of a packing, see the module's docstring.

    Raises:
        CapacityError: the unique tokens do not fit the slot snapshot.
    """
    rows = len(tree.lens)
    group = shape.group_size
    slots = 0
    segment_slot = []
    for segment in tree.segments:
        segment_slot.append(slots)
        slots = _align(slots + segment.end - segment.begin, SLOT_ALIGN)
    tail_slot, tail_cap = [], []
    for begin, length in zip(tree.tail_begin, tree.lens, strict=True):
        tail_slot.append(slots)
        tail_cap.append(length - begin + packing.horizon)
        slots = _align(slots + tail_cap[-1], SLOT_ALIGN)
    if slots > capacity.slots:
        raise CapacityError(
            f"the batch has {tree.unique_tokens} unique KV tokens, the slot snapshot holds "
            f"{capacity.slots} with headroom: raise max_tokens"
        )

    # Parts of each row, by prefix sum: a row with a single item needs none.
    parts_of_row = [0] * rows
    direct = [False] * rows
    for pack, chunks in zip(packing.packs, packing.num_chunks, strict=True):
        if pack.is_tail and pack.start == 0 and chunks == 1:
            direct[pack.rows[0]] = True
            continue
        for row in pack.rows:
            parts_of_row[row] += chunks
    part_ptr = [0]
    for count in parts_of_row:
        part_ptr.append(part_ptr[-1] + count)
    next_part = part_ptr[:-1].copy()

    entries: list[int] = []
    items: list[list[tuple[int, list[int]]]] = [[] for _ in TILES]  # (planned tokens, words)
    planned_tokens = 0
    for pack, chunk, chunks in zip(packing.packs, packing.chunk, packing.num_chunks, strict=True):
        end = pack.end + packing.horizon if pack.is_tail else pack.end
        for c in range(chunks):
            a = pack.start + c * chunk
            b = end if c == chunks - 1 else a + chunk
            first_entry = len(entries) // 2
            for row in pack.rows:
                entries += (row, -1 if direct[row] else next_part[row])
                next_part[row] += 0 if direct[row] else 1

            tail_position = -1
            if pack.is_tail and b > tree.tail_begin[pack.rows[0]]:
                row = pack.rows[0]
                begin, above, slot = tree.tail_begin[row], tree.home[row], tail_slot[row]
                tail_position = max(a, begin)
            else:
                u = pack.segment
                while tree.segments[u].begin >= b:
                    u = tree.segments[u].parent
                begin, above, slot = (
                    tree.segments[u].begin,
                    tree.segments[u].parent,
                    segment_slot[u],
                )
            first = max(a, begin)
            beyond = max(begin - a, 0)
            words = [slot + first - begin, b - first, above if beyond else -1, beyond]

            planned = max(min(b, pack.end) - a, 0)
            offset = 0
            for kind in tiles_of(len(pack.rows) * group):
                count = min(TILES[kind].rows, len(pack.rows) * group - offset)
                head = [first_entry + offset // group, offset % group, count]
                items[kind].append((planned, [*head, *words, tail_position]))
                offset += count
                planned_tokens += planned

    for of_kind in items:
        of_kind.sort(key=lambda item: -item[0])  # stable: heaviest first, then as created
    counts = [len(of_kind) for of_kind in items]
    num_entries = len(entries) // 2
    header = [0] * HEADER_WORDS
    header[H_ROWS] = rows
    header[H_HORIZON] = packing.horizon
    for kind, count in enumerate(counts):
        header[H_ITEM_BEGIN + kind] = sum(counts[:kind])
        header[H_ITEM_COUNT + kind] = count
    header[H_OFF_ITEMS] = HEADER_WORDS
    header[H_OFF_RUNS] = header[H_OFF_ITEMS] + ITEM_WORDS * sum(counts)
    header[H_OFF_TAILS] = header[H_OFF_RUNS] + 4 * len(tree.segments)
    header[H_OFF_ENTRIES] = header[H_OFF_TAILS] + 4 * rows
    header[H_OFF_REPS] = header[H_OFF_ENTRIES] + 2 * num_entries
    header[H_OFF_PART_PTR] = header[H_OFF_REPS] + len(tree.segments)
    header[H_WORDS] = header[H_OFF_PART_PTR] + rows + 1
    header[H_RUNS] = len(tree.segments)
    header[H_PARTS] = part_ptr[-1]
    header[H_SLOTS] = slots
    header[H_ENTRIES] = num_entries
    header[H_SHARING] = int(packing.sharing)
    header[H_COARSENED] = packing.coarsened
    header[H_SPLITS] = packing.num_splits
    header[H_PLANNED_TOKENS] = min(planned_tokens, 2**31 - 1)
    header[H_SHARED_PACKS] = sum(not pack.is_tail for pack in packing.packs)
    header[H_PREDICTED_NS] = min(packing.predicted_ps // 1000, 2**31 - 1)

    words = header
    for of_kind in items:
        for _, item in of_kind:
            words += item
    for segment, slot in zip(tree.segments, segment_slot, strict=True):
        words += (slot, segment.end - segment.begin, segment.parent, segment.begin)
    for slot, begin, cap in zip(tail_slot, tree.tail_begin, tail_cap, strict=True):
        words += (slot, begin, cap, 0)
    words += entries
    words += [segment.first_row for segment in tree.segments]
    words += part_ptr
    return np.array(words, np.int32)


@dataclass(frozen=True)
class PlanTables:
    """The tables of a plan, as views of its words."""

    header: Int32Array
    items: Int32Array
    entries: Int32Array
    runs: Int32Array
    reps: Int32Array
    part_ptr: Int32Array
    tails: Int32Array

    @classmethod
    def parse(cls, words: Int32Array) -> PlanTables:
        """Views of ``words``, which may be longer than the plan."""
        header = words[:HEADER_WORDS]
        rows, runs = int(header[H_ROWS]), int(header[H_RUNS])

        def table(field: int, count: int, width: int) -> Int32Array:
            at = int(header[field])
            return words[at : at + count * width].reshape(count, width)

        num_items = int(header[H_ITEM_COUNT : H_ITEM_COUNT + len(TILES)].sum())
        return cls(
            header=header,
            items=table(H_OFF_ITEMS, num_items, ITEM_WORDS),
            entries=table(H_OFF_ENTRIES, int(header[H_ENTRIES]), 2),
            runs=table(H_OFF_RUNS, runs, 4),
            reps=table(H_OFF_REPS, runs, 1)[:, 0],
            part_ptr=table(H_OFF_PART_PTR, rows + 1, 1)[:, 0],
            tails=table(H_OFF_TAILS, rows, 4),
        )

    def kind_of_item(self, index: int) -> int:
        """Tile index of an item."""
        begins = self.header[H_ITEM_BEGIN : H_ITEM_BEGIN + len(TILES)]
        counts = self.header[H_ITEM_COUNT : H_ITEM_COUNT + len(TILES)]
        return next(k for k in range(len(TILES)) if begins[k] <= index < begins[k] + counts[k])

    def rows_of_item(self, index: int, group: int) -> list[tuple[int, int, int]]:
        """``(row, head of the group, partial slot or -1)`` of each query row of an item."""
        first, offset, count = (int(x) for x in self.items[index, :3])
        flat = range(offset, offset + count)
        at = [(*self.entries[first + f // group].tolist(), f % group) for f in flat]
        return [(row, head, part) for row, part, head in at]

    def slots_of_item(self, index: int, live_lens: Int32Array) -> Int32Array:
        """Offsets into the slot snapshot that an item reads, int64 ``[tokens]``.

        Args:
            index: the item.
            live_lens: ``[rows]`` true sequence lengths.
        """
        first_entry, _, _, slot, length, run, beyond, tail = (int(x) for x in self.items[index])
        if tail >= 0:
            row = int(self.entries[first_entry, 0])
            length = min(max(int(live_lens[row]) - tail, 0), length)
        pieces = [np.arange(slot, slot + length)]
        while beyond > 0:
            slot, length, above, _ = (int(x) for x in self.runs[run])
            take = min(length, beyond)
            pieces.append(np.arange(slot + length - take, slot + length))
            beyond -= take
            run = above
        return np.concatenate(pieces)
