# SPDX-License-Identifier: MIT
"""Serve SmolLM2 with PAT and with the base backend, ask both the same, compare (quickstart.sh).

The requests form a tree on purpose: all 16 share a system prompt, groups of four also share the
beginning of the question, and every one ends differently.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smollm2
from prompts import GROUPS, SYSTEM
from server import Server

MIN_SYSTEM_TOKENS = 800
CPU_LOGPROB_BOUND = 1e-3  # float32: rounding only

# bf16 has no fixed bound, so the base is measured against itself: the same requests again, and one
# by one, which changes the shapes of its kernels as PAT does. PAT may be twice as far away, and a
# little more, because a maximum over a few hundred tokens is itself noisy.
GPU_NOISE_FACTOR, GPU_NOISE_MARGIN = 2.0, 0.05
# ... on enough tokens: an early difference must not make the comparison empty.
GPU_MIN_COMMON = 0.5


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    text: str
    cached: int  # prompt tokens that came from the prefix cache


@dataclass(frozen=True)
class Difference:
    """Two runs of the same requests, compared answer by answer."""

    equal: int  # answers with the same tokens
    answers: int
    common: int  # tokens before the first difference, summed
    tokens: int
    max_logprob: float  # over the common tokens

    def __str__(self) -> str:
        return (
            f"{self.equal} of {self.answers} answers equal, largest log-probability difference "
            f"{self.max_logprob:.2e} over {self.common} of {self.tokens} tokens"
        )


def compare(left: Sequence[Answer], right: Sequence[Answer]) -> Difference:
    equal = common = 0
    largest = 0.0
    for a, b in zip(left, right, strict=True):
        equal += a.tokens == b.tokens
        for ta, tb, la, lb in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
            if ta != tb:
                break
            common += 1
            # A NaN must not pass a comparison.
            largest = max(largest, abs(la - lb)) if la == la and lb == lb else float("inf")
    return Difference(equal, len(left), common, sum(len(a.tokens) for a in left), largest)


class Answering(Server):
    """A server that is asked one prompt at a time."""

    def generate(self, prompt: list[int], new_tokens: int) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens}
        reply = self.call(
            "/generate",
            {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True},
        )
        meta = reply["meta_info"]
        logprobs, tokens, *_ = zip(*meta["output_token_logprobs"], strict=True)
        return Answer(list(tokens), list(logprobs), reply["text"], meta["cached_tokens"])


@contextmanager
def serving(server: Answering, patience: float) -> Iterator[Answering]:
    try:
        seconds = server.wait(patience)
        print(f"  {server.name}: ready after {seconds:.0f} s", flush=True)
        yield server
    except Exception:
        tail = server.log.read_text(errors="replace").splitlines()[-40:]
        print(f"\n--- the end of {server.log}\n" + "\n".join(tail), file=sys.stderr, flush=True)
        raise
    finally:
        server.stop()


class Workload:
    """The prompts as tokens, and one pass over them."""

    def __init__(self, model: Path, new_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.new_tokens = new_tokens
        self.questions = [start + end for start, ends in GROUPS for end in ends]
        self.prompts = [self.chat(question) for question in self.questions]
        columns = enumerate(zip(*self.prompts, strict=False))
        self.shared = next(at for at, tokens in columns if len(set(tokens)) > 1)
        if self.shared < MIN_SYSTEM_TOKENS:
            raise RuntimeError(f"only {self.shared} tokens are shared, not {MIN_SYSTEM_TOKENS}")

    def chat(self, question: str) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def run(self, server: Answering, concurrent: bool = True) -> list[Answer]:
        """Ask everything of a server whose prefix cache is empty."""
        self.flush(server)
        server.generate(self.chat("Good morning!"), 1)  # puts the system prompt into the cache
        begin = time.monotonic()
        with ThreadPoolExecutor(len(self.prompts) if concurrent else 1) as pool:
            answers = list(
                pool.map(lambda prompt: server.generate(prompt, self.new_tokens), self.prompts)
            )
        seconds = time.monotonic() - begin
        cold = [answer.cached for answer in answers if answer.cached < MIN_SYSTEM_TOKENS]
        if cold:
            raise RuntimeError(f"{len(cold)} requests missed the prefix cache: {cold}")
        how = "at once" if concurrent else "one by one"
        tokens = sum(len(answer.tokens) for answer in answers)
        print(f"  {server.name}: {len(answers)} requests {how}, {tokens} tokens, {seconds:.1f} s")
        return answers

    def flush(self, server: Server) -> None:
        for _ in range(50):
            try:
                server.call("/flush_cache", {})
                return
            except urllib.error.HTTPError:  # the last request is not quite gone
                time.sleep(0.2)
        raise RuntimeError("the prefix cache could not be flushed")


def server_arguments(model: Path, device: str, base: str | None, backend: str) -> list[str]:
    arguments = ["--model-path", str(model), "--device", device]
    arguments += ["--skip-server-warmup", "--max-running-requests", "32"]
    if device == "cpu":
        # Said in full, because SGLang would halve float32 and take most of the memory for KV.
        arguments += ["--dtype", "float32", "--max-total-tokens", "16384"]
        arguments += ["--mem-fraction-static", "0.5", "--grammar-backend", "none"]
    else:
        arguments += ["--dtype", "bfloat16", "--disable-prefill-cuda-graph"]
    if backend == "pat":
        arguments += ["--attention-backend", "pat"]
    elif base is not None:
        arguments += ["--attention-backend", base]
    return arguments


def pat_state(server: Server) -> dict[str, Any]:
    """What the plug-in counted."""
    if not (state := server.pat_state()):
        raise RuntimeError("/get_server_info has no `pat` block: the plug-in is not active")
    return state


def problems_of(state: dict[str, Any]) -> list[str]:
    """Why the run does not prove that PAT served it."""
    found = []
    if not state.get("plans_made"):
        found.append("PAT made no plan")
    if not state.get("shared_segments"):
        found.append("no shared segment was packed")
    if not 0 < state.get("planned_kv_tokens", 0) < state.get("unshared_kv_tokens", 0):
        found.append("no KV reads were saved")
    if state.get("steps_on_base"):
        found.append(f"decode steps ran on the base: {state['steps_on_base']}")
    return found


def show(workload: Workload, answers: Sequence[Answer], state: dict[str, Any]) -> None:
    print("\nAnswers (from the server with PAT)")
    for question, answer in zip(workload.questions, answers, strict=True):
        asked = question.rpartition("uestion: ")[2]
        text = " ".join(answer.text.split())
        print(f"  {asked}")
        print(textwrap.indent(textwrap.fill(text, 92), "      "))
    print("\nForest that was packed (the plan that saved the most)")
    print(textwrap.indent(state.get("best_plan", "not reported by the plug-in"), "  "))
    planned, unshared = state.get("planned_kv_tokens", 0), state.get("unshared_kv_tokens", 0)
    made, kept = state.get("plans_made", 0), state.get("plans_kept", 0)
    print(f"\nKV reads, over {made + kept} decode steps ({made} plans made, {kept} steps kept one)")
    if unshared:
        saved = 100 * (1 - planned / unshared)
        print(f"  {planned} tokens a layer instead of {unshared}: {saved:.1f} % saved")


def verdict_cpu(base: list[Answer], pat: list[Answer]) -> bool:
    difference = compare(base, pat)
    print(f"  pat against base: {difference}")
    return (
        difference.equal == difference.answers
        and difference.common == difference.tokens
        and difference.max_logprob <= CPU_LOGPROB_BOUND
    )


def verdict_gpu(
    base: list[Answer], again: list[Answer], one_by_one: list[Answer], pat: list[Answer]
) -> bool:
    repeat, serial, difference = (compare(base, other) for other in (again, one_by_one, pat))
    print(f"  base, again:      {repeat}")
    print(f"  base, one by one: {serial}")
    print(f"  pat against base: {difference}")
    noise = max(repeat.max_logprob, serial.max_logprob)
    bound = GPU_NOISE_FACTOR * noise + GPU_NOISE_MARGIN
    enough = GPU_MIN_COMMON * min(repeat.common, serial.common)
    print(f"  allowed: {bound:.2e} on at least {enough:.0f} tokens")
    return difference.max_logprob <= bound and difference.common >= enough


def run(options: argparse.Namespace, logs: Path) -> bool:
    cpu = options.device == "cpu"
    dtype = "float32" if cpu else "bfloat16"
    model = options.model or smollm2.CACHE / f"SmolLM2-135M-Instruct-{dtype}"
    if options.model is None and smollm2.make(model, dtype):
        print(f"made {model}")
    workload = Workload(model, options.new_tokens)
    base = os.environ.get("PAT_SGLANG_BASE") or ("torch_native" if cpu else None)
    base_name = base or "SGLang's choice"
    print(
        f"{len(workload.prompts)} requests that share {workload.shared} tokens, "
        f"{options.device} {dtype}, base backend: {base_name}; logs in {logs}"
    )

    # The first start on a GPU compiles kernels.
    patience = 300 if cpu else 900

    def start(name: str) -> Answering:
        arguments = server_arguments(model, options.device, base, name)
        environment = {"PAT_SGLANG_BASE": base} if base and name == "pat" else {}
        return Answering(name, arguments, os.environ | environment, logs / f"{name}.log")

    with serving(start("base"), patience) as server:
        base_runs = [workload.run(server)]
        if not cpu:
            base_runs += [workload.run(server), workload.run(server, concurrent=False)]
    with serving(start("pat"), patience) as server:
        answers = workload.run(server)
        state = pat_state(server)

    show(workload, answers, state)
    print("\nComparison")
    same = verdict_cpu(*base_runs, answers) if cpu else verdict_gpu(*base_runs, answers)
    problems = problems_of(state)
    for problem in problems:
        print(f"  {problem}")
    return same and not problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument(
        "--model", type=Path, help="a folder made by smollm2.py (default: made now)"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--keep-logs", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    logs = Path(tempfile.mkdtemp(prefix="pat-quickstart-"))
    passed = False
    try:
        passed = run(options, logs)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        if passed and not options.keep_logs:
            shutil.rmtree(logs)
        else:
            print(f"\nserver logs: {logs}")
    print("PASS" if passed else "FAIL")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
