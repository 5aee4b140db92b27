# SPDX-License-Identifier: MIT
"""The real server on a real model, on the CPU in float32: with PAT and with the plain base.

Both serve the same concurrent requests (two levels of sharing, mixed lengths, chunked and mixed
prefill, forced retractions, one abort). Greedy tokens must be equal, log-probabilities within 1e-3,
and the counters of the PAT server must show that shared segments were really packed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from serving import (
    ANSWER_S,
    CHECKED,
    START_S,
    Answer,
    ask,
    assert_equal,
    assert_nothing_declined,
    greedy,
    server,
    state_of,
)

# A small pool, and a decode batch that loses requests every 20 steps.
POOL = ("--max-total-tokens", "4096")
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}

SYSTEM = (
    "You are the assistant of a public library. Answer in one short sentence, never invent a book, "
    "and say so when you do not know. Opening hours are nine to six on weekdays and ten to two on "
    "Saturday; on Sunday the library is closed. A card costs nothing. "
)
TOPICS = (
    "The question is about astronomy, for a reader of twelve years who likes pictures. ",
    "The question is about cooking. ",
)
QUESTIONS = (
    "What is a comet?",
    "Why do stars twinkle at night but planets much less, and does it matter where one stands?",
    "Which book comes first?",
    "Name three things.",
)


def prompts() -> list[tuple[str, int]]:
    """(text, new tokens): below one system prompt, two topics; two equal prompts; one apart."""
    made = [
        (f"{SYSTEM}{topic}{question}", 12 + 5 * i + 3 * j)
        for j, topic in enumerate(TOPICS)
        for i, question in enumerate(QUESTIONS)
    ]
    return [*made, made[1], (SYSTEM, 8), ("The sea is", 20)]


def abort_midway(url: str) -> bool:
    """A long answer, streamed, aborted after a few tokens; whether the server said so."""
    body = {
        "text": f"{SYSTEM}{TOPICS[0]}Tell everything.",
        "rid": "long",
        "stream": True,
        "sampling_params": greedy(2000),
    }
    with requests.post(f"{url}/generate", json=body, timeout=ANSWER_S, stream=True) as stream:
        seen, reason = 0, None
        for line in stream.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            seen += 1
            reason = json.loads(line.removeprefix(b"data: "))["meta_info"]["finish_reason"]
            if seen == 5:
                requests.post(f"{url}/abort_request", json={"rid": "long"}, timeout=30)
    return 5 <= seen < 2000 and reason is not None and reason["type"] == "abort"


def serve_all(url: str) -> list[Answer]:
    """All prompts at once, beside one long request that is aborted while it decodes."""
    work = prompts()
    with ThreadPoolExecutor(len(work) + 1) as pool:
        long = pool.submit(abort_midway, url)
        answers = list(pool.map(lambda i: ask(url, *work[i], f"r{i}"), range(len(work))))
        assert long.result(), "the long request was not aborted midway"
    return answers


def test_pat_answers_as_the_base_does(model: Path, tmp_path: Path) -> None:
    base_log, pat_log = tmp_path / "base.log", tmp_path / "pat.log"
    with server(base_log, model, *POOL, "--attention-backend", "torch_native", **RETRACT) as url:
        expected = serve_all(url)
        assert "pat" not in state_of(url)
    options = {**RETRACT, **CHECKED}
    with server(pat_log, model, *POOL, "--attention-backend", "pat", **options) as url:
        answers = serve_all(url)
        state = state_of(url)

    assert_equal(answers, expected)
    assert sum(answer.retractions for answer in answers) > 0, "nothing was retracted"

    pat = state["pat"]
    print(json.dumps(pat))
    assert state["attention_backend"] == "torch_native"
    assert pat["active"] == 1 and pat["base"] == "torch_native"
    assert pat["shared_segments"] > 0
    assert 0 < pat["planned_kv_tokens"] < 0.7 * pat["unshared_kv_tokens"]
    assert pat["plans_made"] > 0 and pat["plans_kept"] > 0
    assert_nothing_declined(pat)
    banners = [
        line for line in pat_log.read_text().splitlines() if "decode attention by PAT" in line
    ]
    assert len(banners) == 1


ENGINE = """
import json, os, sys
if __name__ == "__main__":
    import sglang
    engine = sglang.Engine(model_path=sys.argv[1], dtype="float32", device="cpu",
        max_total_tokens=2048, max_running_requests=8, grammar_backend="none",
        **json.loads(sys.argv[2]))
    prompts = ["The library opens at nine. " * 30 + end for end in ("Why?", "When?", "Who?")]
    out = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 6})
    state = engine.get_server_info()["internal_states"][0]["pat"]
    print("RESULT", json.dumps({"texts": [o["text"] for o in out], "pat": state}), flush=True)
    engine.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"attention_backend": "pat"}, {}),
        ({"attention_backend": "torch_native"}, {"PAT_SGLANG": "1"}),
        ({"attention_backend": "torch_native", "decode_attention_backend": "pat"}, {}),
        ({"attention_backend": "pat", "disable_overlap_schedule": True}, {}),
        ({"attention_backend": "pat", "disable_radix_cache": True}, {}),
    ],
    ids=["engine", "environment", "decode-backend", "no-overlap", "no-radix"],
)
def test_other_ways_in(model: Path, tmp_path: Path, options: dict, environment: dict) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    # Forced: packing would not pay in so small a batch.
    ours = {"PAT_SGLANG_STRICT": "1", "PAT_SGLANG_VALIDATE": "1", "PAT_SGLANG_FORCE": "on"}
    done = subprocess.run(
        [sys.executable, str(script), str(model), json.dumps(options)],
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        timeout=START_S,
        start_new_session=True,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stderr[-4000:]
    result = json.loads(results[0].removeprefix("RESULT "))
    assert result["pat"]["active"] == 1 and result["pat"]["plans_made"] > 0
    assert (result["pat"]["shared_segments"] > 0) == ("disable_radix_cache" not in options)


@pytest.mark.slow
def test_tools_that_load_no_plugins(model: Path, tmp_path: Path) -> None:
    """one_batch has no radix tree: PAT runs without sharing."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pat_sglang", "run", "sglang.benchmark.one_batch",
            "--model-path", str(model), "--device", "cpu", "--dtype", "float32",
            "--attention-backend", "pat", "--batch-size", "2", "--input-len", "16",
            "--output-len", "4", "--max-total-tokens", "2048",
        ],
        env={**os.environ, "PAT_SGLANG_VALIDATE": "1"},
        cwd=tmp_path,  # where it leaves its results
        capture_output=True,
        text=True,
        timeout=START_S,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "decode attention by PAT on base torch_native" in done.stdout + done.stderr
