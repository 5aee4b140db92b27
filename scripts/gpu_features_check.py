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
it; and all at once, log-probabilities close to those before it while the tokens are equal (rounding
depends on the batch). Every answer is also rescored to its end: a prefill of the same tokens, which
is always the base's kernels' work, must find the log-probabilities that decoding found as nearly as
it finds those that the base decoded, of parallel samples those of the base's parallel samples. The
counters must show shared segments.

Writes results/features_check-<gpu>.json, and $OUT/ the same when set. Server logs stay in a
temporary folder; the ends of those that failed are printed.
"""

from __future__ import annotations

import argparse
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
    RESCORED_MEAN_FACTOR,
    START_PATIENCE_S,
    Answer,
    Scored,
    Workload,
    arguments_of,
    compare,
    concluded,
    distribution,
    end,
    environment_of,
)
from server import add_plugin_option

STAND_INS = common.ROOT / "tests" / "sglang" / "stand_ins"  # for the dry run
GRAPH_ROWS = [str(rows) for rows in (1, 2, 4, 8, 16, 24, 32)]
SOLO = 6  # prompts that are asked one by one
TAGS = ["kv_cache", "weights", "cuda_graph"]
SAMPLES = 2
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
    """The requests of a family, and how far the base's decoding is from its own prefill."""

    def __init__(self, workload: Workload, new_tokens: int, cpu: bool) -> None:
        self.workload, self.prompts = workload, workload.prompts
        self.counts = [new_tokens] * len(self.prompts)
        self.p99_margin, self.mean_margin = (1e-3, 1e-4) if cpu else (P99_MARGIN, 0.0)
        self.cpu = cpu
        self.own: Row = {}  # the base's answers, rescored by itself
        self.own_samples: list[Row] = []  # likewise, of parallel samples, one each

    def calibrate(self, base: Controlled, **options: Any) -> list[Answer]:
        """The base's answers, and the noise in them."""
        answers = self.at_once(base, **options)
        self.own = self._own(base, answers, **options)
        return answers

    def calibrate_samples(self, base: Controlled, count: int) -> None:
        """The noise in parallel samples, whose batch is `count` times as large."""
        answers = self.at_once(base, samples=count)
        if len(answers) != count * len(self.prompts):
            raise RuntimeError(f"{base.name}: {len(answers)} answers of {count} samples each")
        self.own_samples = [self._own(base, answers[i::count]) for i in range(count)]

    def _own(self, base: Controlled, answers: Sequence[Answer], **options: Any) -> Row:
        own = self.rescored(base, answers, **options)
        if "p99" not in own:
            raise RuntimeError(f"{base.name}: log-probabilities are not finite")
        print(f"{base.name}: its own answers, rescored: {own}", flush=True)
        return own

    def one_by_one(self, server: Controlled) -> list[Answer]:
        server.flush()
        few = [min(count, 32) for count in self.counts[:SOLO]]
        pairs = zip(self.prompts, few, strict=False)
        return [server.generate([prompt], [count])[0] for prompt, count in pairs]

    def at_once(self, server: Controlled, **options: Any) -> list[Answer]:
        server.flush()
        return server.generate(self.prompts, self.counts, **options)

    def rescored(self, server: Controlled, answers: Sequence[Answer], **options: Any) -> Row:
        """Distances of whole answers to a prefill that reuses nothing of what served them."""
        server.flush()
        return distribution(self.workload.rescore(server, answers, **options))

    def apart(self, left: Sequence[Answer], right: Sequence[Answer]) -> Row:
        """Distances of log-probabilities over common beginnings."""
        row = compare(left, right)
        return {**row, "problems": self._beyond(row, "common beginnings", self.own)}

    def check(
        self,
        before: Sequence[Answer],
        answers: Sequence[Answer],
        by: Controlled,
        *,
        short: bool = False,
        own: Row | None = None,
        **options: Any,
    ) -> Row:
        """Whether these are right answers, each to its end.

        Args:
            before: answers to the same questions, compared over common beginnings.
            answers: to the first prompts.
            by: the server whose prefill rescores them.
            short: they may have been cut short.
            own: of the base's answers to requests like these; default: `self.own`.
            options: of the requests.
        """
        own = self.own if own is None else own
        row = self.apart(before, answers)
        rescored = self.rescored(by, answers, **options)
        row.update({f"rescored_{k}": v for k, v in rescored.items() if k not in ("p50", "max")})
        row["problems"] += self._beyond(rescored, "rescored", own)
        bound = RESCORED_MEAN_FACTOR * own["mean"] + self.mean_margin
        # Over far fewer tokens than the base's the mean is noise itself; the p99 has a margin.
        enough = rescored["count"] >= own["count"] / 2
        if enough and rescored.get("mean", 0.0) > bound:
            row["problems"].append(f"rescored: mean {rescored['mean']:.2e} is above {bound:.2e}")
        cut = sum(len(a.tokens) < len(b.tokens) for a, b in zip(answers, before, strict=True))
        if short:
            row["cut_short"] = cut
        elif cut:
            row["problems"].append(f"{cut} answers were cut short")
        return row

    def _beyond(self, row: Row, what: str, own: Row) -> list[str]:
        bound = P99_FACTOR * own["p99"] + self.p99_margin
        if not row["count"]:
            return [f"{what}: nothing to compare"]
        if "p99" not in row:
            return [f"{what}: log-probabilities are not finite"]
        return [f"{what}: p99 {row['p99']:.2e} is above {bound:.2e}"] * (row["p99"] > bound)


class Rows(Row):
    """Checks by name, each shown as it comes: what a run found until it was cut short is known."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family

    def __setitem__(self, name: str, row: Row) -> None:
        super().__setitem__(name, row)
        told = {k: v for k, v in row.items() if k != "problems"}
        shown = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in told.items()}
        problems = "; ".join(row.get("problems", [])) or "as it should be"
        print(f"{self.family}: {name}: {problems} {shown}", flush=True)


class Checks:
    """Operations on a PAT server, each followed by the questions of before."""

    def __init__(self, server: Controlled, questions: Questions, model: Path, rows: Rows) -> None:
        self.server, self.questions, self.model, self.rows = server, questions, model, rows
        self.solo = questions.one_by_one(server)
        self.batch = questions.at_once(server)
        self.rows["one by one"] = questions.check(self.solo, self.solo, server)

    def after(self, name: str, *problems: str, **facts: Any) -> None:
        """The same answers as before all operations?"""
        questions, server = self.questions, self.server
        solo = questions.one_by_one(server)
        equal = sum(a.tokens == b.tokens for a, b in zip(solo, self.solo, strict=True))
        row = questions.check(self.batch, questions.at_once(server), server)
        row["problems"] += [*questions.apart(self.solo, solo)["problems"], *problems]
        row.update(solo_equal=equal, solo=len(solo), **facts)
        if equal < len(solo):
            row["problems"].append(f"{len(solo) - equal} of {len(solo)} lone answers changed")
        self.rows[name] = row

    def samples(self) -> None:
        answers = self.questions.at_once(self.server, samples=SAMPLES)
        for i, own in zip(range(SAMPLES), self.questions.own_samples, strict=True):
            mine = answers[i::SAMPLES]
            row = self.questions.check(self.batch, mine, self.server, own=own)
            self.rows[f"sample {i + 1} of {SAMPLES}"] = row

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
        row = questions.check(self.batch, answers, server, short=mode == "abort")
        if mode == "abort":
            midway = row["cut_short"] > 0  # the pause returns when the answers have ended
        row["midway"] = midway
        if not midway:
            row["problems"].append("not paused midway")
        if not still:
            row["problems"].append("forwards went on")
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
        too_few = not self.questions.cpu and freed < full / 2  # nearly all of it is the KV cache
        problems = [f"only {freed} of {full} MiB were freed"] * too_few
        self.after("released and resumed", *problems, freed_mib=freed)

    def run(self) -> None:
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
        arguments = arguments_of(self.options, "pat" if with_pat else base, GRAPH_ROWS)
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
        print(f"{server.name}: ready after {seconds:.0f} s", flush=True)
        return server

    def run(self, measure: Callable[[Family, Questions], None], questions: Questions) -> Row:
        with concluded(self.result, self.started):
            measure(self, questions)
        self.result["own"] = questions.own
        if questions.own_samples:
            self.result["own_samples"] = questions.own_samples
        problems = "; ".join(self.result["problems"]) or "as it should be"
        sizes = self.result.get("max_total_num_tokens", "")
        print(f"{self.name}: {self.result['seconds']} s: {problems} {sizes}", flush=True)
        return self.result

    def conclude(self, pat: Controlled, rows: Row, *more: str) -> None:
        problems = [f"{name}: {found}" for name, row in rows.items() for found in row["problems"]]
        state = pat.pat_state()
        state.pop("best_plan", None)
        self.result.update(
            checks=dict(rows), pat=state, problems=[*more, *problems, *state_problems(pat)]
        )


def measure_main(family: Family, questions: Questions) -> None:
    """One after the other, each alone on the GPU at the default fraction."""
    idle = used_mib()
    base = family.ready(family.start(with_pat=False))
    sizes = {"base": base.pool_size()}
    expected = questions.calibrate(base)
    questions.calibrate_samples(base, SAMPLES)
    base.stop()
    deadline = time.monotonic() + 30
    while used_mib() > idle + 64 and time.monotonic() < deadline:
        time.sleep(0.2)  # its memory must be back, or PAT's pool is smaller for that
    pat = family.ready(family.start(with_pat=True))
    sizes["pat"] = pat.pool_size()
    rows = Rows(family.name)
    checks = Checks(pat, questions, family.options.model, rows)
    rows["as the base"] = questions.check(expected, checks.batch, pat)
    checks.run()
    family.result.update(max_total_num_tokens=sizes)
    differ = sizes["base"] != sizes["pat"]
    family.conclude(pat, rows, *([f"max_total_num_tokens differ: {sizes}"] if differ else []))


def both(family: Family) -> tuple[Controlled, Controlled]:
    servers = [family.start(with_pat) for with_pat in (False, True)]
    base, pat = map(family.ready, servers)
    return base, pat


def measure_lora(family: Family, questions: Questions) -> None:
    base, pat = both(family)
    names = [("tuned", None)[i // 2 % 2] for i in range(len(questions.prompts))]
    expected = questions.calibrate(base, lora_path=names)
    answers = questions.at_once(pat, lora_path=names)
    plain = questions.at_once(pat)
    row = questions.check(expected, answers, base, lora_path=names)
    tuned = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(answers, plain, strict=True)]
    if not max(d for d, name in zip(tuned, names, strict=True) if name) > 0.05:
        row["problems"].append("the adapter changed nothing")
    rows = Rows(family.name)
    rows["as the base"] = row
    family.conclude(pat, rows)


def measure_hicache(family: Family, questions: Questions) -> None:
    """Other requests push the shared prefixes out to the host; then they are asked for again."""
    base, pat = both(family)
    questions.calibrate(base)
    longest = max(questions.prompts, key=len)
    count = SMALL_POOL // len(longest) + 1
    fillers = [longest[k:] + longest[:k] for k in range(1, count + 1)]
    rows = Rows(family.name)
    for server in (base, pat):
        before = questions.at_once(server)
        for filler in fillers:
            server.generate([filler], [4])
        answers = server.generate(questions.prompts, questions.counts)
        row = questions.check(before, answers, base)
        row["from_host"] = sum(answer.from_host for answer in answers)
        if not row["from_host"]:
            row["problems"].append("nothing came back from the host")
        rows[f"evicted and loaded back, {server.name}"] = row
        if server is base:
            expected = answers
    rows["as the base"] = questions.check(expected, answers, base)
    family.conclude(pat, rows)


def measure_dp(family: Family, questions: Questions) -> None:
    base, pat = both(family)
    expected = questions.calibrate(base)
    rows = Rows(family.name)
    rows["as the base"] = questions.check(expected, questions.at_once(pat), base)
    family.conclude(pat, rows)


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
    add_plugin_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="CPU, float32, torch_native")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    folder = Path(tempfile.mkdtemp(prefix="pat-features-"))
    adapter = folder / "adapter"
    smollm2.make_adapter(adapter)
    workload = Workload(options.model, options.answers)
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
    measures: dict[str, Callable[[Family, Questions], None]] = {
        "main": measure_main,
        "lora": measure_lora,
        "hicache": measure_hicache,
        "dp": measure_dp,
    }

    def run(family: Family) -> Row:
        return family.run(
            measures[family.name], Questions(workload, options.new_tokens, options.dry_run)
        )

    families = {name: Family(name, options, folder, *arguments[name]) for name in wanted}
    results: list[Row] = []
    if main_family := families.pop("main", None):  # alone: it measures the default fraction
        results.append(run(main_family))
    with ThreadPoolExecutor(max(len(families), 1)) as threads:
        results += threads.map(run, families.values())
    report = {
        "model": options.model.name,
        "answers": options.answers,
        "new_tokens": options.new_tokens,
        "families": results,
        **common.provenance(),
    }
    end("features_check", report, folder, stored=not options.dry_run)


if __name__ == "__main__":
    main()
