# SPDX-License-Identifier: MIT
"""The verdict of scripts/gpu_features_check.py on answers that are right, and on others."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from gpu_features_check import Checks, Questions
from gpu_serving_check import Answer, Workload

COUNT = 64
PROMPTS = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [7, 8]]


class Reference:
    """A server whose prefill finds -0.5 for every token below 1000, which it would generate."""

    name = "reference"

    def __init__(self, decoded: list[Answer]) -> None:
        self.decoded, self.forwards_seen, self.orders = decoded, 0, []

    def flush(self) -> None: ...

    def generate(self, prompts, counts, **options):
        return self.decoded[: len(prompts)]

    def score(self, inputs, starts, **options):
        return [
            [-0.5 if token < 1000 else -11.0 for token in tokens[start + 1 :]]
            for tokens, start in zip(inputs, starts, strict=True)
        ]

    def forwards(self) -> int:
        return self.forwards_seen

    def order(self, path: str, **body) -> None:
        self.orders.append(path)


class Sampling(Reference):
    def generate(self, prompts, counts, *, samples, **options):
        return self.decoded[: len(prompts) * samples]


def answer(tokens: int = COUNT, *, right: int = COUNT, off: float = 0.0007, last: float = -0.5):
    """Right tokens first, then confident garbage; `off` is what decoding rounds differently."""
    ids = [100 + i if i < right else 1000 + i for i in range(tokens)]
    return Answer(ids, [*[-0.5 + off] * (tokens - 1), last + off][:tokens], 0)


BEFORE = [answer() for _ in PROMPTS]


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def questions(request):
    workload = Workload.__new__(Workload)
    workload.prompts = PROMPTS
    made = Questions(workload, COUNT, cpu=request.param)
    made.calibrate(Reference([answer(off=0.0005 * (1 + i % 2)) for i in range(len(PROMPTS))]))
    return made


def problems(questions, answers, **options) -> list[str]:
    before = BEFORE[: len(answers)]
    return questions.check(before, answers, Reference([]), **options)["problems"]


def test_the_base_is_calibrated_over_whole_answers(questions):
    assert questions.own["count"] == COUNT * len(PROMPTS)
    assert questions.own["mean"] == pytest.approx(0.00075)


def test_answers_right_to_their_end_pass(questions):
    assert problems(questions, [answer(off=0.0008)] * 4) == []
    assert problems(questions, [answer()] * 2) == []  # to the first questions only


def test_agreeing_and_then_garbage_fails(questions):
    wrong = [answer(right=8)] * 4
    assert questions.apart(BEFORE, wrong)["problems"] == []  # which is why answers are rescored
    assert [found[:12] for found in problems(questions, wrong)] == ["rescored: p9", "rescored: me"]


def test_one_garbage_answer_of_many_fails(questions):
    assert problems(questions, [*BEFORE[:3], answer(right=8)])


def test_one_garbage_token_shows_in_the_mean(questions):
    wrong = [*BEFORE[:3], answer(right=COUNT - 1)]
    assert [found[:14] for found in problems(questions, wrong)] == ["rescored: mean"]


def test_a_small_error_everywhere_shows_in_the_mean(questions):
    off = 0.00075 * 1.15 + questions.mean_margin + 1e-5
    found = problems(questions, [answer(off=off)] * 4)
    assert [text[:14] for text in found] == ["rescored: mean"]


def test_parallel_samples_are_held_to_the_base_s_own(questions):
    def sampled(first: float, second: float) -> Sampling:
        return Sampling([answer(off=off) for _ in PROMPTS for off in (first, second)])

    questions.calibrate_samples(sampled(0.001, 0.002), 2)
    assert [own["mean"] for own in questions.own_samples] == pytest.approx([0.001, 0.002])

    def found(first: float, second: float) -> list[list[str]]:
        checks = Checks.__new__(Checks)
        checks.server, checks.questions = sampled(first, second), questions
        checks.batch, checks.rows = BEFORE, {}
        checks.samples()
        assert list(checks.rows) == ["sample 1 of 2", "sample 2 of 2"]
        return [[text[:14] for text in row["problems"]] for row in checks.rows.values()]

    assert found(0.001, 0.002) == [[], []]  # above what one answer a prompt may be off
    above = 0.001 * 1.15 + questions.mean_margin + 1e-5
    assert found(above, above) == [["rescored: mean"], []]
    with pytest.raises(RuntimeError, match="4 answers of 2 samples each"):
        questions.calibrate_samples(Sampling(BEFORE), 2)


def test_nan_fails(questions):
    found = problems(questions, [*BEFORE[:3], answer(last=math.nan)])
    assert "rescored: log-probabilities are not finite" in found
    assert "common beginnings: log-probabilities are not finite" in found


def test_a_short_answer_passes_only_where_it_may_be_short(questions):
    short = [answer(9), answer(1), answer(8), answer(0)]
    assert problems(questions, short, short=True) == []
    assert problems(questions, short) == ["4 answers were cut short"]
    assert problems(questions, [answer(9, right=5)] * 4, short=True)
    assert problems(questions, [answer(0)] * 4, short=True)  # nothing is no proof


def paused(questions, answers, mode: str):
    checks = Checks.__new__(Checks)
    checks.server, checks.questions, checks.rows = Reference(answers), questions, {}
    checks.solo, checks.batch = BEFORE, BEFORE
    checks.after = lambda name: None
    checks.paused("paused", mode)
    assert checks.server.orders == ["pause_generation", "continue_generation"]
    return checks.rows["paused, midway"]


def test_an_aborted_batch_is_midway_by_its_short_answers(questions):
    row = paused(questions, [answer(9)] * 4, "abort")
    assert (row["midway"], row["cut_short"], row["problems"]) == (True, 4, [])


def test_a_pause_keeps_every_problem(questions):
    row = paused(questions, [answer(right=8)] * 4, "in_place")  # answered before the pause
    assert not row["midway"]
    assert "not paused midway" in row["problems"] and len(row["problems"]) == 3
