# SPDX-License-Identifier: MIT
"""What a plan's words mean, by brute force: every KV token gets a name, and the words are followed.

Written from the description of the layout alone; it calls nothing of ``pat_sglang.layout`` but
the names of the header words.
"""

from __future__ import annotations

import numpy as np
from strategies import TILE_ROWS, Batch

from pat_sglang import layout

NOBODY = -1  # name of a slot nothing was gathered into


def names_of_rows(batch: Batch, live_lens: np.ndarray) -> list[np.ndarray]:
    """For each row the names of its tokens by position: equal names are the same KV token."""
    base, names = 0, []
    own: list[np.ndarray] = []  # of each node
    for length in batch.forest.length.tolist():
        own.append(np.arange(base, base + length))
        base += length
    down_to: dict[int, np.ndarray] = {-1: np.arange(0)}  # of each node with all above it
    for row, live in enumerate(live_lens.tolist()):
        above = -1
        for node in batch.path_of_row[row]:
            if node not in down_to:
                down_to[node] = np.concatenate([down_to[above], own[node]])
            above = node
        private = np.arange(base, base + max(live - down_to[above].size, 0))
        base += private.size
        names.append(np.concatenate([down_to[above], private])[:live])
    return names


def gathered_slots(words: np.ndarray, names: list[np.ndarray]) -> np.ndarray:
    """The slot snapshot of a plan: runs from their representative, tails up to the live length."""
    header = words[:32].tolist()
    slots = np.full(header[layout.H_SLOTS], NOBODY, np.int64)
    for i in range(header[layout.H_RUNS]):
        at = header[layout.H_OFF_RUNS] + 4 * i
        slot, length, _, begin = words[at : at + 4].tolist()
        rep = int(words[header[layout.H_OFF_REPS] + i])
        assert (slots[slot : slot + length] == NOBODY).all(), "two runs share slots"
        slots[slot : slot + length] = names[rep][begin : begin + length]
    for row in range(header[layout.H_ROWS]):
        at = header[layout.H_OFF_TAILS] + 4 * row
        slot, begin, room, zero = words[at : at + 4].tolist()
        tail = names[row][begin : begin + room]
        assert zero == 0
        assert slot + room <= slots.size
        assert (slots[slot : slot + room] == NOBODY).all(), "a tail shares slots"
        slots[slot : slot + tail.size] = tail
    return slots


def read_by_item(words: np.ndarray, slots: np.ndarray, live_lens: np.ndarray) -> list[np.ndarray]:
    """Names of the tokens every work item reads."""
    header = words[:32].tolist()
    count = sum(header[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4])
    read = []
    for i in range(count):
        at = header[layout.H_OFF_ITEMS] + 8 * i
        entry, _, _, slot, length, run, beyond, position = words[at : at + 8].tolist()
        if position >= 0:
            row = int(words[header[layout.H_OFF_ENTRIES] + 2 * entry])
            length = min(max(int(live_lens[row]) - position, 0), length)
        pieces = [slots[slot : slot + length]]
        assert pieces[0].size == length >= 0
        while beyond > 0:
            assert 0 <= run < header[layout.H_RUNS], "an item walks beyond a root"
            at = header[layout.H_OFF_RUNS] + 4 * run
            slot, run_length, run, _ = words[at : at + 4].tolist()
            take = min(run_length, beyond)
            pieces.append(slots[slot + run_length - take : slot + run_length])
            beyond -= take
        read.append(np.concatenate(pieces))
    return read


def query_rows_of_items(words: np.ndarray, group: int) -> list[list[tuple[int, int, int]]]:
    """For every item its query rows: (row, head of the group, partial slot)."""
    header = words[:32].tolist()
    count = sum(header[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 4])
    entries_at, num_entries = header[layout.H_OFF_ENTRIES], header[layout.H_ENTRIES]
    entries = words[entries_at : entries_at + 2 * num_entries].reshape(-1, 2).tolist()
    of_items = []
    for i in range(count):
        at = header[layout.H_OFF_ITEMS] + 8 * i
        first, head, number = words[at : at + 3].tolist()
        flat = [divmod(head + k, group) for k in range(number)]
        of_items.append([(*entries[first + step], h) for step, h in flat])
    return [[(row, h, part) for row, part, h in item] for item in of_items]


def check_plan(
    words: np.ndarray, batch: Batch, group: int, live_lens: np.ndarray | None = None
) -> None:
    """Asserts that the plan computes attention over exactly the tokens of every row and head.

    Args:
        words: the plan, exactly.
        batch: what it was made for.
        group: query heads per KV head.
        live_lens: true lengths, host length .. host length + horizon; default: the host lengths.
    """
    live = batch.host_lens if live_lens is None else live_lens
    header = words[:32].tolist()
    assert header[layout.H_WORDS] == words.size
    assert header[layout.H_ROWS] == batch.rows
    names = names_of_rows(batch, live)
    read = read_by_item(words, gathered_slots(words, names), live)
    items = query_rows_of_items(words, group)

    # Who computes each (row, head), and where the result goes.
    items_of: dict[tuple[int, int], list[int]] = {}
    parts_of: dict[tuple[int, int], list[int]] = {}
    for index, query_rows in enumerate(items):
        for row, head, part in query_rows:
            items_of.setdefault((row, head), []).append(index)
            parts_of.setdefault((row, head), []).append(part)
    assert set(items_of) == {(row, head) for row in range(batch.rows) for head in range(group)}

    # Every token of every row exactly once. Heads with the same items need one look.
    for row, items_of_row in {(row, tuple(of)) for (row, _), of in items_of.items()}:
        got = np.sort(np.concatenate([read[i] for i in items_of_row]))
        assert np.array_equal(got, np.sort(names[row])), f"row {row} does not read its own tokens"

    # Partial slots: one for each (row, item), in the row's range; none for a row with one item.
    part_at = header[layout.H_OFF_PART_PTR]
    part_ptr = words[part_at : part_at + batch.rows + 1].tolist()
    assert part_ptr[0] == 0
    assert part_ptr[-1] == header[layout.H_PARTS]
    for (row, head), parts in parts_of.items():
        wanted = list(range(part_ptr[row], part_ptr[row + 1]))
        assert sorted(parts) == (wanted if len(parts) > 1 else [-1]), f"row {row} head {head}"
        assert len(wanted) != 1, f"row {row} has one item and a partial"

    # Tables in place, items in tiles that fit, heaviest first.
    begin = 0
    planned = [r.size for r in read_by_item(words, np.zeros(header[layout.H_SLOTS], np.int64),
                                            batch.host_lens)]  # fmt: skip
    for kind, most in enumerate(TILE_ROWS):
        count = header[layout.H_ITEM_COUNT + kind]
        assert header[layout.H_ITEM_BEGIN + kind] == begin
        least = 0 if kind == 0 else TILE_ROWS[kind - 1]
        assert all(least < len(items[i]) <= most for i in range(begin, begin + count))
        of_kind = planned[begin : begin + count]
        assert of_kind == sorted(of_kind, reverse=True)
        begin += count
    assert sum(planned) == header[layout.H_PLANNED_TOKENS]
