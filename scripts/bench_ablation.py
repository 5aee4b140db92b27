# SPDX-License-Identifier: MIT
"""What each part of the planner is worth: the ablations of the paper, on the 18 sharing trees.

    python scripts/bench_ablation.py [--heads 32/8] [--dry-run]

    fixed 16, 64, 128   one tile for everything
    naive packing       a pack for every segment and a tail for every row: nothing merged, no chains
    no chains           every level of a tree leaves partials
    no split            no run is cut
    no sharing          the plan of a kernel that knows no prefixes
    serial              the chosen plan in two launches: wide tiles, then the narrow one (None where
                        it has one kind alone; a second, empty merge is in the time)

Cold times in the protocol of bench_decode; outputs are compared with those of the chosen plan.
Writes results/ablation-<gpu>.jsonl: {"kind": "cell"} with microseconds by variant (equal plans have
equal times), and {"kind": "summary"}: geometric mean of variant over chosen.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import gpu_common as common
import numpy as np
import torch
from gpu_common import Row, geomean
from pat_backend import Pat, Planners
from plan_lab import Bed, Lab, Option, load
from suites import SUITES
from trees import NUM_SHARING, published

from pat_sglang import layout
from pat_sglang.packing import Search

CHOSEN, SERIAL = "chosen", "serial"
OPTIONS = [
    Option(CHOSEN),
    Option("fixed 16", Search(tiles=(0,))),
    Option("fixed 64", Search(tiles=(1,))),
    Option("fixed 128", Search(tiles=(2,))),
    Option("naive packing", Search(chains=False), "on", levels=0),
    Option("no chains", Search(chains=False)),
    Option("no split", Search(walls=(0,))),
    Option("no sharing", sharing="off"),
]
KEY = ("kind", "tree", "heads", "variant")


def halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A plan as two: its wide tiles without a merge, then its narrow tile with the merge."""
    wide, narrow = words.copy(), words.copy()
    wide[layout.H_ITEM_COUNT] = 0
    part_ptr = wide[layout.H_OFF_PART_PTR]
    wide[part_ptr : part_ptr + wide[layout.H_ROWS] + 1] = 0
    narrow[layout.H_ITEM_COUNT + 1 : layout.H_ITEM_COUNT + 3] = 0
    return wide, narrow


def time_serial(bed: Bed, words: np.ndarray, planners: Planners) -> float | None:
    """Cold microseconds of two launches; None if the plan has wide tiles or narrow ones alone."""
    counts = words[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + 3]
    if not counts[0] or not counts[1:].any() or bed.lab.cpu:
        return None
    second = Pat(1, planners)
    second.prepare(bed.case)
    for pat, half in zip((bed.pat, second), halves(words), strict=True):
        load(pat, half)
    # The merge reads what both launches left.
    own = second.current.partial_out, second.current.partial_lse
    second.current.partial_out = bed.pat.current.partial_out
    second.current.partial_lse = bed.pat.current.partial_lse
    second.out = bed.pat.out

    def both() -> torch.Tensor:
        bed.pat.run()
        return second.run()

    try:
        graph, out = common.capture(both)
        out.fill_(float("nan"))
        graph.replay()
        bed.compare(out)
        return common.time_cold(graph, bed.lab.flush)
    finally:
        second.current.partial_out, second.current.partial_lse = own


def summary(cells: Sequence[Row]) -> list[Row]:
    """Geometric mean and range of every variant over the chosen plan."""
    rows = []
    for variant in [*(option.name for option in OPTIONS[1:]), SERIAL]:
        ratios = [c["us"][variant] / c["us"][CHOSEN] for c in cells if c["us"].get(variant)]
        if ratios:
            mean = round(geomean(ratios), 4)
            spread = [round(min(ratios), 4), round(max(ratios), 4)]
            rows.append(
                {"kind": "summary", "variant": variant, "over_chosen": mean, "range": spread,
                 "cells": len(ratios)}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = list(SUITES["published"].heads)
    parser.add_argument("--heads", type=lambda s: s.split(","), default=default)
    parser.add_argument("--trees", type=int, default=NUM_SHARING, help="only the first of the 18")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dry-run", action="store_true", help="no GPU: predicted times")
    options = parser.parse_args()
    started = time.monotonic()
    trees = [published(number) for number in range(1, options.trees + 1)]
    lab = Lab([(t, h) for t in trees for h in options.heads], options.processes, options.dry_run)
    provenance, others = common.provenance(), lab.new_planners()
    cells: list[Row] = []
    for bed, candidates in lab.plans(OPTIONS):
        if time.monotonic() - started > options.budget_s:
            print("budget used up")
            break
        us: dict[str, float | None] = {}
        for candidate in candidates:
            us |= dict.fromkeys(candidate.names, bed.time(candidate.words, 30))
        us[SERIAL] = time_serial(bed, candidates[0].words, others)
        us = {name: round(value, 2) if value else None for name, value in us.items()}
        cells.append({"kind": "cell", "tree": bed.tree.name, "heads": bed.heads, "us": us})
        print(f"{bed.tree.name} {bed.heads:>5} {us}", flush=True)
        if not options.dry_run:
            rows = [{**row, **provenance} for row in [*summary(cells), *cells]]
            common.write_rows(f"ablation-{common.gpu_slug()}.jsonl", rows, KEY)
    print(*summary(cells), f"{time.monotonic() - started:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
