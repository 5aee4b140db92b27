# SPDX-License-Identifier: MIT
"""How far the planner's choice is from the best plan of a sweep, on the 12 marked ragged forests.

    python scripts/bench_regret.py [--heads 32/8,64/8] [--dry-run]

The sweep narrows the planner to every combination of tile set, split (limit of an item's solo
time) and chains (none, or their rows a work item), the last two also at other prices of a partial,
which moves rows between packs and tails; and it forces sharing on and off. Every different plan is
timed cold. The four fastest and the chosen one are then timed again, in turns: regret is chosen
over best.

Writes results/regret-<gpu>.jsonl: {"kind": "cell"} with all plans as [option, us, predicted us].
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time

import gpu_common as common
from forests import regret_suite
from gpu_common import Row, geomean
from plan_lab import Bed, Candidate, Lab, Option

from pat_sglang.packing import WALLS, Search

TILE_SETS = ((0, 1, 2), (0, 1), (0, 2), (0,))
CHAIN_ROWS: tuple[tuple[int, ...], ...] = ((), (128,), (64,), (16,))  # (): no chains
PART_QUARTERS = (1, 16)
FINALISTS, ROUNDS = 4, 3
KEY = ("kind", "tree", "heads")


def _search(wall: int, chain_rows: tuple[int, ...], tiles: tuple[int, ...]) -> Search:
    chains = bool(chain_rows)
    return Search(chains, (wall,), chain_rows or (128, 64, 16), tiles, without_chains=not chains)


def sweep() -> list[Option]:
    """What is tried; the first is the planner as it is."""
    options = [Option("chosen")]
    for wall, chain_rows, tiles in itertools.product(WALLS, CHAIN_ROWS, TILE_SETS):
        name = f"wall {wall} chain {chain_rows} tiles {tiles}"
        options.append(Option(name, _search(wall, chain_rows, tiles)))
    for wall, chain_rows in itertools.product(WALLS, CHAIN_ROWS):
        search = _search(wall, chain_rows, TILE_SETS[0])
        name = f"wall {wall} chain {chain_rows}"
        options += [
            Option(f"{name} part {quarters}/4", search, part_quarters=quarters)
            for quarters in PART_QUARTERS
        ]
        options.append(Option(f"{name} sharing on", search, "on"))
    options += [
        Option(f"wall {wall} sharing off", _search(wall, (), TILE_SETS[0]), "off") for wall in WALLS
    ]
    return options


def measure(bed: Bed, candidates: list[Candidate]) -> Row:
    """Times all plans of a cell, then the best again beside the chosen one."""
    plans: list[tuple[str, float, float]] = []
    facts: Row = {}
    for candidate in candidates:
        us = bed.time(candidate.words)
        facts = facts or bed.pat.facts()
        plans.append((candidate.names[0], round(us, 2), round(bed.predicted_us(), 2)))
    ranking = sorted(range(1, len(plans)), key=lambda i: plans[i][1])[:FINALISTS]
    times: dict[int, list[float]] = {index: [] for index in [0, *ranking]}
    for _ in range(ROUNDS):
        for index in times:
            times[index].append(bed.time(candidates[index].words, 20))
    medians = {index: statistics.median(of) for index, of in times.items()}
    best = min(medians, key=lambda index: medians[index])
    return {
        "kind": "cell",
        "tree": bed.tree.name,
        "heads": bed.heads,
        "plans_timed": len(plans),
        "chosen_us": round(medians[0], 2),
        "best_us": round(medians[best], 2),
        "best": candidates[best].names,
        "regret": round(medians[0] / medians[best], 4),
        "plan": facts,
        "plans": plans,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=lambda s: s.split(","), default=["32/8", "64/8"])
    parser.add_argument("--forests", type=int, default=12, help="only the first of the marked ones")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dry-run", action="store_true", help="no GPU: predicted times")
    options = parser.parse_args()
    started = time.monotonic()
    trees = regret_suite()[: options.forests]
    lab = Lab([(t, h) for t in trees for h in options.heads], options.processes, options.dry_run)
    provenance = common.provenance()
    rows: list[Row] = []
    for bed, candidates in lab.plans(sweep()):
        if time.monotonic() - started > options.budget_s:
            print("budget used up")
            break
        row = measure(bed, candidates)
        rows.append({**row, **provenance})
        print(
            f"{row['tree']:<20}{row['heads']:>6} chosen {row['chosen_us']:9.2f} us, best of "
            f"{row['plans_timed']} {row['best_us']:9.2f} us, regret {row['regret']:.3f} "
            f"({row['best'][0]})",
            flush=True,
        )
        if not options.dry_run:
            common.write_rows(f"regret-{common.gpu_slug()}.jsonl", rows, KEY)
    regrets = [row["regret"] for row in rows]
    print(
        f"{len(rows)} cells, geometric mean of regret {geomean(regrets):.3f}, largest "
        f"{max(regrets, default=0):.3f}, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
