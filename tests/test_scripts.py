# SPDX-License-Identifier: MIT
"""The quick start's verdict, and the model conversion's one piece of arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import prompts
import smollm2
from quickstart import Answer, compare, problems_of, verdict_cpu, verdict_gpu


def answers(*logprobs: float, tokens: tuple[int, ...] = (1, 2, 3)) -> list[Answer]:
    return [Answer(list(tokens), list(logprobs), "", 900)]


BASE = answers(-0.1, -0.2, -0.3)


def test_compare_stops_at_the_first_other_token() -> None:
    found = compare(BASE, answers(-0.15, -9.0, -9.0, tokens=(1, 7, 3)))
    assert (found.equal, found.common, found.tokens) == (0, 1, 3)
    assert found.max_logprob == pytest.approx(0.05)


@pytest.mark.parametrize(
    "other",
    [
        answers(-0.1, -0.2, -0.302),  # beyond the bound
        answers(-0.1, -0.2, float("nan")),
        answers(-0.1, -0.2, -0.3, tokens=(1, 2, 4)),
        answers(-0.1, -0.2, tokens=(1, 2)),  # shorter
        answers(-0.1, -0.2, -0.3, -0.4, tokens=(1, 2, 3, 4)),  # longer
    ],
)
def test_cpu_verdict_is_strict(other: list[Answer]) -> None:
    assert not verdict_cpu(BASE, other)


def test_cpu_verdict_passes_rounding() -> None:
    assert verdict_cpu(BASE, answers(-0.1, -0.2, -0.30001))


def test_gpu_verdict_measures_the_base_against_itself() -> None:
    noisy = answers(-0.15, -0.2, -0.3)
    assert verdict_gpu(BASE, BASE, noisy, answers(-0.22, -0.2, -0.3))
    assert not verdict_gpu(BASE, BASE, noisy, answers(-0.30, -0.2, -0.3))
    assert not verdict_gpu(BASE, BASE, noisy, answers(float("nan"), -0.2, -0.3))
    # Other answers from the first token on leave nothing to compare, which is no success.
    assert not verdict_gpu(BASE, BASE, noisy, answers(-0.1, -0.2, -0.3, tokens=(9, 9, 9)))


def test_a_run_that_packed_nothing_is_no_proof() -> None:
    good = {
        "plans_made": 3,
        "shared_segments": 5,
        "planned_kv_tokens": 10,
        "unshared_kv_tokens": 20,
        "steps_on_base": {},
    }
    assert problems_of(good) == []
    assert problems_of({})
    for broken in ({"plans_made": 0}, {"shared_segments": 0}, {"planned_kv_tokens": 20}):
        assert problems_of(good | broken), broken
    assert problems_of(good | {"steps_on_base": {"reason": 1}})


def test_the_questions_end_differently() -> None:
    questions = [start + end for start, ends in prompts.GROUPS for end in ends]
    assert len(set(questions)) == 16


def test_unpermute_pairs_the_halves_of_a_head() -> None:
    heads, head_dim = 2, 6
    rows = np.arange(heads * head_dim)[:, None]
    # llama.cpp interleaves: rows 0, d/2, 1, d/2 + 1, ... of each head.
    permuted = rows.reshape(heads, 2, head_dim // 2, 1).swapaxes(1, 2).reshape(rows.shape)
    assert (smollm2.unpermute(permuted, heads) == rows).all()
