# SPDX-License-Identifier: MIT
"""Tables of bench_serving's rows, and what they say on each criterion of the serving issue."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# Median inter-token latency of PAT over fa3's, at most.
TARGETS = {"prefix-4x32-4k": 0.6, "prefix-1x128-8k": 0.4}
COLUMNS = ("median_itl_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "output_tok_s")
# What a control may lose: (column, share), or the spread of the peer with itself if that is more.
CONTROL_SLACK = (
    ("mean_tpot_ms", 0.01),
    ("p99_tpot_ms", 0.02),
    ("mean_ttft_ms", 0.02),
    ("output_tok_s", 0.02),
)


def median(rows: Sequence[Row], column: str) -> float:
    """Median over the rounds."""
    return statistics.median(row[column] for row in rows)


def spread(rows: Sequence[Row], column: str) -> float:
    """Largest relative difference between two rounds of one backend."""
    values = [row[column] for row in rows]
    return (max(values) - min(values)) / statistics.median(values)


def load_of(row: Row) -> str:
    """The point of a row, as Point.name has it."""
    if row["request_rate"] is not None:
        return f"{row['workload']}@{row['request_rate']:g}/s"
    return row["workload"] + ("" if row["concurrency"] is None else f"@{row['concurrency']}")


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
    """Rows by (model, rivals, load), then by backend."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        of_load = groups.setdefault((row["model"], row["rivals"], load_of(row)), {})
        of_load.setdefault(row["backend"], []).append(row)
    return groups


def verdicts(load: str, mine: Sequence[Row], peer: Sequence[Row], name: str) -> list[str]:
    """What does not hold against a peer, measured in the same rounds; empty: everything does."""
    found = []
    gain = {column: median(mine, column) / median(peer, column) for column in COLUMNS}
    target = TARGETS.get(load)
    if target is not None and name == "fa3" and gain["median_itl_ms"] > target:
        found.append(f"median ITL {gain['median_itl_ms']:.3f} of {name}'s, asked {target}")
    slack = dict(CONTROL_SLACK)
    if mine[0]["shared"]:
        found += [
            f"{column} {gain[column]:.3f} of {name}'s"
            for column in ("mean_tpot_ms", "p99_tpot_ms")
            if gain[column] >= 1
        ]
        slack = {column: slack[column] for column in ("mean_ttft_ms", "output_tok_s")}
    for column, share in slack.items():
        allowed = max(share, spread(peer, column))
        loss = 1 / gain[column] - 1 if column == "output_tok_s" else gain[column] - 1
        if loss > allowed:
            found.append(f"{column} {loss:+.1%}, {name} against itself {spread(peer, column):.1%}")
    return found


def report(rows: Sequence[Row]) -> str:
    """Medians over the rounds, the spread of each backend with itself, and the verdicts."""
    lines = []
    for (model, rivals, load), backends in grouped(rows).items():
        rounds = max(len(of) for of in backends.values())
        lines.append(f"{model}, {load} ({rivals}, {rounds} rounds)")
        for name, of in backends.items():
            cells = [f"{median(of, c):9.2f} ({spread(of, c):5.1%})" for c in COLUMNS]
            counters = of[-1].get("pat")
            saved = ""
            if counters and counters["unshared_kv_tokens"]:
                read = counters["planned_kv_tokens"] / counters["unshared_kv_tokens"]
                saved = f"  KV read {read:.2f}, plans {counters['plans_made']}"
                saved += f"/{counters['plans_made'] + counters['plans_kept']}"
            lines.append(f"  {name:16}" + " ".join(cells) + saved)
        for name, of in backends.items():
            if name != "pat" and "pat" in backends:
                failed = verdicts(load, backends["pat"], of, name)
                ratio = median(of, "median_itl_ms") / median(backends["pat"], "median_itl_ms")
                words = "; ".join(failed) if failed else "holds"
                lines.append(f"    against {name}: {ratio:.2f}x in median ITL; {words}")
    header = "  ".join(COLUMNS)
    return f"medians over rounds (largest - smallest, relative): {header}\n" + "\n".join(lines)
