# SPDX-License-Identifier: MIT
"""The two figures of the paper, from the result files: kernel latency per tree, TPOT against rate.

    python scripts/plot.py [--gpu h100] [--to results/figures]     needs matplotlib

Draws what is stored and nothing else: a backend or a rate that was not measured has no mark.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]

HEADS = ("32/32", "16/8", "32/8", "64/8")
# Backend of the rows, label, colour.
KERNELS = (
    ("pat", "PAT", "tab:red"),
    ("fa3_p1", "FA3", "tab:blue"),
    ("fi_decode_p1", "FlashInfer", "tab:green"),
    ("fi_decode_p64", "FlashInfer, page 64", "tab:olive"),
    ("cascade", "FlashInfer cascade", "tab:purple"),
    ("xqa_p64", "XQA, page 64", "tab:brown"),
)
SERVERS = (
    ("pat", "PAT", "tab:red"),
    ("fa3", "FA3", "tab:blue"),
    ("flashinfer", "FlashInfer", "tab:green"),
    ("flashinfer-p64", "FlashInfer, page 64", "tab:olive"),
)


def kernel_figure(rows: Sequence[Row]) -> Any:
    """Cold time of each published tree, one panel a head layout; the floor as steps."""
    figure, panels = plt.subplots(len(HEADS), 1, figsize=(10, 11), sharex=True)
    for panel, heads in zip(panels, HEADS, strict=True):
        here = [r for r in rows if r["suite"] == "published" and r["heads"] == heads]
        trees = sorted({r["tree"] for r in here})
        for place, (backend, label, colour) in enumerate(KERNELS):
            times = {r["tree"]: r["cold_us"] for r in here if r["backend"] == backend}
            at = [x + 0.12 * (place - len(KERNELS) / 2) for x, t in enumerate(trees) if t in times]
            values = [times[t] for t in trees if t in times]
            panel.bar(at, values, 0.12, label=label, color=colour)
        floors = {r["tree"]: r["floor_us"] for r in here if r["backend"] == "pat"}
        for x, tree in enumerate(trees):
            if tree in floors:
                panel.plot((x - 0.45, x + 0.4), (floors[tree],) * 2, "k-", lw=1)
        panel.set_yscale("log")
        panel.set_ylabel(f"{heads} heads, us")
        panel.set_xticks(range(len(trees)), [t.removeprefix("pat") for t in trees])
    panels[-1].set_xlabel("tree of the paper; black: the measured floor")
    panels[0].legend(ncols=3, fontsize="small")
    figure.suptitle(f"Decode attention of one layer, cold L2, {rows[0]['gpu']}")
    return figure


def _cell(row: Row) -> tuple[str, ...]:
    return row["workload"], row["model"], row["rivals"], row["commit"], row["server_arguments"]


def serving_figure(rows: Sequence[Row]) -> Any:
    """Mean TPOT (left) and P99 TPOT (right) against the request rate.

    One row a workload and set of servers that were measured together.
    """
    rows = [r for r in rows if r["request_rate"] is not None and "p99_tpot_ms" in r]
    cells = sorted({_cell(r) for r in rows})
    size = max(len(cells), 1)
    figure, panels = plt.subplots(size, 2, figsize=(10, 3.5 * size), squeeze=False)
    for cell, pair in zip(cells, panels, strict=False):
        here = [r for r in rows if _cell(r) == cell]
        for panel, column, name in zip(
            pair, ("mean_tpot_ms", "p99_tpot_ms"), ("mean", "P99"), strict=True
        ):
            for backend, label, colour in SERVERS:
                of = [r for r in here if r["backend"] == backend]
                rates = sorted({r["request_rate"] for r in of})
                middle = [
                    statistics.median(r[column] for r in of if r["request_rate"] == rate)
                    for rate in rates
                ]
                if rates:
                    panel.plot(rates, middle, "o-", label=label, color=colour)
            panel.set(xlabel="requests a second", ylabel=f"{name} TPOT, ms", ylim=(0, None))
            panel.set_title(", ".join(cell[:2]), fontsize="medium")
            panel.legend(fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--to", type=Path, default=ROOT / "results" / "figures")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    # The rows alone: gpu_common would import torch.
    for name, draw in (("bench_decode", kernel_figure), ("bench_serving", serving_figure)):
        path = ROOT / "results" / f"{name}-{options.gpu}.jsonl"
        if not path.exists():
            print(f"{path.name}: not there, no figure")
            continue
        figure = draw([json.loads(line) for line in path.read_text().splitlines()])
        figure.tight_layout()
        target = options.to / f"{name}-{options.gpu}.svg"
        figure.savefig(target)
        print(target)


if __name__ == "__main__":
    main()
