# SPDX-License-Identifier: MIT
"""What a plan's words mean, by brute force: every KV token gets a name, and the words are followed.

Written from the description of the layout alone; it calls nothing of ``pat_sglang.layout`` but
the names of the header words.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from strategies import TILE_ROWS, Batch, Setup

from pat_sglang import layout

NOBODY = -1  # name of a slot nothing was gathered into
WIDTH = {  # words of one row of each table, in the order of the tables in the plan
    "ITEMS": 12, "FRAGMENTS": 2, "STEPS": 4, "RUNS": 4, "TAILS": 4, "ENTRIES": 2, "REPS": 1,
    "PART_PTR": 1,
}  # fmt: skip


class Read(NamedTuple):
    """Names of the tokens that query rows ``[lo, hi)`` of a work item read."""

    lo: int
    hi: int
    names: np.ndarray
    fragment: int  # of the item, -1: the shared run of all its query rows


def split_tables(words: np.ndarray) -> dict[str, list[list[int]]]:
    """The tables of a plan; asserts that they lie one after the other, padded with zeros."""
    header = words[:32].tolist()
    assert header[layout.H_WORDS] == words.size
    rows = {
        "ITEMS": sum(header[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + len(TILE_ROWS)]),
        "FRAGMENTS": header[layout.H_FRAGMENTS],
        "STEPS": header[layout.H_STEPS],
        "RUNS": header[layout.H_RUNS],
        "TAILS": header[layout.H_ROWS],
        "ENTRIES": header[layout.H_ENTRIES],
        "REPS": header[layout.H_RUNS],
        "PART_PTR": header[layout.H_ROWS] + 1,
    }
    tables, end = {}, 32
    for name, width in WIDTH.items():
        at = header[getattr(layout, f"H_OFF_{name}")]
        assert at == -(-end // 4) * 4, f"table {name} is not behind the one before"
        assert not words[end:at].any()
        end = at + width * rows[name]
        tables[name] = words[at:end].reshape(-1, width).tolist()
    assert end == words.size
    return tables


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
    tables = split_tables(words)
    slots = np.full(int(words[layout.H_SLOTS]), NOBODY, np.int64)
    for (slot, length, _, begin), (rep,) in zip(tables["RUNS"], tables["REPS"], strict=True):
        assert slot % 4 == 0
        assert (slots[slot : slot + length] == NOBODY).all(), "two runs share slots"
        slots[slot : slot + length] = names[rep][begin : begin + length]
    for row, (slot, begin, room, zero) in enumerate(tables["TAILS"]):
        tail = names[row][begin : begin + room]
        assert slot % 4 == zero == 0
        assert slot + room <= slots.size
        assert (slots[slot : slot + room] == NOBODY).all(), "a tail shares slots"
        slots[slot : slot + tail.size] = tail
    return slots


def read_by_items(
    words: np.ndarray, slots: np.ndarray, live_lens: np.ndarray, group: int
) -> list[list[Read]]:
    """What every work item reads: its shared run, then the steps of its fragments."""
    tables = split_tables(words)

    def piece(slot: int, length: int, position: int, row: int) -> np.ndarray:
        if position >= 0:
            length = min(max(int(live_lens[row]) - position, 0), length)
        of_piece = slots[slot : slot + length]
        assert of_piece.size == length >= 0
        return of_piece

    read, next_fragment, next_step = [], 0, 0
    chains = 0
    for item in sorted(tables["ITEMS"], key=lambda item: item[8]):  # fragments are numbered in turn
        entry, head, count, slot, length, run, beyond, position, fragment, row, *rest = item
        assert rest == [0, 0]
        assert row == (tables["ENTRIES"][entry][0] if position >= 0 else -1)
        pieces = [piece(slot, length, position, row)]
        while beyond > 0:
            assert 0 <= run < len(tables["RUNS"]), "an item walks beyond a root"
            slot, run_length, run, _ = tables["RUNS"][run]
            take = min(run_length, beyond)
            pieces.append(slots[slot + run_length - take : slot + run_length])
            beyond -= take
        reads = [Read(0, count, np.concatenate(pieces), -1)]
        if fragment >= 0:
            chains += 1
            assert (fragment, head, position) == (next_fragment, 0, -1)
            assert count % group == 0, "a chain has whole request rows"
            for f, begin in enumerate(range(0, count, 16)):
                first_step, steps = tables["FRAGMENTS"][fragment + f]
                assert first_step == next_step
                slots_of_steps = [step[0] for step in tables["STEPS"][next_step:][:steps]]
                assert len(set(slots_of_steps)) == steps, "a fragment reads a run twice"
                for slot, length, rows, position in tables["STEPS"][next_step:][:steps]:
                    lo, hi = begin + rows % 256, begin + rows // 256
                    assert begin <= lo < hi <= min(begin + 16, count)
                    owners = {(k // group) for k in range(lo, hi)}
                    assert position < 0 or len(owners) == 1, "a tail has one request row"
                    row = tables["ENTRIES"][entry + lo // group][0]
                    names = piece(slot, length, position, row)
                    reads.append(Read(lo, hi, names, f))
                next_fragment += 1
                next_step += steps
        read.append((item, reads))
    assert next_fragment == len(tables["FRAGMENTS"])
    assert next_step == len(tables["STEPS"])
    assert chains == words[layout.H_CHAINS]
    of_item = {tuple(item): reads for item, reads in read}
    assert len(of_item) == len(tables["ITEMS"]), "two items are the same"
    return [of_item[tuple(item)] for item in tables["ITEMS"]]


def query_rows_of_items(words: np.ndarray, group: int) -> list[list[tuple[int, int, int]]]:
    """For every item its query rows: (row, head of the group, partial slot)."""
    tables = split_tables(words)
    of_items = []
    for first, head, number, *_ in tables["ITEMS"]:
        flat = [divmod(head + k, group) for k in range(number)]
        of_items.append([(*tables["ENTRIES"][first + step], h) for step, h in flat])
    return [[(row, h, part) for row, part, h in item] for item in of_items]


def weight(reads: list[Read], kind: int) -> int:
    """Tokens of an item's shared run, and in how many tokens' time its fragments are done.

    Of a narrow item four warps have a fourth of its fragment each; else each has every fourth one.
    """
    of_warp = [0, 0, 0, 0]
    for read in reads[1:]:
        of_warp[read.fragment % 4] += read.names.size
    private = sum(of_warp) if kind == 0 else 4 * max(of_warp)
    return reads[0].names.size + private


def check_plan(
    words: np.ndarray,
    batch: Batch,
    group: int,
    live_lens: np.ndarray | None = None,
    tile_rows: tuple[int, ...] = TILE_ROWS,
) -> None:
    """Asserts that the plan computes attention over exactly the tokens of every row and head.

    Args:
        words: the plan, exactly.
        batch: what it was made for.
        group: query heads per KV head.
        live_lens: true lengths, host length .. host length + horizon; default: the host lengths.
        tile_rows: query rows of the tiles, 0 for one that must not be used.
    """
    live = batch.host_lens if live_lens is None else live_lens
    header, tables = words[:32].tolist(), split_tables(words)
    assert header[layout.H_ROWS] == batch.rows
    names = names_of_rows(batch, live)
    reads_of = read_by_items(words, gathered_slots(words, names), live, group)
    items = query_rows_of_items(words, group)

    # Who computes each (row, head), what it reads there, and where the result goes.
    parts_of: dict[tuple[int, int], list[int]] = {}
    read_of: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, query_rows in enumerate(items):
        for row, head, part in query_rows:
            parts_of.setdefault((row, head), []).append(part)
        for number, read in enumerate(reads_of[index]):
            for row, head, _ in query_rows[read.lo : read.hi]:
                read_of.setdefault((row, head), []).append((index, number))
    assert set(parts_of) == {(row, head) for row in range(batch.rows) for head in range(group)}

    # Every token of every row exactly once. Heads that read the same need one look.
    for row, of_row in {(row, tuple(of)) for (row, _), of in read_of.items()}:
        got = np.sort(np.concatenate([reads_of[i][n].names for i, n in of_row]))
        assert np.array_equal(got, np.sort(names[row])), f"row {row} does not read its own tokens"

    # Partial slots: one for each (row, item), in the row's range; none for a row with one item.
    part_ptr = [pointer for (pointer,) in tables["PART_PTR"]]
    assert part_ptr[0] == 0
    assert part_ptr[-1] == header[layout.H_PARTS]
    for (row, head), parts in parts_of.items():
        wanted = list(range(part_ptr[row], part_ptr[row + 1]))
        assert sorted(parts) == (wanted if len(parts) > 1 else [-1]), f"row {row} head {head}"
        assert len(wanted) != 1, f"row {row} has one item and a partial"

    # Items in the smallest tile that holds them, heaviest first.
    empty = np.zeros(header[layout.H_SLOTS], np.int64)
    planned = read_by_items(words, empty, batch.host_lens, group)
    begin, least = 0, 0
    for kind, most in enumerate(tile_rows):
        count = header[layout.H_ITEM_COUNT + kind]
        assert header[layout.H_ITEM_BEGIN + kind] == begin
        assert all(least < len(items[i]) <= most for i in range(begin, begin + count))
        of_kind = [weight(reads, kind) for reads in planned[begin : begin + count]]
        assert of_kind == sorted(of_kind, reverse=True)
        begin += count
        least = most or least
    tokens = sum(read.names.size for reads in planned for read in reads)
    assert tokens == header[layout.H_PLANNED_TOKENS]
    assert sum(batch.host_lens) == header[layout.H_UNSHARED_TOKENS]
    unique = np.unique(np.concatenate([*names_of_rows(batch, batch.host_lens), []])).size
    length = batch.forest.length
    if all(
        sum(length[node] for node in path) <= live
        for path, live in zip(batch.path_of_row, batch.host_lens.tolist(), strict=True)
    ):
        assert unique == header[layout.H_UNIQUE_TOKENS]
    else:  # the last node of a row that is shorter than its path is not shared with it
        assert unique <= header[layout.H_UNIQUE_TOKENS] <= header[layout.H_UNSHARED_TOKENS]


class Load(NamedTuple):
    """Work items of one tile of one pack, for one KV head."""

    tile: int
    items: int
    solo_ps: int
    work_ps: int


def bound_ps(loads: list[Load], setup: Setup) -> int:
    """When the last item ends: all that are as long as an item, or longer, start before it; or in
    waves of those as long as it, behind the longer ones, whichever is earlier.

    As long as it: the same octave of the solo time, and the same quarter of it. What fits on the
    GPU side by side starts at once: 2, 2 or 1 items of the three tiles on each SM; up to the mean
    of all work it lasts an eighth longer. Narrow items last three quarters of their solo time when
    all items together take no more than half of the GPU. Where items of one length run in waves,
    these fall out of step: the last ends 1/64 of its solo time for each of up to eight waves behind
    the time when all work up to theirs could be done.
    """
    heads, num_sms = setup.shape.num_kv_heads, setup.model.num_sms

    def length(load: Load) -> tuple[int, int]:
        octave = 3
        while 2 ** (octave + 1) <= load.solo_ps:
            octave += 1
        return octave, 4 * max(load.solo_ps - 2**octave, 0) // 2**octave

    def share(of: list[Load]) -> Fraction:
        """SMs that items take."""
        return sum((Fraction(load.items * heads, (2, 2, 1)[load.tile]) for load in of), Fraction())

    def lasts(load: Load) -> int:
        alone = load.tile == 0 and share(loads) * 2 <= num_sms
        return load.solo_ps * 3 // 4 if alone else load.solo_ps

    mean = end = sum(load.work_ps for load in loads) * heads // num_sms
    for of in {length(load) for load in loads}:
        same = [load for load in loads if length(load) == of]
        first = [load for load in loads if length(load) >= of]
        longest = max(lasts(load) for load in same)
        ends = [max(longest, min(longest, mean) * 9 // 8)]
        if share(first) > num_sms:
            work = sum(load.work_ps for load in same) * heads
            last = work // (sum(load.items for load in same) * heads)
            before = sum(load.work_ps for load in first) * heads
            waves = math.ceil(share(same) / num_sms)
            ends = [(before - last) // num_sms + longest]
            ends.append((before - work) // num_sms + waves * longest)
            end = max(end, before // num_sms + longest // 64 * min(waves, 8))
        end = max(end, min(ends))
    return end


def predicted_ps(words: np.ndarray, batch: Batch, setup: Setup) -> int:
    """Time of a plan under a cost model, from the items in its words."""
    model, group = setup.model, setup.shape.group_size
    header, items = words[:32].tolist(), split_tables(words)["ITEMS"]
    empty = np.zeros(header[layout.H_SLOTS], np.int64)
    reads_of = read_by_items(words, empty, batch.host_lens, group)
    kinds = np.repeat(range(len(TILE_ROWS)), header[layout.H_ITEM_COUNT :][: len(TILE_ROWS)])
    fragments, steps = split_tables(words)["FRAGMENTS"], split_tables(words)["STEPS"]

    # Items that read the same run for different rows: the first finds it in device memory.
    chunks: list[list[int]] = []
    run, end = None, -1
    for i in sorted(range(len(items)), key=lambda i: items[i][:2]):
        begin = items[i][0] * group + items[i][1]
        if begin != end or run != (*items[i][3:8], items[i][8] >= 0):
            chunks.append([])
        chunks[-1].append(i)
        run, end = (*items[i][3:8], items[i][8] >= 0), begin + items[i][2]
    # Chunks of a pack are side by side. The last is shorter; then come those for the growth.
    entries = split_tables(words)["ENTRIES"]
    packs: list[list[list[int]]] = []
    before: tuple[list[int], bool] | None = None
    of_pack = of_last = 0  # tokens of the first chunk, and of the last so far
    for of_chunk in chunks:
        first, last = items[of_chunk[0]], items[of_chunk[-1]]
        end_entry = -(-(last[0] * group + last[1] + last[2]) // group)
        rows = [row for row, _ in entries[first[0] : end_entry]]
        key, tokens = (rows, first[8] >= 0), reads_of[of_chunk[0]][0].names.size
        if key != before or tokens > of_pack or (tokens > 0 and of_last < of_pack):
            packs.append([])
            before, of_pack = key, tokens
        packs[-1].append(of_chunk)
        of_last = tokens

    # The empty chunks of a pack end sooner than its others.
    packs = [
        side
        for pack in packs
        for side in (
            [chunk for chunk in pack if reads_of[chunk[0]][0].names.size > 0 or chunk is pack[0]],
            [chunk for chunk in pack[1:] if reads_of[chunk[0]][0].names.size == 0],
        )
        if side
    ]

    query_rows = query_rows_of_items(words, group)
    loads: list[Load] = []
    for of_pack_chunks in packs:
        longest = max(reads_of[of_chunk[0]][0].names.size for of_chunk in of_pack_chunks)
        is_chain = items[of_pack_chunks[0][0]][8] >= 0
        assert not is_chain or len(of_pack_chunks) == 1
        counts, works, private, seen = [0] * 3, [0] * 3, 0, set()
        for of_chunk in of_pack_chunks:
            for i in of_chunk:
                # All items of a chain are priced by the tile of its first one.
                kind = kinds[of_chunk[0]] if is_chain else kinds[i]
                shared = reads_of[i][0].names.size
                counts[kind] += 1
                works[kind] += model.item_ps[kind] + model.part_ps * sum(
                    part >= 0 for _, _, part in query_rows[i]
                )
                a_token = model.token_ps if i == of_chunk[0] else model.reread_ps
                works[kind] += shared * a_token[kind]
                if not is_chain:
                    continue
                private = max(private, weight(reads_of[i], kinds[i]) - shared)
                numbers = [
                    n
                    for f in range(items[i][8], items[i][8] - (-items[i][2] // 16))
                    for n in range(fragments[f][0], sum(fragments[f]))
                ]
                for n, read in zip(numbers, reads_of[i][1:], strict=True):
                    step_ps = model.reread_ps if steps[n][0] in seen else model.token_ps
                    seen.add(steps[n][0])
                    works[kind] += read.names.size * step_ps[0] + model.step_ps
        assert seen or not is_chain, "a chain without a step"
        for kind in range(3):
            solo = model.solo_item_ps[kind] + longest * model.solo_token_ps[kind]
            if counts[kind]:
                solo += private * model.private_token_ps
                loads.append(Load(kind, counts[kind], solo, works[kind]))
    return bound_ps(loads, setup) + (model.merge_ps if header[layout.H_PARTS] else 0)


class ChainCut(NamedTuple):
    """How a chain should be cut along its rows, and the time of the whole plan."""

    rows_per_item: int  # 0: a plain pack
    separated: set[int]
    predicted_ps: int


def chain_cut(batch: Batch, setup: Setup, wall: int) -> ChainCut:
    """The best cut under one limit of a batch that is one chain and nothing else.

    All rows are on node 0, the only root; the other nodes are its children and end in two rows or
    more. Rows of the same child are side by side, those that end on the root come last.
    """
    model, group, heads = setup.model, setup.shape.group_size, setup.shape.num_kv_heads
    rows, shared = batch.rows, int(batch.forest.length[0])
    horizon = min(64 + int(batch.host_lens.min()) // 32, 256)
    depths = [batch.depth[path[-1]] for path in batch.path_of_row]
    tails = [length - depth for length, depth in zip(batch.host_lens.tolist(), depths, strict=True)]

    def tiles(query_rows: int) -> list[int]:
        full, rest = divmod(query_rows, TILE_ROWS[-1])
        return [2] * full + [min(k for k in range(3) if rest <= TILE_ROWS[k])] * (rest > 0)

    def cut(tokens: int, room: int) -> tuple[int, int]:
        if tokens <= room:
            return tokens, 1
        even = -(-tokens // -(-tokens // room))
        chunk = -(-even // 64) * 64
        return chunk, -(-tokens // chunk)

    def plain(of: int, tokens: int, chunk: int, chunks: int, parts: bool = True) -> list[Load]:
        kinds, left, loads = tiles(of * group), of * group, []
        for kind in sorted(set(kinds)):
            same = kinds.count(kind)
            a_token = same * model.reread_ps[kind]
            if kinds[0] == kind:
                a_token += model.token_ps[kind] - model.reread_ps[kind]
            below = [TILE_ROWS[k] for k in kinds if k > kind]
            number = min(left - sum(below), same * TILE_ROWS[kind]) * parts
            work = chunks * (same * model.item_ps[kind] + number * model.part_ps)
            solo = model.solo_item_ps[kind] + chunk * model.solo_token_ps[kind]
            loads.append(Load(kind, chunks * same, solo, work + tokens * a_token))
        return loads

    def sum_of(loads: list[Load]) -> int:
        return sum(load.work_ps for load in loads)

    # The limit: a part of the mean time of an SM if the chain were one item.
    base = sum_of(plain(rows, shared, shared, 1, parts=False))
    base += sum(tails) * model.token_ps[0] + rows * model.step_ps
    for node in range(1, len(batch.depth)):
        of_node = sum(node in path for path in batch.path_of_row)
        fragments = -(-of_node * group // 16)
        a_token = model.token_ps[0] + (fragments - 1) * model.reread_ps[0]
        base += int(batch.forest.length[node]) * a_token + fragments * model.step_ps
    limit = base * heads // model.num_sms * wall // 16 if wall else 10**18
    room = [max(limit // ps, 64) for ps in model.solo_token_ps]

    # For a number of rows an item: loads, whether the steps are within the limit, and whether the
    # shared run is cut.
    most = max(limit // (4 * model.private_token_ps), 64)  # of a warp alone
    separated = {row for row, tail in enumerate(tails) if tail > most}
    own = [
        {("node", n): int(batch.forest.length[n]) for n in batch.path_of_row[row][1:]}
        | ({} if row in separated else {("tail", row): tails[row]})
        for row in range(rows)
    ]

    def chain(rows_per_item: int) -> tuple[list[Load], bool, bool]:
        work, private, seen = 0, 0, set()
        for first in range(0, rows, rows_per_item):
            query_rows = np.repeat(range(first, min(first + rows_per_item, rows)), group).tolist()
            of_warp = [0] * 4
            for f in range(-(-len(query_rows) // 16)):
                pieces: dict[tuple[str, int], int] = {}
                for row in query_rows[16 * f : 16 * f + 16]:
                    pieces |= own[row]
                for piece, tokens in pieces.items():
                    ps = model.reread_ps if piece in seen else model.token_ps
                    work += tokens * ps[0] + model.step_ps
                of_warp[f % 4] += sum(pieces.values())
                seen |= set(pieces)
            private = max(private, of_warp[0] if len(query_rows) <= 16 else 4 * max(of_warp))
        (kind,) = tiles(min(rows_per_item, rows) * group)
        chunk, chunks = cut(shared, room[kind])
        last = shared - (chunks - 1) * chunk
        loads = plain(rows, shared - last, chunk, chunks - 1) if chunks > 1 else []
        items = -(-rows // rows_per_item)
        work += items * model.item_ps[kind]
        work += last * (model.token_ps[kind] + (items - 1) * model.reread_ps[kind])
        work += (rows if chunks > 1 else len(separated)) * group * model.part_ps
        solo = model.solo_item_ps[kind] + last * model.solo_token_ps[kind]
        private_ps = private * model.private_token_ps
        of_items = Load(kind, items, solo + private_ps, work)
        return [*loads, of_items], private_ps <= limit, chunks > 1

    if any(own):
        tries = [rows // group for rows in (128, 64, 16) if rows >= group]
        if setup.shape.sharing == "on":
            tries = [m for m in tries if m > 1]
        else:
            while tries[-1] > 1:
                tries.append(tries[-1] // 2)
        cuts = {m: chain(m) for m in tries}
        within = [m for m in tries if cuts[m][1]] or tries[-1:]
        chosen = min(within, key=lambda m: (sum_of(cuts[m][0]), -m))
        loads, _, has_parts = cuts[chosen]
    else:
        chosen, has_parts = 0, True
        chunk, chunks = cut(shared, room[tiles(rows * group)[0]])
        loads = plain(rows, shared, chunk, chunks)
    for row in separated:
        chunk, chunks = cut(tails[row], room[tiles(group)[0]])
        loads += plain(1, tails[row], chunk, chunks)
        beyond = tails[row] + horizon - chunks * chunk
        if chunks > 1 and beyond > chunk / 4:  # otherwise the last chunk takes it
            loads += plain(1, 0, 0, -(-beyond // chunk))
    merge_ps = model.merge_ps if has_parts or separated else 0
    return ChainCut(chosen, separated, bound_ps(loads, setup) + merge_ps)
