# SPDX-License-Identifier: MIT
"""Cost constants of the GPU at hand, by measuring plans: ``doctor --calibrate``.

The constants of the cost model are not physical quantities that a stopwatch could give one by one:
what counts is which plans they choose. So they are searched: a random descent changes one to three
of them at a time, has a set of batches planned and timed, and keeps what makes the set faster. Most
changes leave most plans as they were: times are kept by plan, and taken again only to confirm.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import __version__, layout, saved_cost
from ._types import Int32Array
from .cost import ALL_TILES, CostModel, cost_model_for
from .decode import pat_decode
from .forest import Forest, build_segment_tree, node_ends
from .host import HostPlanner
from .plan import DecodePlanner

HEADS = ((32, 8), (64, 8), (16, 8), (8, 1), (32, 32))
HEAD_DIM = 128
MAX_ROWS = 512
MAX_TOKENS = 1 << 19
MAX_KV_BYTES = 2 << 30  # of a batch: larger ones are left out
FLUSH_BYTES = 256 << 20  # written before each replay: more than any L2 holds
REPLAYS = 9  # of which the median counts
LEAST_GAIN = 0.9985  # of the time of a whole set; what is less is noise

# What a step may change: (field, tile or None), and by which factor.
_CONSTANTS: tuple[tuple[str, int | None], ...] = (
    *(
        (name, tile)
        for name in ("item_ps", "reread_ps", "solo_item_ps", "solo_token_ps")
        for tile in ALL_TILES
    ),
    ("token_ps", 1), ("token_ps", 2),  # that of the narrow tile is the bandwidth
    ("private_token_ps", None), ("part_ps", None), ("step_ps", None), ("merge_ps", None),
)  # fmt: skip
_FACTORS = (0.5, 0.65, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Batch:
    """One decode batch: its forest, the deepest node of each row and the lengths ``[rows]``."""

    name: str
    forest: Forest
    leaf_of_row: np.ndarray
    lens: np.ndarray

    @property
    def tokens(self) -> int:
        """Unique tokens."""
        return build_segment_tree(self.forest, self.leaf_of_row, self.lens).unique_tokens


def batches() -> list[Batch]:
    """What the constants are chosen for: unshared rows, groups like those of RL rollouts, agents on
    a long root, trees of many levels, a long row among short ones."""
    rng = np.random.default_rng(0)

    def log_uniform(shortest: int, longest: int, count: int) -> np.ndarray:
        return np.exp(rng.uniform(math.log(shortest), math.log(longest), count))

    def unshared(rows: int, tokens: int) -> Batch:
        return Batch(
            f"{rows} rows of {tokens}",
            Forest.empty(),
            np.full(rows, -1, np.int32),
            np.full(rows, tokens, np.int32),
        )

    def groups(count: int, rows: int, prompt: int, shortest: int, longest: int) -> Batch:
        own = log_uniform(shortest, longest, count * rows)
        return Batch(
            f"{count} groups of {rows} on {prompt}, {shortest} to {longest} of their own",
            Forest(np.full(count, -1), np.full(count, prompt)),
            np.repeat(np.arange(count, dtype=np.int32), rows),
            (prompt + own).astype(np.int32),
        )

    def levels(widths: Sequence[int], tokens: Sequence[int]) -> Batch:
        """Nodes of each level, the last one's being the rows; tokens of a node of each level."""
        parent = [-1] * widths[0]
        for level in range(1, len(widths) - 1):
            above = sum(widths[: level - 1])
            each = widths[level] // widths[level - 1]
            parent += [above + node // each for node in range(widths[level])]
        leaf = len(parent) - widths[-2] + np.arange(widths[-1]) * widths[-2] // widths[-1]
        return Batch(
            f"{widths} nodes of {tokens}",
            Forest(np.array(parent), np.repeat(tokens[:-1], widths[:-1])),
            leaf.astype(np.int32),
            np.full(widths[-1], sum(tokens), np.int32),
        )

    def agents(count: int, root: int) -> Batch:
        """On one root; each with up to 8 turns, below them 1 to 8 rows."""
        parent, length, depth, leaf, lens = [-1], [root], [root], [], []
        for _ in range(count):
            tip = 0
            for _ in range(rng.integers(0, 9)):
                parent.append(tip)
                length.append(int(log_uniform(16, 1024, 1)[0]))
                depth.append(depth[tip] + length[-1])
                tip = len(parent) - 1
            for own in log_uniform(1, 2048, int(rng.integers(1, 9))):
                leaf.append(tip)
                lens.append(depth[tip] + int(own))
        return Batch(
            f"{count} agents on {root}",
            Forest(np.array(parent), np.array(length)),
            np.array(leaf, np.int32),
            np.array(lens, np.int32),
        )

    def one_long(rows: int, prefix: int, longest: int) -> Batch:
        """Every other row on the prefix, the first one long, the others of up to 1024."""
        own = log_uniform(1, 1024, rows)
        own[0] = longest
        leaf = np.arange(rows, dtype=np.int32) % 2 - 1
        return Batch(
            f"one of {longest} among {rows}, half of them on {prefix}",
            Forest(np.array([-1]), np.array([prefix])),
            leaf,
            (own + 1 + prefix * (leaf == 0)).astype(np.int32),
        )

    return [
        unshared(1, 1024), unshared(1, 16384), unshared(8, 1024), unshared(8, 8192),
        unshared(64, 1024), unshared(64, 4096),
        groups(1, 16, 4096, 256, 512),
        groups(1, 256, 2048, 32, 64),
        groups(4, 32, 4096, 128, 256),
        groups(8, 8, 1024, 256, 8192),
        groups(8, 64, 1024, 128, 512),
        groups(32, 8, 512, 64, 2048),
        groups(6, 24, 1024, 1, 16384),
        groups(16, 12, 2048, 1, 8192),
        groups(1, 64, 8192, 16, 1024),
        levels((1, 8, 128), (2048, 512, 256)),
        levels((1, 16, 64), (8192, 128, 64)),
        levels((1, 4, 256), (64, 256, 64)),
        levels((8, 32, 512), (512, 128, 128)),
        levels((1, 4, 16, 512), (768, 256, 128, 48)),
        levels((1, 4, 16, 64, 512), (256, 64, 192, 64, 160)),
        levels((1, 8, 32, 64, 128, 512), (256, 128, 64, 32, 32, 48)),
        agents(6, 2500), agents(16, 7000), agents(40, 4000),
        one_long(64, 256, 32768), one_long(32, 900, 16384),
    ]  # fmt: skip


def descend(
    start: CostModel,
    measure: Callable[[CostModel, bool], Sequence[float]],
    keep_going: Callable[[], bool],
    seed: int = 0,
) -> tuple[CostModel, float]:
    """Random descent over the constants.

    Args:
        start: where it begins.
        measure: microseconds of every batch, planned under a model; ``True``: known ones anew.
        keep_going: asked before each step.
        seed: of the steps.

    Returns:
        The best model, and the geometric mean of its times over that of ``start``: at most 1.
    """
    rng = random.Random(seed)

    def score(model: CostModel, again: bool = False) -> float:
        return statistics.fmean(math.log(us) for us in measure(model, again))

    best, best_score = start, score(start, again=True)
    while keep_going():
        changed: dict[str, Any] = {}
        for name, tile in rng.sample(_CONSTANTS, rng.choice((1, 1, 2, 3))):
            value, factor = changed.get(name, getattr(best, name)), rng.choice(_FACTORS)
            if tile is None:
                changed[name] = max(1, int(value * factor))
            else:
                scaled = max(1, int(value[tile] * factor))
                changed[name] = (*value[:tile], scaled, *value[tile + 1 :])
        candidate = replace(best, **changed)
        least_gain = math.log(LEAST_GAIN)
        if score(candidate) >= best_score + least_gain:
            continue
        # Timed again: the first of many candidates to look good is often only lucky. The best one
        # has some of these plans too.
        confirmed, best_score = score(candidate, again=True), score(best)
        if confirmed < best_score + least_gain:
            best, best_score = candidate, confirmed
    return best, math.exp(best_score - score(start))


class PlanTimes:
    """Microseconds by plan, the latest taken.

    Args:
        time_plan: times the plan at hand.
    """

    def __init__(self, time_plan: Callable[[], float]) -> None:
        self._time_plan = time_plan
        self._us: dict[bytes, float] = {}

    def us(self, words: Int32Array, again: bool) -> float:
        """Of the plan at hand, whose words these are; known plans are timed if ``again``."""
        words = words.copy()
        words[layout.H_PREDICTED_NS] = 0  # the model's opinion is no part of what is run
        plan = words.tobytes()
        if again or plan not in self._us:
            self._us[plan] = self._time_plan()
        return self._us[plan]


class _Timed:
    """A batch at one head layout on the GPU, its decode captured once for all plans."""

    def __init__(
        self,
        batch: Batch,
        planner: DecodePlanner,
        k: torch.Tensor,
        v: torch.Tensor,
        flush: torch.Tensor,
    ) -> None:
        rows, device = len(batch.lens), planner.layer.device
        lens = torch.from_numpy(batch.lens.astype(np.int64)).to(device)
        table = torch.from_numpy(slots_of(batch)).to(device)
        self.planner = planner
        self.arguments = (
            batch.forest, batch.leaf_of_row, batch.lens, lens, table,
            torch.arange(rows, device=device),
        )  # fmt: skip
        q = torch.randn(rows, planner.layer.num_q_heads, HEAD_DIM, dtype=k.dtype, device=device)
        out = torch.empty_like(q)
        plan = planner.plan(*self.arguments)

        def run() -> None:
            pat_decode(q, k, v, plan, sm_scale=HEAD_DIM**-0.5, out=out)

        run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()
        self.held = (q, k, v, out)  # the graph only has their addresses
        self.times = PlanTimes(lambda: time_cold(self.graph, flush, REPLAYS))

    def measure(self, again: bool) -> float:
        """Microseconds of one layer under the planner's model, cold L2."""
        return self.times.us(self.planner.plan(*self.arguments).host_words, again)


def time_cold(graph: Any, flush: torch.Tensor, replays: int) -> float:
    """Median microseconds of a replay after ``flush`` was written: L2 holds none of the KV."""
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(replays)
    ]
    for begin, end in pairs:
        flush.zero_()  # also keeps the host ahead: replay and events are queued while it runs
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)


def slots_of(batch: Batch) -> np.ndarray:
    """``req_to_token`` of a batch: int32 ``[rows, longest]``, slots in random order."""
    slots = np.random.default_rng(1).permutation(batch.tokens).astype(np.int32)
    table = np.zeros((len(batch.lens), int(batch.lens.max())), np.int32)
    parent, length = batch.forest.parent, batch.forest.length
    ends = node_ends(batch.forest, batch.forest.topological_order())
    first_of_node = np.concatenate([[0], np.cumsum(length)]).astype(int)
    taken = int(first_of_node[-1])
    for row, (leaf, tokens) in enumerate(zip(batch.leaf_of_row, batch.lens, strict=True)):
        begin = ends[leaf] if leaf >= 0 else 0
        node = int(leaf)
        while node >= 0:
            end = ends[node]
            first = first_of_node[node]
            table[row, end - length[node] : end] = slots[first : first + length[node]]
            node = int(parent[node])
        table[row, begin:tokens] = slots[taken : taken + tokens - begin]
        taken += tokens - begin
    return table


def calibrate(seconds: float) -> str:
    """Searches constants for ``seconds``, saves them and says how much they gain.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--calibrate measures on a GPU, and there is none here")
    properties = torch.cuda.get_device_properties("cuda")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    timed: list[_Timed] = []
    planners = []
    for q_heads, kv_heads in HEADS:
        planner = DecodePlanner(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM, dtype=torch.bfloat16,
            device="cuda", max_rows=MAX_ROWS, max_tokens=MAX_TOKENS,
        )  # fmt: skip
        planners.append(planner)
        most = MAX_KV_BYTES // (4 * kv_heads * HEAD_DIM)
        of_layout = [batch for batch in batches() if batch.tokens <= most]
        slots = max(batch.tokens for batch in of_layout)
        k, v = (
            torch.randn(slots, kv_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            for _ in range(2)
        )
        timed += [_Timed(batch, planner, k, v, flush) for batch in of_layout]

    def measure(model: CostModel, again: bool) -> list[float]:
        for planner in planners:
            planner.host = HostPlanner(planner.host.shape, model, planner.host.capacity)
        return [one.measure(again) for one in timed]

    start = cost_model_for(properties.name, properties.multi_processor_count, HEAD_DIM)
    measure(start, False)  # clocks rise
    begin = time.monotonic()
    best, ratio = descend(start, measure, lambda: time.monotonic() - begin < seconds)
    provenance = (
        f"{properties.name}, {time.strftime('%Y-%m-%d')}: doctor --calibrate, {seconds:.0f} s over "
        f"{len(timed)} batches, {ratio:.3f} of the time under the shipped constants"
    )
    path = saved_cost.save(replace(best, provenance=provenance), properties.name, __version__)
    return f"{provenance}\nwritten to {path}"
