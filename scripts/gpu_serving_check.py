# SPDX-License-Identifier: MIT
"""SmolLM2 served by real SGLang with PAT and with its bases, log-probabilities compared.

    python scripts/gpu_serving_check.py --model ~/gpu/smollm2              fa3, flashinfer, triton
    python scripts/gpu_serving_check.py --model FOLDER --bases fa3 --answers 24
    python scripts/gpu_serving_check.py --model FOLDER --bases fa3 --load  while bench_serving loads
    python scripts/gpu_serving_check.py --model FOLDER32 --dry-run         on a CPU, torch_native

For every base two servers run at once, the base itself and `--attention-backend pat` on that base,
with decode CUDA graphs and the overlap scheduler on (on a GPU all servers of all bases run
together: the model is small). Each gets the same requests twice, its prefix cache emptied before:
a system prompt that all share, a beginning that groups share, ends of their own; in two waves, so
that requests join and leave while others decode. Reported, always beside the base's own
run-to-run difference:

- `generated`: |difference| of the log-probabilities of generated tokens, over the common beginning
  of each pair of answers, and the number of equal answers
- `prompt`: the same for the tokens of the prompts
- `rescored`: every answer, to its end, against the base's prefill of the same tokens. Needs no
  equal answers, and the decode kernels meet a reference that is no decode kernel
- `pat`: the plug-in's counters, which prove that shared segments were packed

Writes results/serving_check[-load]-<gpu>.json, and $OUT/ the same when set. Server logs stay in a
temporary folder; the ends of those that failed are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_common as common
import numpy as np
from gpu_common import Row
from prompts import GROUPS, SYSTEM
from server import Server, add_plugin_option, environment_with

RUNS = 2
NEW_TOKENS = (32, 48, 64, 96, 128)  # requests leave the batch at different times
SECOND_WAVE_S = 0.4
START_PATIENCE_S = 420.0  # a first start compiles kernels
LOAD_PATIENCE_S = 180.0
GRAPH_ROWS = [str(rows) for rows in (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96)]

# A run is within noise when PAT is this much further from the base than the base is from itself.
RESCORED_MEAN_FACTOR = 1.15
P99_FACTOR, P99_MARGIN = 2.0, 0.02


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    cached: int
    from_host: int = 0  # of the cached tokens, those that HiCache brought back


class Scored(Server):
    """A server that is asked for answers and for scores."""

    def generate(
        self, prompts: list[list[int]], new_tokens: list[int], samples: int = 1, **options: Any
    ) -> list[Answer]:
        """One batched request: all prompts arrive together."""
        sampling = [
            {"temperature": 0, "max_new_tokens": count, "ignore_eos": True, "n": samples}
            for count in new_tokens
        ]
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        body |= options
        answers = []
        for reply in self.call("/generate", body):
            # An aborted request may have none; JSON has no NaN, which arrives as null.
            entries = reply["meta_info"]["output_token_logprobs"]
            tokens = [entry[1] for entry in entries]
            logprobs = [math.nan if entry[0] is None else entry[0] for entry in entries]
            cached = reply["meta_info"].get("cached_tokens", 0)
            host = (reply["meta_info"].get("cached_tokens_details") or {}).get("host", 0)
            answers.append(Answer(tokens, logprobs, cached, host))
        return answers

    def score(
        self, inputs: list[list[int]], starts: list[int], **options: Any
    ) -> list[list[float]]:
        """Log-probabilities of each input's tokens from `start` + 1 on, by prefill."""
        body = {
            "input_ids": inputs,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": starts,
            **options,
        }
        scores = []
        replies = self.call("/generate", body)
        for reply, tokens, start in zip(replies, inputs, starts, strict=True):
            wanted = tokens[start + 1 :]  # the first position has no predecessor to be scored by
            entries = reply["meta_info"]["input_token_logprobs"]
            entries = entries[len(entries) - len(wanted) :]
            if [entry[1] for entry in entries] != wanted:
                raise RuntimeError(f"{self.name}: scored tokens are not those that were sent")
            scores.append([math.nan if entry[0] is None else entry[0] for entry in entries])
        return scores


@contextlib.contextmanager
def load_on(server: Scored, model: Path, folder: Path) -> Iterator[None]:
    """``sglang.bench_serving`` keeps the server busy: groups with a prompt each, 32 at a time.

    Raises:
        RuntimeError: it did not begin, or ended before the block did.
    """
    log = folder / f"{server.name.replace('+', '-')}.load.log"
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--base-url", server.url, "--tokenizer", str(model), "--max-concurrency", "32"]
    command += ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "512"]
    command += ["--gsp-prompts-per-group", "16", "--gsp-system-prompt-len", "512"]
    command += ["--gsp-question-len", "32", "--gsp-output-len", "128", "--gsp-ordered"]
    command += ["--output-file", str(folder / "load.jsonl")]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + LOAD_PATIENCE_S
        while server.call("/v1/loads?include=core")["loads"][0]["num_running_reqs"] < 16:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no load on {server.name}, see {log}")
            time.sleep(0.2)
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the load on {server.name} ended too early, see {log}")
    finally:
        process.kill()
        process.wait()


class Workload:
    """The requests, as tokens."""

    def __init__(self, model: Path, answers: int) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts: list[list[int]] = []
        questions = [(start, end) for start, ends in GROUPS for end in ends]
        for number in range(answers):
            start, end = questions[number % len(questions)]
            visitor = f" (I am visitor {number // len(questions) + 1}.)"
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": start + end + visitor},
            ]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            self.prompts.append(tokenizer.encode(text, add_special_tokens=False))
        self.new_tokens = [NEW_TOKENS[i % len(NEW_TOKENS)] for i in range(answers)]

    def run(self, server: Scored, new_tokens: list[int], loaded: bool) -> list[Answer]:
        """Two waves; the second finds the first decoding. On an empty prefix cache, if possible."""
        if not loaded:
            server.flush()
        half = 2 * len(self.prompts) // 3
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.generate, self.prompts[:half], new_tokens[:half])
            time.sleep(SECOND_WAVE_S)
            second = pool.submit(server.generate, self.prompts[half:], new_tokens[half:])
            return first.result() + second.result()

    def score_prompts(self, server: Scored) -> list[list[float]]:
        some = self.prompts[:16]
        server.flush()
        return server.score(some, [0] * len(some))

    def rescore(self, server: Scored, answers: Sequence[Answer], **options: Any) -> list[float]:
        """Differences between an answer's log-probabilities and `server`'s prefill of it.

        The answers are those to the first prompts; `options` are those of `Scored.generate`.
        """
        prompts = self.prompts[: len(answers)]
        inputs = [p + a.tokens for p, a in zip(prompts, answers, strict=True)]
        starts = [len(prompt) - 1 for prompt in prompts]
        differences: list[float] = []
        scores = server.score(inputs, starts, **options)
        for scored, answer in zip(scores, answers, strict=True):
            pairs = zip(scored, answer.logprobs, strict=True)
            differences += [abs(a - b) for a, b in pairs]
        return differences


# Comparisons


def distribution(differences: Sequence[float]) -> Row:
    """Mean, p50, p99 and max of absolute differences; a NaN anywhere shows as NaN turned null."""
    values = np.asarray(differences, np.float64)
    if not values.size:
        return {"count": 0}
    if not np.isfinite(values).all():
        return {"count": int(values.size), "not_finite": int((~np.isfinite(values)).sum())}
    return {
        "count": int(values.size),
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
    }


def compare(left: Sequence[Answer], right: Sequence[Answer]) -> Row:
    """Generated log-probabilities over the common beginning of each pair of answers."""
    equal, differences = 0, []
    for a, b in zip(left, right, strict=True):
        equal += a.tokens == b.tokens
        for ta, tb, la, lb in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
            if ta != tb:
                break
            differences.append(abs(la - lb))
    tokens = sum(len(answer.tokens) for answer in left)
    return {
        "equal_answers": equal,
        "answers": len(left),
        "tokens": tokens,
        **distribution(differences),
    }


def compare_scores(left: list[list[float]], right: list[list[float]]) -> Row:
    pairs = zip(left, right, strict=True)
    return distribution([abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)])


def problems_of(result: Row, cpu: bool) -> list[str]:
    """Why a family does not pass."""
    found = []
    state = result["pat"]
    if not state:
        return ["no `pat` block in /get_server_info: the plug-in is not active"]
    if not state.get("plans_made") or not state.get("shared_segments"):
        found.append("no shared segment was packed")
    if not 0 < state.get("planned_kv_tokens", 0) < state.get("unshared_kv_tokens", 0):
        found.append("no KV reads were saved")
    for name in ("steps_on_base", "layers_on_base"):
        if state.get(name):
            found.append(f"{name}: {state[name]}")
    kept, launched = state.get("plans_kept", 0), state.get("appends_launched", 0)
    if not cpu and 10 * launched > kept:
        found.append(f"{launched} of {kept} kept steps were launched for: no graph appends")
    for what in ("generated", "prompt", "rescored"):
        of = result[what]
        mine, base = of["pat"], of["base"]
        if "p99" not in mine or "p99" not in base:
            found.append(f"{what}: not finite or empty")
            continue
        # A base that repeats itself bit for bit still has bf16 noise: what it says of its own
        # answers when it decodes them differs from what it says when it prefills them.
        noise = base["p99"]
        if what == "generated":
            noise = max(noise, result["rescored"]["base"].get("p99", 0))
        if mine["p99"] > P99_FACTOR * noise + (1e-3 if cpu else P99_MARGIN):
            found.append(f"{what}: p99 {mine['p99']:.2e}, the base's own is {noise:.2e}")
    mine, base = result["rescored"]["pat"], result["rescored"]["base"]
    if not cpu and mine.get("mean", 0) > RESCORED_MEAN_FACTOR * base.get("mean", 0):
        found.append(f"rescored: mean {mine['mean']:.2e}, the base's own is {base['mean']:.2e}")
    return found


# Servers


def arguments_of(options: argparse.Namespace, backend: str, rows: Sequence[str]) -> list[str]:
    """Arguments of a server that decodes batches of at most ``rows[-1]``; graphs for each of them.

    Without those that say how much memory it takes.
    """
    arguments = ["--model-path", str(options.model), "--attention-backend", backend]
    arguments += ["--skip-server-warmup", "--sampling-backend", "pytorch", "--random-seed", "1"]
    arguments += ["--max-running-requests", rows[-1], "--grammar-backend", "none"]
    if options.dry_run:
        return [*arguments, "--device", "cpu", "--dtype", "float32"]
    arguments += ["--dtype", "bfloat16", "--disable-prefill-cuda-graph"]
    return [*arguments, "--cuda-graph-bs-decode", *rows]


def memory_of(options: argparse.Namespace) -> list[str]:
    """A small cache, and a budget that holds while other servers take their share meanwhile."""
    tokens, fraction = ("32768", "0.5") if options.dry_run else ("98304", "0.6")
    return ["--max-total-tokens", tokens, "--mem-fraction-static", fraction]


def environment_of(options: argparse.Namespace, base: str, with_pat: bool) -> dict[str, str]:
    """The environment of a server."""
    environment = environment_with(with_pat, options.plugin)
    if with_pat:
        environment["PAT_SGLANG_BASE"] = base
    if base == "flashinfer":
        environment["SGLANG_FLASHINFER_USE_PAGED"] = "1"  # needs no fa3 module, see build_peers.sh
    return environment


@contextlib.contextmanager
def concluded(result: Row, servers: Collection[Server]) -> Iterator[None]:
    """Whatever happens in the block: servers stopped, errors among the result's problems."""
    begin = time.monotonic()
    try:
        yield
    except Exception as error:
        result.setdefault("problems", []).append(f"{type(error).__name__}: {error}"[:400])
        for server in servers:
            print(server.tail(), flush=True)
    finally:
        for server in servers:
            server.stop()
    result["seconds"] = round(time.monotonic() - begin)


class Family:
    """The two servers of one base."""

    def __init__(self, base: str, options: argparse.Namespace, folder: Path) -> None:
        self.base, self.options, self.folder = base, options, folder
        self.result: Row = {"base": base, "load": options.load}
        self.servers: dict[str, Scored] = {}
        for name, backend, with_pat in ((base, base, False), (f"pat+{base}", "pat", True)):
            environment = environment_of(options, base, with_pat)
            self.servers[name] = Scored(
                name,
                [*arguments_of(options, backend, GRAPH_ROWS), *memory_of(options)],
                environment,
                folder / f"{name.replace('+', '-')}.log",
                cwd=folder,  # not the repository: a base server must not see the plug-in
            )

    def measure(self, workload: Workload) -> None:
        plain, pat = self.servers.values()
        self.result["ready_s"] = {
            name: round(server.wait(START_PATIENCE_S)) for name, server in self.servers.items()
        }
        count = self.options.new_tokens
        new_tokens = [min(n, count) for n in workload.new_tokens]
        runs: dict[str, list[list[Answer]]] = {}
        for server in (plain, pat):
            loaded = self.options.load
            load = load_on(server, self.options.model, self.folder) if loaded else None
            with load or contextlib.nullcontext():
                runs[server.name] = [workload.run(server, new_tokens, loaded) for _ in range(RUNS)]
        self.result["pat"] = pat.pat_state()
        self.result["cached_tokens"] = {
            name: [sum(a.cached for a in run) for run in of] for name, of in runs.items()
        }
        base_runs, pat_runs = runs[plain.name], runs[pat.name]
        self.result["generated"] = {
            "base": compare(base_runs[0], base_runs[1]),
            "pat": compare(base_runs[0], pat_runs[0]),
            "pat_again": compare(base_runs[0], pat_runs[1]),
            "pat_itself": compare(pat_runs[0], pat_runs[1]),
        }
        scores = [workload.score_prompts(s) for s in (plain, plain, pat)]
        self.result["prompt"] = {
            "base": compare_scores(scores[0], scores[1]),
            "pat": compare_scores(scores[0], scores[2]),
        }
        self.result["rescored"] = {
            "base": distribution([d for run in base_runs for d in workload.rescore(plain, run)]),
            "pat": distribution([d for run in pat_runs for d in workload.rescore(plain, run)]),
        }
        self.result["problems"] = problems_of(self.result, self.options.dry_run)

    def run(self, workload: Workload) -> Row:
        with concluded(self.result, self.servers.values()):
            self.measure(workload)
        self.show()
        return self.result

    def show(self) -> None:
        print(f"\n{self.base}: ready {self.result.get('ready_s')}, {self.result['seconds']} s")
        for what in ("generated", "prompt", "rescored"):
            for name, of in self.result.get(what, {}).items():
                shown = {k: float(f"{v:.3g}") for k, v in of.items()}
                print(f"  {what:<9} {name:<10} {shown}")
        state = {k: v for k, v in self.result.get("pat", {}).items() if k != "best_plan"}
        print(f"  counters  {state}")
        print("  " + ("; ".join(self.result["problems"]) or "within noise"), flush=True)


def end(name: str, report: Row, folder: Path, *, stored: bool) -> None:
    """Writes the result file, prints the verdict, and exits by it."""
    if stored:
        for path in common.result_paths(f"{name}-{common.gpu_slug()}.json"):
            path.write_text(json.dumps(report, indent=1) + "\n")
    passed = not any(result["problems"] for result in report["families"])
    print(f"\nlogs: {folder}\n" + ("PASS" if passed else "FAIL"), flush=True)
    sys.exit(not passed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, bf16")
    parser.add_argument("--bases", type=lambda s: s.split(","), default=None)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=max(NEW_TOKENS), help="at most")
    add_plugin_option(parser)
    parser.add_argument("--load", action="store_true", help="other requests beside those checked")
    parser.add_argument("--one-by-one", action="store_true", help="one base after the other")
    parser.add_argument("--dry-run", action="store_true", help="CPU, float32, torch_native")
    options = parser.parse_args()
    bases = options.bases or (
        ["torch_native"] if options.dry_run else ["fa3", "flashinfer", "triton"]
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    folder = Path(tempfile.mkdtemp(prefix="pat-serving-"))
    results: list[Row] = []
    if options.dry_run or options.one_by_one:
        workload = Workload(options.model, options.answers)
        results += [Family(base, options, folder).run(workload) for base in bases]
    else:
        families = [Family(base, options, folder) for base in bases]
        workload = Workload(options.model, options.answers)  # while the servers start
        with ThreadPoolExecutor(len(families)) as pool:
            results += pool.map(lambda family: family.run(workload), families)
    report = {
        "model": options.model.name,
        "answers": options.answers,
        "prompt_tokens": [min(map(len, workload.prompts)), max(map(len, workload.prompts))],
        "flags": [*arguments_of(options, "<backend>", GRAPH_ROWS)[2:], *memory_of(options)],
        "families": results,
        **common.provenance(),
    }
    name = f"serving_check{'-load' if options.load else ''}"
    end(name, report, folder, stored=not options.dry_run)


if __name__ == "__main__":
    main()
