# SPDX-License-Identifier: MIT
"""The verdicts on the Hopper criteria, on rows that were made up; slots that a stream reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import report
from trees import make_layout, plain, published, random_tree


def row(tree: str, backend: str, cold_us: float, **more: Any) -> dict[str, Any]:
    """A row of bench_decode: limit 100 us, floor 110 us, unless said otherwise."""
    page_size = 64 if backend.endswith("p64") else 1
    known = {
        "suite": "published", "tree": tree, "heads": "32/8", "backend": backend,
        "page_size": page_size, "limit_us": 100.0, "floor_us": 110.0, "cold_us": cold_us,
        "warm_us": cold_us, "gpu": "NVIDIA A100",
    }  # fmt: skip
    return known | more


def verdict(rows: list[dict[str, Any]], criterion: Any, part: str) -> report.Verdict:
    """The only verdict of a criterion whose text contains `part`."""
    found = [v for v in criterion(report.cells_of(rows)) if part in v.criterion]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("cold_us", "holds"), [(130.0, True), (135.0, False)])
def test_large_cells_are_held_against_the_floor(cold_us: float, holds: bool) -> None:
    rows = [row("pat03", "pat", cold_us), row("pat03", "fa3_p1", 500.0)]
    assert verdict(rows, report.sharing, "time / floor").holds is holds
    assert verdict(rows, report.sharing, "smaller cells").holds is None


@pytest.mark.parametrize(("cold_us", "holds"), [(20.9, True), (21.1, False)])
def test_small_cells_may_be_six_microseconds_over(cold_us: float, holds: bool) -> None:
    rows = [row("pat01", "pat", cold_us, limit_us=10.0, floor_us=15.0)]
    assert verdict(rows, report.sharing, "smaller cells").holds is holds
    assert verdict(rows, report.sharing, "time / floor").holds is None


@pytest.mark.parametrize(
    ("best", "mine", "holds"),
    [(150.0, 149.0, True), (150.0, 151.0, False), (111.0, 113.0, True), (111.0, 114.0, False)],
)
def test_faster_everywhere_but_near_the_limit(best: float, mine: float, holds: bool) -> None:
    rows = [row("pat06", "pat", mine), row("pat06", "xqa_p64", best), row("pat06", "cascade", 900)]
    assert verdict(rows, report.sharing, "in every cell").holds is holds


def test_tabled_peers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tabled = {("pat06", "32/8"): {"fasttree_p1": 120.0}}
    monkeypatch.setattr(report, "tabled_peers", lambda gpu: tabled)
    rows = [row("pat06", "pat", 125.0), row("pat06", "xqa_p64", 150.0)]
    assert not verdict(rows, report.sharing, "in every cell").holds


@pytest.mark.parametrize(
    ("mine", "p1", "p64", "floor", "verdicts"),
    [
        (100.0, 100.0, 100.0, 90.0, (True, True)),
        (100.0, 99.0, 99.0, 90.0, (False, True)),
        (100.0, 120.0, 94.0, 90.0, (True, False)),
        (100.0, 120.0, 94.0, 96.0, (True, True)),  # the ceiling is lower than 0.95 of the best
        (20.9, 20.0, 20.0, 15.0, (True, True)),  # under 30 us a microsecond is allowed
        (21.1, 20.0, 20.0, 15.0, (False, False)),
    ],
)
def test_no_sharing(
    mine: float, p1: float, p64: float, floor: float, verdicts: tuple[bool, bool]
) -> None:
    rows = [
        row("pat19", "pat", mine, floor_us=floor),
        row("pat19", "fa3_p1", p1),
        row("pat19", "fa3_p64", p64),
    ]
    assert verdict(rows, report.no_sharing, "page 1 >= 1.0x").holds is verdicts[0]
    assert verdict(rows, report.no_sharing, "page 1 >= 0.95x").holds is verdicts[1]


def test_wrong_rows_are_no_times() -> None:
    rows = [row("pat03", "pat", 120.0, error="wrong"), row("pat03", "fa3_p1", 50.0, error="wrong")]
    [cell] = report.cells_of(rows)
    assert cell.us("pat") is None and cell.best() is None
    assert not next(report.soundness(rows)).holds


def test_ragged_is_compared_with_the_uniform_cells() -> None:
    uniform = [row("pat03", "pat", 121.0)]  # 1.1 of the floor
    ragged = [row("r", "pat", 130.0, suite="ragged"), row("r", "fa3_p1", 128.0, suite="ragged")]
    assert verdict(uniform + ragged, report.ragged, "time / floor").holds
    assert verdict(uniform + ragged, report.ragged, "3 %").holds
    ragged[0]["cold_us"] = 135.0
    assert not verdict(uniform + ragged, report.ragged, "time / floor").holds
    assert not verdict(uniform + ragged, report.ragged, "3 %").holds


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_stream_reads_every_slot_once(page_size: int) -> None:
    trees = [published(1), published(18), plain(3, 100), random_tree("ragged", 40, 1)]
    for tree in (t.at_page_size(page_size) for t in trees):
        layout = make_layout(tree, page_size, 5)
        slots = layout.stream_slots(tree)
        assert len(slots) == tree.unique_tokens()
        assert np.array_equal(np.sort(slots), layout.used_slots(tree.seq_lens))
