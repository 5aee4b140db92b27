# SPDX-License-Identifier: MIT
"""What PAT costs a decode step outside the layers: the host's time, and on a GPU the device's too.

    . scripts/cpu/env.sh                     on a machine without a GPU
    python scripts/bench_host.py [--rows 256] [--levels 3] [--profile]

Requests live in the prefix tree that a server of this SGLang has: one prompt that all share, below
it 8 groups, below those (--levels 4) 8 groups each, and at last private tokens. Steps go the way of
a CUDA-graph replay: the hook on ForwardBatch.init_new, then init_forward_metadata_out_graph of a
PAT backend.

- changed: one request has finished and a new one, with private tokens that nobody has seen, has
  joined the batch, in a new list, as filter_batch and merge_batch make it
- changed, another shape: the new request's prompt goes on as one of a request that is gone and then
  differs, which splits that one's node. The tracker's forest cannot be kept and is made anew, but
  where the tree shows ids only (0.5.23): of these the tracker knows the ones that rows pass
- unchanged: the same list, every request one token longer, in an eager step or on a graph without
  PAT's append; the first part ends where the fill kernel is launched
- unchanged, in the graph: the same on a graph that appends the new slots, as SGLang's decode graphs
  do: nothing is launched before the replay

Serving the new request is no part of a step, but leaves the CPU's caches cold, as the scheduler's
work between two steps does. Launching the kernel is part of the host's time on a GPU; on a CPU
there is nothing to launch. Device time is that of the upload, the fill and the append kernel,
queued behind a long kernel so that no gap of the host's counts.

Writes results/bench_host-<gpu>.jsonl, a line a measure.
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import gpu_common as common
import numpy as np
import torch

sys.path.insert(0, str(common.ROOT / "tests" / "sglang"))

from scheduling import MiniScheduler, forward_view, model_runner

from pat_sglang.plugin.graphs import AppendingGraphs

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
FAN_OUT = 8
ROOT_TOKENS, GROUP_TOKENS, PRIVATE_TOKENS = 1024, 256, (64, 192)
GROWTH = 32  # tokens every request has decoded; the steps that are timed walk through them
MIDDLE_TOKENS = 32  # of the node that a request of another shape brings
SPARE_SLOTS = 4096  # for requests that are gone, until they are evicted
SPIN_CYCLES = 4_000_000  # of the kernel that device work is queued behind
KEY = ("rows", "levels", "measure")


def row_of(measure: str, limit_us: int | None, us: list[float]) -> common.Row:
    """A line of the result file; the limits are those of issue 4."""
    median, p99 = statistics.median(us), sorted(us)[len(us) * 99 // 100]
    return {
        "measure": measure,
        "median_us": round(median, 2),
        "p99_us": round(p99, 2),
        "limit_us": limit_us,
        "steps": len(us),
    }


class Step(NamedTuple):
    """Host microseconds of one step."""

    structure: float  # the hook, and reading the tree
    altogether: float  # with the metadata, to its end
    until_launch: float  # until the upload or fill kernel is launched, if one is

    @property
    def planning(self) -> float:
        """What is not the structure's."""
        return self.altogether - self.structure


class Observed:
    """Takes the place of a tracker's ``observe``: notes how long it takes."""

    def __init__(self, observe: Callable[..., Any]) -> None:
        self.observe = observe
        self.ns = 0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter_ns()
        structure = self.observe(*args)
        self.ns = time.perf_counter_ns() - begin
        return structure


class Launches:
    """Takes the place of a planner's transfer: notes the time of a launch, then launches."""

    def __init__(self, transfer: Any) -> None:
        self.transfer = transfer  # None on a CPU, where it is no part of the host's work
        self.ns = 0
        self.acquire = (lambda turn: None) if transfer is None else transfer.acquire

    def upload(self, *args: Any) -> bool:
        self.ns = time.perf_counter_ns()
        return self.transfer is None or self.transfer.upload(*args)

    def append(self, *args: Any) -> None:
        self.ns = time.perf_counter_ns()
        if self.transfer is not None:
            self.transfer.append(*args)

    def append_one(self, *args: Any) -> None:
        if self.transfer is not None:
            self.transfer.append_one(*args)


class Bed:
    """A batch in a real prefix tree, and a PAT backend as the server builds it."""

    def __init__(self, rows: int, levels: int) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        from pat_sglang.plugin import builder
        from pat_sglang.plugin.feed import on_init_new

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.served = 0
        self.fresh = count()  # token ids; no two nodes of the tree have one in common
        shared = self.shared_prompts(levels)
        self.shared_tokens = len(shared[0])
        context = self.shared_tokens + MIDDLE_TOKENS + PRIVATE_TOKENS[1] + GROWTH
        slots = len(shared) * self.shared_tokens + rows * (context - self.shared_tokens)
        slots += SPARE_SLOTS
        self.scheduler = MiniScheduler(rows=rows, context=context, slots=slots, device=device)
        self.reqs = [self.serve(shared[row % len(shared)]) for row in range(rows)]

        layer = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=0)
        pool = MHATokenToKVPool(
            slots, 1, torch.bfloat16, KV_HEADS, HEAD_DIM, 1, device, enable_memory_saver=False
        )
        self.runner = model_runner(self.scheduler, [layer], pool)
        self.backend = builder.wrap("torch_native", TorchNativeAttnBackend)(self.runner)
        self.backend._pat.captured = True  # and no layer needed the base
        (self.planner,) = self.backend._pat.planners.values()
        self.launches = Launches(self.planner.transfer if device == "cuda" else None)
        self.planner.transfer = self.launches
        tracker = self.backend._pat.feed.tracker
        tracker.observe = self.observed = Observed(tracker.observe)
        self.words = np.empty_like(self.planner._ring[0])
        self.hook, self.levels, self.steps = on_init_new, levels, 0
        # Inputs of the graphs, which the runner fills before it hands them to the backend.
        self.seq_lens = torch.ones(rows, dtype=torch.int64, device=device)
        self.new_slots = torch.zeros(rows, dtype=torch.int64, device=device)
        self.graph: Any = None  # on a GPU, of what is ahead of the layers
        self.capture()

    def inputs(self, forward_mode: Any, **others: Any) -> Any:
        """The batch that the backend is handed, in the graphs' inputs."""
        return forward_view(
            batch_size=len(self.reqs),
            forward_mode=forward_mode,
            num_padding=0,
            seq_lens=self.seq_lens,
            out_cache_loc=self.new_slots,
            **others,
        )

    def capture(self) -> None:
        """The graph of this batch, as SGLang's runner captures it, without layers."""
        ones = torch.ones(len(self.reqs), dtype=torch.int64)
        rows = torch.zeros_like(self.seq_lens)
        mode = self.scheduler.batch([]).forward_mode
        batch = self.inputs(mode, seq_lens_cpu=ones, req_pool_indices=rows)
        self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
        if not torch.cuda.is_available():
            self.graphs.append(batch)  # as launching in a capture does
            return
        self.backend.init_forward_metadata_in_graph(batch)  # loads the kernel
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.backend.init_forward_metadata_in_graph(batch)

    @property
    def graphs(self) -> Any:
        """What the backend knows of its graphs."""
        return self.backend._pat.graphs

    def new(self, tokens: int) -> list[int]:
        return list(islice(self.fresh, tokens))

    def shared_prompts(self, levels: int) -> list[list[int]]:
        """What the requests of each lowest group share."""
        found = [self.new(ROOT_TOKENS)]
        for _ in range(levels - 2):
            found = [above + self.new(GROUP_TOKENS) for above in found for _ in range(FAN_OUT)]
        return found

    def serve(self, shared: list[int]) -> Any:
        """A request with private tokens of its own, which has decoded for a while."""
        shortest, longest = PRIVATE_TOKENS
        self.served += 1
        private = shortest + self.served * 37 % (longest - shortest)
        req = self.scheduler.serve(shared + self.new(private))
        for _ in range(GROWTH):
            self.scheduler.decode([req])
        return req

    def replace_one(self, middle: bool = False) -> None:
        """One request finishes and a new one of the same group joins, as told at the top."""
        victim = self.reqs[self.steps * 7 % len(self.reqs)]
        self.scheduler.finish(victim)
        prompt = list(victim.origin_input_ids[: self.shared_tokens])
        if middle:
            prompt += self.new(MIDDLE_TOKENS)
            self.scheduler.finish(self.scheduler.serve(prompt + self.new(1)))
        self.reqs = [req for req in self.reqs if req is not victim]  # filter_batch
        self.reqs = self.reqs + [self.serve(prompt)]  # noqa: RUF005 - as merge_batch

    def batches(self) -> tuple[Any, Any]:
        """The ScheduleBatch of the next step, and the ForwardBatch that a replay gets."""
        self.steps += 1
        batch = self.scheduler.batch(self.reqs)
        batch.seq_lens_cpu -= GROWTH - 1 - self.steps % GROWTH
        rows = [self.scheduler.row(req) for req in self.reqs]
        indices = torch.tensor(rows, device=self.runner.device)
        self.seq_lens.copy_(batch.seq_lens_cpu)
        self.new_slots.copy_(self.scheduler.pool.req_to_token[indices, self.seq_lens - 1])
        lens = batch.seq_lens_cpu
        return batch, self.inputs(batch.forward_mode, seq_lens_cpu=lens, req_pool_indices=indices)

    def step(self) -> Step:
        """One decode step up to its layers, timed on the host."""
        batch, view = self.batches()
        begin = time.perf_counter_ns()
        self.hook(None, None, batch, self.runner)
        seen = time.perf_counter_ns()
        self.backend.init_forward_metadata_out_graph(view)
        end = time.perf_counter_ns()
        structure = seen - begin + self.observed.ns
        return Step(structure / 1e3, (end - begin) / 1e3, (self.launches.ns - begin) / 1e3)

    def changed(self) -> Step:
        """A step of a changed batch."""
        self.replace_one()
        return self.step()

    def reshaped(self) -> Step:
        """A step of a changed batch, whose new request brings a node of another shape."""
        self.replace_one(middle=True)
        return self.step()

    def appended(self) -> Step:
        """A step of the batch as it was, on a graph that appends the new slots.

        Lengths begin anew after GROWTH steps, with a new plan.
        """
        if (self.steps + 1) % GROWTH == 0:
            self.step()
        return self.step()

    def unchanged(self) -> Step:
        """The same on a graph that does not append."""
        graphs, self.backend._pat.graphs = self.graphs, AppendingGraphs()
        step = self.appended()
        self.backend._pat.graphs = graphs
        return step

    def plan_us(self) -> float:
        """Microseconds of the C++ planner, its Python call included, on the present batch."""
        structure = self.backend._pat.feed.tracker._structure
        lens, words = self.planner._planned_lens.astype(np.int32), self.words
        begin = time.perf_counter_ns()
        self.planner.host.plan(structure.forest, structure.leaf_of_row, lens, words)
        return (time.perf_counter_ns() - begin) / 1e3

    def device_us(self, step: Callable[[], Step]) -> float:
        """Device microseconds of a step's work before the layers."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        metadata = self.backend.init_forward_metadata_out_graph

        def between_events(view: Any) -> None:
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            metadata(view)
            if step == self.appended:
                self.graph.replay()
            end.record()

        self.backend.init_forward_metadata_out_graph = between_events
        try:
            step()
        finally:
            del self.backend.init_forward_metadata_out_graph
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3


def measure(bed: Bed, steps: int) -> list[common.Row]:
    """All measures, in the order of the table."""
    for _ in range(steps // 10):  # warm-up
        bed.changed()
        bed.unchanged()
    changed = [bed.changed() for _ in range(steps)]
    planner = [bed.plan_us() for _ in range(steps)]
    unchanged = [bed.unchanged() for _ in range(steps)]
    appended = [bed.appended() for _ in range(steps)]
    reshaped = [bed.reshaped() for _ in range(steps)]
    rows = [
        row_of("changed: structure", 100, [s.structure for s in changed]),
        row_of("changed: planning", 150, [s.planning for s in changed]),
        row_of("  of it the C++ planner", None, planner),
        row_of("changed, another shape: structure", None, [s.structure for s in reshaped]),
        row_of("unchanged: structure", None, [s.structure for s in unchanged]),
        row_of("unchanged: until launch", 15, [s.until_launch for s in unchanged]),
        row_of("unchanged: altogether", 30, [s.altogether for s in unchanged]),
        row_of("unchanged, in the graph: altogether", 30, [s.altogether for s in appended]),
    ]
    if torch.cuda.is_available():
        of_kind = (("changed", bed.changed), ("unchanged", bed.unchanged))
        for name, step in (*of_kind, ("unchanged, in the graph", bed.appended)):
            us = [bed.device_us(step) for _ in range(steps // 10)]
            rows.append(row_of(f"{name}: device", 10, us))
    return rows


def profile(bed: Bed, step: Callable[[], Step], steps: int) -> None:
    """The functions that the timed part of a kind of step spends its time in."""
    profiler = cProfile.Profile()
    hook, metadata = bed.hook, bed.backend.init_forward_metadata_out_graph
    bed.hook = partial(profiler.runcall, hook)
    bed.backend.init_forward_metadata_out_graph = partial(profiler.runcall, metadata)
    for _ in range(steps):
        step()
    bed.hook = hook
    del bed.backend.init_forward_metadata_out_graph
    print(f"\n{step.__name__}, {steps} steps")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(16)


def cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--levels", type=int, default=3, help="of sharing; the last is private")
    parser.add_argument("--steps", type=int, default=2000, help="of each kind")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    bed = Bed(options.rows, options.levels)
    about = {"rows": options.rows, "levels": options.levels, "cpu": cpu_name()}
    rows = measure(bed, options.steps)
    stats = bed.planner._plan.stats
    print(
        f"{options.rows} rows on {options.levels} levels, {about['cpu']}, {common.gpu_name()}: "
        f"{stats.shared_segments} shared segments packed, {stats.tokens_saved} of "
        f"{stats.unshared_tokens} KV tokens saved"
    )
    print(f"{'us a step':<34}{'median':>8}{'p99':>8}{'limit':>7}")
    for row in rows:
        limit = row["limit_us"]
        verdict = "" if limit is None or row["median_us"] <= limit else "  over"
        print(
            f"{row['measure']:<34}{row['median_us']:8.1f}{row['p99_us']:8.1f}"
            f"{'' if limit is None else limit:>7}{verdict}"
        )
    provenance = common.provenance()
    lines = [{**about, **row, **provenance} for row in rows]
    common.write_rows(f"bench_host-{common.gpu_slug()}.jsonl", lines, KEY)
    if options.profile:
        for step in (bed.changed, bed.reshaped, bed.unchanged):
            profile(bed, step, options.steps)


if __name__ == "__main__":
    main()
