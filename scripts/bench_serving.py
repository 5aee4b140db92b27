# SPDX-License-Identifier: MIT
"""SGLang servers with PAT and with other attention backends under the same load, interleaved.

    bash scripts/bench_serving.sh --model qwen3-8b --tokenizer ~/gpu/smollm2 --backends pat,fa3
    bash scripts/bench_serving.sh --model /models/Qwen3-8B --backends pat,flashinfer,flashinfer-p64
    bash scripts/bench_serving.sh --model qwen3-8b --tokenizer ~/gpu/smollm2 -- --tp 2
    bash scripts/bench_serving.sh --report                    what the stored results say

Starts one server a backend, all at once (they must fit the GPU together: --max-total-tokens), and
gives each the same points of workloads.py by ``sglang.bench_serving``, in turn, so that a drift of
the machine meets them all alike; --rounds times. Only the server under load works. The spread of a
backend over its rounds is the noise that differences between backends are compared with.

--model is a folder, or a shape of shapes.py with random weights (then --tokenizer is a folder).
Graphs and the overlap scheduler are on. Writes results/bench_serving-<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import io
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_common as common
import numpy as np
import shapes
from gpu_common import Row
from server import Server, add_plugin_option, environment_with
from serving_report import COLUMNS, report
from workloads import MOONCAKE, Point, points

KEY = (
    "model", "server_arguments", "workload", "request_rate", "concurrency", "rivals",
    "max_total_tokens", "commit", "backend", "round",
)  # fmt: skip
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TRACE = common.ROOT.parent / "shared/traces" / MOONCAKE
START_PATIENCE_S = 540.0  # a first start compiles kernels
# bench_serving's names of what a row keeps, and of the times by what of them means something.
KEPT = ("completed", "total_output_tokens", "duration")
KEPT_TIMES = {
    "tokens": (
        "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "p99_ttft_ms",
        "mean_itl_ms", "median_itl_ms", "p99_itl_ms",
    ),
    "first token": ("mean_ttft_ms", "p99_ttft_ms"),
    "none": (),
}  # fmt: skip
LOGGED_STEPS = 16  # a line each
MOST_SILENT = 0.01  # of the requests
SEED = "1"
COUNTED = ("plans_made", "plans_kept", "planned_kv_tokens", "unshared_kv_tokens")


class Record(dict[str, Any]):
    """A record of Mooncake's trace, with what SGLang 0.5.17 looks for in a request and lacks there.

    It crashes without, before and after the run; input lengths are not among what is kept.
    """

    prompt = ""
    prompt_len = text_prompt_len = vision_prompt_len = 0


def load_serving() -> Any:
    """``sglang.bench_serving`` as a module that reads Mooncake's trace and makes requests once.

    Making them anew for every run would take as long as some runs do, with the GPU idle. And with
    ``--tokenize-prompt`` it sends token ids for datasets that only make text.
    """
    from sglang.benchmark import serving
    from sglang.benchmark.datasets.mooncake import MooncakeDataset

    load, get_dataset = MooncakeDataset.load, serving.get_dataset
    if hasattr(get_dataset, "__wrapped__"):
        return serving

    @functools.wraps(load)
    def load_records(*args: Any, **options: Any) -> list[Record]:
        return [Record(record) for record in load(*args, **options)]

    made: dict[str, Any] = {}

    @functools.wraps(get_dataset)
    def get_requests(args: argparse.Namespace, tokenizer: Any, *more: Any) -> Any:
        of_requests = (
            "dataset", "gsp", "random", "sharegpt", "mooncake", "num_prompts", "seed", "tokenize",
        )  # fmt: skip
        options = {k: v for k, v in vars(args).items() if k.startswith(of_requests)}
        key = str(sorted(options.items()))
        if key not in made:
            random.seed(args.seed)
            np.random.seed(args.seed)
            ids = args.tokenize_prompt
            changes = {"tokenize_prompt": False, "gsp_fast_prepare": True} if ids else {}
            made[key] = get_dataset(argparse.Namespace(**vars(args) | changes), tokenizer, *more)
            if ids:
                prompts = tokenizer([request.prompt for request in made[key]])["input_ids"]
                for request, prompt in zip(made[key], prompts, strict=True):
                    request.prompt = prompt
        np.random.seed(args.seed)  # arrivals are drawn next, and are the same in every run
        prompts = {id(request.prompt): request.prompt for request in made[key]}
        return copy.deepcopy(made[key], prompts)  # all but the prompts, which are many numbers

    MooncakeDataset.load = load_records
    serving.get_dataset = get_requests
    serving.get_tokenizer = functools.cache(serving.get_tokenizer)
    return serving


def make_requests(point: Point, tokenizer: Path, folder: Path) -> None:
    """Make the requests of a point before its first run."""
    serving = load_serving()
    run_benchmark = serving.run_benchmark
    serving.run_benchmark = lambda args: serving.get_dataset(
        args, serving.get_tokenizer(str(tokenizer)), None
    )
    sys.argv = ["bench_serving", "--backend", "sglang", "--seed", SEED]
    sys.argv += point.arguments(tokenizer, folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            serving.cli_main()
    finally:
        serving.run_benchmark = run_benchmark


def backend_of(name: str) -> tuple[str, int]:
    """Attention backend and page size of a name like ``flashinfer-p64``."""
    backend, _, page = name.partition("-p")
    return backend, int(page or 1)


def step_ms(log: str) -> float | None:
    """Median milliseconds of a decode step by the server's own log, prefills and pauses included.

    What the GPU and the scheduler take, whoever has to print the tokens. A line has the tokens a
    second since the one before it, but the requests of its last step. The first line is left out:
    it counts from before the run. None: there are no others.
    """
    line = r"Decode batch.*#running-req: (\d+).*gen throughput \(token/s\): ([\d.]+)"
    lines = [(int(rows), float(rate)) for rows, rate in re.findall(line, log)]
    steps = [
        1e3 * (before + rows) / 2 / rate for (before, _), (rows, rate) in pairwise(lines) if rate
    ]
    return statistics.median(steps) if steps else None


def prefills(log: str) -> list[int]:
    """Tokens of each prefill by the server's own log, without those that were cached.

    Prompts that come one by one are prefilled in more steps, and two of the same step that share a
    prefix both compute it: what the time to the first token differs by where the kernels do not.
    """
    return [int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", log)]


class Contender(Server):
    """A server of one backend."""

    def __init__(self, name: str, model: Path, options: argparse.Namespace, folder: Path) -> None:
        backend, page = backend_of(name)
        arguments = ["--model-path", str(model), "--attention-backend", backend]
        arguments += ["--page-size", str(page), "--random-seed", "1"]
        arguments += ["--decode-log-interval", str(LOGGED_STEPS)]
        if options.cpu:
            arguments += ["--device", "cpu", "--dtype", "float32", "--grammar-backend", "none"]
        else:
            rows = [str(n) for n in GRAPH_ROWS if n <= options.max_running]
            # The capture of the prefill graph compiles for minutes.
            arguments += ["--disable-prefill-cuda-graph", "--cuda-graph-bs-decode", *rows]
        if options.model in shapes.SHAPES:
            arguments += ["--load-format", "dummy"]
        arguments += ["--max-running-requests", str(options.max_running)]
        arguments += ["--max-total-tokens", str(options.max_total_tokens)]
        arguments += ["--mem-fraction-static", str(options.mem_fraction), *options.server_arguments]
        environment = environment_with(backend == "pat", options.plugin)
        super().__init__(name, arguments, environment, folder / f"{name}.log", cwd=folder)
        self.folder, self.with_pat = folder, backend == "pat"

    def measure(self, point: Point, tokenizer: Path) -> Row:
        """One run of ``sglang.bench_serving``; its own process would spend 10 s on imports.

        Raises:
            RuntimeError: a request failed or printed nothing, or PAT did not serve.
        """
        output = self.folder / "bench.json"
        output.unlink(missing_ok=True)
        command = ["--backend", "sglang", "--base-url", self.url, "--tokenizer", str(tokenizer)]
        command += ["--warmup-requests", "0", "--seed", SEED, "--disable-tqdm", "--output-details"]
        command += ["--output-file", str(output), *point.arguments(tokenizer, self.folder)]
        self.flush()  # bench_serving's own --flush-cache fails when its warm-up is not quite gone
        before = self.pat_state()
        told = self.log.stat().st_size
        sys.argv = ["bench_serving", *command]
        log = self.log.with_suffix(".bench.log")
        with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            load_serving().cli_main()
        after = self.pat_state()
        result = json.loads(output.read_text())
        errors = sorted({error for error in result["errors"] if error})
        if errors or result["completed"] != len(result["errors"]):
            raise RuntimeError(f"{self.name}, {point.name}: {errors[:2]}, see {log}")
        # Without a first token that prints, latency counts as time between tokens. The few bytes
        # that are no character alone are all that a tokenizer should have of this kind.
        silent = sum(ttft <= 0 for ttft in result["ttfts"])
        if silent > MOST_SILENT * len(result["ttfts"]):
            raise RuntimeError(f"{self.name}, {point.name}: {silent} requests printed nothing")
        row = {name: result[name] for name in (*KEPT, *KEPT_TIMES[point.times])}
        row["silent"] = silent
        row["output_tok_s"] = result["output_throughput"]
        said = self.log.read_bytes()[told:].decode(errors="replace")
        row["server_step_ms"] = step_ms(said)
        tokens = prefills(said)
        row["prefills"], row["prefilled_tokens"] = len(tokens), sum(tokens)
        if self.with_pat:
            if not after.get("active"):
                raise RuntimeError(f"{self.name}: PAT is not active: {after.get('declined')}")
            for name in ("declined", "layers_on_base", "steps_on_base", "no_sharing"):
                if after[name]:
                    raise RuntimeError(f"{self.name}: {name}: {after[name]}")
            row["pat"] = {name: after[name] - before.get(name, 0) for name in COUNTED}
        return row


def in_order(chosen: Sequence[Point], rounds: Iterable[int]) -> Iterator[tuple[int, Point]]:
    """Every run of every point, numbered by itself; a round is once through all points."""
    for number in rounds:
        for point in chosen:
            for again in range(point.runs):
                yield number * point.runs + again, point


def keep(row: Row, point: Point) -> None:
    """Stores a row and prints what matters of it."""
    common.write_rows(f"bench_serving-{common.gpu_slug()}.jsonl", [row], KEY)
    shown = [column for column in COLUMNS if column in row]
    cells = "  ".join(f"{column} {row[column]:.1f}" for column in shown)
    print(f"{row['round']} {point.name:24} {row['backend']:16} {cells}", flush=True)


def run(options: argparse.Namespace, folder: Path) -> None:
    """All rounds over all points; rows are written as they come."""
    model = Path(options.model)
    tokenizer = options.tokenizer or model
    if options.model in shapes.SHAPES:
        if options.tokenizer is None:
            sys.exit(
                f"--model {options.model} has no tokenizer of its own: give --tokenizer FOLDER"
            )
        model = shapes.make(options.model, tokenizer, folder / options.model)
    elif not (model / "config.json").exists():
        sys.exit(f"--model {model} is neither a model folder nor one of {', '.join(shapes.SHAPES)}")
    smoke, *others = points(options.trace)
    chosen = others
    if options.points:
        chosen = [p for p in (smoke, *others) if any(part in p.name for part in options.points)]
    if not chosen:
        sys.exit(f"no point of {options.points}: {[p.name for p in (smoke, *others)]}")
    servers = [Contender(name, model, options, folder) for name in options.backends]
    try:
        for point in (smoke, *chosen):  # takes many seconds, while the servers start
            make_requests(point, tokenizer, folder)
        gc.freeze()  # all those numbers
        for server in servers:
            print(f"{server.name}: ready after {server.wait(START_PATIENCE_S):.0f} s", flush=True)
            info = server.call("/get_server_info")
            print(f"  max_total_num_tokens {info['max_total_num_tokens']}", flush=True)
        for point in (smoke, chosen[0]):  # first requests of a kind compile kernels
            for server in servers:
                server.measure(point, tokenizer)
        # A full garbage collection of SGLang's front process takes 0.3 s and more, and the burst
        # that it falls into begins so much later.
        for server in servers:
            server.call("/freeze_gc", {})
        deadline = time.monotonic() + options.budget_s
        constant = {
            "model": model.name,
            "server_arguments": " ".join(options.server_arguments),
            "rivals": "+".join(sorted(options.backends)),
            "max_total_tokens": options.max_total_tokens,
            **common.provenance(),
        }
        numbers = range(options.first_round, options.first_round + options.rounds)
        for number, point in in_order(chosen, numbers):
            if time.monotonic() > deadline:  # not between backends: every run is one of all
                print("the time is up", flush=True)
                return
            turn = number % len(servers)
            for server in servers[turn:] + servers[:turn]:
                row = {
                    "workload": point.workload,
                    "shared": point.shared,
                    "request_rate": point.request_rate,
                    "concurrency": point.concurrency,
                    "times": point.times,
                    "ids": point.ids,
                    "backend": server.name,
                    "round": number,
                    **server.measure(point, tokenizer),
                    **constant,
                }
                keep(row, point)
    except BaseException:
        for server in servers:
            print(server.tail(12), flush=True)
        raise
    finally:
        for server in servers:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--model", default="qwen3-8b", help="a shape of shapes.py, or a folder")
    parser.add_argument("--tokenizer", type=Path, help="a folder; default: the model's")
    parser.add_argument("--backends", type=words, default=["pat", "fa3"])
    parser.add_argument("--points", type=words, help="parts of their names; default: all but smoke")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="to add to stored rounds")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no run after that")
    parser.add_argument("--max-running", type=int, default=512)
    parser.add_argument("--max-total-tokens", type=int, default=120_000)
    parser.add_argument("--mem-fraction", type=float, default=0.85)
    parser.add_argument("--trace", type=Path, default=TRACE)
    add_plugin_option(parser)
    parser.add_argument("--cpu", action="store_true", help="a dry run in float32")
    parser.add_argument("--report", action="store_true", help="print what is stored and stop")
    parser.add_argument("server_arguments", nargs="*", help="after --: more for every server")
    options = parser.parse_args()
    if not options.report:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
        run(options, Path(tempfile.mkdtemp(prefix="pat-bench-serving-")))
    for path in sorted((common.ROOT / "results").glob("bench_serving-*.jsonl")):
        print(f"\n{path.name}")
        print(report(common.read_rows(path)))


if __name__ == "__main__":
    main()
