# SPDX-License-Identifier: MIT
"""Tables of bench_serving's rows, and what they say on each criterion of the serving issue."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

DEFAULT = "fa3"  # SGLang's own choice of backend where this was measured

# Median inter-token latency of PAT over fa3's, at most.
TARGETS = {"prefix-4x32-4k": 0.6, "prefix-1x128-8k": 0.4}
COLUMNS = ("median_itl_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "output_tok_s")
# What a control may lose of each column, or the spread of the peer with itself if that is more.
CONTROL_SLACK = {
    "mean_tpot_ms": 0.01,
    "p99_tpot_ms": 0.02,
    "mean_ttft_ms": 0.02,
    "output_tok_s": 0.02,
}


def median(rows: Sequence[Row], column: str) -> float:
    """Median over the rounds."""
    return statistics.median(row[column] for row in rows)


def measured(rows: Sequence[Row]) -> list[str]:
    """The columns that all rows have: one that was not soundly measured is not in a row."""
    return [column for column in COLUMNS if all(column in row for row in rows)]


def spread(rows: Sequence[Row], column: str) -> float:
    """Largest relative difference between two rounds of one backend; NaN: there is one only."""
    values = [row[column] for row in rows]
    if len(values) < 2:
        return math.nan
    return (max(values) - min(values)) / statistics.median(values)


def load_of(row: Row) -> str:
    """The point of a row, as Point.name has it."""
    if row["request_rate"] is not None:
        return f"{row['workload']}@{row['request_rate']:g}/s"
    return row["workload"] + ("" if row["concurrency"] is None else f"@{row['concurrency']}")


def grouped(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """Rows by load and all that it was measured with, then by backend."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        measured_with = (row["rivals"], f"{row['max_total_tokens']} slots", row["commit"])
        measured_with += (row["server_arguments"],) if row["server_arguments"] else ()
        of_load = groups.setdefault((row["model"], load_of(row), *measured_with), {})
        of_load.setdefault(row["backend"], []).append(row)
    return groups


def paired(mine: Sequence[Row], peer: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the rounds that both backends ran."""
    both = {row["round"] for row in mine} & {row["round"] for row in peer}
    kept_mine, kept_peer = ([r for r in rows if r["round"] in both] for rows in (mine, peer))
    return kept_mine, kept_peer


def losses(
    load: str, mine: Sequence[Row], peer: Sequence[Row], name: str
) -> tuple[list[str], list[str]]:
    """What does not hold against a peer measured in the same rounds, and what is not decided.

    A loss that is above what the issue allows, but below the differences of the peer with itself,
    is the second kind: more rounds, or a quieter machine, would tell.
    """
    failed, undecided = [], []
    columns = measured([*mine, *peer])
    ratio = {column: median(mine, column) / median(peer, column) for column in columns}
    target = TARGETS.get(load)
    if target is not None and name == DEFAULT and ratio.get("median_itl_ms", 0) > target:
        failed.append(f"median ITL {ratio['median_itl_ms']:.3f} of {name}'s, asked {target}")
    must_gain: tuple[str, ...] = ()
    if mine[0]["shared"]:  # of answers that came whole tokens a second are all there is
        whole = mine[0].get("times") == "none"
        must_gain = ("output_tok_s",) if whole else ("mean_tpot_ms", "p99_tpot_ms")
    for column in columns:
        loss = (1 / ratio[column] if column == "output_tok_s" else ratio[column]) - 1
        if column in must_gain:
            if loss >= 0:
                failed.append(f"{column} {ratio[column]:.3f} of {name}'s")
        # Only SGLang's default is what nobody may lose to; another base changes prefill as well.
        elif name == DEFAULT and loss > CONTROL_SLACK.get(column, math.inf):
            noise = spread(peer, column)
            known = "unknown: one round" if math.isnan(noise) else f"{noise:.1%}"
            text = f"{column} {loss:.1%} worse, {name} against itself {known}"
            (failed if loss > noise else undecided).append(text)
    return failed, undecided


def report(rows: Sequence[Row]) -> str:
    """Medians over the rounds, the spread of each backend with itself, and the verdicts."""
    lines = []
    for group, backends in grouped(rows).items():
        lines.append(", ".join(group))
        for name, of in backends.items():
            columns = measured(of)
            if all(row.get("server_step_ms") for row in of):
                columns.append("server_step_ms")
            text = "  ".join(f"{c} {median(of, c):.2f}{_noise(of, c)}" for c in columns)
            lines.append(f"  {name:16}{text}  {len(of)} rounds{_plans(of[-1])}")
        for name, of in backends.items():
            mine, peer = paired(backends.get("pat", []), of)
            if name == "pat" or not mine:
                continue
            failed, undecided = losses(load_of(of[0]), mine, peer, name)
            words = list(failed)
            if not failed and not undecided:
                asked = name == DEFAULT or mine[0]["shared"]
                words.append("holds" if asked else "nothing is asked of it")
            if missing := [c for c in COLUMNS if c not in measured([*mine, *peer])]:
                words.append(f"not measured: {', '.join(missing)}")
            if undecided:
                words.append("not decided: " + ", ".join(undecided))
            lines.append(f"    against {name}: {_gain(mine, peer)}; {'; '.join(words)}")
    return "medians over rounds (largest - smallest, relative)\n" + "\n".join(lines)


def _noise(rows: Sequence[Row], column: str) -> str:
    return f" ({spread(rows, column):.1%})" if len(rows) > 1 else ""


def _gain(mine: Sequence[Row], peer: Sequence[Row]) -> str:
    if "median_itl_ms" in measured([*mine, *peer]):
        return f"{median(peer, 'median_itl_ms') / median(mine, 'median_itl_ms'):.2f}x in median ITL"
    return f"{median(mine, 'output_tok_s') / median(peer, 'output_tok_s'):.2f}x in tokens/s"


def _plans(row: Row) -> str:
    counted = row.get("pat")
    if not counted or not counted["unshared_kv_tokens"]:
        return ""
    read = counted["planned_kv_tokens"] / counted["unshared_kv_tokens"]
    steps = counted["plans_made"] + counted["plans_kept"]
    return f", KV read {read:.2f}, plans {counted['plans_made']}/{steps}"
