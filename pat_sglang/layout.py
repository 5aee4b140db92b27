# SPDX-License-Identifier: MIT
"""Word layout of a plan: what the planner writes and the kernels read, as int32 words.

The plan is one tight int32 array, so that one copy brings it to the device; the header says where
each table starts (at a multiple of four words). ``csrc/plan_layout.h`` is the same layout in C++.

========== ======================= ==============================================================
table      shape                   meaning
========== ======================= ==============================================================
header     ``[32]``                counts and offsets, fields ``H_*``
items      ``[items, 12]``         ``first entry, head offset, query rows, first slot, first length,
                                   next run, tokens beyond the first run, tail position or -1,
                                   first fragment or -1, tail row or -1, 0, 0``
fragments  ``[fragments, 2]``      ``first step, steps``
steps      ``[steps, 4]``          ``slot offset, length, lo | hi << 8, tail position or -1``
runs       ``[segments, 4]``       ``slot offset, length, next run (parent), first position``
tails      ``[rows, 4]``           ``slot offset, first position, capacity, 0``
entries    ``[entries, 2]``        ``row, partial slot`` (-1: the item writes the output itself)
reps       ``[segments]``          row whose ``req_to_token`` line holds the segment's slots
part_ptr   ``[rows + 1]``          first partial slot of each row; none for a row written directly
========== ======================= ==============================================================

A work item reads its *first run* and then walks up ``next run`` until it has read ``tokens beyond
the first run`` more; of the last run it reads the end. When the tail position is not -1 the first
run is a piece of the tail row's tail, its live length ``clamp(seq_len - position, 0, first
length)``.
All query rows of the item read this *shared run*.

A chain has fragments too: fragment ``first fragment + f`` is the private part of its query rows
``[16 f, 16 f + 16)``. Each step of a fragment is one contiguous piece of the snapshot that the
fragment's query rows ``[lo, hi)`` read: a whole segment, or with a tail position the tail of one
request row, whose live length is found as that of a tail item (of the row of query row ``lo``).

Slot offsets index the slot snapshot, an int32 device array owned by the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._types import Int32Array
from .cost import FRAGMENT_ROWS, TILES, tiles_of
from .forest import SegmentTree
from .packing import (
    MAX_CHAIN_DEPTH,
    Cut,
    Pack,
    Packing,
    Shape,
    Step,
    chain_items,
    private_span,
    step_tokens,
)

HEADER_WORDS = 32
(
    H_ROWS,
    H_SHARED_PACKS,
    H_ITEM_BEGIN,  # one word a tile
    H_ITEM_COUNT,  # one word a tile
    H_OFF_ITEMS,
    H_OFF_ENTRIES,
    H_OFF_RUNS,
    H_OFF_FRAGMENTS,
    H_OFF_STEPS,
    H_OFF_PART_PTR,
    H_OFF_TAILS,
    H_UNIQUE_TOKENS,  # the last word that kernels of a layer read
    H_PARTS,
    H_SLOTS,
    H_WORDS,
    H_ENTRIES,
    H_SHARING,
    H_COARSENED,
    H_SPLITS,
    H_PLANNED_TOKENS,
    H_HORIZON,
    H_PREDICTED_NS,
    H_FRAGMENTS,
    H_STEPS,
    H_CHAINS,
    H_OFF_REPS,
    H_UNSHARED_TOKENS,
    H_RUNS,
) = (0, 1, 2, 5, *range(8, 32))
ITEM_WORDS = 12
FRAGMENT_WORDS = 2
STEP_WORDS = 4
ENTRY_WORDS = 2
RUN_WORDS = 4
TAIL_WORDS = 4
SLOT_ALIGN = 4  # every run and tail of the snapshot starts at a multiple of this
TABLE_ALIGN = 4  # every table of the plan too
NUM_TABLES = 8

STEP_HI_SHIFT = 8  # in the word that holds lo and hi


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
    tile`` items an entry beyond its first tile, and fewer segments than rows. A row is in at most
    one chain; its query rows lie in few fragments, and in each it has at most one step for every
    level of a chain and one for its tail.
    """
    entries = max_parts + max_rows
    items = entries * (1 + group_size // TILES[-1].rows) + max_rows
    slots = max_tokens + max_rows * (max_horizon + SLOT_ALIGN) + max_rows * SLOT_ALIGN
    fragments = max_rows * (1 + -(-group_size // FRAGMENT_ROWS))
    words = HEADER_WORDS + NUM_TABLES * (TABLE_ALIGN - 1)
    words += ITEM_WORDS * items + ENTRY_WORDS * entries
    words += (FRAGMENT_WORDS + STEP_WORDS * (MAX_CHAIN_DEPTH + 1)) * fragments
    words += (RUN_WORDS + 1) * max_rows  # runs and reps
    words += (TAIL_WORDS + 1) * max_rows + 1  # tails and part_ptr
    return Capacity(max_rows, max_parts, items, slots, _align(words, TABLE_ALIGN))


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


class _Slots:
    """Where the snapshot holds the runs and tails of a batch."""

    def __init__(self, tree: SegmentTree, horizon: int, capacity: Capacity) -> None:
        self.segment: list[int] = []
        self.tail: list[int] = []
        self.tail_room: list[int] = []  # tokens
        self.end = 0
        for segment in tree.segments:
            self.segment.append(self.end)
            self.end = _align(self.end + segment.end - segment.begin, SLOT_ALIGN)
        for begin, length in zip(tree.tail_begin, tree.lens, strict=True):
            self.tail.append(self.end)
            self.tail_room.append(length - begin + horizon)
            self.end = _align(self.end + self.tail_room[-1], SLOT_ALIGN)
        if self.end > capacity.slots:
            raise CapacityError(
                f"the batch has {tree.unique_tokens} unique KV tokens, the slot snapshot holds "
                f"{capacity.slots} with headroom: raise max_tokens"
            )


@dataclass
class _Items:
    """Work items of a plan as they are created, with the tables they point into."""

    tree: SegmentTree
    packing: Packing
    group: int
    slots: _Slots
    next_part: list[int]  # of each row, -1: the row is written directly

    entries: list[tuple[int, int]] = field(default_factory=list)
    fragments: list[tuple[int, int]] = field(default_factory=list)
    steps: list[tuple[int, int, int, int]] = field(default_factory=list)
    of_kind: list[list[tuple[int, list[int]]]] = field(  # (weight, words)
        default_factory=lambda: [[] for _ in TILES]
    )
    planned_tokens: int = 0
    chains: int = 0

    def add(self, pack: Pack, cut: Cut) -> None:
        """All items of a pack."""
        end = pack.end + self.packing.horizon if pack.is_tail else pack.end
        for c in range(cut.num_chunks):
            last = c == cut.num_chunks - 1
            begin = pack.start + c * cut.chunk
            run = self._run(pack, begin, end if last else begin + cut.chunk)
            planned = max(min(begin + cut.chunk, pack.end) - begin, 0)
            if last and cut.rows_per_item:
                self._add_chain(pack, cut, run, planned)
            else:
                self._add_chunk(pack.rows, run, planned)

    def _run(self, pack: Pack, a: int, b: int) -> list[int]:
        """Words 3 to 7 of an item that reads token positions ``[a, b)`` of the pack's path."""
        tree, tail_position = self.tree, -1
        if pack.is_tail and b > tree.tail_begin[pack.rows[0]]:
            row = pack.rows[0]
            begin, above, slot = tree.tail_begin[row], tree.home[row], self.slots.tail[row]
            tail_position = max(a, begin)
        else:
            u = pack.segment
            while tree.segments[u].begin >= b:
                u = tree.segments[u].parent
            begin, above = tree.segments[u].begin, tree.segments[u].parent
            slot = self.slots.segment[u]
        first, beyond = max(a, begin), max(begin - a, 0)
        return [slot + first - begin, b - first, above if beyond else -1, beyond, tail_position]

    def _add_entries(self, rows: tuple[int, ...]) -> int:
        first = len(self.entries)
        for row in rows:
            self.entries.append((row, self.next_part[row]))
            self.next_part[row] += self.next_part[row] >= 0
        return first

    def _add_chunk(self, rows: tuple[int, ...], run: list[int], planned: int) -> None:
        first_entry, offset = self._add_entries(rows), 0
        for kind in tiles_of(len(rows) * self.group, self.packing.tiles):
            count = min(TILES[kind].rows, len(rows) * self.group - offset)
            head = [first_entry + offset // self.group, offset % self.group, count]
            tail_row = rows[0] if run[-1] >= 0 else -1
            self.of_kind[kind].append((planned, [*head, *run, -1, tail_row, 0, 0]))
            self.planned_tokens += planned
            offset += count

    def _add_chain(self, pack: Pack, cut: Cut, run: list[int], planned: int) -> None:
        for rows, fragments in chain_items(self.tree, pack, cut, self.group):
            (kind,) = tiles_of(len(rows) * self.group, self.packing.tiles)
            head = [self._add_entries(rows), 0, len(rows) * self.group]
            words = [*head, *run, len(self.fragments), -1, 0, 0]
            weight = planned + private_span(self.tree, fragments, kind)
            self.of_kind[kind].append((weight, words))
            self.chains += 1
            self.planned_tokens += planned
            for steps in fragments:
                self.fragments.append((len(self.steps), len(steps)))
                self.steps += [self._step(step) for step in steps]
                self.planned_tokens += sum(step_tokens(self.tree, step) for step in steps)

    def _step(self, step: Step) -> tuple[int, int, int, int]:
        rows = step.lo | step.hi << STEP_HI_SHIFT
        if step.segment < 0:
            room = self.slots.tail_room[step.row]
            return self.slots.tail[step.row], room, rows, self.tree.tail_begin[step.row]
        return self.slots.segment[step.segment], step_tokens(self.tree, step), rows, -1


def lay_out(tree: SegmentTree, packing: Packing, shape: Shape, capacity: Capacity) -> Int32Array:
    """Tables of a packing, see the module's docstring.

    Raises:
        CapacityError: the unique tokens do not fit the slot snapshot.
    """
    rows = len(tree.lens)
    slots = _Slots(tree, packing.horizon, capacity)
    packs = list(zip(packing.packs, packing.cuts, strict=True))

    # Parts of each row, by prefix sum: a row that is computed once needs none.
    parts_of_row = [0] * rows
    for pack, cut in packs:
        for row in pack.rows:
            parts_of_row[row] += cut.num_chunks
    part_ptr, next_part = [0], []
    for count in parts_of_row:
        next_part.append(part_ptr[-1] if count > 1 else -1)
        part_ptr.append(part_ptr[-1] + (count if count > 1 else 0))

    items = _Items(tree, packing, shape.group_size, slots, next_part)
    for pack, cut in packs:
        items.add(pack, cut)
    for of_kind in items.of_kind:
        of_kind.sort(key=lambda item: -item[0])  # stable: heaviest first, then as created
    counts = [len(of_kind) for of_kind in items.of_kind]

    header = [0] * HEADER_WORDS
    words = np.zeros(HEADER_WORDS, np.int32)
    for field_, table in (
        (H_OFF_ITEMS, [item for of_kind in items.of_kind for _, item in of_kind]),
        (H_OFF_FRAGMENTS, items.fragments),
        (H_OFF_STEPS, items.steps),
        (
            H_OFF_RUNS,
            [
                (slot, segment.end - segment.begin, segment.parent, segment.begin)
                for segment, slot in zip(tree.segments, slots.segment, strict=True)
            ],
        ),
        (
            H_OFF_TAILS,
            [(*tail, 0) for tail in zip(slots.tail, tree.tail_begin, slots.tail_room, strict=True)],
        ),
        (H_OFF_ENTRIES, items.entries),
        (H_OFF_REPS, [segment.first_row for segment in tree.segments]),
        (H_OFF_PART_PTR, part_ptr),
    ):
        header[field_] = _align(words.size, TABLE_ALIGN)
        padding = np.zeros(header[field_] - words.size, np.int32)
        words = np.concatenate([words, padding, np.array(table, np.int32).reshape(-1)])

    header[H_ROWS] = rows
    header[H_HORIZON] = packing.horizon
    for kind, count in enumerate(counts):
        header[H_ITEM_BEGIN + kind] = sum(counts[:kind])
        header[H_ITEM_COUNT + kind] = count
    header[H_RUNS] = len(tree.segments)
    header[H_PARTS] = part_ptr[-1]
    header[H_SLOTS] = slots.end
    header[H_WORDS] = words.size
    header[H_ENTRIES] = len(items.entries)
    header[H_SHARING] = int(packing.sharing)
    header[H_COARSENED] = packing.coarsened
    header[H_SPLITS] = packing.num_splits
    header[H_UNSHARED_TOKENS] = min(sum(tree.lens), 2**31 - 1)
    header[H_UNIQUE_TOKENS] = min(tree.unique_tokens, 2**31 - 1)
    header[H_PLANNED_TOKENS] = min(items.planned_tokens, 2**31 - 1)
    header[H_SHARED_PACKS] = sum(not pack.is_tail for pack in packing.packs)
    header[H_PREDICTED_NS] = min(packing.predicted_ps // 1000, 2**31 - 1)
    header[H_FRAGMENTS] = len(items.fragments)
    header[H_STEPS] = len(items.steps)
    header[H_CHAINS] = items.chains
    words[:HEADER_WORDS] = header
    return words


@dataclass(frozen=True)
class PlanTables:
    """The tables of a plan, as views of its words."""

    header: Int32Array
    items: Int32Array
    fragments: Int32Array
    steps: Int32Array
    runs: Int32Array
    tails: Int32Array
    entries: Int32Array
    reps: Int32Array
    part_ptr: Int32Array

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
            fragments=table(H_OFF_FRAGMENTS, int(header[H_FRAGMENTS]), FRAGMENT_WORDS),
            steps=table(H_OFF_STEPS, int(header[H_STEPS]), STEP_WORDS),
            runs=table(H_OFF_RUNS, runs, RUN_WORDS),
            tails=table(H_OFF_TAILS, rows, TAIL_WORDS),
            entries=table(H_OFF_ENTRIES, int(header[H_ENTRIES]), ENTRY_WORDS),
            reps=table(H_OFF_REPS, runs, 1)[:, 0],
            part_ptr=table(H_OFF_PART_PTR, rows + 1, 1)[:, 0],
        )

    def rows_of_item(self, index: int, group: int) -> list[tuple[int, int, int]]:
        """``(row, head of the group, partial slot or -1)`` of each query row of an item."""
        first, offset, count = (int(x) for x in self.items[index, :3])
        flat = range(offset, offset + count)
        at = [(*self.entries[first + f // group].tolist(), f % group) for f in flat]
        return [(row, head, part) for row, part, head in at]

    def steps_of_item(
        self, index: int, group: int, live_lens: Int32Array
    ) -> list[tuple[int, int, Int32Array]]:
        """What an item reads: ``(lo, hi, slots)``, read by its query rows ``[lo, hi)``.

        The shared run of all query rows comes first, then the steps of its fragments.

        Args:
            index: the item.
            group: query heads per KV head.
            live_lens: ``[rows]`` true sequence lengths.

        Returns:
            ``slots`` are offsets into the slot snapshot, int64 ``[tokens]``.
        """
        words = self.items[index].tolist()
        first_entry, _, query_rows, slot, length, run, beyond, tail, fragment, tail_row, *_ = words

        def live(length: int, position: int, row: int) -> int:
            if position < 0:
                return length
            return min(max(int(live_lens[row]) - position, 0), length)

        pieces = [np.arange(slot, slot + live(length, tail, tail_row))]
        while beyond > 0:
            slot, length, above, _ = (int(x) for x in self.runs[run])
            take = min(length, beyond)
            pieces.append(np.arange(slot + length - take, slot + length))
            beyond -= take
            run = above
        steps = [(0, query_rows, np.concatenate(pieces))]
        fragments = range(0, query_rows, FRAGMENT_ROWS) if fragment >= 0 else ()
        for f, begin in enumerate(fragments):
            first_step, count = self.fragments[fragment + f].tolist()
            for slot, length, rows, tail in self.steps[first_step : first_step + count].tolist():
                lo = begin + (rows & (1 << STEP_HI_SHIFT) - 1)
                hi = begin + (rows >> STEP_HI_SHIFT)
                row = int(self.entries[first_entry + lo // group, 0])
                length = live(length, tail, row)
                steps.append((lo, hi, np.arange(slot, slot + length)))
        return steps
