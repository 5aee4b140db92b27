# SPDX-License-Identifier: MIT
"""Microseconds per layer of PAT's decode attention, of its peers and of the floor.

    python scripts/bench_decode.py                                   the published trees
    python scripts/bench_decode.py --suite plain,tp8 --budget-s 150
    python scripts/bench_decode.py --trees 3,12 --heads 32/8 --backends pat,fa3_p1
    python scripts/bench_decode.py --report                          tables and criteria, no GPU

Suites are in suites.py, peers in peers.py. Attention call only, CUDA-graph replay, in one run for
all: *cold* is the median of 30 replays (10 of a graph that takes a millisecond) with 256 MB written
before each, the shorter of two such medians with all other backends of the page size in between (an
almost empty graph is measured once and printed); *warm* is back-to-back replays. Planning is timed
apart (`plan_us`, once a step, not a layer). `limit_us` is what physics allows: max(unique KV bytes
/ copy bandwidth, FLOPs / matrix rate). `floor_us` is measured in the cell, cold: a stream of the
same bytes through the same slots (floor.py), at the page size of the backend.

Errors are against an fp32 oracle on the same inputs over `verified_rows` rows (seeded). All rows
are compared with the first backend of the cell and page size that was right (`all_rows_max_diff`),
so that a wrong row outside the sample shows.

Writes results/bench_decode-<gpu>.jsonl every few seconds, and $OUT/ the same when set.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_common as common
import numpy as np
import torch
from cells import Pool, heads_of, slots_needed
from floor import Floor, chosen
from gpu_common import GPU_LIMITS, GpuLimits, Row
from pat_backend import Pat, Planners
from peers import PEERS, Case, Peer
from report import format_cell, report
from suites import HEAD_DIM, SUITES, Suite, kv_bytes
from trees import Tree

KEY = ("tree", "heads", "head_dim", "dtype", "page_size", "backend")
PATS = {"pat": 1, "pat_p64": 64}
FLOORS = {1: "floor_p1", 64: "floor_p64"}  # by page size
WRONG = 0.02  # relative error no bf16 kernel that is right comes near (they are at 0.002 to 0.005)
ORACLE_TOKENS = 1 << 21  # tokens x KV heads the oracle reads in a cell, about
WRITE_EVERY_S = 5.0


class Timed(NamedTuple):
    """A backend whose graph is replayed once more: what it allocated must live as long."""

    backend: Peer
    graph: Any  # None on a CPU


class Bench:
    """One run: a pool, planners, and the cells one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu = options.dry_run
        self.device = "cpu" if self.cpu else "cuda"
        self.started = time.monotonic()
        self.deadline = self.started + options.budget_s
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase
        self.rows: list[Row] = []
        self.written = 0.0
        self.seen: set[str] = set()  # errors whose traceback was printed
        self.provenance = common.provenance()
        self.work = [(suite, self._chosen_trees(suite)) for suite in options.suites]
        cells = [
            (tree, heads)
            for suite, trees in self.work
            for tree in trees
            for heads in self._heads(suite, tree)
        ]
        pages = {self._page_size(name) for suite, _ in self.work for name in self._backends(suite)}
        with self._phase("pool"):
            self.pool = Pool(cells, pages, self.device)
        trees = [tree for tree, _ in cells]
        tokens = max(slots_needed(tree, page) for tree in trees for page in pages)
        self.planners = Planners(max(tree.num_rows for tree in trees), tokens)
        self.flush = torch.empty(
            1 << 20 if self.cpu else common.L2_FLUSH_BYTES, dtype=torch.uint8, device=self.device
        )
        with self._phase("limits"):
            self.limits = self._limits()
        self.variant = None if self.cpu else chosen(common.gpu_slug())

    def _chosen_trees(self, suite: Suite) -> list[Tree]:
        trees = suite.trees()
        wanted = self.options.trees
        return [trees[i - 1] for i in wanted if i <= len(trees)] if wanted else trees

    def _heads(self, suite: Suite, tree: Tree) -> list[str]:
        return [h for h in self.options.heads or suite.heads if suite.has(tree, h)]

    def _backends(self, suite: Suite) -> Sequence[str]:
        names = self.options.backends or suite.backends
        return [name for name in names if name in PATS] if self.cpu else names

    def _page_size(self, backend: str) -> int:
        return PATS[backend] if backend in PATS else PEERS[backend]().page_size

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - begin

    def _limits(self) -> GpuLimits:
        if self.cpu:
            return GpuLimits(1e10, 1e12)
        rate, empty = common.copy_bandwidth(), common.empty_graph_us(self.flush)
        limits = GPU_LIMITS.get(common.gpu_slug(), GpuLimits(rate, math.inf))
        self.provenance |= {"copy_tb_s": round(rate / 1e12, 3), "empty_graph_us": empty}
        print(
            f"{self.provenance}\nlimits: {limits.copy_bytes_per_s / 1e12:.2f} TB/s (a copy in this "
            f"run: {rate / 1e12:.2f}), {limits.matrix_flop_per_s / 1e12:.0f} TFLOP/s; "
            f"an almost empty graph, cold: {empty} us",
            flush=True,
        )
        return limits

    def run(self) -> None:
        for suite, trees in self.work:
            backends = self._backends(suite)
            pages = sorted({self._page_size(name) for name in backends})
            for tree in trees:
                with self._phase("layout"):
                    cases = {page: self.pool.case(tree, page) for page in pages}
                for heads in self._heads(suite, tree):
                    if time.monotonic() > self.deadline:
                        print(f"budget of {self.options.budget_s} s used up at {tree.name} {heads}")
                        return
                    q = self.pool.queries(tree.num_rows, heads_of(heads)[0])
                    with_heads = {p: self.pool.with_heads(c, heads, q) for p, c in cases.items()}
                    self._run_cell(suite, tree, heads, with_heads, backends)

    def _run_cell(
        self,
        suite: Suite,
        tree: Tree,
        heads: str,
        cases: dict[int, Case],
        backends: Sequence[str],
    ) -> None:
        common_row: Row = {
            "suite": suite.name,
            "tree": tree.name,
            "heads": heads,
            "head_dim": HEAD_DIM,
            "dtype": str(self.pool.dtype).removeprefix("torch."),
        }
        limit = common.limit_us(
            self.limits,
            kv_bytes(tree.unique_tokens(), heads),
            4 * heads_of(heads)[0] * HEAD_DIM * tree.total_tokens(),
        )
        cell: list[Row] = []
        for page, case in cases.items():
            sample = self._sample(tree, heads)
            with self._phase("oracle"):
                reference = common.oracle(
                    case.q, case.k, case.v, case.req_to_token, tree.seq_lens.tolist(),
                    case.sm_scale, sample,
                )  # fmt: skip
            trusted: torch.Tensor | None = None
            floor = [] if self.cpu else [FLOORS[page]]
            rows: list[Row] = []
            timed: list[tuple[Row, Timed]] = []
            for name in [*floor, *(b for b in backends if self._page_size(b) == page)]:
                row: Row = {**common_row, "page_size": page, "backend": name}
                row["limit_us"] = round(limit, 2)
                rows.append(row)
                try:
                    out, kept = self._measure(name, case, row)
                    timed.append((row, kept))
                    if name not in FLOORS.values():
                        with self._phase("verify"):
                            self._verify(row, out, sample, reference, trusted)
                        trusted = out.float() if trusted is None and "error" not in row else trusted
                except Exception as error:
                    self._failed(row, error)
                    if "CUDA error" in str(error):  # the context is gone: nothing later is true
                        self.rows += [{**row, **self.provenance} for row in (*cell, *rows)]
                        raise
                out = None  # type: ignore[assignment]
            self._time_again(timed)
            floor_us = rows[0].get("cold_us") if floor else None
            for row in rows[len(floor) :]:
                row["floor_us"] = floor_us
            cell += [{**row, **self.provenance} for row in rows]
        self.rows += cell
        print(format_cell(cell), flush=True)
        if not self.cpu:
            self.write(WRITE_EVERY_S)
            if torch.cuda.memory_reserved() > 0.85 * torch.cuda.mem_get_info()[1]:
                gc.collect()
                torch.cuda.empty_cache()

    def _time_again(self, timed: Sequence[tuple[Row, Timed]]) -> None:
        """Cold times of all backends once more, of each the shorter: what disturbs a GPU for some
        milliseconds disturbs whole medians."""
        with self._phase("cold"):
            for row, kept in timed:
                if kept.graph is not None:
                    again = common.time_cold(kept.graph, self.flush, row["warm_us"])
                    row["cold_us"] = round(min(row["cold_us"], again), 2)

    def _failed(self, row: Row, error: Exception) -> None:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
        if row["error"] not in self.seen and (self.options.verbose or row["backend"] in PATS):
            traceback.print_exc()
        self.seen.add(row["error"])

    def _make(self, name: str, page_size: int) -> Peer:
        if name in PATS:
            return Pat(page_size, self.planners)
        if name in FLOORS.values():
            assert self.variant is not None
            return Floor(page_size, self.variant)
        return PEERS[name]()

    def _measure(self, name: str, case: Case, row: Row) -> tuple[torch.Tensor, Timed]:
        """Times a backend into its row; a copy of its output, and what another replay needs."""
        backend = self._make(name, case.layout.page_size)
        with self._phase("prepare"):
            backend.prepare(case)
        with self._phase("plan"):
            row["plan_us"] = round(self._plan_us(backend), 1)
        if isinstance(backend, Pat):
            row["plan"] = backend.facts()
        if self.cpu:
            return backend.run().clone(), Timed(backend, None)
        with self._phase("capture"):
            graph, out = common.capture(backend.run)
            out.fill_(math.nan)
            graph.replay()
            result = out.clone()
            expected_us = common.time_once(graph)
        with self._phase("cold"):
            row["cold_us"] = round(common.time_cold(graph, self.flush, expected_us), 2)
        with self._phase("warm"):
            row["warm_us"] = round(common.time_warm(graph, expected_us), 2)
        if not torch.equal(out, result):
            row["repeatable"] = False
            row["nan_at_first"], row["nan_at_last"] = (
                bool(of.isnan().any()) for of in (result, out)
            )
        if isinstance(backend, Floor) and not torch.equal(result, case.q):
            row["error"] = "wrong: q was not copied"
        return result, Timed(backend, graph)

    def _plan_us(self, backend: Peer) -> float:
        """Median host time of a plan; the device is idle before and is not waited for after."""
        times = []
        for _ in range(2 if self.cpu else 7 if isinstance(backend, Pat) else 3):
            if not self.cpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            backend.plan()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)

    def _verify(
        self,
        row: Row,
        out: torch.Tensor,
        sample: list[int],
        reference: torch.Tensor,
        trusted: torch.Tensor | None,
    ) -> None:
        """Errors of a backend's output into its row; "error" when it is wrong."""
        row["max_abs_err"], row["rel_err"] = common.errors(out[sample], reference)
        row["verified_rows"] = len(sample)
        if not row["rel_err"] < WRONG:
            row["error"] = f"wrong: relative error {row['rel_err']:.3g}"
            row["max_abs_err"] = row["rel_err"] = None  # JSON has no infinity
        elif trusted is not None:
            row["all_rows_max_diff"] = float((out.float() - trusted).abs().max())
            if not row["all_rows_max_diff"] < 10 * float(trusted.abs().max()) * WRONG:
                row["error"] = f"wrong: a row differs by {row['all_rows_max_diff']:.3g}"

    def _sample(self, tree: Tree, heads: str) -> list[int]:
        """First, last and some other rows, fewer of them where rows are long."""
        each = int(tree.seq_lens.max()) * heads_of(heads)[1]
        count = min(self.options.verify_rows or tree.num_rows, max(2, ORACLE_TOKENS // each))
        if count >= tree.num_rows:
            return list(range(tree.num_rows))
        middle = np.random.default_rng(1).permutation(np.arange(1, tree.num_rows - 1))
        return sorted([0, tree.num_rows - 1, *middle[: count - 2].tolist()])

    def write(self, every_s: float = 0.0) -> None:
        """Writes the result files, unless that was done less than `every_s` ago."""
        if self.cpu or time.monotonic() - self.written < every_s:
            return
        with self._phase("write"):
            common.write_rows(f"bench_decode-{common.gpu_slug()}.jsonl", self.rows, KEY)
        self.written = time.monotonic()

    def summary(self) -> str:
        """How many measurements, and where the time went."""
        total = time.monotonic() - self.started
        phases = {**self.seconds, "other": total - sum(self.seconds.values())}
        spent = ", ".join(f"{k} {v:.1f}" for k, v in sorted(phases.items(), key=lambda x: -x[1]))
        failed = sum("error" in row for row in self.rows)
        return f"{len(self.rows)} measurements, {failed} failed, {total:.0f} s ({spent})"


def numbers(text: str) -> list[int]:
    """'1-4,7' as [1, 2, 3, 4, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(SUITES)
    parser.add_argument("--suite", default="published", help=f"of {names}, or all")
    parser.add_argument("--trees", type=numbers, help="1-18,20: positions in the suite (all)")
    parser.add_argument("--heads", type=lambda s: s.split(","), help="32/8,64/8 (the suite's)")
    parser.add_argument(
        "--backends",
        type=lambda s: s.split(","),
        help=f"of {','.join([*PATS, *PEERS])} (the suite's); the first right one of a page size is "
        "what all rows are compared with",
    )
    parser.add_argument("--verify-rows", type=int, default=8, help="0: all")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop cleanly after this")
    parser.add_argument("--report", type=Path, nargs="?", const=Path(), help="print a result file")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: PAT's CPU path, no times")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of failing peers")
    options = parser.parse_args()
    unknown = [b for b in options.backends or [] if b not in PATS and b not in PEERS]
    wanted = list(SUITES) if options.suite == "all" else options.suite.split(",")
    unknown += [name for name in wanted if name not in SUITES]
    if unknown:
        parser.error(f"unknown: {unknown}")
    options.suites = [SUITES[name] for name in wanted]
    if options.report is not None:
        files = [options.report] if options.report.suffix else None
        for path in files or sorted((common.ROOT / "results").glob("bench_decode-*.jsonl")):
            print(path.name, *report(common.read_rows(path)), sep="\n")
        return
    bench = Bench(options)
    try:
        bench.run()
    finally:
        bench.write()
        print(*report(bench.rows), bench.summary(), sep="\n", flush=True)
    sys.exit(any("error" in row and row["backend"] in PATS for row in bench.rows))


if __name__ == "__main__":
    main()
