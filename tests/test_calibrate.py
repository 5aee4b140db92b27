# SPDX-License-Identifier: MIT
"""Searching the planner's constants, and keeping them. Times come from a formula, not a GPU."""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from pat_sglang import DecodePlanner, __version__, layout, saved_cost
from pat_sglang.__main__ import main
from pat_sglang.calibrate import (
    HEADS,
    MAX_ROWS,
    MAX_TOKENS,
    PlanTimes,
    batches,
    descend,
    slots_of,
)
from pat_sglang.cost import H100, CostModel, cost_model_for
from pat_sglang.forest import node_ends


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_CACHE_DIR", str(tmp_path))
    saved_cost._warned.clear()
    return tmp_path


def model_on_cpu() -> CostModel:
    planner = DecodePlanner(
        num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cpu",
        max_rows=4, max_tokens=100, max_workspace_bytes=1 << 30,
    )  # fmt: skip
    return planner.host.model


def steps(number):
    left = iter(range(number))
    return lambda: next(left, None) is not None


@pytest.mark.parametrize("seed", [0, 1])
def test_descent_approaches_the_constants_that_are_fastest(seed: int) -> None:
    hidden = replace(H100, part_ps=200_000, solo_token_ps=(9_000, 60_000, 30_000))

    def measure(model: CostModel, again: bool = False) -> list[float]:
        off = zip(model.words(), hidden.words(), strict=True)
        return [100.0 * math.exp(sum(math.log(a / b) ** 2 for a, b in off) / 10)] * 3

    best, ratio = descend(H100, measure, steps(400), seed)
    assert ratio == pytest.approx(measure(best)[0] / measure(H100)[0])
    assert ratio < 0.5 * (1 + 100.0 / measure(H100)[0])  # more than half of the way
    assert best.num_sms == H100.num_sms
    assert best.token_ps[0] == H100.token_ps[0]
    assert descend(H100, measure, steps(400), seed) == (best, ratio)


def test_descent_does_not_follow_luck() -> None:
    """Times that do not depend on the model, now and then lower by chance: nothing is changed."""
    lucky = itertools.cycle([100.0, 100.0, 90.0, 100.0, 100.0, 100.0, 90.0])
    times: dict[tuple[int, ...], float] = {}
    confirmed = []

    def measure(model: CostModel, again: bool) -> list[float]:
        words = tuple(model.words())
        if again:
            confirmed.append(times.get(words))
            times[words] = 100.0
        return [times.setdefault(words, next(lucky))]

    assert descend(H100, measure, steps(100)) == (H100, 1.0)
    assert set(confirmed[1:]) == {90.0}  # only what looked good


def test_a_plan_is_timed_once_whatever_was_predicted() -> None:
    taken = itertools.count(1)
    times = PlanTimes(lambda: float(next(taken)))
    plan, other = np.arange(40, dtype=np.int32), np.zeros(40, np.int32)
    assert [times.us(plan, False), times.us(other, False), times.us(plan, False)] == [1.0, 2.0, 1.0]
    plan[layout.H_PREDICTED_NS] += 7
    assert times.us(plan, False) == 1.0
    assert plan[layout.H_PREDICTED_NS] == layout.H_PREDICTED_NS + 7
    assert [times.us(plan, True), times.us(plan, False)] == [3.0, 3.0]
    plan[-1] += 1
    assert times.us(plan, False) == 4.0


def test_saved_constants_are_what_a_planner_uses(caplog) -> None:
    shipped = model_on_cpu()
    assert shipped == cost_model_for("cpu", 132, 128)
    measured = replace(shipped, part_ps=shipped.part_ps + 1, provenance="measured here")
    saved_cost.save(measured, "cpu", __version__)
    assert model_on_cpu() == measured
    assert saved_cost.model_for("cpu", 132, 64, __version__) == measured.scaled_to(64)
    assert saved_cost.model_for("cpu", 108, 128, __version__) == cost_model_for("cpu", 108, 128)
    assert not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.0.0"},
        {"num_sms": 7},
        {"part_ps": 0},
        {"part_ps": "much"},
        {"part_ps": 1 << 24},
        {"step_ps": 1 << 31},
        {"item_ps": [1, 2]},
        {"item_ps": None},
        {"another": 1},
        None,
    ],
)
def test_a_file_that_cannot_be_used_is_named_once(change, caplog) -> None:
    path = saved_cost.save(H100, "cpu", __version__)
    words = {"version": __version__, **asdict(H100)}
    path.write_text(json.dumps(words | change) if change else "{")
    with caplog.at_level(logging.WARNING):
        assert [model_on_cpu() for _ in range(2)] == [cost_model_for("cpu", 132, 128)] * 2
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert "--calibrate" in caplog.text


def test_every_batch_fits_and_shares_what_it_says() -> None:
    assert len({batch.name for batch in batches()}) == len(batches())
    for batch in batches():
        assert len(batch.lens) <= MAX_ROWS
        assert batch.tokens <= MAX_TOKENS
        table = slots_of(batch)
        ends = node_ends(batch.forest, batch.forest.topological_order())
        used = [table[row, :n] for row, n in enumerate(batch.lens)]
        assert len(np.unique(np.concatenate(used))) == batch.tokens
        for (a, leaf_a), (b, leaf_b) in itertools.pairwise(
            zip(used, batch.leaf_of_row, strict=True)
        ):
            shared = np.intersect1d(a, b)
            if leaf_a == leaf_b >= 0:
                assert set(shared) == set(a[: ends[leaf_a]])
            elif batch.forest.parent.size == 0:
                assert shared.size == 0


def test_every_batch_is_planned_at_every_head_layout() -> None:
    for q_heads, kv_heads in HEADS:
        planner = DecodePlanner(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=128, dtype=torch.bfloat16,
            device="cpu", max_rows=MAX_ROWS, max_tokens=MAX_TOKENS,
        )  # fmt: skip
        for batch in batches():
            table = torch.from_numpy(slots_of(batch))
            rows = torch.arange(len(batch.lens))
            lens = torch.from_numpy(batch.lens)
            plan = planner.plan(
                batch.forest, batch.leaf_of_row, batch.lens, lens, table, rows
            )  # fmt: skip
            assert plan.stats.unique_tokens == batch.tokens
            plan.validate(table, rows, lens)


def test_without_a_gpu_it_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--calibrate"]) == 1
    assert "GPU" in capsys.readouterr().err
