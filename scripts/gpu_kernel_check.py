# SPDX-License-Identifier: MIT
"""PAT's kernels against an fp32 oracle on random forests, replayed from CUDA graphs.

    python scripts/gpu_kernel_check.py                 360 forests, 162 in chains, growing tails
    python scripts/gpu_kernel_check.py --path sm80     the A100 kernels on this GPU
    compute-sanitizer --tool memcheck python scripts/gpu_kernel_check.py --sanitize

One graph is captured for each padded batch size; all forests of a configuration run through it,
with a new plan each. Slots that hold no token are NaN, so is the output before each replay, and
padding rows have NaN queries: what must not be read or left unwritten shows. The same inputs go
through FlashAttention-3 (page size 1) where it can be imported; design.md section 6 bounds PAT's
errors by that kernel's: relative L2 at most 1.05x, largest absolute at most 1.5x a case, geometric
mean of the L2 ratios at most 1.01. Each replay is done twice and must repeat bit by bit.

Other forests are planned by a planner that makes chains wherever it can, with items of every tile,
whole and cut; in them tails grow, and rows outgrow theirs: those rows alone become NaN.

Writes results/kernel_check-<gpu>.jsonl: one object a case, then one {"case": "summary", ...}.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gpu_common as common
import numpy as np
import torch
from gpu_common import Row, geomean
from trees import KINDS, Layout, Tree, make_layout, random_tree

from pat_sglang import DecodePlanner, Forest, pat_decode
from pat_sglang.host import HostPlanner
from pat_sglang.packing import MAX_HORIZON, Search

PADDED = (8, 64, 256)  # captured batch sizes
L2_BOUND, MAX_BOUND, MEAN_BOUND = 1.05, 1.5, 1.01
# Without a reference kernel a case must stay below this relative error; bf16 kernels are at 0.004.
ABSOLUTE_BOUND = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROW_STEPS, GROW_ROWS = 400, 24


@dataclass(frozen=True)
class Config:
    """A geometry and how its cache is laid out."""

    group: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_size: int

    @property
    def name(self) -> str:
        heads = f"{self.group * self.kv_heads}/{self.kv_heads}"
        return f"{heads} d{self.head_dim} {self.dtype} p{self.page_size}"


CONFIGS = [
    Config(1, 8, 128, "bf16", 1),
    Config(3, 4, 128, "bf16", 1),
    Config(4, 8, 128, "bf16", 1),
    Config(4, 8, 128, "bf16", 16),
    Config(5, 2, 128, "bf16", 1),
    Config(7, 4, 128, "bf16", 16),
    Config(8, 8, 128, "bf16", 1),
    Config(8, 1, 128, "bf16", 1),
    Config(16, 2, 128, "bf16", 1),
    Config(4, 4, 128, "fp16", 1),
    Config(7, 2, 128, "fp16", 16),
    Config(1, 4, 64, "bf16", 1),
    Config(3, 3, 64, "bf16", 1),
    Config(8, 4, 64, "bf16", 16),
    Config(3, 3, 64, "fp16", 1),
    Config(16, 1, 64, "fp16", 1),
    Config(24, 2, 128, "bf16", 1),
    Config(24, 1, 64, "fp16", 16),
]
SANITIZE_CONFIGS = [CONFIGS[2], CONFIGS[0], CONFIGS[5], CONFIGS[15]]
SANITIZE_CASES = [
    ("uniform", 7),
    ("rl_groups", 24),
    ("all_shared", 40),
    ("nothing_shared", 5),
    ("tails_from_zero", 8),
    ("agents", 12),
]

# In chains: query rows of an item at most, one tile each; SMs that a plan is made for (for one SM,
# nothing is cut); kinds and sizes of the forests, in turn.
CHAIN_ROWS, CHAIN_SMS = (16, 64, 128), (1, 132)
CHAIN_KINDS = (
    *("rl_groups", "agents", "tails_from_zero", "uniform"),
    *("duplicates", "ragged", "all_shared"),
)
CHAIN_SIZES = (40, 64, 12, 200, 7)


def reference_kernel() -> Any:
    """FlashAttention-3 as SGLang has it, None where it cannot be imported."""
    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    except Exception as error:  # a missing wheel, or a library built for another torch
        print(f"no reference kernel, ratios are left out: {type(error).__name__}: {error}")
        return None
    return flash_attn_with_kvcache


class Rig:
    """Planner, caches and captured graphs of one configuration."""

    def __init__(self, config: Config, options: argparse.Namespace, fa3: Any) -> None:
        self.config, self.options, self.fa3 = config, options, fa3
        self.device = "cpu" if options.dry_run else "cuda"
        self.dtype = torch.float32 if options.dry_run else DTYPES[config.dtype]
        self.q_heads = config.group * config.kv_heads
        self.sm_scale = config.head_dim**-0.5
        self.slots, self.max_rows = options.pool, max(options.padded)
        extra = {"path": options.path} if options.path else {}
        self.planner = DecodePlanner(
            num_q_heads=self.q_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=self.dtype,
            device=self.device,
            max_rows=self.max_rows,
            max_tokens=self.slots,
            **extra,
        )
        generator = torch.Generator(self.device).manual_seed(7)

        def random(*shape: int) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=self.device)
            return values.to(self.dtype)

        cache = (self.slots, config.kv_heads, config.head_dim)
        self.k_clean, self.v_clean = random(*cache), random(*cache)
        self.k, self.v = torch.empty_like(self.k_clean), torch.empty_like(self.v_clean)
        self.queries = random(self.max_rows, self.q_heads, config.head_dim)
        self.q = torch.empty_like(self.queries)
        self.out = torch.empty_like(self.queries)
        # As SGLang has them: row 0 of req_to_token is padding, lengths and indices are int64.
        width = options.longest + GROW_STEPS + 64
        self.req_to_token = torch.zeros(
            self.max_rows + 1, width, dtype=torch.int32, device=self.device
        )
        self.seq_lens = torch.ones(self.max_rows, dtype=torch.int64, device=self.device)
        self.indices = torch.zeros(self.max_rows, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, Any] = {}

    def load(self, tree: Tree, seed: int, reserve: int = 0) -> None:
        """Puts a tree into the tables and the NaN-filled cache."""
        config = self.config
        self.tree = tree
        aligned = tree.at_page_size(config.page_size)
        self.forest = Forest(aligned.parent, aligned.length)
        pool_slots = self.slots // config.page_size * config.page_size
        self.layout: Layout = make_layout(aligned, config.page_size, seed, reserve, pool_slots)
        rows, rng = tree.num_rows, np.random.default_rng(seed)
        self.padded = next(p for p in self.options.padded if p >= rows)
        self.pool_rows = torch.from_numpy(rng.permutation(self.max_rows)[:rows] + 1).to(self.device)
        self.lens = tree.seq_lens.astype(np.int64)
        table = torch.from_numpy(self.layout.req_to_token).to(self.device)
        self.req_to_token.zero_()
        self.req_to_token[self.pool_rows, : table.shape[1]] = table
        self.seq_lens.fill_(1)
        self.seq_lens[:rows] = torch.from_numpy(self.lens).to(self.device)
        self.indices.zero_()
        self.indices[:rows] = self.pool_rows
        used = torch.from_numpy(self.layout.used_slots(tree.seq_lens)).long().to(self.device)
        for cache, clean in ((self.k, self.k_clean), (self.v, self.v_clean)):
            cache.fill_(math.nan)
            cache[used] = clean[used]
        shift = int(rng.integers(self.max_rows))
        self.q.fill_(math.nan)
        self.q[:rows] = self.queries.roll(shift, 0)[:rows]

    def plan(self, lag: int = 0) -> Any:
        """Plans what is loaded; host lengths may lag behind the device by `lag` tokens."""
        host_lens = np.maximum(self.lens - lag, 1).astype(np.int32)
        self.current = self.planner.plan(
            self.forest,
            self.tree.leaf,
            host_lens,
            self.seq_lens[: self.padded],
            self.req_to_token,
            self.indices[: self.padded],
        )
        return self.current

    @contextlib.contextmanager
    def chains(self, query_rows: int, num_sms: int) -> Iterator[None]:
        """Plans made meanwhile have chains wherever possible, of at most so many query rows."""
        host = self.planner.host
        self.planner.host = HostPlanner(
            replace(host.shape, sharing="on"),
            replace(host.model, num_sms=num_sms, part_ps=2_000_000, step_ps=1),
            host.capacity,
            native=False,
            search=Search(chain_rows=(query_rows,), without_chains=False),
        )
        try:
            yield
        finally:
            self.planner.host = host

    def append(self, tokens: np.ndarray) -> None:
        """Gives the rows more tokens, of which the host is not told."""
        for row, count in enumerate(tokens.tolist()):
            begin = int(self.lens[row])
            new = self.req_to_token[self.pool_rows[row], begin : begin + count].long()
            self.k[new], self.v[new] = self.k_clean[new], self.v_clean[new]
        self.lens += tokens
        self.seq_lens[: self.tree.num_rows] += torch.from_numpy(tokens).to(self.device)

    def advance(self, tell_lengths: bool) -> bool:
        """One more token for every row; False if a new plan had to be made."""
        self.lens += 1
        self.seq_lens[: self.tree.num_rows] += 1
        newest = self.req_to_token[self.pool_rows, self.seq_lens[: self.tree.num_rows] - 1].long()
        self.k[newest], self.v[newest] = self.k_clean[newest], self.v_clean[newest]
        lens = self.lens.astype(np.int32) if tell_lengths else None
        if self.planner.advance(self.current, host_lens=lens):
            return True
        self.plan()
        return False

    def decode(self) -> torch.Tensor:
        """PAT's output for the padded batch, through the graph of its size."""
        self.out.fill_(math.nan)
        padded, plan = self.padded, self.current

        def call() -> torch.Tensor:
            out = self.out[:padded]
            pat_decode(self.q[:padded], self.k, self.v, plan, sm_scale=self.sm_scale, out=out)
            return out

        if self.device == "cpu" or self.options.sanitize:  # the sanitizer is slow enough eagerly
            return call().clone()
        if padded not in self.graphs:
            self.graphs[padded] = common.capture(call)[0]
            self.out.fill_(math.nan)
        self.graphs[padded].replay()
        return self.out[:padded].clone()

    def oracle(self) -> torch.Tensor:
        table = self.req_to_token[self.pool_rows]
        rows = self.tree.num_rows
        return common.oracle(
            self.q[:rows], self.k_clean, self.v_clean, table, self.lens.tolist(), self.sm_scale
        )

    def reference(self) -> torch.Tensor | None:
        """The reference kernel on the clean cache."""
        if self.fa3 is None or self.device == "cpu":
            return None
        rows = self.tree.num_rows
        longest = int(self.lens.max())
        return self.fa3(
            q=self.q[:rows],
            k_cache=self.k_clean[:, None],
            v_cache=self.v_clean[:, None],
            page_table=self.req_to_token[self.pool_rows, :longest].contiguous(),
            cache_seqlens=self.seq_lens[:rows].int(),
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            max_seqlen_q=1,
            softmax_scale=self.sm_scale,
            causal=True,
        )

    def check(self, case: str, lag: int = 0) -> Row:
        """Errors and flags of what is loaded and planned."""
        rows = self.tree.num_rows
        result = self.decode()
        again = self.decode()
        expected = self.oracle()
        largest, relative = common.errors(result[:rows], expected)
        stats = self.current.stats
        row: Row = {
            "case": case,
            "config": self.config.name,
            "path": self.options.path or "default",
            "rows": rows,
            "padded": self.padded,
            "unique_tokens": stats.unique_tokens,
            "lag": lag,
            "items": stats.items,
            "chains": stats.chains,
            "partial_slots": stats.partial_slots,
            "pat_l2": relative,
            "pat_max": largest,
            "repeatable": torch.equal(result, again),
            "padding_is_zero": bool((result[rows:] == 0).all()),
        }
        reference = self.reference()
        row["ok"] = row["repeatable"] and row["padding_is_zero"]
        if reference is None:
            row["ok"] &= relative < ABSOLUTE_BOUND[self.dtype]
            return row
        row["ref_max"], row["ref_l2"] = common.errors(reference, expected)
        row["l2_ratio"] = error_ratio(relative, row["ref_l2"])
        row["max_ratio"] = error_ratio(largest, row["ref_max"])
        row["ok"] &= row["l2_ratio"] <= L2_BOUND and row["max_ratio"] <= MAX_BOUND
        return row


def error_ratio(mine: float, reference: float) -> float:
    """1 where neither errs: a row of one token is copied exactly."""
    if mine <= 1e-7 and reference <= 1e-7:
        return 1.0
    return mine / reference if reference > 0 else math.inf


def case_list(count: int, longest: int, padded: tuple[int, ...], seed: int) -> list[Tree]:
    """`count` trees: every kind, batch sizes around the captured ones."""
    rng = np.random.default_rng(seed)
    kinds, trees = list(KINDS), []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        most = padded[min(index // len(kinds) + int(rng.integers(0, 2)), len(padded) - 1)]
        low = padded[padded.index(most) - 1] + 1 if most != padded[0] else 1
        rows = int(rng.choice([most, int(rng.integers(low, most + 1))]))
        if kind == "one_long":
            if longest < 32768:
                kind = "ragged"
            rows = min(64, max(padded))
        trees.append(random_tree(kind, rows, seed * 1000 + index))
    return trees


def fitting(tree: Tree, options: argparse.Namespace, page_size: int, reserve: int) -> bool:
    """Whether the tree fits into the pool."""
    aligned = tree.at_page_size(page_size)
    tails = aligned.seq_lens - aligned.tail_begins() + reserve
    shared = aligned.length[aligned.reached()]
    pages = shared.sum() // page_size + (-(-tails // page_size)).sum() + 1
    return int(pages) * page_size <= options.pool


def smaller(tree: Tree, options: argparse.Namespace, page_size: int, reserve: int = 0) -> Tree:
    """The tree with as many of its first rows as fit."""
    rows = tree.num_rows
    if int(tree.seq_lens.max()) > options.longest:
        raise ValueError(f"{tree.name}: a row is longer than {options.longest}")
    while not fitting(tree, options, page_size, reserve):
        rows = rows // 2
        tree = Tree(tree.name, tree.parent, tree.length, tree.leaf[:rows], tree.seq_lens[:rows])
    return tree


class Check:
    """The whole run and its rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.deadline = time.monotonic() + options.budget_s
        self.fa3 = None if options.sanitize or options.dry_run else reference_kernel()
        self.provenance = common.provenance()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, row: Row) -> None:
        finite = {k: None if v in (math.inf, -math.inf) else v for k, v in row.items()}
        self.rows.append({**finite, **self.provenance})
        if not row["ok"]:
            shown = {k: v for k, v in row.items() if k not in ("items", "path")}
            print(f"  NOT WITHIN BOUNDS {shown}", flush=True)

    def run(self) -> None:
        configs = SANITIZE_CONFIGS if self.options.sanitize else CONFIGS
        if self.options.configs:
            configs = [CONFIGS[i] for i in self.options.configs]
        for number, config in enumerate(configs):
            if self.out_of_time():
                print("budget used up")
                return
            begin, first = time.monotonic(), len(self.rows)
            try:
                self.run_config(number, config)
            except Exception as error:
                traceback.print_exc()
                self.add({"case": "error", "config": config.name, "error": str(error), "ok": False})
                if "CUDA error" in str(error):
                    return  # the context is gone
            mine = self.rows[first:]
            worst = max((r.get("pat_l2") or math.inf for r in mine), default=math.inf)
            print(
                f"{config.name}: {len(mine)} cases, {sum(not r['ok'] for r in mine)} out of "
                f"bounds, worst L2 {worst:.2e}, {time.monotonic() - begin:.1f} s",
                flush=True,
            )

    def run_config(self, number: int, config: Config) -> None:
        rig = Rig(config, self.options, self.fa3)
        if self.options.sanitize:
            trees = [random_tree(kind, rows, 3) for kind, rows in SANITIZE_CASES]
        else:
            padded, longest = self.options.padded, self.options.longest
            trees = case_list(self.options.cases, longest, padded, number)
        for index, tree in enumerate(trees):
            if self.out_of_time():
                return
            tree = smaller(tree, self.options, config.page_size)
            lag = index % 4 if index % 3 == 0 else 0
            rig.load(tree, seed=number * 1000 + index)
            rig.plan(lag)
            row = rig.check(tree.name, lag)
            if index % 4 == 0:  # an equal plan, made anew, gives equal bits
                before = rig.decode()
                rig.plan(lag)
                row["replan_equal"] = torch.equal(before, rig.decode())
                row["ok"] &= row["replan_equal"]
            self.add(row)
        kinds = ["tails_from_zero"] if self.options.sanitize else ["tails_from_zero", "ragged"]
        if not self.options.sanitize and number % 4 == 2 and self.options.longest >= 32768:
            kinds.append("one_long")
        for kind in kinds:
            self.grow(rig, kind, number)
        self.chain_cases(rig, number)

    def chain_cases(self, rig: Rig, number: int) -> None:
        """Forests in chains, with items of every tile that holds two requests."""
        limits = [rows for rows in CHAIN_ROWS if rows // rig.config.group > 1]
        for index in range(self.options.chains):
            if self.out_of_time():
                return
            limit, turn = limits[index % len(limits)], index // len(limits)
            kind = CHAIN_KINDS[(number + index) % len(CHAIN_KINDS)]
            rows = min(CHAIN_SIZES[(number + index) % len(CHAIN_SIZES)], rig.max_rows)
            tree = random_tree(kind, rows, 500 + number * 100 + index)
            tree = smaller(tree, self.options, rig.config.page_size)
            with rig.chains(limit, CHAIN_SMS[turn % len(CHAIN_SMS)]):
                rig.load(tree, seed=number * 1000 + 500 + index)
                rig.plan(lag=index % 3)
                self.add(rig.check(f"chains{limit}-{tree.name}", index % 3))
        for limit in limits[:1] if self.options.sanitize else limits:
            with rig.chains(limit, CHAIN_SMS[number % len(CHAIN_SMS)]):
                self.outgrow(rig, number, limit)
        with rig.chains(limits[number % len(limits)], 1):
            self.grow(rig, "rl_groups", number)

    def outgrow(self, rig: Rig, number: int, limit: int) -> None:
        """Every fifth row outgrows its tail unseen: it becomes NaN, the others stay right."""
        tree = random_tree("rl_groups", 6 if self.options.sanitize else GROW_ROWS, 70 + number)
        reserve = MAX_HORIZON + 8
        tree = smaller(tree, self.options, rig.config.page_size, reserve)
        rig.load(tree, seed=78, reserve=reserve)
        rig.plan()
        outgrown = np.arange(tree.num_rows) % 5 == 1
        rig.append(np.where(outgrown, MAX_HORIZON + 1, 1))
        assert rig.planner.advance(rig.current)
        out = rig.decode()[: tree.num_rows]
        rest = torch.from_numpy(~outgrown)
        largest, relative = common.errors(out[rest], rig.oracle()[rest])
        row: Row = {
            "case": f"outgrown{limit}-{tree.name}",
            "config": rig.config.name,
            "path": self.options.path or "default",
            "rows": tree.num_rows,
            "items": rig.current.stats.items,
            "chains": rig.current.stats.chains,
            "pat_l2": relative,
            "pat_max": largest,
            "repeatable": torch.equal(out[rest], rig.decode()[: tree.num_rows][rest]),
            "only_outgrown_are_nan": bool(out[torch.from_numpy(outgrown)].isnan().all()),
        }
        row["ok"] = (
            row["repeatable"]
            and row["only_outgrown_are_nan"]
            and relative < ABSOLUTE_BOUND[rig.dtype]
        )
        self.add(row)

    def grow(self, rig: Rig, kind: str, number: int) -> None:
        """Tails that grow by a token a step: advance() until the horizon, then a new plan."""
        steps = 12 if self.options.sanitize else self.options.grow
        rows = 6 if self.options.sanitize else GROW_ROWS
        tree = random_tree(kind, rows, 50 + number)
        tree = smaller(tree, self.options, rig.config.page_size, steps)
        rig.load(tree, seed=77, reserve=steps)
        rig.plan()
        worst, replans, checks = self._grown(rig, 0), 0, 1
        for step in range(1, steps + 1):
            replanned = not rig.advance(tell_lengths=step % 2 == 0)
            replans += replanned
            if replanned or step < 4 or step % 37 == 0 or step == steps:
                worst, checks = max(worst, self._grown(rig, step)), checks + 1
        row = rig.check(f"grow-{tree.name}")
        row |= {"steps": steps, "replans": replans, "checks": checks, "worst_l2": worst}
        row["ok"] &= worst < ABSOLUTE_BOUND[rig.dtype]
        self.add(row)

    def _grown(self, rig: Rig, step: int) -> float:
        relative = common.errors(rig.decode()[: rig.tree.num_rows], rig.oracle())[1]
        if not relative < ABSOLUTE_BOUND[rig.dtype]:
            print(f"  {rig.config.name} {rig.tree.name} step {step}: L2 {relative:.3g}", flush=True)
        return relative

    def summary(self) -> Row:
        """The numbers of design.md section 6 over all cases."""
        cases = [row for row in self.rows if "pat_l2" in row]
        rated = [row for row in cases if row.get("l2_ratio")]
        ratios = [row["l2_ratio"] for row in rated]
        result: Row = {
            "case": "summary",
            "path": self.options.path or "default",
            "cases": len(cases),
            "out_of_bounds": sum(not row["ok"] for row in self.rows),
            "not_finite": sum(row["pat_l2"] is None for row in cases),
            "not_repeatable": sum(not row["repeatable"] for row in cases),
            "worst_l2": max((row["pat_l2"] or 0 for row in cases), default=None),
            "cases_with_chains": sum(row["chains"] > 0 for row in cases),
        }
        if rated:
            result |= {
                "rated_cases": len(rated),
                "reference": "fa3 page 1",
                "l2_ratio_geomean": geomean(ratios),
                "l2_ratio_max": max(ratios),
                "l2_ratio_above_bound": sum(r > L2_BOUND for r in ratios),
                "max_ratio_max": max(row["max_ratio"] for row in rated),
                "max_ratio_above_bound": sum(row["max_ratio"] > MAX_BOUND for row in rated),
                "mean_within_bound": geomean(ratios) <= MEAN_BOUND,
            }
        return {**result, **self.provenance}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20, help="forests a configuration")
    parser.add_argument("--chains", type=int, default=9, help="forests a configuration in chains")
    parser.add_argument("--grow", type=int, default=GROW_STEPS, help="steps of growing tails")
    parser.add_argument("--path", choices=["sm80", "sm90"], help="kernel path (default: the GPU's)")
    parser.add_argument(
        "--configs", type=lambda s: [int(x) for x in s.split(",")], help="indices of CONFIGS"
    )
    parser.add_argument("--budget-s", type=float, default=math.inf)
    parser.add_argument("--sanitize", action="store_true", help="a small set, for the sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: PAT's CPU path, small")
    options = parser.parse_args()
    options.grow = min(options.grow, GROW_STEPS)
    small = options.sanitize or options.dry_run
    if options.sanitize:
        options.chains = 3
    options.padded = (8, 64) if small else PADDED
    options.pool = (1 << 15) if small else (1 << 17)
    options.longest = 1 << 14 if small else 1 << 15
    check = Check(options)
    begin = time.monotonic()
    check.run()
    summary = check.summary()
    print(summary, f"\n{time.monotonic() - begin:.1f} s", sep="", flush=True)
    if not small:
        rows = [*check.rows, summary]
        name = f"kernel_check-{common.gpu_slug()}.jsonl"
        common.write_rows(name, rows, ("case", "config", "path"))
    seen = summary["cases_with_chains"] if options.chains else summary["cases"]
    sys.exit(bool(summary["out_of_bounds"]) or not seen)


if __name__ == "__main__":
    main()
