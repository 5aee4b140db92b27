# SPDX-License-Identifier: MIT
"""The requests bench_serving.py sends, as options of ``sglang.bench_serving``.

A point is one workload at one concurrency or request rate. Those whose requests share a prefix are
what PAT is for; the others are controls, where it must cost nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Option = str | int | float

ROOT = Path(__file__).resolve().parents[1]
MOONCAKE = "mooncake_conversation_trace.jsonl"

# The paper's system prompt: tokens below which all, a language's, a country's requests are equal.
CONVERSATION_LEVELS = (46, 348, 2123)
# Stand-in for BurstGPT's request lengths, which are not at hand here: log-normal, clipped.
USER_MEDIAN, USER_SIGMA, USER_RANGE = 250, 1.1, (16, 2048)


@dataclass(frozen=True)
class Point:
    """One workload, as users would run it.

    Attributes:
        workload: name in the result files.
        options: of ``sglang.bench_serving``, without the server.
        shared: whether requests share more than a few tokens.
        request_rate: Poisson arrivals a second; None: all at once.
        concurrency: requests in flight at most; None: no limit.
        rows: writes the requests of a workload that bench_serving cannot generate.
        runs: how often it is run in a round of the benchmark.
        times: what of its times means something: "tokens", "first token", or "none": answers come
            whole, as RL frameworks ask for them.
        ids: prompts are sent as token ids, as RL frameworks and routers do. One process tokenizes
            a million tokens for seconds, so that as text the requests of a long prompt arrive one
            after the other, and the first are done before the last begin.
    """

    workload: str
    options: dict[str, Option] = field(hash=False)
    shared: bool = True
    request_rate: float | None = None
    concurrency: int | None = None
    rows: Callable[[Any], list[str]] | None = None
    runs: int = 1
    times: str = "tokens"
    ids: bool = False

    @property
    def name(self) -> str:
        """Name with the load, unique."""
        if self.request_rate is not None:
            return f"{self.workload}@{self.request_rate:g}/s"
        return self.workload if self.concurrency is None else f"{self.workload}@{self.concurrency}"

    def arguments(self, tokenizer: Path, folder: Path) -> list[str]:
        """Command line of ``sglang.bench_serving``; writes a request file if it needs one."""
        options = dict(self.options)
        if self.rows is not None:
            path = folder / f"{self.workload}.jsonl"
            if not path.exists():
                _write_requests(path, tokenizer, self.rows)
            options |= {"dataset-name": "custom", "dataset-path": str(path)}
        if self.request_rate is not None:
            options["request-rate"] = self.request_rate
        if self.concurrency is not None:
            options["max-concurrency"] = self.concurrency
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        if self.ids:
            words.append("--tokenize-prompt")
        return [*words, "--disable-stream"] if self.times == "none" else words


def points(trace: Path) -> list[Point]:
    """Every point there is, the smallest first; ``trace``: Mooncake's conversation trace."""
    return [
        _shared_prefix("smoke", 2, 4, system=256, question=16, output=16, ids=True),
        # The two of anchors.md.
        _shared_prefix("prefix-4x32-4k", groups=4, samples=32, system=4096),
        _shared_prefix("prefix-1x128-8k", groups=1, samples=128, system=8192),
        # RL rollouts: samples of one prompt; streamed, and whole as RL frameworks ask for them.
        *(
            _shared_prefix(
                f"{name}-8x{samples}", 8, samples, 1024, 8, output, times=times, ids=True
            )
            for name, times in (("grpo", "tokens"), ("rollout", "none"))
            for samples, output in ((16, 512), (64, 128))
        ),
        # The time to the first token varies with the order of arrivals: measured more often.
        _shared_prefix(
            "burst-8x16", 8, 16, 1024, question=8, output=8, times="first token", ids=True, runs=4
        ),
        # One system prompt at three loads.
        *(
            _shared_prefix(f"system-{name}", 1, running, tokens, ids=True, concurrency=running)
            for name, tokens in (("2.5k", 2560), ("8k", 8192))
            for running in (64, 128, 256)
        ),
        Point(
            "tools-1x8x16",
            {"num-prompts": 128, "sharegpt-output-len": 256},
            rows=tool_tree,
            ids=True,
        ),
        *(
            Point(
                "conversation",
                {"num-prompts": int(10 * rate), "sharegpt-output-len": 256},
                request_rate=rate,
                rows=conversations,
            )
            for rate in (8, 16, 24, 32, 40)
        ),
        # With 128 prompts, 7 seconds, the mean time of a token moved by a tenth and more between
        # rounds of one server, by whose prefills fell together.
        Point(
            "random-512x1k",
            {
                "dataset-name": "random-ids",
                "num-prompts": 512,
                "random-input-len": 1024,
                "random-output-len": 256,
                "random-range-ratio": 0.5,
            },
            shared=False,
            concurrency=64,
        ),
        Point(
            "mooncake",
            {
                "dataset-name": "mooncake",
                "mooncake-workload": "conversation",
                "dataset-path": str(trace),
                "num-prompts": 24,
            },
            shared=False,
        ),
    ]


def _shared_prefix(
    name: str,
    groups: int,
    samples: int,
    system: int,
    question: int = 128,
    output: int = 256,
    **of_point: Any,
) -> Point:
    options: dict[str, Option] = {
        "dataset-name": "generated-shared-prefix",
        "gsp-num-groups": groups,
        "gsp-prompts-per-group": samples,
        "gsp-system-prompt-len": system,
        "gsp-question-len": question,
        "gsp-output-len": output,
    }
    return Point(name, options, **of_point)


def _write_requests(path: Path, tokenizer: Path, rows: Callable[[Any], list[str]]) -> None:
    from transformers import AutoTokenizer

    random.seed(1)
    prompts = rows(AutoTokenizer.from_pretrained(tokenizer))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for prompt in prompts:
            turns = [{"content": prompt}, {"content": "an answer of a few words"}]
            out.write(json.dumps({"conversations": turns}) + "\n")


def _words(tokenizer: Any, tokens: int) -> str:
    """Text of about that many tokens, random."""
    from sglang.benchmark.datasets.common import gen_prompt

    return str(gen_prompt(tokenizer, tokens))


def tool_tree(tokenizer: Any) -> list[str]:
    """Eight agents of 16 requests each: tool descriptions for all, a role for each agent."""
    tools = _words(tokenizer, 3072)
    roles = [_words(tokenizer, 1024) for _ in range(8)]
    return ["\n\n".join((tools, role, _words(tokenizer, 256))) for role in roles for _ in range(16)]


def conversations(tokenizer: Any) -> list[str]:
    """The paper's three levels, 1 x 2 x 4 nodes, and user turns of the lengths above."""
    first, second, third = CONVERSATION_LEVELS
    top = _words(tokenizer, first)
    languages = [_words(tokenizer, second - first) for _ in range(2)]
    systems = [
        "\n\n".join((top, language, _words(tokenizer, third - second)))
        for language in languages
        for _ in range(2)
    ]
    low, high = USER_RANGE
    lengths = [
        min(max(int(USER_MEDIAN * random.lognormvariate(0, USER_SIGMA)), low), high)
        for _ in range(512)
    ]
    return [
        "\n\n".join((systems[i % len(systems)], _words(tokenizer, length)))
        for i, length in enumerate(lengths)
    ]
