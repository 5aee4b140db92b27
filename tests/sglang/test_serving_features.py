# SPDX-License-Identifier: MIT
"""What a server is asked for between and during requests, on the CPU: with PAT and with the base.

One server of each kind runs through the whole file. Every test ends with the same requests to both:
greedy tokens equal, log-probabilities within 1e-3, shared segments packed, nothing on the base.

What SGLang 0.5.17 cannot do here is checked on a GPU by scripts/gpu_features_check.py:

- memory that is really released (torch_memory_saver hooks the CUDA allocator; here release and
  resume only flush and copy)
- recaptured CUDA graphs
- HiCache (its host pool calls cudaHostRegister)
- data-parallel attention (torch_native has no get_cuda_graph_seq_len_fill_value)

Tensor parallelism needs another model, see test_two_ranks.py.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from serving import (
    ANSWER_S,
    CHECKED,
    STOOD_IN,
    Answer,
    answer_of,
    assert_equal,
    assert_nothing_declined,
    greedy,
    server,
    state_of,
)

FRACTION = 0.05  # of stand_ins.FREE: 9320 slots

SYSTEM = (
    "You are the guide of a lighthouse. The tower was built of grey granite, has 142 steps, and "
    "its lamp was fed with whale oil. The last keeper left when the light was made automatic. "
)
PROMPTS = [
    f"{SYSTEM}How high is the tower?",
    f"{SYSTEM}How many steps lead up to the lamp, and who counted them?",
    f"{SYSTEM}How many steps lead up to the lamp, and why?",
    "The sea is",
]
NEW_TOKENS = [14, 20, 20, 9]


@dataclass(frozen=True)
class Servers:
    base: str
    pat: str


@pytest.fixture(scope="module")
def adapter(smollm2: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    smollm2.make_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def servers(
    model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Both servers, side by side."""
    logs = tmp_path_factory.mktemp("servers")
    options = [
        "--mem-fraction-static", str(FRACTION), "--enable-lora", "--lora-backend", "torch_native",
        "--max-lora-rank", "16", "--lora-paths", f"tuned={adapter}",
    ]  # fmt: skip

    def start(backend: str) -> str:
        checked = CHECKED if backend == "pat" else {}
        return stack.enter_context(
            server(
                logs / f"{backend}.log", model, "--attention-backend", backend, *options,
                **STOOD_IN, **checked,
            )
        )  # fmt: skip

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        base, pat = pool.map(start, ("torch_native", "pat"))
        yield Servers(base, pat)


def post(url: str, path: str, **body: Any) -> Any:
    """A control request that must succeed."""
    reply = requests.post(f"{url}/{path}", json=body, timeout=ANSWER_S)
    assert reply.status_code == 200, reply.text
    return reply


def body_of(samples: int = 1, times: int = 1, **options: Any) -> dict[str, Any]:
    """All prompts, for ``times`` as many tokens as usual."""
    sampling = [{**greedy(times * count), "n": samples} for count in NEW_TOKENS]
    return {"text": PROMPTS, "sampling_params": sampling, "return_logprob": True, **options}


def generate(url: str, **options: Any) -> list[Answer]:
    """All prompts in one request: they arrive together."""
    body = body_of(**options)
    replies = requests.post(f"{url}/generate", json=body, timeout=ANSWER_S).json()
    return list(map(answer_of, replies))


def stream(
    url: str, midway: Callable[[], Any] = lambda: None, **options: Any
) -> list[dict[str, Any]]:
    """The last reply to each prompt; ``midway`` is called once, when all are being decoded."""
    last: dict[int, dict[str, Any]] = {}
    called = False
    body = body_of(stream=True, **options)
    with requests.post(f"{url}/generate", json=body, timeout=ANSWER_S, stream=True) as lines:
        for line in lines.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            reply = json.loads(line.removeprefix(b"data: "))
            before = last.get(reply["index"])
            if before is not None:  # what was said is never taken back
                assert reply["text"].startswith(before["text"])
            last[reply["index"]] = reply
            counts = [of["meta_info"]["completion_tokens"] for of in last.values()]
            if not called and len(counts) == len(PROMPTS) and min(counts) >= 3:
                called = True
                midway()
    assert called, "the answers ended before all of them were being decoded"
    return [last[index] for index in range(len(PROMPTS))]


def compare(servers: Servers, play: Callable[[str], list[Answer]]) -> list[Answer]:
    """The same to both servers at once; PAT's answers, when all is well."""
    before = state_of(servers.pat)["pat"]
    with ThreadPoolExecutor(2) as pool:
        base, pat = pool.map(play, (servers.base, servers.pat))
    assert_equal(pat, base)
    after = state_of(servers.pat)["pat"]
    assert after["shared_segments"] > before["shared_segments"]
    assert after["planned_kv_tokens"] < after["unshared_kv_tokens"]
    assert_nothing_declined(after)
    return pat


@pytest.fixture(scope="module")
def plain(servers: Servers) -> list[Answer]:
    """What an undisturbed server says, compared already."""
    return compare(servers, generate)


def test_the_kv_pool_is_as_large_as_the_bases(servers: Servers) -> None:
    sizes = [
        requests.get(f"{url}/get_server_info", timeout=30).json()["max_total_num_tokens"]
        for url in (servers.base, servers.pat)
    ]
    assert sizes == [9320, 9320]


def test_streamed_answers(servers: Servers, plain: list[Answer]) -> None:
    streamed = compare(servers, lambda url: list(map(answer_of, stream(url))))
    assert_equal(streamed, plain)


def test_parallel_samples(servers: Servers, plain: list[Answer]) -> None:
    answers = compare(servers, lambda url: generate(url, samples=2))
    assert_equal(answers[::2], plain)
    assert_equal(answers[1::2], plain)


def test_flushed_cache(servers: Servers, plain: list[Answer]) -> None:
    def play(url: str) -> list[Answer]:
        post(url, "flush_cache")
        return generate(url)

    assert_equal(compare(servers, play), plain)


def test_lora(servers: Servers, plain: list[Answer]) -> None:
    """Two prompts with one beginning and one adapter share it; the plain ones share no node."""
    adapters = [None, "tuned", "tuned", None]
    answers = compare(servers, lambda url: generate(url, lora_path=adapters))
    first = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(answers, plain, strict=True)]
    changed = [difference > 0.01 for difference in first]
    assert changed == [adapter is not None for adapter in adapters]


def paused(mode: str, during: Callable[[str], Any]) -> Callable[[str], list[Answer]]:
    """Streams all answers; midway, generation is paused for something else."""

    def play(url: str) -> list[Answer]:
        def midway() -> None:
            post(url, "pause_generation", mode=mode)
            during(url)
            post(url, "continue_generation", torch_empty_cache=False)

        return list(map(answer_of, stream(url, midway)))

    return play


def nothing_runs(url: str) -> None:
    """The step in flight may end; after it no forward is seen."""
    if "pat" not in state_of(url):
        return
    time.sleep(0.5)
    before = state_of(url)["pat"]["hook_fired"]
    time.sleep(0.5)
    assert state_of(url)["pat"]["hook_fired"] == before


def test_paused_in_place(servers: Servers, plain: list[Answer]) -> None:
    answers = compare(servers, paused("in_place", nothing_runs))
    assert_equal(answers, plain)
    assert sum(answer.retractions for answer in answers) == 0


def test_weights_updated_under_requests_in_place(
    servers: Servers, plain: list[Answer], model: Path
) -> None:
    """As RL frameworks do in the middle of a rollout: the old KV cache stays."""

    def update(url: str) -> None:
        post(url, "update_weights_from_disk", model_path=str(model), flush_cache=False)

    assert_equal(compare(servers, paused("in_place", update)), plain)


def test_paused_by_retracting(servers: Servers, plain: list[Answer]) -> None:
    """The same requests come back, to other slots of their own."""
    answers = compare(servers, paused("retract", nothing_runs))
    assert_equal(answers, plain)
    assert all(answer.retractions > 0 for answer in answers)


def test_paused_by_aborting(servers: Servers, plain: list[Answer]) -> None:
    def play(url: str) -> list[Answer]:
        def midway() -> None:
            post(url, "pause_generation", mode="abort")

        try:  # more tokens than a slow client could miss
            ends = [
                reply["meta_info"]["finish_reason"]["type"]
                for reply in stream(url, midway, times=8)
            ]
        finally:
            post(url, "continue_generation", torch_empty_cache=False)
        assert ends == ["abort"] * len(PROMPTS)
        return generate(url)

    assert_equal(compare(servers, play), plain)


@pytest.mark.parametrize("flush", [True, False])
def test_weights_updated_from_disk(
    servers: Servers, plain: list[Answer], model: Path, flush: bool
) -> None:
    def play(url: str) -> list[Answer]:
        post(url, "update_weights_from_disk", model_path=str(model), flush_cache=flush)
        return generate(url)

    assert_equal(compare(servers, play), plain)


def test_released_and_resumed(servers: Servers, plain: list[Answer]) -> None:
    """In the order of RL frameworks; what is not released here is not on a GPU either."""

    def play(url: str) -> list[Answer]:
        post(url, "release_memory_occupation", tags=["kv_cache", "weights"])
        post(url, "resume_memory_occupation", tags=["weights"])
        post(url, "resume_memory_occupation", tags=["kv_cache"])
        return generate(url)

    assert_equal(compare(servers, play), plain)
