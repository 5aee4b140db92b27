# SPDX-License-Identifier: MIT
"""Which stream is the floor: all variants of csrc/bench on a few cells, the best few on all cells.

    python scripts/bench_floor.py [--budget-s 90]

Same protocol as bench_decode: CUDA-graph replay, cold (256 MB written before each) and warm, slots
in random order at page 1, in random pages of 64. The digest of every variant is compared with the
caches first. One variant is chosen for all cells: that with the fewest cells above 1.05x the best
variant of the cell (or 0.5 us, the grain of the timer), then that of the least geometric mean.

Writes results/floor-<gpu>.jsonl: {"kind": "cell"} with the times of the variants (cold and warm)
and the chosen over the best, and one {"kind": "chosen"}, which bench_decode reads.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import gpu_common as common
import torch
from cells import Pool, heads_of
from floor import Floor, Variant, variants
from gpu_common import Row, geomean
from peers import Case
from suites import HEAD_DIM, SUITES, kv_bytes
from trees import Tree, published

PAGES = (1, 64)
PROBES = [(n, heads) for n in (1, 3, 4, 6, 12, 20) for heads in ("32/32", "32/8", "8/1")]
CHECKS = [(1, "32/8"), (12, "8/1")]
FINALISTS = 6
REPEATS = 15  # cold, and down to 10 of a long one
WITHIN, GRAIN_US = 1.05, 0.5
KEY = ("kind", "tree", "heads", "page_size")

Times = dict[Variant, tuple[float, float]]  # cold, warm


class FloorBench:
    """A pool with the cells in it, and what was measured."""

    def __init__(self, budget_s: float) -> None:
        self.deadline = time.monotonic() + budget_s
        self.provenance = common.provenance()
        suites = (SUITES["published"], SUITES["tp8"])
        self.cells: list[tuple[Tree, str]] = [
            (tree, heads) for suite in suites for tree in suite.trees() for heads in suite.heads
        ]
        self.pool = Pool(self.cells, PAGES, "cuda")
        self.flush = torch.empty(common.L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.copy_rate = common.copy_bandwidth()

    def case(self, tree: Tree, heads: str, page_size: int) -> Case:
        return self.pool.with_heads(self.pool.case(tree, page_size), heads)

    def check(self, candidates: Sequence[Variant]) -> None:
        """Every variant reads every word."""
        for number, heads in CHECKS:
            for page_size in PAGES:
                case = self.case(published(number), heads, page_size)
                for variant in candidates:
                    stream = Floor(page_size, variant)
                    stream.prepare(case)
                    stream.run()
                    if not stream.check():
                        raise SystemExit(f"{variant} does not read all of pat{number:02d} {heads}")

    def time(self, case: Case, candidates: Sequence[Variant]) -> Times:
        """Cold and warm microseconds of each."""
        times: Times = {}
        for variant in candidates:
            stream = Floor(case.layout.page_size, variant)
            stream.prepare(case)
            graph, _ = common.capture(stream.run)
            once = common.time_once(graph)
            cold = common.time_cold(graph, self.flush, max(once, common.COLD_BUDGET_US / REPEATS))
            times[variant] = (round(cold, 2), round(common.time_warm(graph, once), 2))
        return times

    def finalists(self, candidates: Sequence[Variant]) -> list[Variant]:
        """The best by geometric mean over a few cells."""
        ratios: dict[Variant, list[float]] = {variant: [] for variant in candidates}
        for number, heads in PROBES:
            for page_size in PAGES:
                times = self.time(self.case(published(number), heads, page_size), candidates)
                best = min(cold for cold, _ in times.values())
                for variant, (cold, _) in times.items():
                    ratios[variant].append(cold / best)
        ranking = sorted((geomean(values), str(v), v) for v, values in ratios.items())
        for mean, name, variant in ranking:
            print(f"{name:<32} {mean:.3f}x the best, at most {max(ratios[variant]):.3f}x")
        return [variant for _, _, variant in ranking[:FINALISTS]]

    def run(self) -> list[Row]:
        """Rows of the result file, the chosen variant first."""
        candidates = variants()
        self.check(candidates)
        candidates = self.finalists(candidates)
        measured: list[tuple[Row, Times]] = []
        for tree, heads in self.cells:
            for page_size in PAGES:
                if time.monotonic() > self.deadline:
                    print(f"budget used up at {tree.name} {heads}")
                    return self.rows(measured, candidates)
                case = self.case(tree, heads, page_size)
                nbytes = kv_bytes(case.tree.unique_tokens(), heads)
                nbytes += 4 * tree.num_rows * heads_of(heads)[0] * HEAD_DIM  # q and out
                row: Row = {
                    "kind": "cell", "tree": tree.name, "heads": heads, "page_size": page_size,
                    "bytes": nbytes,
                }  # fmt: skip
                measured.append((row, self.time(case, candidates)))
        return self.rows(measured, candidates)

    def rows(self, measured: list[tuple[Row, Times]], candidates: Sequence[Variant]) -> list[Row]:
        """Chooses, and says how far the chosen is from the best of each cell."""
        best = [min(cold for cold, _ in times.values()) for _, times in measured]

        def above(variant: Variant) -> int:
            return sum(
                times[variant][0] > max(WITHIN * least, least + GRAIN_US)
                for (_, times), least in zip(measured, best, strict=True)
            )

        def mean(variant: Variant) -> float:
            pairs = zip(measured, best, strict=True)
            return geomean(times[variant][0] / least for (_, times), least in pairs)

        pick = min(candidates, key=lambda variant: (above(variant), mean(variant)))
        rows = []
        for (row, times), least in zip(measured, best, strict=True):
            cold, warm = times[pick]
            rows.append(
                {
                    **row,
                    "variant": str(pick),
                    "cold_us": cold,
                    "warm_us": warm,
                    "over_best": round(cold / least, 4),
                    "tb_s": round(row["bytes"] / cold / 1e6, 3),
                    "cold_us_of": {str(v): c for v, (c, _) in times.items()},
                    "warm_us_of": {str(v): w for v, (_, w) in times.items()},
                    **self.provenance,
                }
            )
        ratios = [row["over_best"] for row in rows]
        chosen: Row = {
            "kind": "chosen",
            "variant": str(pick),
            "cells": len(rows),
            "cells_above_5_percent": sum(ratio > WITHIN for ratio in ratios),
            "cells_above_5_percent_and_grain": above(pick),
            "largest_over_best": max(ratios, default=math.nan),
            "mean_over_best": round(geomean(ratios), 4),
            "copy_tb_s": round(self.copy_rate / 1e12, 3),
            "best_tb_s": max((row["tb_s"] for row in rows), default=math.nan),
            **self.provenance,
        }
        return [chosen, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop cleanly after this")
    started = time.monotonic()
    bench = FloorBench(parser.parse_args().budget_s)
    rows = bench.run()
    common.write_rows(f"floor-{common.gpu_slug()}.jsonl", rows, KEY)
    for row in rows[1:]:
        name = f"{row['tree']} {row['heads']} p{row['page_size']}"
        print(f"{name:<20} {row['cold_us']:9.2f} us {row['tb_s']:6.3f} TB/s x{row['over_best']}")
    print(rows[0], f"\n{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
