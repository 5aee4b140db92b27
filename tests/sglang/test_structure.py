# SPDX-License-Identifier: MIT
"""Structure of decode batches, read from SGLang's own prefix trees."""

from __future__ import annotations

from array import array
from itertools import combinations, count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import versions
from scheduling import MiniScheduler, assert_exact, row_depths

from pat_sglang.forest import build_segment_tree
from pat_sglang.metrics import METRICS
from pat_sglang.plugin.feed import StructureFeed
from pat_sglang.plugin.structure import ForestBuilder, StructureTracker, _rows_gone

SYSTEM = list(range(100, 140))
TOOLS = list(range(200, 230))


def observe(scheduler, reqs, tracker=None):
    return observe_batch(scheduler.decode(reqs), tracker)


def observe_batch(batch, tracker=None):
    return (tracker or StructureTracker()).observe(batch, batch.seq_lens_cpu.numpy())


def take(feed, batch):
    """The hook fires, then the backend asks."""
    feed.on_forward(batch)
    return feed.take(batch.seq_lens_cpu.numpy())


def test_two_levels_and_private_tails(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, *TOOLS, 300 + i, 1, 2]) for i in range(4)]
    reqs += [scheduler.serve([*SYSTEM, 400 + i]) for i in range(3)]
    structure = observe(scheduler, reqs)
    assert_exact(scheduler, structure)
    depths = row_depths(structure)
    assert depths[0][1] == 70 and depths[0][4] == 40 and depths[4][5] == 40
    assert structure.no_sharing is None
    assert structure.forest.num_nodes == 2  # private nodes are left out


def test_one_step_lag_after_prefill(tree):
    """The first decode step is launched before the prompt is published: less sharing, not wrong."""
    scheduler = MiniScheduler(tree)
    scheduler.serve([*SYSTEM, 1])
    reqs = [scheduler.admit(scheduler.request([*SYSTEM, *TOOLS, i])) for i in (2, 3)]
    tracker = StructureTracker()
    first = observe(scheduler, reqs, tracker)
    assert_exact(scheduler, first)
    assert row_depths(first)[0][1] == 40
    for req in reqs:
        scheduler.publish(req)
    second = observe(scheduler, reqs, tracker)
    assert second.version != first.version
    assert_exact(scheduler, second)
    assert row_depths(second)[0][1] == 70


def test_duplicates_share_the_whole_prompt_and_write_apart(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, 5]) for _ in range(3)]
    structure = observe(scheduler, reqs)
    assert_exact(scheduler, structure)
    assert row_depths(structure)[0][2] == 41
    assert len(set(structure.leaf_of_row.tolist())) == 1


def test_cold_burst_is_deduplicated_after_the_first_step(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.admit(scheduler.request([*SYSTEM, i])) for i in range(4)]
    tracker = StructureTracker()
    first = observe(scheduler, reqs, tracker)
    assert first.forest is None and first.no_sharing is None
    for req in reqs:
        scheduler.publish(req)
    structure = observe(scheduler, reqs, tracker)
    assert_exact(scheduler, structure)
    assert row_depths(structure)[0][3] == 40


def test_chunked_prefill(tree):
    scheduler = MiniScheduler(tree)
    other = scheduler.serve([*SYSTEM, 1])
    tracker = StructureTracker()
    feed = StructureFeed()
    feed.tracker = tracker
    chunked = scheduler.admit(scheduler.request([*SYSTEM, *TOOLS, *TOOLS, 9]), chunk=32)
    while True:
        feed.on_forward(scheduler.batch([chunked], "EXTEND"))
        done = scheduler.lens[chunked] == len(chunked.origin_input_ids)
        scheduler.publish(chunked, chunked=not done)
        assert_exact(scheduler, observe(scheduler, [other], tracker))
        if done:
            break
        scheduler.next_chunk(chunked, chunk=32)
    structure = observe(scheduler, [other, chunked], tracker)
    assert_exact(scheduler, structure)
    assert row_depths(structure)[0][1] == 40


def test_node_split_keeps_the_plan_exact(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, *TOOLS, i]) for i in (1, 2)]
    tracker = StructureTracker()
    before = observe(scheduler, reqs, tracker)
    scheduler.serve([*SYSTEM[:20], 999])  # splits the node of SYSTEM at 20
    after = observe(scheduler, reqs, tracker)
    assert after is before
    assert_exact(scheduler, after)
    joined = observe(scheduler, [*reqs, scheduler.serve([*SYSTEM[:20], 998])], tracker)
    assert joined.version != before.version
    assert_exact(scheduler, joined)
    assert row_depths(joined)[0][2] == 20


def test_eviction_leaves_running_rows_alone(tree):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    scheduler = MiniScheduler(tree)
    for i in range(8):
        scheduler.finish(scheduler.serve([*SYSTEM, 500 + i, 1, 2, 3]))
    reqs = [scheduler.serve([*SYSTEM, *TOOLS, i]) for i in (1, 2)]
    tracker = StructureTracker()
    before = observe(scheduler, reqs, tracker)
    assert scheduler.tree.evict(EvictParams(num_tokens=1 << 20)).num_tokens_evicted == 32
    assert observe(scheduler, reqs, tracker) is before
    assert_exact(scheduler, before)
    fresh = observe(scheduler, reqs)
    assert_exact(scheduler, fresh)
    assert row_depths(fresh)[0][1] == 70


def test_abort_takes_the_row_out(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(3)]
    tracker = StructureTracker()
    before = observe(scheduler, reqs, tracker)
    scheduler.finish(reqs[1])
    left = [reqs[0], reqs[2]]
    after = observe(scheduler, left, tracker)
    assert after.version != before.version and len(after.reqs) == 2
    assert_exact(scheduler, after)


def test_retraction_and_return(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(3)]
    tracker = StructureTracker()
    observe(scheduler, reqs, tracker)
    scheduler.retract(reqs[2])
    assert_exact(scheduler, observe(scheduler, reqs[:2], tracker))
    scheduler.publish(scheduler.admit(reqs[2]))
    back = observe(scheduler, list(reqs), tracker)
    assert_exact(scheduler, back)
    assert row_depths(back)[0][2] == 40


def test_retract_all_and_resume_is_a_new_signature(tree):
    """Same requests in the same list, even the same pool rows and nodes: the prefill between ends
    the plan."""
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    feed = StructureFeed()
    before = take(feed, scheduler.decode(reqs))
    assert take(feed, scheduler.decode(reqs)) is before
    for req in reqs:
        scheduler.retract(req)
    for req in reqs:
        scheduler.admit(req)
    feed.on_forward(scheduler.batch(reqs, "EXTEND"))
    for req in reqs:
        scheduler.publish(req)
    after = take(feed, scheduler.decode(reqs))
    assert after.version != before.version
    assert_exact(scheduler, after)


def test_lora_namespaces_never_share(tree):
    scheduler = MiniScheduler(tree)
    keys = ["lora-a", "lora-b", None, "lora-a"]
    reqs = [scheduler.serve([*SYSTEM, i], key) for i, key in enumerate(keys)]
    structure = observe(scheduler, reqs)
    assert_exact(scheduler, structure)
    depths = row_depths(structure)
    assert depths[0][3] == 40 and depths[0][1] == depths[0][2] == depths[1][2] == 0


def test_disabled_radix_cache(tree):
    scheduler = MiniScheduler(tree, disable=True)
    structure = observe(scheduler, [scheduler.serve([*SYSTEM, i]) for i in range(2)])
    assert structure.forest is None and structure.no_sharing == "radix cache is off"
    assert_exact(scheduler, structure)


@pytest.mark.skipif(
    not versions.has_tree("chunk"),
    reason="0.5.23 has no ChunkCache but a tree that is off: test_disabled_radix_cache",
)
def test_chunk_cache():
    scheduler = MiniScheduler("chunk")
    structure = observe(scheduler, [scheduler.serve([*SYSTEM, i]) for i in range(2)])
    assert structure.forest is None and structure.no_sharing == "radix cache is off"


def test_unified_tree_with_node_ids(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, *TOOLS, i]) for i in range(2)]
    reqs.append(scheduler.serve([*SYSTEM, 1]))
    assert all((type(req.last_node) is int) == (tree != "radix") for req in reqs)
    structure = observe(scheduler, reqs)
    assert_exact(scheduler, structure)
    assert row_depths(structure)[0][1] == 70


def test_page_size_16_shares_whole_pages(tree):
    scheduler = MiniScheduler(tree, page_size=16)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(3)]
    structure = observe(scheduler, reqs)
    assert_exact(scheduler, structure)
    assert row_depths(structure)[0][1] == 32


class RustCore:
    """collect_path_info as both tree cores of 0.5.22+ have it; no node objects."""

    def __init__(self, paths):
        self.paths = paths

    def collect_path_info(self, ids):
        return tuple(
            tuple(
                SimpleNamespace(node_id=node, path_start=begin, path_end=end)
                for node, begin, end in self.paths[i]
            )
            for i in ids
        )


def fake_batch(tree, nodes, lens):
    reqs = [
        SimpleNamespace(last_node=n, kv=SimpleNamespace(req_pool_idx=i))
        for i, n in enumerate(nodes)
    ]
    return SimpleNamespace(reqs=reqs, tree_cache=tree, seq_lens_cpu=torch.tensor(lens))


def test_rust_core_paths():
    core = RustCore(
        {5: [(2, 0, 10), (5, 10, 30)], 6: [(2, 0, 10), (6, 10, 12)], 2: [(2, 0, 10)], 1: []}
    )
    tree = SimpleNamespace(tree_core=core, disable=False)
    structure = observe_batch(fake_batch(tree, [5, 6, 2, 1, 5], [40, 13, 11, 9, 31]))
    depths = row_depths(structure)
    assert depths[0][1] == 10 and depths[0][4] == 30 and depths[1][2] == 10
    assert structure.leaf_of_row[3] == -1


def test_stale_node_ids_cost_sharing_not_the_server(caplog):
    tree = SimpleNamespace(tree_core=RustCore({}), disable=False)
    tracker = StructureTracker()
    for _ in range(2):
        structure = observe_batch(fake_batch(tree, [3, 3], [5, 5]), tracker)
        tracker.drop()
    assert structure.forest is None and structure.no_sharing == "tree lookup failed: KeyError"
    assert len(caplog.records) == 1


def test_stale_node_ids_are_an_error_when_strict(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    tree = SimpleNamespace(tree_core=RustCore({}), disable=False)
    with pytest.raises(KeyError):
        observe_batch(fake_batch(tree, [3, 3], [5, 5]))


class IdTree:
    """A radix tree of ids in a few lines, as the tree cores of 0.5.22+ are: no node objects."""

    def __init__(self, counts_children=True):
        self.counts_children = counts_children  # 0.5.22 does not
        self.ids = count()
        self.asked = []
        self.reset()

    def reset(self):
        self.nodes = {next(self.ids): SimpleNamespace(parent=None, key=(), children={}, locks=0)}

    def path(self, node):
        path = []
        while self.nodes[node].parent is not None:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def collect_path_info(self, ids):
        self.asked.extend(ids)
        paths = []
        for last in ids:
            paths.append([])
            end = 0
            for i in self.path(last):
                node = self.nodes[i]
                info = SimpleNamespace(
                    node_id=i, path_start=end, path_end=(end := end + len(node.key))
                )
                if self.counts_children:
                    info.num_children = len(node.children)
                paths[-1].append(info)
        return paths

    def add(self, parent, key):
        new = next(self.ids)
        self.nodes[new] = SimpleNamespace(parent=parent, key=key, children={}, locks=0)
        self.nodes[parent].children[key[0]] = new
        return new

    def match(self, tokens):
        """The last node of what is there, split off if need be, and how long that is."""
        at, done = min(self.nodes), 0
        while done < len(tokens) and (child := self.nodes[at].children.get(tokens[done])):
            node = self.nodes[child]
            rest = tokens[done : done + len(node.key)]
            same = next((i for i, t in enumerate(rest) if t != node.key[i]), len(rest))
            if same < len(node.key):  # as UnifiedTreeCore._split_node: the lower part keeps its id
                upper = self.add(at, node.key[:same])
                self.nodes[upper].locks = node.locks
                self.nodes[upper].children[node.key[same]] = child
                node.parent, node.key = upper, node.key[same:]
                child = upper
            at, done = child, done + same
        return at, done

    def insert(self, tokens):
        at, done = self.match(tokens)
        return self.add(at, tokens[done:]) if done < len(tokens) else at

    def lock(self, node, by=1):
        for i in self.path(node):
            self.nodes[i].locks += by
        return node

    def unlock(self, lock):
        self.lock(lock, -1)

    def evict(self):
        for i in sorted(self.nodes, reverse=True):
            node = self.nodes[i]
            if node.parent is not None and not node.locks and not node.children:
                del self.nodes[i]
                del self.nodes[node.parent].children[node.key[0]]

    def slots(self, node):
        """What stands for slots: each prefix is there once, so tokens from the root do."""
        return [token for i in self.path(node) for token in self.nodes[i].key]


class RealIdTree:
    """The same with SGLang's tree, on the Rust core."""

    def __init__(self):
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.allocator = TokenToKVPoolAllocator(2048, torch.float32, "cpu", None, False)
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                req_to_token_pool=ReqToTokenPool(1, 8, "cpu", enable_memory_saver=False),
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                disable=False,
                tree_components=(ComponentType.FULL,),
                tree_core_backend="rust",
            )
        )
        self.lock, self.unlock = self.cache.lock, self.cache.unlock
        self.asked = []

    def collect_path_info(self, ids):
        self.asked.extend(ids)
        return self.cache.tree_core.collect_path_info(ids)

    def reset(self):
        self.cache.reset()
        self.allocator.clear()

    def match(self, tokens):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(array("q", tokens), None)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        return found.last_device_node, found.device_prefix_len

    def insert(self, tokens):
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        if self.allocator.available_size() < 100:
            self.evict()
        slots = self.allocator.alloc(len(tokens))
        key = RadixKey(array("q", tokens), None)
        self.cache.insert(InsertParams(key=key, value=slots))
        return self.match(tokens)[0]

    def evict(self):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.cache.evict(EvictParams(num_tokens=1 << 20))

    def slots(self, node):
        return self.cache.path_device_indices(node).tolist()


def common(first, second):
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


@pytest.mark.parametrize("kind", ["0.5.22", "0.5.23", "rust"])
def test_paths_of_ids_are_followed(kind):
    """Rows come, grow, end and go while nodes are split and evicted: the forest always says what
    the rows' slots say, and nothing is kept that no row passes."""
    if kind == "rust":
        pytest.importorskip("sglang.srt.mem_cache.rust_tree_core.adapter")
        tree = RealIdTree()
    else:
        tree = IdTree(counts_children=kind == "0.5.23")
    rng = np.random.default_rng(17)
    tracker, cache = StructureTracker(), SimpleNamespace(tree_core=tree, disable=False)
    rows, ended = [], []  # (last node, lock, tokens)
    kept = shared = 0

    def some_tokens():
        known = [tokens for _, _, tokens in rows] + ended
        begin = known[int(rng.integers(len(known)))] if known and rng.random() < 0.8 else ()
        begin = begin[: int(rng.integers(len(begin) + 1))]
        return (*begin, *rng.integers(4, size=int(rng.integers(1, 9))).tolist())

    def admit(tokens):
        last = tree.insert(tokens)
        return last, tree.lock(last), tokens

    for _ in range(2000):
        for _ in range(int(rng.integers(1, 4))):
            match int(rng.integers(12)):
                case 0:  # a request comes and goes between two steps
                    tree.insert(some_tokens())
                case 1:
                    tree.match(some_tokens())
                case 2:
                    tree.evict()
                case 3 if rows:  # published, or another chunk
                    row = int(rng.integers(len(rows)))
                    _, lock, tokens = rows[row]
                    rows[row] = admit((*tokens, *rng.integers(4, size=3).tolist())[:60])
                    tree.unlock(lock)
                case 4 if rows and rng.random() < 0.3:  # what was found in the tree, no more
                    tokens = some_tokens()
                    last, length = tree.match(tokens)
                    rows = [*rows, (last, tree.lock(last), tokens[:length])]
                case 5 if ended and len(rows) < 12:  # retracted and back, evicted or not
                    rows = [*rows, admit(ended.pop())]
                case 6 if rng.random() < 0.1:
                    rows = [rows[i] for i in rng.permutation(len(rows))]
                case 7 if rng.random() < 0.05:  # flush_cache, which needs an idle server
                    for _, lock, _ in rows:
                        tree.unlock(lock)
                    rows = []
                    tree.reset()
                case 8 | 9 | 10 if len(rows) < 12:
                    rows = [*rows, admit(some_tokens())]
                case _ if len(rows) > 4:
                    _, lock, tokens = rows[(gone := int(rng.integers(len(rows))))]
                    rows = rows[:gone] + rows[gone + 1 :]
                    tree.unlock(lock)
                    ended = [*ended[-8:], tokens]
        last_nodes = [last for last, _, _ in rows]
        before = tracker._reader and tracker._reader._builder._shared
        structure = observe_batch(
            fake_batch(cache, last_nodes, [len(tokens) + 1 for _, _, tokens in rows] or [1]),
            tracker,
        )
        assert structure.no_sharing is None
        same = before is tracker._reader._builder._shared
        kept, shared = kept + same, shared + (same and structure.forest is not None)

        slots = [tree.slots(last) for last in last_nodes]
        assert [len(row) for row in slots] == [len(tokens) for _, _, tokens in rows]
        depths = row_depths(structure)
        for i, j in combinations(range(len(rows)), 2):
            assert depths[i][j] == common(slots[i], slots[j])
        passed = {info.node_id for path in tree.collect_path_info(last_nodes) for info in path}
        assert tracker._reader._paths._nodes.keys() <= passed  # less what was split since
    assert kept > 500 and shared > 300


def test_one_row_of_many_changes():
    """One id is asked for, no node of another row is made anew, and the forest stays."""
    tree, tracker = IdTree(), StructureTracker()
    cache = SimpleNamespace(tree_core=tree, disable=False)

    def admit(row):  # a system prompt, then 15 chunks
        for chunks in range(1, 16):
            last = tree.insert((*SYSTEM, *(1000 + row,) * 8 * chunks))
        return last

    rows = [admit(row) for row in range(256)]
    assert len(tree.path(rows[0])) == 16
    before = observe_batch(fake_batch(cache, rows, [200] * 256), tracker)
    known = dict(tracker._reader._paths._nodes)
    tree.asked.clear()
    for step in range(20):
        rows = [*rows[:100], *rows[101:], admit(256 + step)]
        after = observe_batch(fake_batch(cache, rows, [200] * 256), tracker)
        assert after.forest is before.forest and after.leaf_of_row.tolist() == [0] * 256
        assert tree.asked == [rows[-1]]
        made = tracker._reader._paths._nodes.items() - known.items()
        assert len(made) == 15
        known = dict(tracker._reader._paths._nodes)
        tree.asked.clear()


def test_a_private_node_that_a_new_row_splits_is_looked_at_again():
    """Neither row's path tells of the other: the known one has to be asked for again."""
    tree, tracker = IdTree(), StructureTracker()
    cache = SimpleNamespace(tree_core=tree, disable=False)
    rows = [tree.insert((*SYSTEM, *TOOLS, i)) for i in (1, 2)]
    rows.append(tree.insert((*SYSTEM, 5, 6, 7, 8)))
    observe_batch(fake_batch(cache, rows, [100] * 3), tracker)
    tree.asked.clear()
    rows.append(tree.insert((*SYSTEM, 5, 6, 9)))
    structure = observe_batch(fake_batch(cache, rows, [100] * 4), tracker)
    assert row_depths(structure)[2][3] == 42 and row_depths(structure)[0][1] == 70
    assert len(tree.asked) == 3  # it, the one split and the node of TOOLS


def test_a_shared_node_that_was_split_is_two_once_a_row_shows_it():
    tree, tracker = IdTree(), StructureTracker()
    cache = SimpleNamespace(tree_core=tree, disable=False)
    rows = [tree.insert((*SYSTEM, *TOOLS, i)) for i in (1, 2)]
    before = observe_batch(fake_batch(cache, rows, [100] * 2), tracker)
    tree.match(SYSTEM)
    again = observe_batch(fake_batch(cache, rows, [100] * 2), tracker)
    assert again.forest is before.forest and before.forest.length.tolist() == [70]
    rows.append(tree.insert((*SYSTEM, *TOOLS, 3)))
    after = observe_batch(fake_batch(cache, rows, [100] * 3), tracker)
    assert after.forest.length.tolist() == [40, 30] and after.leaf_of_row.tolist() == [1, 1, 1]


def test_a_reading_that_failed_halfway_leaves_nothing_behind(monkeypatch):
    tree, tracker = IdTree(), StructureTracker()
    cache = SimpleNamespace(tree_core=tree, disable=False)
    rows = [tree.insert((*SYSTEM, 1))]
    observe_batch(fake_batch(cache, rows, [100]), tracker)
    rows.append(tree.insert((*SYSTEM, 2)))
    asked, collect = count(), tree.collect_path_info

    def fails_once(ids):
        if next(asked) == 1:
            raise KeyError(ids)
        return collect(ids)

    monkeypatch.setattr(tracker._reader._paths, "_collect", fails_once)
    failed = observe_batch(fake_batch(cache, rows, [100] * 2), tracker)
    assert failed.forest is None and failed.no_sharing == "tree lookup failed: KeyError"
    found = observe_batch(fake_batch(cache, rows, [100] * 2), tracker)
    assert row_depths(found)[0][1] == 40


def test_a_row_below_the_end_of_another_is_no_row_of_its_own():
    top = Node(Node(None, 0), 10)
    rows = [Node(top, 5) for _ in range(3)]
    builder = ForestBuilder()
    builder.build(rows, np.full(3, 40))
    middle = Node(rows[0], 4)
    forest, leaf_of_row = builder.build([*rows, Node(middle, 3)], np.full(4, 40))
    assert forest.length.tolist() == [10, 5] and leaf_of_row.tolist() == [1, 0, 0, 1]


def test_a_row_whose_nodes_are_its_own_keeps_the_forest():
    top = Node(Node(None, 0), 10)
    rows = [Node(top, 5) for _ in range(3)]
    builder = ForestBuilder()
    before, _ = builder.build(rows, np.full(3, 40))
    chunks = [Node(top, 5)]
    chunks += [Node(chunks[0], 6)]
    forest, leaf_of_row = builder.build([*rows, chunks[1]], np.full(4, 40))
    assert forest is before and leaf_of_row.tolist() == [0] * 4
    forest, leaf_of_row = builder.build([*rows, *chunks[::-1]], np.full(5, 40))
    assert forest.length.tolist() == [10, 5] and leaf_of_row.tolist() == [0, 0, 0, 1, 1]


def test_opaque_handles_share_nothing():
    class Handle:
        pass

    handle = Handle()
    tree = SimpleNamespace(disable=False)
    structure = observe_batch(fake_batch(tree, [handle, handle], [5, 5]))
    assert structure.forest is None
    assert structure.no_sharing == "nodes of type Handle are opaque"


def test_streaming_session_is_looked_through(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    reqs.append(scheduler.serve([*SYSTEM, 9]))
    batch = scheduler.decode(reqs)
    batch.tree_cache = SimpleNamespace(inner=scheduler.tree)
    reqs[2].last_node = type("_VirtualNode", (), {})()
    structure = observe_batch(batch)
    assert row_depths(structure)[0][1] == 40 and structure.leaf_of_row[2] == -1


def test_path_is_capped_below_the_sequence_length():
    top = Node(Node(None, 0), 10)
    low = Node(top, 5)
    forest, leaf = shared_forest([low, low, low], np.array([16, 15, 3]))
    assert leaf.tolist() == [1, 0, -1]  # 15 tokens: the last one is being decoded
    assert forest.length.tolist() == [10, 5]


class Node:
    def __init__(self, parent, length):
        self.parent, self.key, self.children = parent, range(length), []
        if parent is not None:
            parent.children.append(self)

    def split(self):
        """As RadixCache._split_node: a new node above, with the first token."""
        upper = Node(self.parent, 1)
        self.parent.children.remove(self)
        self.parent, self.key = upper, self.key[1:]
        upper.children.append(self)
        return upper


def shared_forest(nodes, lens):
    return ForestBuilder().build(nodes, lens)


def segments_of(forest, leaf_of_row, lens):
    """What a planner makes of it: the shared runs, and how many rows each has."""
    if forest is None:
        return []
    tree = build_segment_tree(forest, leaf_of_row, lens)
    return sorted((s.begin, s.end, s.num_rows, s.first_row) for s in tree.segments)


def test_forest_agrees_with_paths_on_random_trees():
    rng = np.random.default_rng(5)
    for _ in range(300):
        nodes = [Node(None, 0)]
        for _ in range(int(rng.integers(1, 40))):
            nodes.append(Node(nodes[int(rng.integers(len(nodes)))], int(rng.integers(1, 9))))
        rows = [nodes[int(rng.integers(len(nodes)))] for _ in range(int(rng.integers(1, 20)))]
        rows = [None if rng.random() < 0.1 else node for node in rows]

        def depth_of(node):
            return (
                0 if node is None or node.parent is None else len(node.key) + depth_of(node.parent)
            )

        def ancestors(node):
            return set() if node is None or node.parent is None else {node, *ancestors(node.parent)}

        lens = np.array([depth_of(node) + 1 for node in rows])
        forest, leaf = shared_forest(rows, lens)
        structure = SimpleNamespace(reqs=rows, forest=forest, leaf_of_row=leaf)
        depths = row_depths(structure)
        for i, a in enumerate(rows):
            for j, b in enumerate(rows[:i]):
                common = ancestors(a) & ancestors(b)
                assert depths[i][j] == max(map(depth_of, common), default=0)
        if forest is not None:
            assert all(p < i for i, p in enumerate(forest.parent))


def test_a_kept_forest_is_the_one_of_a_new_builder():
    """Rows come, go and change places, nodes are split and added: nothing is missed."""
    rng = np.random.default_rng(11)
    root = Node(None, 0)
    nodes, rows, builder = [root], [], ForestBuilder()
    kept = shared = 0
    for _ in range(3000):
        for _ in range(int(rng.integers(1, 4))):  # changes from one step to the next
            parent = nodes[int(rng.integers(len(nodes)))]
            match int(rng.integers(8)):
                case 0:
                    nodes.append(Node(parent, int(rng.integers(1, 9))))
                case 1 if len(parent.key) > 1:
                    nodes.append(parent.split())
                case 2 if len(rows) < 12:
                    rows = [*rows, parent]
                case 3 | 4 if len(rows) < 12:  # as most requests come: a new end below
                    nodes.append(Node(parent, int(rng.integers(1, 9))))
                    rows = [*rows, nodes[-1]]
                case 5 | 6 if len(rows) > 1:
                    gone = int(rng.integers(len(rows)))
                    rows = rows[:gone] + rows[gone + 1 :]
                case 7 if rows:
                    rows = [rows[i] for i in rng.permutation(len(rows))]
        if not rows:
            continue
        lens = rng.integers(0, 40, len(rows))
        before = builder._shared
        found, fresh = builder.build(rows, lens), shared_forest(rows, lens)
        kept += builder._shared is before
        shared += builder._shared is before and found[0] is not None
        assert segments_of(*found, lens) == segments_of(*fresh, lens)
        depths = []
        for forest, leaf_of_row in (found, fresh):
            shown = SimpleNamespace(reqs=rows, forest=forest, leaf_of_row=leaf_of_row)
            depths.append(np.array(row_depths(shown), int).reshape(len(rows), len(rows)))
            np.fill_diagonal(depths[-1], 0)  # a kept node may be one row's alone by now
        assert np.array_equal(*depths)
    assert kept > 1000 and shared > 1000


def test_rows_that_stay_are_found_in_their_order():
    """Against every way to read the new batch as rows of the old one, then others."""
    rng = np.random.default_rng(3)
    for _ in range(3000):
        some = [object() for _ in range(4)]  # so few that last nodes repeat
        before = [some[i] for i in rng.integers(4, size=int(rng.integers(6)))]
        now = [some[i] for i in rng.integers(4, size=int(rng.integers(6)))]
        gone = _rows_gone(before, now)
        stays = [node for row, node in enumerate(before) if row not in set(gone)]
        assert gone == sorted(set(gone)) and now[: len(stays)] == stays
        assert len(stays) == max(
            size
            for size in range(len(before) + 1)
            if now[:size] in map(list, combinations(before, size))
        )


def test_a_batch_that_others_left_and_joined():
    """What filter_batch and merge_batch make: only those who left are gone."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        before, new = ([object() for _ in range(int(rng.integers(40)))] for _ in range(2))
        gone = np.flatnonzero(rng.random(len(before)) < rng.choice([0.02, 0.5])).tolist()
        now = [node for row, node in enumerate(before) if row not in gone] + new
        assert _rows_gone(before, now) == gone


def test_a_row_that_comes_back_finds_its_forest():
    top = Node(Node(None, 0), 10)
    rows, lens = [Node(top, 5) for _ in range(4)], np.full(4, 30)
    builder = ForestBuilder()
    builder.build(rows, lens)
    before = builder._shared
    builder.build(rows[1:], lens[1:])
    Node(rows[0], 3)  # the answer of the request that ended there
    forest, leaf_of_row = builder.build([*rows[1:], rows[0]], lens)
    assert builder._shared is before
    assert forest.length.tolist() == [10] and leaf_of_row.tolist() == [0] * 4


@pytest.mark.parametrize("known", [False, True])
def test_two_new_rows_with_one_end_share_it(known):
    top = Node(Node(None, 0), 10)
    rows = [Node(top, 5) for _ in range(4)]
    builder = ForestBuilder()
    builder.build(rows if known else rows[1:], np.full(4, 30))
    forest, leaf_of_row = builder.build([*rows[1:], rows[0], rows[0]], np.full(5, 30))
    assert forest.length.tolist() == [10, 5] and leaf_of_row.tolist() == [0, 0, 0, 1, 1]


def test_a_row_taken_for_short_has_its_whole_path_when_it_stays():
    top = Node(Node(None, 0), 10)
    rows, builder = [Node(top, 5) for _ in range(3)], ForestBuilder()
    _, lifted = builder.build(rows, np.array([10, 30, 30]))
    _, whole = builder.build(rows[:2], np.array([11, 30]))
    assert (lifted.tolist(), whole.tolist()) == ([-1, 0, 0], [0, 0])


def test_ends_of_rows_that_are_gone_are_forgotten():
    top = Node(Node(None, 0), 10)
    builder, rows = ForestBuilder(), [Node(top, 5) for _ in range(4)]
    for _ in range(1000):
        builder.build(rows, np.full(4, 30))
        rows = [*rows[1:], Node(top, 5)]
    assert len(builder._shared.leaf) < 100


def test_a_node_that_got_shorter_in_place_is_read_again():
    top = Node(Node(None, 0), 10)
    builder, lens = ForestBuilder(), np.array([20, 20])
    first, _ = builder.build([top, top], lens)
    top.key = range(4)
    second, _ = builder.build([top, top], lens)
    assert (first.length.tolist(), second.length.tolist()) == ([10], [4])


def test_a_last_node_above_another_rows_is_shared():
    """Each row ends in a node of its own, but one of these lies on the other's path."""
    top = Node(Node(None, 0), 10)
    forest, leaf = shared_forest([top, Node(top, 5)], np.array([30, 30]))
    assert forest.length.tolist() == [10] and leaf.tolist() == [0, 0]


# -- signature ------------------------------------------------------------------------------------


def test_unchanged_rows_are_the_same_object(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(3)]
    tracker = StructureTracker()
    first = observe(scheduler, reqs, tracker)
    assert observe(scheduler, reqs, tracker) is first
    # A new list may mean that rows are elsewhere in req_to_token.
    assert observe(scheduler, list(reqs), tracker).version != first.version


def test_reordered_rows_are_a_change(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(3)]
    tracker = StructureTracker()
    first = observe(scheduler, reqs, tracker)
    second = observe(scheduler, reqs[::-1], tracker)
    assert second.version != first.version and second.reqs == reqs[::-1]


@pytest.mark.parametrize("mode", ["MIXED", "EXTEND"])
def test_another_forward_of_a_row_drops_the_signature(mode, tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    feed = StructureFeed()
    first = take(feed, scheduler.decode(reqs))
    new = scheduler.admit(scheduler.request([*SYSTEM, 8, 8, 8]))
    feed.on_forward(scheduler.batch([new, *reqs], mode))
    assert feed.take(np.full(3, 50)) is None  # only decode steps have a structure
    assert take(feed, scheduler.decode(reqs)).version != first.version


def test_a_prefill_of_others_keeps_the_signature(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    feed = StructureFeed()
    first = take(feed, scheduler.decode(reqs))
    feed.on_forward(scheduler.batch([scheduler.admit(scheduler.request([1, 2, 3]))], "EXTEND"))
    assert take(feed, scheduler.decode(reqs)) is first


def test_a_structure_is_taken_once_and_only_by_its_own_step(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    feed = StructureFeed()
    assert take(feed, scheduler.decode(reqs)) is not None
    assert feed.take(np.full(2, 50)) is None
    feed.on_forward(scheduler.decode(reqs))
    other = feed.take(np.full(5, 50))
    assert other.forest is None and "no requests" in other.no_sharing
    assert take(feed, scheduler.decode(reqs)).version > other.version


def test_speculative_decode_is_not_ours(tree):
    scheduler = MiniScheduler(tree)
    reqs = [scheduler.serve([*SYSTEM, i]) for i in range(2)]
    feed = StructureFeed()
    batch = scheduler.decode(reqs)
    batch.spec_info = object()
    assert take(feed, batch) is None
    assert METRICS.as_dict()["steps_on_base"] == {"speculative decode": 1}


def test_hook_that_never_fires_is_reported(monkeypatch, caplog):
    feed = StructureFeed()
    feed.check_fired()
    feed.check_fired()
    assert len(caplog.records) == 1 and "never fired" in caplog.text
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    with pytest.raises(RuntimeError, match="never fired"):
        StructureFeed().check_fired()
