# SPDX-License-Identifier: MIT
"""A real SGLang server on the CPU in float32, and greedy requests to it.

Servers run in their own process group: an SGLang scheduler that dies kills its parent with SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from server import port_arguments

START_S, ANSWER_S = 240, 180  # on an idle machine 20 and 15 are enough

# Every plan is proven against req_to_token, shared runs are always packed, and no fallback to the
# base is silent.
CHECKED = {"PAT_SGLANG_STRICT": "1", "PAT_SGLANG_FORCE": "on", "PAT_SGLANG_VALIDATE": "1"}

# For servers that need what SGLang has on GPUs only: LoRA, DP attention, the KV pool's size.
_STAND_INS = Path(__file__).parent / "stand_ins"
STOOD_IN = {
    "PYTHONPATH": os.pathsep.join([str(_STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])])
}


@dataclass(frozen=True)
class Answer:
    """What a request came back with."""

    tokens: list[int]
    logprobs: list[float]
    retractions: int


@contextlib.contextmanager
def server(log: Path, model: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """A running server's base URL."""
    port, of_ports = port_arguments()
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model),
        "--dtype", "float32", "--device", "cpu", *of_ports,
        "--max-running-requests", "16", "--grammar-backend", "none", "--chunked-prefill-size", "96",
        "--enable-mixed-chunk", "--skip-server-warmup", "--random-seed", "1", *arguments,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"the server died:\n{tail(log)}"
            assert time.monotonic() < deadline, f"no server after {START_S} s:\n{tail(log)}"
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=10).status_code == 200:
                    break
            time.sleep(0.5)
        yield url
        assert process.poll() is None, f"the server died:\n{tail(log)}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def greedy(new_tokens: int) -> dict[str, Any]:
    """Sampling parameters of an answer of exactly this many tokens."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


def answer_of(reply: dict[str, Any]) -> Answer:
    """A whole answer, not one that was cut short."""
    meta = reply["meta_info"]
    assert meta["finish_reason"]["type"] == "length", meta["finish_reason"]
    pairs = meta["output_token_logprobs"]
    return Answer(
        [token for _, token, _ in pairs], [p for p, _, _ in pairs], meta["num_retractions"]
    )


def ask(url: str, text: str, new_tokens: int, rid: str, **options: Any) -> Answer:
    """One greedy answer."""
    body = {
        "text": text,
        "rid": rid,
        "return_logprob": True,
        "sampling_params": greedy(new_tokens),
        **options,
    }
    return answer_of(requests.post(f"{url}/generate", json=body, timeout=ANSWER_S).json())


def assert_equal(mine: Sequence[Answer], base: Sequence[Answer]) -> None:
    """Equal greedy tokens, and log-probabilities within 1e-3."""
    for index, (a, b) in enumerate(zip(mine, base, strict=True)):
        assert a.tokens == b.tokens, f"request {index}"
        worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        assert worst < 1e-3, f"request {index}: log-probabilities differ by {worst}"


def states_of(url: str) -> list[dict[str, Any]]:
    """The state of the first rank, or of each of those that have requests of their own."""
    info: dict[str, Any] = requests.get(f"{url}/get_server_info", timeout=30).json()
    return list(info["internal_states"])


def state_of(url: str) -> dict[str, Any]:
    return states_of(url)[0]


def assert_nothing_declined(pat: dict[str, Any]) -> None:
    """Every decode step and layer ran on PAT, with the sharing known."""
    for reasons in ("declined", "layers_on_base", "steps_on_base", "no_sharing"):
        assert pat[reasons] == {}, reasons
