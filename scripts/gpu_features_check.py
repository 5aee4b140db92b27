# SPDX-License-Identifier: MIT
"""What RL frameworks and operators ask of a running server, with PAT on a GPU.

    python scripts/gpu_features_check.py --model ~/gpu/smollm2          fa3, decode CUDA graphs
    python scripts/gpu_features_check.py --model FOLDER32 --dry-run     on a CPU, torch_native

Families, each a base server and one with `--attention-backend pat` on that base:

- `main`: one after the other at the default memory fraction, with the memory saver. The KV pools
  must be equally large. Then, on PAT: a flushed cache, parallel samples, generation paused in the
  three ways while requests decode, weights updated in the middle of requests, with recaptured
  graphs, and between them, memory released (KV cache, weights, graphs) and resumed
- `hicache`: hierarchical cache with a pool so small that shared prefixes come back from the host
- `lora`: a batch with and without an adapter
- `dp`: data-parallel attention on two GPUs, where there are two

After each operation the same requests come again: one by one, greedy tokens equal to those before
it; and all at once, log-probabilities as close to those before it as a decode kernel and the base's
prefill are to each other (rounding depends on the batch). The counters must show shared segments.

Writes results/features_check-<gpu>.json, and $OUT/ the same when set. Server logs stay in a
temporary folder; the ends of those that failed are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_common as common
import smollm2
from gpu_common import Row
from gpu_serving_check import (
    P99_FACTOR,
    P99_MARGIN,
    START_PATIENCE_S,
    Answer,
    Scored,
    Workload,
    compare,
    distribution,
    environment_of,
)

STAND_INS = common.ROOT / "tests" / "sglang" / "stand_ins"  # for the dry run
SOLO = 6  # prompts that are asked one by one
TAGS = ["kv_cache", "weights", "cuda_graph"]
STEPS_UNDER_WAY = 8  # forwards after which requests are surely being decoded
SMALL_POOL = 10240  # slots: holds all answers or the fillers, not both


class Controlled(Scored):
    """A server that takes orders."""

    def order(self, path: str, **body: Any) -> None:
        reply = self.call(f"/{path}", body)
        if isinstance(reply, dict) and reply.get("success") is False:
            raise RuntimeError(f"{self.name}: {path}: {reply}")

    def forwards(self) -> int:
        """Forwards seen by PAT's hook."""
        return self.pat_state()["hook_fired"]

    def pool_size(self) -> int:
        return self.call("/get_server_info")["max_total_num_tokens"]


class Questions:
    """The requests, and what a server answered first."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        self.workload, self.prompts = workload, workload.prompts
        self.counts = [options.new_tokens] * len(self.prompts)
        self.cpu = options.dry_run
        self.noise = 0.0  # p99 of the base's decode kernels against its own prefill

    def calibrate(self, base: Controlled) -> list[Answer]:
        """The base's answers, and the noise in them."""
        answers = self.at_once(base)
        few = [Answer(a.tokens[:16], a.logprobs[:16], a.cached) for a in answers]
        self.noise = distribution(self.workload.rescore(base, few)).get("p99", 0.0)
        return answers

    def one_by_one(self, server: Controlled) -> list[Answer]:
        server.flush()
        few = [min(count, 32) for count in self.counts[:SOLO]]
        pairs = zip(self.prompts, few, strict=False)
        return [server.generate([prompt], [count])[0] for prompt, count in pairs]

    def at_once(self, server: Controlled, **options: Any) -> list[Answer]:
        server.flush()
        return server.generate(self.prompts, self.counts, **options)

    def distance(self, left: Sequence[Answer], right: Sequence[Answer]) -> Row:
        """Of log-probabilities over common beginnings, with `problem` when it is too long."""
        row = compare(left, right)
        bound = P99_FACTOR * self.noise + (1e-3 if self.cpu else P99_MARGIN)
        if "p99" not in row:
            row["problem"] = "log-probabilities are not finite"
        elif row["p99"] > bound:
            row["problem"] = f"p99 {row['p99']:.2e} is above {bound:.2e}"
        return row


class Checks:
    """Operations on a PAT server, each followed by the questions of before."""

    def __init__(self, server: Controlled, questions: Questions, model: Path) -> None:
        self.server, self.questions, self.model = server, questions, model
        self.solo = questions.one_by_one(server)
        self.batch = questions.at_once(server)
        self.rows: Row = {}

    def after(self, name: str, **facts: Any) -> None:
        """The same answers as before all operations?"""
        solo = self.questions.one_by_one(self.server)
        equal = sum(a.tokens == b.tokens for a, b in zip(solo, self.solo, strict=True))
        row = self.questions.distance(self.batch, self.questions.at_once(self.server))
        row.update(solo_equal=equal, solo=len(solo), **facts)
        if equal < len(solo):
            row["problem"] = f"{len(solo) - equal} of {len(solo)} lone answers changed"
        self.rows[name] = row

    def samples(self) -> None:
        answers = self.questions.at_once(self.server, samples=2)
        for which in (0, 1):
            row = self.questions.distance(self.batch, answers[which::2])
            self.rows[f"sample {which + 1} of 2"] = row

    def paused(self, name: str, mode: str, action: Callable[[], None] = lambda: None) -> None:
        """Requests decode, generation stops, ``action``, generation goes on."""
        server, questions = self.server, self.questions
        server.flush()
        begin = server.forwards()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.generate, questions.prompts, questions.counts)
            while server.forwards() < begin + STEPS_UNDER_WAY and not asked.done():
                time.sleep(0.005)
            server.order("pause_generation", mode=mode)
            midway = not asked.done()
            time.sleep(0.2)  # the step in flight ends
            stopped_at = server.forwards()
            time.sleep(0.2)
            still = server.forwards() == stopped_at
            try:
                action()
            finally:  # or the requests never end
                server.order("continue_generation", torch_empty_cache=not questions.cpu)
            answers = asked.result()
        row = questions.distance(self.batch, answers)
        cut = sum(len(a.tokens) < n for a, n in zip(answers, questions.counts, strict=True))
        row.update(cut_short=cut, midway=midway)
        if mode == "abort":
            midway = cut > 0  # the pause returns when the answers have ended
        if not midway or not still:
            row["problem"] = "not paused midway" if still else "forwards went on"
        self.rows[f"{name}, midway"] = row
        self.after(name)

    def update(self, **options: Any) -> None:
        self.server.order("update_weights_from_disk", model_path=str(self.model), **options)

    def released(self) -> None:
        """In the order of RL frameworks: weights back first, for the trainer's new ones."""
        self.server.flush()
        full = used_mib()
        self.server.order("release_memory_occupation", tags=TAGS)
        freed = full - used_mib()
        self.server.order("resume_memory_occupation", tags=["weights"])
        self.update(flush_cache=False)  # what was released is lost
        self.server.order("resume_memory_occupation", tags=["kv_cache", "cuda_graph"])
        self.after("released and resumed", freed_mib=freed)
        row = self.rows["released and resumed"]
        if not self.questions.cpu and freed < full / 2:  # nearly all of it is the KV cache
            row["problem"] = f"only {freed} of {full} MiB were freed"

    def run(self) -> Row:
        self.after("flushed")
        self.samples()
        self.paused("paused in place", "in_place")
        self.paused("paused by retracting", "retract")
        self.paused("paused by aborting", "abort")
        recapture = {"flush_cache": False, "recapture_cuda_graph": True}
        self.paused("weights and graphs in place", "in_place", lambda: self.update(**recapture))
        self.update(flush_cache=True)
        self.after("weights updated")
        self.update(flush_cache=True, recapture_cuda_graph=True)
        self.after("weights updated, graphs recaptured")
        self.released()
        return self.rows


def used_mib() -> int:
    """GPU memory in use, of all processes; 0 without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except FileNotFoundError:
        return 0


def state_problems(server: Controlled) -> list[str]:
    """What the counters say against it."""
    state = server.pat_state()
    if not state.get("active"):
        return [f"PAT is not active: {state.get('declined')}"]
    found = [f"{n}: {state[n]}" for n in ("steps_on_base", "layers_on_base") if state[n]]
    if not state["shared_segments"] or state["planned_kv_tokens"] >= state["unshared_kv_tokens"]:
        found.append("no shared segment was packed")
    if "out of memory" in server.log.read_text(errors="replace").lower():
        found.append("ran out of memory, see the log")
    return found


# Servers


def arguments_of(options: argparse.Namespace, backend: str) -> list[str]:
    arguments = ["--model-path", str(options.model), "--attention-backend", backend]
    arguments += ["--skip-server-warmup", "--sampling-backend", "pytorch", "--random-seed", "1"]
    arguments += ["--max-running-requests", "32", "--grammar-backend", "none"]
    if options.dry_run:
        return [*arguments, "--device", "cpu", "--dtype", "float32"]
    arguments += ["--dtype", "bfloat16", "--disable-prefill-cuda-graph"]
    return [*arguments, "--cuda-graph-bs-decode", "1", "2", "4", "8", "16", "24", "32"]


class Family:
    """A base server and one with PAT, under the same options."""

    def __init__(
        self, name: str, options: argparse.Namespace, folder: Path, *arguments: str
    ) -> None:
        self.name, self.options, self.folder = name, options, folder
        self.arguments = arguments
        self.result: Row = {"family": name}
        self.started: list[Controlled] = []

    def start(self, with_pat: bool) -> Controlled:
        base = "torch_native" if self.options.dry_run else "fa3"
        environment = environment_of(self.options, base, with_pat)
        environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
        if self.options.dry_run:
            environment["PYTHONPATH"] = f"{STAND_INS}{os.pathsep}{environment['PYTHONPATH']}"
        name = f"{self.name}-{'pat' if with_pat else base}"
        arguments = arguments_of(self.options, "pat" if with_pat else base)
        server = Controlled(
            name,
            [*arguments, *self.arguments],
            environment,
            self.folder / f"{name}.log",
            cwd=self.folder,  # not the repository: a base server must not see the plug-in
        )
        self.started.append(server)
        return server

    def ready(self, server: Controlled) -> Controlled:
        seconds = server.wait(START_PATIENCE_S)
        self.result.setdefault("ready_s", {})[server.name] = round(seconds)
        return server

    def run(self, measure: Callable[[Family], None]) -> Row:
        begin = time.monotonic()
        try:
            measure(self)
        except Exception as error:
            self.result.setdefault("problems", []).append(f"{type(error).__name__}: {error}"[:400])
            for server in self.started:
                tail = server.log.read_text(errors="replace").splitlines()[-25:]
                print(f"\n--- the end of {server.log}", *tail, sep="\n", flush=True)
        finally:
            for server in self.started:
                server.stop()
        self.result["seconds"] = round(time.monotonic() - begin)
        self.show()
        return self.result

    def conclude(self, pat: Controlled, rows: Row, *more: str) -> None:
        problems = [f"{name}: {row['problem']}" for name, row in rows.items() if "problem" in row]
        state = pat.pat_state()
        state.pop("best_plan", None)
        self.result.update(
            checks=rows, pat=state, problems=[*more, *problems, *state_problems(pat)]
        )

    def show(self) -> None:
        print(f"\n{self.name}: {self.result['seconds']} s, ready {self.result.get('ready_s')}")
        for name, row in self.result.get("checks", {}).items():
            shown = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
            print(f"  {name:<36} {shown}")
        if sizes := self.result.get("max_total_num_tokens"):
            print(f"  max_total_num_tokens {sizes}")
        print("  " + ("; ".join(self.result["problems"]) or "as it should be"), flush=True)


def measure_main(family: Family, questions: Questions) -> None:
    """One after the other, each alone on the GPU at the default fraction."""
    idle = used_mib()
    base = family.ready(family.start(with_pat=False))
    sizes = {"base": base.pool_size()}
    expected = questions.calibrate(base)
    base.stop()
    deadline = time.monotonic() + 30
    while used_mib() > idle + 64 and time.monotonic() < deadline:
        time.sleep(0.2)  # its memory must be back, or PAT's pool is smaller for that
    pat = family.ready(family.start(with_pat=True))
    sizes["pat"] = pat.pool_size()
    checks = Checks(pat, questions, family.options.model)
    checks.rows["as the base"] = questions.distance(expected, checks.batch)
    rows = checks.run()
    family.result.update(max_total_num_tokens=sizes, noise_p99=questions.noise)
    differ = sizes["base"] != sizes["pat"]
    family.conclude(pat, rows, *([f"max_total_num_tokens differ: {sizes}"] if differ else []))


def both(family: Family, questions: Questions) -> tuple[Controlled, Controlled]:
    servers = [family.start(with_pat) for with_pat in (False, True)]
    base, pat = map(family.ready, servers)
    if not questions.noise:  # without the family `main`
        questions.calibrate(base)
    return base, pat


def measure_lora(family: Family, questions: Questions) -> None:
    base, pat = both(family, questions)
    names = [("tuned", None)[i // 2 % 2] for i in range(len(questions.prompts))]
    expected, answers = (questions.at_once(s, lora_path=names) for s in (base, pat))
    plain = questions.at_once(pat)
    rows = {"as the base": questions.distance(expected, answers)}
    tuned = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(answers, plain, strict=True)]
    if not max(d for d, name in zip(tuned, names, strict=True) if name) > 0.05:
        rows["as the base"]["problem"] = "the adapter changed nothing"
    family.conclude(pat, rows)


def measure_hicache(family: Family, questions: Questions) -> None:
    """Other requests push the shared prefixes out to the host; then they are asked for again."""
    base, pat = both(family, questions)
    longest = max(questions.prompts, key=len)
    count = SMALL_POOL // len(longest) + 1
    fillers = [longest[k:] + longest[:k] for k in range(1, count + 1)]
    rows: Row = {}
    for server in (base, pat):
        before = questions.at_once(server)
        for filler in fillers:
            server.generate([filler], [4])
        answers = server.generate(questions.prompts, questions.counts)
        row = questions.distance(before, answers)
        row["from_host"] = sum(answer.from_host for answer in answers)
        if not row["from_host"]:
            row["problem"] = "nothing came back from the host"
        rows[f"evicted and loaded back, {server.name}"] = row
        if server is base:
            expected = answers
    rows["as the base"] = questions.distance(expected, answers)
    family.conclude(pat, rows)


def measure_dp(family: Family, questions: Questions) -> None:
    base, pat = both(family, questions)
    expected, answers = (questions.at_once(server) for server in (base, pat))
    family.conclude(pat, {"as the base": questions.distance(expected, answers)})


def gpu_count() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return 0
    return listed.count("GPU ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, bf16")
    parser.add_argument("--answers", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument(
        "--families",
        type=lambda s: s.split(","),
        help="main,lora,hicache,dp; default: all that this machine can run",
    )
    parser.add_argument(
        "--plugin",
        type=Path,
        default=os.environ.get("PAT_PLUGIN_META"),
        help="folder with the package metadata that carries the entry point (gpu_session.sh)",
    )
    parser.add_argument("--dry-run", action="store_true", help="CPU, float32, torch_native")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    folder = Path(tempfile.mkdtemp(prefix="pat-features-"))
    adapter = folder / "adapter"
    smollm2.make_adapter(adapter)
    questions = Questions(Workload(options.model, options.answers), options)
    wanted = options.families or (
        ["main", "lora"]
        if options.dry_run
        else ["main", "lora", "hicache", *(["dp"] if gpu_count() > 1 else [])]
    )
    # Small pools, and budgets that hold while the other servers take their share meanwhile.
    small = ["--mem-fraction-static", "0.4"]
    lora = ["--enable-lora", "--lora-paths", f"tuned={adapter}", "--max-lora-rank", "16"]
    if options.dry_run:
        saver, small = ["--mem-fraction-static", "0.15"], ["--mem-fraction-static", "0.15"]
        lora += ["--lora-backend", "torch_native"]
    else:
        saver = ["--enable-memory-saver"]
    pool = ["--max-total-tokens", "32768"]
    hicache = ["--max-total-tokens", str(SMALL_POOL), "--enable-hierarchical-cache"]
    hicache += ["--hicache-ratio", "4"]
    dp = ["--tp", "2", "--dp", "2", "--enable-dp-attention"]
    arguments = {
        "main": saver,
        "lora": [*small, *pool, *lora],
        "hicache": [*small, *hicache],
        "dp": [*small, *pool, *dp],
    }
    measures: dict[str, Callable[[Family], None]] = {
        "main": lambda family: measure_main(family, questions),
        "lora": lambda family: measure_lora(family, questions),
        "hicache": lambda family: measure_hicache(family, questions),
        "dp": lambda family: measure_dp(family, questions),
    }
    families = {name: Family(name, options, folder, *arguments[name]) for name in wanted}
    results: list[Row] = []
    if main_family := families.pop("main", None):  # alone: it measures the default fraction
        results.append(main_family.run(measures["main"]))
    with ThreadPoolExecutor(max(len(families), 1)) as threads:
        results += threads.map(lambda family: family.run(measures[family.name]), families.values())
    report = {
        "model": options.model.name,
        "answers": options.answers,
        "new_tokens": options.new_tokens,
        "families": results,
        **common.provenance(),
    }
    if not options.dry_run:
        for path in common.result_paths(f"features_check-{common.gpu_slug()}.json"):
            path.write_text(json.dumps(report, indent=1) + "\n")
    passed = not any(result["problems"] for result in results)
    print(f"\nlogs: {folder}\n" + ("PASS" if passed else "FAIL"), flush=True)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
