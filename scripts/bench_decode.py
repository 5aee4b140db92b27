# SPDX-License-Identifier: MIT
"""Microseconds per layer of PAT's decode attention and of its peers on the 20 published trees.

    python scripts/bench_decode.py                            20 trees, four head layouts, all
    python scripts/bench_decode.py --trees 3,12 --heads 32/8 --backends pat,fa3_p1
    python scripts/bench_decode.py --report                   tables from the result file, no GPU

Attention call only, CUDA-graph replay, in one run for all: *cold* is the median of 30 replays with
256 MB written before each (an almost empty graph is measured the same way and printed), *warm* is
back-to-back replays. Planning is timed apart (`plan_us`, once a step, not a layer). `limit_us` is
what physics allows: max(unique KV bytes / copy bandwidth, FLOPs / matrix rate).

Errors are against an fp32 oracle on the same inputs over `verified_rows` rows (seeded; 0 with
--verify-rows means all). All rows are compared with the first backend of the cell that was right
(`all_rows_max_diff`), so that a wrong row outside the sample shows.

Writes results/bench_decode-<gpu>.jsonl after every cell, and $OUT/ the same when set.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_common as common
import numpy as np
import torch
from gpu_common import GPU_LIMITS, GpuLimits, Row, geomean
from peers import DEFAULT_PEERS, PEERS, Case, Peer
from trees import NUM_SHARING, PUBLISHED, Layout, Tree, make_layout, published

KEY = ("tree", "heads", "head_dim", "dtype", "page_size", "backend")
HEADS = ["32/32", "16/8", "32/8", "64/8"]
HEAD_DIM = 128
WRONG = 0.02  # relative error no bf16 kernel that is right comes near (they are at 0.002 to 0.005)
CHUNK = 1 << 16  # slots filled or copied at a time


class Pat(Peer):
    """PAT through the library API and nothing else. One planner serves all trees of a pool."""

    def __init__(self, page_size: int, planners: dict[Any, Any], limits: tuple[int, int]) -> None:
        super().__init__(page_size)
        self.planners = planners
        self.max_rows, self.max_tokens = limits

    def prepare(self, case: Case) -> None:
        from pat_sglang import DecodePlanner, Forest, pat_decode

        self.case, self.decode = case, pat_decode
        q_heads, kv_heads = case.heads
        key = (q_heads, kv_heads, case.q.dtype)
        if key not in self.planners:
            self.planners[key] = DecodePlanner(
                num_q_heads=q_heads,
                num_kv_heads=kv_heads,
                head_dim=case.q.shape[2],
                dtype=case.q.dtype,
                device=case.q.device.type,
                max_rows=self.max_rows,
                max_tokens=self.max_tokens,
            )
        self.planner = self.planners[key]
        tree = case.tree.at_page_size(self.page_size)
        self.forest = Forest(tree.parent, tree.length)
        self.rows = torch.arange(tree.num_rows, dtype=torch.int64, device=case.q.device)
        self.out = torch.empty_like(case.q)
        self.plan()

    def plan(self) -> None:
        self.current = self.planner.plan(
            self.forest,
            self.case.tree.leaf,
            self.case.tree.seq_lens,
            self.case.seq_lens,
            self.case.req_to_token,
            self.rows,
        )

    def run(self) -> torch.Tensor:
        return self.decode(
            self.case.q,
            self.case.k,
            self.case.v,
            self.current,
            sm_scale=self.case.sm_scale,
            out=self.out,
        )

    def facts(self) -> Row:
        """What the plan does, for whoever reads the numbers."""
        stats = self.current.stats
        names = ("planned_tokens", "unique_tokens", "items", "partial_slots", "splits", "coarsened")
        facts = {name: getattr(stats, name, None) for name in names}
        facts["predicted_us"] = getattr(stats, "predicted_us", None)
        facts["workspace_mb"] = round(self.planner.workspace_bytes / 1e6, 1)
        return facts


class Pool:
    """K and V of one head layout at one page size; trees use its first slots."""

    def __init__(self, slots: int, kv_heads: int, device: str, dtype: torch.dtype) -> None:
        shape = (slots, kv_heads, HEAD_DIM)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def randomise(self) -> None:
        """Standard normal values, in chunks: some elements lie beyond 2^31."""
        for cache in (self.k, self.v):
            for part in cache.split(CHUNK):
                part.normal_()

    def copy_from(self, other: Pool, source: torch.Tensor) -> None:
        """Slot i becomes slot source[i] of `other`."""
        for begin in range(0, len(source), CHUNK):
            index = source[begin : begin + CHUNK]
            self.k[begin : begin + len(index)] = other.k[index]
            self.v[begin : begin + len(index)] = other.v[index]


class Layouts:
    """Layouts of the trees by page size, made once: seconds for the largest."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = trees
        self._made: dict[tuple[str, int], Layout] = {}

    def of(self, tree: Tree, page_size: int) -> Layout:
        key = (tree.name, page_size)
        if key not in self._made:
            seed = sum(tree.name.encode())
            self._made[key] = make_layout(tree.at_page_size(page_size), page_size, seed)
        return self._made[key]

    def slots(self, page_size: int) -> int:
        """Slots of a pool that holds any of the trees, page by page; no layout is made for it."""
        needed = 0
        for tree in self.trees:
            aligned = tree.at_page_size(page_size)
            own = aligned.seq_lens - aligned.tail_begins()
            pages = aligned.length.sum() // page_size + (-(-own // page_size)).sum() + 1
            needed = max(needed, int(pages) * page_size)
        return needed


class Bench:
    """One run: pools, planners, and the cells one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu = options.dry_run
        self.device = "cpu" if self.cpu else "cuda"
        self.dtype = torch.float32 if self.cpu else torch.bfloat16
        self.trees = [published(number) for number in options.trees]
        self.layouts = Layouts(self.trees)
        self.provenance = common.provenance()
        self.deadline = time.monotonic() + options.budget_s
        self.planners: dict[Any, Any] = {}
        self.rows: list[Row] = []
        self.seen: set[str] = set()  # errors whose traceback was printed
        self.flush = torch.empty(
            1 << 20 if self.cpu else common.L2_FLUSH_BYTES, dtype=torch.uint8, device=self.device
        )
        self.limits = self._limits()

    def _limits(self) -> GpuLimits:
        if self.cpu:
            return GpuLimits(1e10, 1e12)
        rate, floor = common.copy_bandwidth(), common.empty_graph_us(self.flush)
        limits = GPU_LIMITS.get(common.gpu_slug(), GpuLimits(rate, math.inf))
        self.provenance |= {"copy_tb_s": round(rate / 1e12, 3), "empty_graph_us": floor}
        print(
            f"{self.provenance}\nlimits: {limits.copy_bytes_per_s / 1e12:.2f} TB/s (a copy in this "
            f"run: {rate / 1e12:.2f}), {limits.matrix_flop_per_s / 1e12:.0f} TFLOP/s; "
            f"an almost empty graph, cold: {floor} us",
            flush=True,
        )
        return limits

    def make_backend(self, name: str) -> Peer:
        if name == "pat":
            page = self.options.page_size
            tokens = self.layouts.slots(page)
            return Pat(page, self.planners, (max(t.num_rows for t in self.trees), tokens))
        return PEERS[name]()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def run(self) -> None:
        for kv_heads in dict.fromkeys(heads.split("/")[1] for heads in self.options.heads):
            layouts = [h for h in self.options.heads if h.split("/")[1] == kv_heads]
            self._run_pool(int(kv_heads), layouts)
            self.planners.clear()
            self._release()

    def _run_pool(self, kv_heads: int, layouts: list[str]) -> None:
        """All cells of one number of KV heads: they share the pools, up to 34 GB together."""
        backends = [self.make_backend(name) for name in self.options.backends]
        pools: dict[int, Pool] = {}
        for page_size in sorted({1, *(backend.page_size for backend in backends)}):
            slots = self.layouts.slots(page_size)
            pools[page_size] = Pool(slots, kv_heads, self.device, self.dtype)
        torch.manual_seed(kv_heads)
        pools[1].randomise()
        for tree in self.trees:
            lens = torch.from_numpy(tree.seq_lens).to(self.device)
            cases: dict[int, Case] = {}
            for page_size, pool in pools.items():
                layout = self.layouts.of(tree, page_size)
                table = torch.from_numpy(layout.req_to_token).to(self.device)
                if page_size != 1:
                    pool.copy_from(pools[1], self._sources(layout, cases[1].layout))
                k, v = pool.k[: layout.num_slots], pool.v[: layout.num_slots]
                q = torch.empty(0, dtype=self.dtype, device=self.device)  # set per head layout
                cases[page_size] = Case(tree, layout, q, k, v, table, lens, HEAD_DIM**-0.5)
            for heads in layouts:
                if self.out_of_time():
                    print(f"budget of {self.options.budget_s} s is used up at {tree.name} {heads}")
                    return
                q_heads = int(heads.split("/")[0])
                q = torch.randn(
                    tree.num_rows, q_heads, HEAD_DIM, dtype=self.dtype, device=self.device
                )
                self._run_cell(heads, {p: replace(c, q=q) for p, c in cases.items()})

    def _sources(self, layout: Layout, plain: Layout) -> torch.Tensor:
        """For every slot of a paged layout the page-1 slot with the same token (unused: slot 0)."""
        source = np.zeros(layout.num_slots, np.int64)
        source[layout.req_to_token] = plain.req_to_token
        return torch.from_numpy(source).to(self.device)

    def _run_cell(self, heads: str, cases: dict[int, Case]) -> None:
        case = cases[1]
        sample = self._sample(case.tree)
        reference = common.oracle(
            case.q, case.k, case.v, case.req_to_token, case.tree.seq_lens.tolist(),
            case.sm_scale, sample,
        )  # fmt: skip
        limit = self._limit_us(case)
        cell: list[Row] = []
        trusted: torch.Tensor | None = None
        for name in self.options.backends:
            row: Row = {
                "tree": case.tree.name,
                "heads": heads,
                "head_dim": HEAD_DIM,
                "dtype": str(self.dtype).removeprefix("torch."),
                "page_size": 1,
                "backend": name,
            }
            try:
                backend = self.make_backend(name)
                row["page_size"] = backend.page_size
                out = self._measure(backend, cases[backend.page_size], row)
                self._verify(row, out, sample, reference, trusted)
                if trusted is None and "error" not in row:
                    trusted = out.float()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
                if row["error"] not in self.seen and (self.options.verbose or name == "pat"):
                    traceback.print_exc()
                self.seen.add(row["error"])
                if "CUDA error" in str(error):  # the context is gone: nothing later would be true
                    self.rows += [*cell, {**row, "limit_us": limit, **self.provenance}]
                    raise
            cell.append({**row, "limit_us": round(limit, 2), **self.provenance})
            backend = out = None  # type: ignore[assignment]
        self.rows += cell
        print(format_cell(cell), flush=True)
        if not self.cpu:
            common.write_rows(f"bench_decode-{common.gpu_slug()}.jsonl", self.rows, KEY)
            if torch.cuda.memory_reserved() > 0.75 * torch.cuda.mem_get_info()[1]:
                self._release()

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

    def _measure(self, backend: Peer, case: Case, row: Row) -> torch.Tensor:
        backend.prepare(case)
        row["plan_us"] = round(self._plan_us(backend), 1)
        if isinstance(backend, Pat):
            row["plan"] = backend.facts()
        if self.cpu:
            return backend.run().clone()
        graph, out = common.capture(backend.run)
        out.fill_(math.nan)
        graph.replay()
        result = out.clone()
        row["cold_us"] = round(common.time_cold(graph, self.flush), 2)
        row["warm_us"] = round(common.time_warm(graph), 2)
        if not torch.equal(out, result):
            row["repeatable"] = False
        return result

    def _plan_us(self, backend: Peer) -> float:
        """Median host time of a plan; the device is idle before and is not waited for after."""
        times = []
        for _ in range(2 if self.cpu else 7):
            if not self.cpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            backend.plan()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)

    def _limit_us(self, case: Case) -> float:
        q_heads, kv_heads = case.heads
        nbytes = case.tree.unique_tokens() * kv_heads * HEAD_DIM * 2 * 2  # K and V, 16 bit
        flops = 4 * q_heads * HEAD_DIM * case.tree.total_tokens()
        return 1e6 * max(
            nbytes / self.limits.copy_bytes_per_s, flops / self.limits.matrix_flop_per_s
        )

    def _sample(self, tree: Tree) -> list[int]:
        count = self.options.verify_rows or tree.num_rows
        if count >= tree.num_rows:
            return list(range(tree.num_rows))
        middle = np.random.default_rng(1).permutation(np.arange(1, tree.num_rows - 1))
        return sorted([0, tree.num_rows - 1, *middle[: max(0, count - 2)].tolist()])

    def _release(self) -> None:
        gc.collect()
        if not self.cpu:
            torch.cuda.empty_cache()


# Tables


def ratio(row: Row, what: str = "cold_us") -> float | None:
    """Time over limit, None where there is no sound time."""
    return row[what] / row["limit_us"] if what in row and "error" not in row else None


def format_cell(cell: Sequence[Row]) -> str:
    """One line a cell: cold/warm of every backend, PAT's ratio to the limit and its error."""
    parts = [f"{cell[0]['tree']} {cell[0]['heads']:>5} limit {cell[0]['limit_us']:7.1f}"]
    for row in cell:
        if "error" in row:
            parts.append(f"{row['backend']} FAILED {row['error'][:60]}")
        elif row["backend"] == "pat":
            times = f"{row.get('cold_us', 0):.1f}/{row.get('warm_us', 0):.1f}"
            parts.append(
                f"pat {times} x{ratio(row) or 0:.2f} plan {row['plan_us']:.0f} "
                f"err {row['rel_err']:.1e}"
            )
        else:
            parts.append(f"{row['backend']} {row.get('cold_us', 0):.1f}")
        if row.get("repeatable") is False:
            parts[-1] += " NOT REPEATABLE"
    return " | ".join(parts)


def _sharing(rows: Sequence[Row]) -> list[Row]:
    names = {f"pat{n:02d}" for n in range(1, NUM_SHARING + 1)}
    return [row for row in rows if row["tree"] in names]


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Geometric means over the trees that share, and PAT against the best peer cell by cell."""
    for heads in dict.fromkeys(row["heads"] for row in rows):
        mine = [row for row in rows if row["heads"] == heads]
        yield f"\nheads {heads}: geometric mean of time / limit over pat01 to pat{NUM_SHARING}"
        means = []
        for backend in dict.fromkeys(row["backend"] for row in mine):
            of = [row for row in _sharing(mine) if row["backend"] == backend]
            cold = [r for r in (ratio(row) for row in of) if r]
            warm = [r for r in (ratio(row, "warm_us") for row in of) if r]
            if cold:
                means.append((geomean(cold), geomean(warm), len(cold), backend))
        for cold_mean, warm_mean, count, backend in sorted(means):
            yield f"  {backend:<20} cold {cold_mean:5.2f}  warm {warm_mean:5.2f}  ({count} trees)"
        yield from _against_best(mine)


def _against_best(rows: Sequence[Row]) -> Iterator[str]:
    gains, behind = [], []
    for tree in dict.fromkeys(row["tree"] for row in rows):
        cell = [row for row in rows if row["tree"] == tree and ratio(row)]
        pat = [row for row in cell if row["backend"] == "pat"]
        others = [row for row in cell if row["backend"] != "pat"]
        if not pat or not others:
            continue
        best = min(others, key=lambda row: row["cold_us"])
        gain = best["cold_us"] / pat[0]["cold_us"]
        if tree in {row["tree"] for row in _sharing(rows)}:
            gains.append(gain)
        if gain < 1:
            behind.append(f"{tree} {gain:.2f} ({best['backend']})")
    if gains:
        yield f"  pat against the best peer: {geomean(gains):.2f}x faster over {len(gains)} trees"
    if behind:
        yield "  behind on " + ", ".join(behind)


def numbers(text: str) -> list[int]:
    """'1-4,7' as [1, 2, 3, 4, 7]; 'all' as 1 to 20."""
    if text == "all":
        return list(range(1, len(PUBLISHED) + 1))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trees", type=numbers, default=numbers("all"), help="1-18,20 or all")
    parser.add_argument("--heads", type=lambda s: s.split(","), default=HEADS, help="32/8,64/8")
    parser.add_argument(
        "--backends",
        type=lambda s: s.split(","),
        default=[*DEFAULT_PEERS, "pat"],
        help=f"of pat,{','.join(PEERS)}; the first right one is what all rows are compared with",
    )
    parser.add_argument("--page-size", type=int, default=1, help="of pat's cache")
    parser.add_argument("--verify-rows", type=int, default=24, help="0: all")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop cleanly after this")
    parser.add_argument("--report", type=Path, nargs="?", const=Path(), help="print a result file")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: PAT's CPU path, no times")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of failing peers")
    options = parser.parse_args()
    unknown = [b for b in options.backends if b != "pat" and b not in PEERS]
    if unknown:
        parser.error(f"unknown backends {unknown}")
    if options.report is not None:
        files = [options.report] if options.report.suffix else None
        for path in files or sorted((common.ROOT / "results").glob("bench_decode-*.jsonl")):
            print(path.name, *report(common.read_rows(path)), sep="\n")
        return
    bench = Bench(options)
    started = time.monotonic()
    try:
        bench.run()
    finally:
        print(*report(bench.rows), sep="\n")
        failed = sum("error" in row for row in bench.rows)
        seconds = time.monotonic() - started
        print(f"\n{len(bench.rows)} measurements, {failed} failed, {seconds:.0f} s", flush=True)
    sys.exit(any("error" in row and row["backend"] == "pat" for row in bench.rows))


if __name__ == "__main__":
    main()
