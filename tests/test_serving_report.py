# SPDX-License-Identifier: MIT
"""The verdicts on serving, the shape of the request trees, and the figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import plot
import workloads
from bench_serving import prefills, step_ms
from serving_report import losses, report, spread


def rows(backend: str, *factors: float, shared: bool = True, **changed: float) -> list[dict]:
    """One row a round, all times scaled by its factor."""
    of_round: dict[str, Any] = {
        "median_itl_ms": 20.0,
        "mean_tpot_ms": 22.0,
        "p99_tpot_ms": 30.0,
        "mean_ttft_ms": 500.0,
        "output_tok_s": 4000.0,
        **changed,
    }
    constant = {
        "model": "m", "rivals": "fa3+pat", "workload": "prefix-4x32-4k", "gpu": "g", "commit": "c",
        "max_total_tokens": 1000, "request_rate": None, "concurrency": None, "shared": shared,
        "backend": backend, "server_arguments": "",
    }  # fmt: skip
    made = []
    for number, factor in enumerate(factors):
        row = {name: value * factor for name, value in of_round.items()}
        row["output_tok_s"] = of_round["output_tok_s"] / factor
        made.append({**constant, **row, "round": number})
    return made


HOLDS: tuple[list[str], list[str]] = ([], [])


def test_spread_is_of_the_rounds() -> None:
    assert spread(rows("fa3", 1.0, 1.1, 0.9), "mean_tpot_ms") == pytest.approx(0.2)


def test_a_shared_load_must_gain_and_meet_its_target() -> None:
    peer = rows("fa3", 1.0, 1.0)
    half = {"median_itl_ms": 10.0, "mean_tpot_ms": 12.0, "p99_tpot_ms": 20.0}
    assert losses("prefix-4x32-4k", rows("pat", 1.0, 1.0, **half), peer, "fa3") == HOLDS
    (missed,), _ = losses("prefix-1x128-8k", rows("pat", 1.0, 1.0, **half), peer, "fa3")
    assert "0.500" in missed and "0.4" in missed
    slower = rows("pat", 1.0, 1.0, **half | {"p99_tpot_ms": 31.0})
    (missed,), _ = losses("other", slower, peer, "fa3")
    assert "p99" in missed


@pytest.mark.parametrize(("loss", "holds"), [(1.009, True), (1.015, False)])
def test_a_control_may_lose_a_percent(loss: float, holds: bool) -> None:
    peer = rows("fa3", 1.0, 1.0, shared=False)
    mine = rows("pat", 1.0, 1.0, shared=False, mean_tpot_ms=22.0 * loss)
    failed, undecided = losses("random", mine, peer, "fa3")
    assert (not failed) == holds and not undecided


def test_controls_are_held_to_the_default_backend_alone() -> None:
    slower = rows("pat", 1.1, 1.1, shared=False)
    assert losses("random", slower, rows("flashinfer", 1.0, 1.0, shared=False), "flashinfer") == (
        HOLDS
    )
    # A shared load must gain against every backend, but only the tokens after the first.
    late = rows("pat", 1.0, 1.0, mean_tpot_ms=12.0, p99_tpot_ms=20.0, mean_ttft_ms=900.0)
    assert losses("other", late, rows("flashinfer", 1.0, 1.0), "flashinfer") == HOLDS
    assert losses("other", late, rows("fa3", 1.0, 1.0), "fa3") != HOLDS
    failed, _ = losses("other", rows("pat", 1.1), rows("flashinfer", 1.0), "flashinfer")
    assert len(failed) == 2


def test_a_loss_within_the_peers_own_differences_is_not_decided() -> None:
    peer = rows("fa3", 0.98, 1.0, 1.02, shared=False)
    failed, undecided = losses("random", rows("pat", 1.03, shared=False), peer, "fa3")
    assert not failed and len(undecided) == 4
    # Throughput that fell is a loss, throughput that rose is none.
    failed, undecided = losses("random", rows("pat", 1.06, shared=False), peer, "fa3")
    assert len(failed) == 4 and not undecided
    assert losses("random", rows("pat", 0.5, shared=False), peer, "fa3") == HOLDS


def test_one_round_decides_no_small_loss() -> None:
    mine, peer = rows("pat", 1.2, shared=False), rows("fa3", 1.0, shared=False)
    failed, undecided = losses("random", mine, peer, "fa3")
    assert not failed and len(undecided) == 4 and "one round" in undecided[0]


def test_the_report_names_every_backend_and_verdict() -> None:
    text = report([*rows("pat", 1.2), *rows("fa3", 1.0)])
    assert "fa3" in text and "mean_tpot_ms 1.200 of fa3's" in text


def test_only_rounds_of_both_are_compared() -> None:
    """A third round that the peer has not run would make PAT look faster."""
    text = report([*rows("pat", 1.2, 1.2, 0.1, 0.1, 0.1), *rows("fa3", 1.0, 1.0)])
    assert "mean_tpot_ms 1.200 of fa3's" in text


def test_what_was_not_measured_is_said() -> None:
    """And is no reason to call anything a loss or a gain."""
    partial = [
        {k: v for k, v in row.items() if k not in ("mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms")}
        for row in [*rows("pat", 0.5), *rows("fa3", 1.0)]
    ]
    text = report(partial)
    assert "holds; not measured: mean_tpot_ms, p99_tpot_ms, mean_ttft_ms" in text
    assert "mean_tpot_ms 1" not in text and "median_itl_ms 10.00" in text
    slower = [row | {"median_itl_ms": 19.0} for row in partial if row["backend"] == "pat"]
    assert "asked 0.6" in report([*slower, *(r for r in partial if r["backend"] == "fa3")])


def test_answers_that_come_whole_must_come_faster() -> None:
    whole = [
        {k: v for k, v in row.items() if not k.endswith("_ms")} | {"times": "none"}
        for row in [*rows("pat", 1.1), *rows("fa3", 1.0)]
    ]
    text = report(whole)
    assert "0.91x in tokens/s; output_tok_s 0.909 of fa3's; not measured" in text
    assert "worse" not in text
    (faster,) = (row | {"output_tok_s": 8000.0} for row in whole if row["backend"] == "pat")
    assert "2.00x in tokens/s; holds" in report([faster, whole[1]])


def test_steps_of_the_servers_log() -> None:
    line = "[now] Decode batch, #running-req: {}, #token: 9, gen throughput (token/s): {}, more\n"
    log = line.format(64, 10.0) + line.format(64, 8000.0) + "Prefill batch, #running-req: 3\n"
    assert step_ms(log) == pytest.approx(8.0)
    # 64 requests at first and 128 at last: 96 tokens a step, at 9600 a second.
    assert step_ms(log + line.format(128, 9600.0)) == pytest.approx(9.0)
    assert step_ms(line.format(64, 10.0)) is None


def test_prefills_are_those_of_the_log() -> None:
    line = "Prefill batch, #new-seq: {}, #new-token: {}, #cached-token: 4096, token usage: 0.1\n"
    log = line.format(2, 8192) + "Decode batch, #running-req: 2\n" + line.format(1, 128)
    assert prefills(log) == [8192, 128]
    assert prefills("Decode batch, #running-req: 2\n") == []


@pytest.mark.parametrize("other", [{"commit": "d"}, {"server_arguments": "--tp 2"}])
def test_what_was_measured_with_other_things_is_not_mixed(other: dict[str, str]) -> None:
    newer = [row | other for row in rows("pat", 0.5)]
    text = report([*rows("pat", 1.2), *rows("fa3", 1.0), *newer])
    assert "mean_tpot_ms 1.200 of fa3's" in text and text.count("against fa3") == 1


def levels(prompts: list[str]) -> list[int]:
    """Distinct beginnings of one, two, ... parts."""
    parts = [prompt.split("\n\n") for prompt in prompts]
    depth = {len(p) for p in parts}
    assert len(depth) == 1
    return [len({tuple(p[: n + 1]) for p in parts}) for n in range(depth.pop())]


def test_request_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(range(10_000))
    sizes = []

    def numbered(tokenizer: object, tokens: int) -> str:
        sizes.append(tokens)
        return f"text {next(words)}"

    monkeypatch.setattr(workloads, "_words", numbered)
    assert levels(workloads.tool_tree(None)) == [1, 8, 128]
    sizes.clear()
    assert levels(workloads.conversations(None)) == [1, 2, 4, 512]
    assert sum(sizes[i] for i in (0, 1, 3)) == 2123
    assert all(16 <= n <= 2048 for n in sizes[7:])


def test_points_have_names_of_their_own() -> None:
    names = [point.name for point in workloads.points(Path("trace"))]
    assert len(set(names)) == len(names)


def test_figures_show_what_was_measured(tmp_path: Path) -> None:
    kernels = [
        {"suite": "published", "heads": heads, "tree": "pat01", "backend": backend,
         "cold_us": 10.0, "floor_us": 5.0, "gpu": "g"}
        for heads in plot.HEADS
        for backend in ("pat", "fa3_p1")
    ]  # fmt: skip
    figure = plot.kernel_figure(kernels)
    assert [len(panel.patches) for panel in figure.axes] == [2] * len(plot.HEADS)
    served = [
        {"model": "m", "workload": "w", "request_rate": rate, "backend": backend,
         "mean_tpot_ms": 5.0 * n, "p99_tpot_ms": 9.0 * n, "rivals": f"{peer}+pat", "commit": "c",
         "server_arguments": ""}
        for rate in (8.0, 4.0)
        for peer, times in (("fa3", (1, 2, 3)), ("flashinfer", (7,)))
        for backend in ("pat", peer)
        for n in times
    ]  # fmt: skip
    mean, _, other, _ = plot.serving_figure(served).axes
    assert [line.get_label() for line in mean.lines] == ["PAT", "FA3"]
    assert mean.lines[0].get_xydata().tolist() == [[4.0, 10.0], [8.0, 10.0]]
    assert [line.get_label() for line in other.lines] == ["PAT", "FlashInfer"]
    assert other.lines[0].get_xydata().tolist() == [[4.0, 35.0], [8.0, 35.0]]
