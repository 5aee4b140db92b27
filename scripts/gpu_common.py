# SPDX-License-Identifier: MIT
"""What the GPU scripts share: provenance, limits, result files, graphs, timing, the fp32 oracle.

Imported first by every script beside it: it also puts the repository root on sys.path.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from pat_sglang import calibrate  # noqa: E402 - found on that path

Row = dict[str, Any]

L2_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU below
COLD_REPEATS, FEWEST_COLD = 30, 10
COLD_BUDGET_US = 10_000.0  # replays of one measure together, from FEWEST_COLD on
WARM_BATCHES, WARM_REPEATS = 5, 10
WARM_BUDGET_US = 1_000.0  # of one batch
WARM_SPIN_CYCLES = 4_000_000  # some 2 ms: enough to launch all
ORACLE_BYTES = 1 << 30  # of K and V in fp32 that the oracle takes at once


@dataclass(frozen=True)
class GpuLimits:
    """Rates that the physical limit of a cell is computed from."""

    copy_bytes_per_s: float
    matrix_flop_per_s: float


# H100: the constants of anchors.md, so that ratios compare. H200: a device-to-device copy and an
# 8192^3 bf16 product measured here (KINDS.md). Other GPUs take the copy rate of the same run.
GPU_LIMITS = {"h100": GpuLimits(3.0e12, 800e12), "h200": GpuLimits(4.3e12, 790e12)}


def limit_us(limits: GpuLimits, kv_bytes: int, flops: int) -> float:
    """What physics allows: the bytes once at the copy rate, or the products at the matrix rate."""
    return 1e6 * max(kv_bytes / limits.copy_bytes_per_s, flops / limits.matrix_flop_per_s)


def gpu_name() -> str:
    """The name torch gives the GPU, or 'cpu'."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def gpu_slug() -> str:
    """Short name for result files: h100, h200, a100, ..."""
    words = gpu_name().lower().replace("-", " ").split()
    return next((w for w in words if w[0] in "abhl" and w[1:].rstrip("s").isdigit()), words[-1])


def version_of(package: str) -> str | None:
    """Installed version, None if absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree; PAT_COMMIT where the tree is a copy, whose .git may lag."""
    if "PAT_COMMIT" in os.environ:
        return os.environ["PAT_COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> Row:
    """Where and with what a number was measured (design.md section 9)."""
    return {
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sglang": version_of("sglang"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


# Result files


def result_paths(name: str) -> list[Path]:
    """results/<name>, and the same under $OUT (what comes back from a lent machine)."""
    folders = [ROOT / "results"]
    if os.environ.get("OUT"):
        folders.append(Path(os.environ["OUT"]))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return [folder / name for folder in folders]


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(name: str, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Writes rows to results/<name>: replaces those with an equal key, keeps the others."""
    paths = result_paths(name)

    def identity(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in key)

    merged = {identity(row): row for row in [*read_rows(paths[0]), *rows]}
    text = "".join(json.dumps(row) + "\n" for row in merged.values())
    for path in paths:
        path.write_text(text)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; nan for nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


# Graphs and timing


def capture(fn: Callable[[], torch.Tensor], warmups: int = 2) -> tuple[Any, torch.Tensor]:
    """`fn` warmed up on a side stream, then captured. Returns the graph and fn's output tensor."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph, out


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def time_once(graph: Any) -> float:
    """Microseconds of one replay, L2 as it is: to choose the number of repeats by."""
    begin, end = _event(), _event()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def time_cold(graph: Any, flush: torch.Tensor, expected_us: float = 0.0) -> float:
    """Median microseconds of a replay after `flush` was written: L2 holds none of the KV.

    30 replays, and down to 10 of a graph that is expected to take a millisecond or more.
    """
    repeats = COLD_REPEATS
    if expected_us > 0:
        repeats = max(FEWEST_COLD, min(COLD_REPEATS, int(COLD_BUDGET_US / expected_us)))
    return calibrate.time_cold(graph, flush, repeats)


def time_warm(graph: Any, expected_us: float) -> float:
    """Microseconds of a replay in back-to-back replays: median over batches of the mean.

    5 batches of 10, and down to 3 batches of 2 of a graph that is expected to take long. They are
    queued behind a kernel that spins: a late host is no part of them.
    """
    batches, repeats = WARM_BATCHES, WARM_REPEATS
    if expected_us * repeats > WARM_BUDGET_US:
        batches, repeats = 3, max(2, int(WARM_BUDGET_US / expected_us))
    pairs = [(_event(), _event()) for _ in range(batches)]
    graph.replay()
    torch.cuda._sleep(WARM_SPIN_CYCLES)
    for begin, end in pairs:
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 / repeats for begin, end in pairs)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second of a large device-to-device copy."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(10):
        begin, end = _event(), _event()
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times)


def empty_graph_us(flush: torch.Tensor) -> float | None:
    """What the cold measure gives for a graph that does next to nothing."""
    try:
        tiny = torch.zeros(1, device="cuda")
        return time_cold(capture(lambda: tiny.add_(1))[0], flush)
    except RuntimeError:
        return None


# The oracle


def oracle(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: Sequence[int],
    sm_scale: float,
    rows: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention of the given rows in fp32 on the same inputs: [len(rows), q_heads, d] fp32.

    Written apart from pat_sglang.reference on purpose: the two are compared in dry runs. Rows are
    taken in chunks of similar length whose K and V fit into ORACLE_BYTES.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32: containers turn it on
    rows = range(q.shape[0]) if rows is None else rows
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // kv_heads
    out = torch.empty(len(rows), q.shape[1], head_dim, dtype=torch.float32, device=q.device)
    order = sorted(range(len(rows)), key=lambda i: seq_lens[rows[i]])
    at = 0
    while at < len(order):
        shortest, chunk = seq_lens[rows[order[at]]], [order[at]]
        for i in order[at + 1 :]:
            length = seq_lens[rows[i]]
            size = (len(chunk) + 1) * length * kv_heads * head_dim * 4 * 2
            if size > ORACLE_BYTES or length > 2 * shortest + 64:
                break
            chunk.append(i)
        at += len(chunk)
        index = torch.tensor([rows[i] for i in chunk], device=q.device)
        lens = torch.tensor([seq_lens[rows[i]] for i in chunk], device=q.device)
        longest = seq_lens[rows[chunk[-1]]]
        live = torch.arange(longest, device=q.device) < lens[:, None]  # [b, t]
        slots = req_to_token[index, :longest].long()
        slots = torch.where(live, slots, slots[:, :1])  # any live slot: nothing foreign is read
        keys, values = k_cache[slots].float(), v_cache[slots].float()  # [b, t, kv_heads, d]
        queries = q[index].float().view(len(chunk), kv_heads, group, head_dim)
        scores = torch.einsum("bhgd,bthd->bhgt", queries, keys) * sm_scale
        scores.masked_fill_(~live[:, None, None, :], float("-inf"))
        result = torch.einsum("bhgt,bthd->bhgd", scores.softmax(-1), values)
        target = torch.tensor(chunk, device=q.device)
        out[target] = result.reshape(len(chunk), q.shape[1], head_dim)
    return out


def errors(out: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, relative L2 error); nan and inf never pass as small."""
    difference = out.float() - reference
    if not bool(torch.isfinite(difference).all()):
        return math.inf, math.inf
    return float(difference.abs().max()), float(difference.norm() / reference.norm())
