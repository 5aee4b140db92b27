# SPDX-License-Identifier: MIT
"""Replays captured layers thousands of times and compares every output with the first, bit by bit.

    python scripts/gpu_repeat_check.py [--budget-s 60] [--cells 11,12] [--heads 64/8] [--pages 64]

A race in a kernel, or between a layer and the next, may show in one replay of a thousand. A graph
has three layers, each with an output of its own that is filled with NaN before every replay: a
piece that was left out shows as well as a wrong one. Before every other replay L2 is flushed. Cells
are captured in turn, ROUNDS times, until the time is up; one that had no turn is a failure too.

Writes results/repeat_check-<gpu>.jsonl, a line a cell: replays, and how many of them differed; of
the first one that did, its layer, rows, heads and whether something was missing (NaN).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gpu_common as common
import torch
from cells import Pool, heads_of, slots_needed
from gpu_common import Row
from pat_backend import Pat, Planners
from peers import Case
from trees import Tree, plain, published

LAYERS = 3
BATCH = 20  # replays of a capture: its first is unlike the others
ROUNDS = 1000
KEY = ("tree", "heads", "page_size")
TREES = (11, 12, 2, 3, 7, 15, 16, 17, 1)
HEADS = ("64/8", "32/8", "16/8", "8/1")
PLAIN = ((1, 1024), (64, 1024), (256, 1024))


@dataclass
class Cell:
    """A batch, its captured layers, and what their outputs should be."""

    tree: Tree
    heads: str
    page_size: int
    case: Case
    outs: list[torch.Tensor] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)
    graph: Any = None
    replays: int = 0
    differed: int = 0
    first: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.tree.name} {self.heads} p{self.page_size}"

    def capture(self, planners: Planners) -> None:
        """Plans, runs the layers once by themselves and captures them.

        NOTE: a planner has one plan, so a cell is captured anew whenever it is its turn.
        """
        pat = Pat(self.page_size, planners)
        pat.prepare(self.case)
        self.outs = [torch.empty_like(self.case.q) for _ in range(LAYERS)]

        def layers() -> torch.Tensor:
            for out in self.outs:
                pat.out = out
                pat.run()
            return out

        if self.case.q.device.type == "cpu":
            layers()
        else:
            self.graph, _ = common.capture(layers)
        if not self.expected:
            self.replay()
            self.expected = [out.clone() for out in self.outs]

    def replay(self) -> None:
        """All layers once, from outputs of NaN; without a graph they are what they are."""
        if self.graph is not None:
            for out in self.outs:
                out.fill_(math.nan)
            self.graph.replay()

    def differs(self) -> torch.Tensor:
        """Whether any output is not what it was at first: a bool on the device."""
        same = [bits(a).eq(bits(b)).all() for a, b in zip(self.outs, self.expected, strict=True)]
        return ~torch.stack(same).all()

    def check(self, flush: torch.Tensor) -> None:
        """A batch of replays; the first that differs is described."""
        found = torch.zeros((), dtype=torch.int64, device=flush.device)
        kept = [torch.empty_like(out) for out in self.outs]
        for turn in range(BATCH):
            if turn % 2:
                flush.zero_()
            self.replay()
            differs = self.differs()
            for mine, out in zip(kept, self.outs, strict=True):
                torch.where(differs & (found == 0), out, mine, out=mine)
            found += differs
        self.replays += BATCH
        self.differed += int(found)
        if int(found) and not self.first:
            self.first = self.describe(kept)

    def describe(self, outs: list[torch.Tensor]) -> Row:
        """What is wrong in these outputs."""
        for layer, (out, good) in enumerate(zip(outs, self.expected, strict=True)):
            wrong = bits(out).ne(bits(good)).any(-1)  # [rows, heads]
            if bool(wrong.any()):
                rows, heads = (torch.nonzero(wrong.any(d)).flatten().tolist() for d in (1, 0))
                difference = (out.float() - good.float())[wrong].abs()
                return {
                    "layer": layer,
                    "rows": rows[:64],
                    "num_rows": len(rows),
                    "heads": heads,
                    "share_nan": float(out[wrong].isnan().float().mean()),
                    "largest": float(difference.nan_to_num(0).max()),
                }
        return {}

    def row(self) -> Row:
        return {
            "tree": self.tree.name,
            "heads": self.heads,
            "page_size": self.page_size,
            "layers": LAYERS,
            "replays": self.replays,
            "differed": self.differed,
            "first": self.first,
        }


def bits(values: torch.Tensor) -> torch.Tensor:
    """NaN equals itself in these."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def cells_of(options: argparse.Namespace, device: str) -> Iterator[Cell]:
    """The cells asked for, in one pool."""
    trees = [published(int(n)) for n in options.cells.split(",")] if options.cells else [
        *(published(n) for n in TREES),
        *(plain(*shape) for shape in PLAIN),
    ]  # fmt: skip
    wanted = [(tree, heads) for tree in trees for heads in options.heads.split(",")]
    pages = [int(page) for page in options.pages.split(",")]
    pool = Pool(wanted, pages, device)
    for tree, heads in wanted:
        for page in pages:
            case = pool.with_heads(pool.case(tree, page), heads)
            yield Cell(tree, heads, page, case)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default="", help="numbers of published trees")
    parser.add_argument("--heads", default=",".join(HEADS))
    parser.add_argument("--pages", default="64,16,1")
    parser.add_argument("--budget-s", type=float, default=math.inf)
    parser.add_argument("--dry-run", action="store_true", help="no GPU: one run of each cell")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    device = "cpu" if options.dry_run else "cuda"
    cells = list(cells_of(options, device))
    tokens = max(slots_needed(cell.tree, cell.page_size) for cell in cells)
    planners = Planners(max(cell.tree.num_rows for cell in cells), tokens)
    for heads in {cell.heads for cell in cells}:
        planners.of(*heads_of(heads), cells[0].case.q.dtype, device)
    size = 1 << 20 if options.dry_run else common.L2_FLUSH_BYTES
    flush = torch.empty(size, dtype=torch.uint8, device=device)
    for _ in range(1 if options.dry_run else ROUNDS):
        for cell in cells:
            if time.monotonic() > deadline:
                break
            cell.capture(planners)
            if not options.dry_run:
                cell.check(flush)
    rows = [{**cell.row(), **common.provenance()} for cell in cells if cell.expected]
    if not options.dry_run:
        common.write_rows(f"repeat_check-{common.gpu_slug()}.jsonl", rows, KEY)
    bad = [cell for cell in cells if cell.differed]
    for cell in bad:
        print(f"NOT REPEATABLE {cell.name}: {cell.differed} of {cell.replays}, {cell.first}")
    replays = sum(cell.replays for cell in cells)
    print(f"{len(rows)} of {len(cells)} cells, {replays} replays, {len(bad)} cells that differ")
    raise SystemExit(bool(bad) or len(rows) < len(cells))


if __name__ == "__main__":
    main()
