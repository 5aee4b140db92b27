# SPDX-License-Identifier: MIT
"""Wraps SGLang's attention backend builders: base instance in, PAT instance (or the base) out.

Runs in scheduler processes, after the model and the KV pools exist and before any CUDA graph is
captured. Kernels are built or loaded here, never in a forward. Whatever PAT cannot do at start
ends in decline(): one line, a count, and the base backend, untouched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import pat_sglang
from pat_sglang import envs
from pat_sglang.metrics import METRICS
from pat_sglang.plan import explain, workspace_for

from . import compat, eligibility, feed, hooks, server_args
from .memory import GpuMemory

if TYPE_CHECKING:
    from pat_sglang import DecodePlanner

    from .backend import PatState

logger = logging.getLogger("pat_sglang")

Builder = Callable[[Any], Any]


class StrictError(RuntimeError):
    """PAT_SGLANG_STRICT=1, and something would have fallen back to the base."""


class _Declined(Exception):
    """PAT does not serve this model runner; the message says why."""


_live: list[PatState] = []  # of the backends built in this process; the last one serves


def wrap_registry() -> None:
    """Wrap every registered builder, and register the name ``pat`` itself. Idempotent."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for name, build in list(ATTENTION_BACKENDS.items()):
        if name != server_args.NAME and not hasattr(build, "_pat_base"):
            ATTENTION_BACKENDS[name] = wrap(name, build)
    ATTENTION_BACKENDS.setdefault(server_args.NAME, build_by_name)


def wrap(name: str, build: Builder) -> Builder:
    """Builder of backend ``name`` that returns a PAT backend when the server asked for it."""

    @functools.wraps(build)
    def wrapper(runner: Any) -> Any:
        backend = build(runner)
        if not wanted(name, runner):
            return backend
        return extend(name, runner, backend)

    wrapper._pat_base = build  # type: ignore[attr-defined]
    return wrapper


def wanted(name: str, runner: Any) -> bool:
    """Whether the instance being built serves the decode steps of a server that asked for PAT."""
    if getattr(runner, "is_draft_worker", False) or not server_args.requested(runner.server_args):
        return False
    prefill, decode = compat.backend_names(runner)
    # Two instances are built when the names differ; the other one never sees a decode step.
    return prefill == decode or decode in (name, server_args.NAME)


def build_by_name(runner: Any) -> Any:
    """Factory of the literal name ``pat``.

    Only reached when ServerArgs were made before the plug-ins were loaded, so the name was never
    translated: pick a base as SGLang would for a plain model.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    base = envs.BASE.get() or _default_base(torch.device(runner.device).type)
    if getattr(runner, "is_draft_worker", False):
        return ATTENTION_BACKENDS[base](runner)
    setattr(runner.server_args, server_args.FLAG, {"asked_by": "attention_backend='pat'"})
    return ATTENTION_BACKENDS[base](runner)


def extend(name: str, runner: Any, backend: Any) -> Any:
    """The base instance with PAT decode, or as it is when PAT cannot serve this runner."""
    from .backend import adopt

    try:
        envs.check_all()
        state = _make_state(name, runner)
    except _Declined as declined:
        return decline(name, str(declined), backend)
    except envs.EnvError:
        raise
    except Exception as error:  # an SGLang that differs from what was probed: the base still runs
        logger.debug("pat-sglang: not active", exc_info=True)
        first = (str(error).splitlines() or [""])[0]
        return decline(name, f"{type(error).__name__}: {first}", backend)
    structure_feed = state.feed
    setattr(runner, feed.ATTRIBUTE, structure_feed)
    hooks.install_runtime(feed.on_init_new, on_internal_state)
    _announce(name, runner, state)
    _live.append(state)
    return adopt(backend, state)


def decline(name: str, reason: str, backend: Any) -> Any:
    """Serve through the base: one line that says why, a count, and no change to the instance.

    Raises:
        StrictError: under PAT_SGLANG_STRICT.
    """
    if envs.STRICT.get():
        raise StrictError(f"pat-sglang: not active: {reason}")
    METRICS.count_reason("declined", reason)
    METRICS.gauge("active", 0)
    METRICS.gauge("base", name)
    logger.warning("pat-sglang: not active, decode stays on %s: %s", name, reason)
    hooks.install_runtime(feed.on_init_new, on_internal_state)
    return backend


def on_internal_state(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER hook on Scheduler.get_internal_state: the `pat` block of /get_server_info."""
    block = {"version": pat_sglang.__version__, **METRICS.as_dict()}
    best = _live[-1].best if _live else None
    if best is not None:
        block["best_plan"] = explain(best.words)
    result.internal_state["pat"] = block


def _make_state(name: str, runner: Any) -> PatState:
    from .backend import PatState

    installed = compat.sglang_version()
    reason = compat.unsupported_version(installed) or compat.missing_seams()
    if reason is None and name not in envs.BASE_BACKENDS:
        supported = ", ".join(envs.BASE_BACKENDS)
        reason = f"{name} is no base backend of PAT; choose --attention-backend {supported}"
    reason = reason or eligibility.runner_reason(runner)
    if reason is not None:
        raise _Declined(reason)
    geometries = _geometries(runner)
    pool = runner.token_to_kv_pool
    slots = runner.req_to_token_pool
    device = slots.req_to_token.device
    make = functools.partial(
        _make_planners,
        geometries,
        pool.dtype,
        device,
        _num_slots(pool),
        functools.partial(_gpu_memory, runner, device),
    )
    planners = make(slots.size)
    return PatState(
        feed=feed.StructureFeed(),
        planners=planners,
        make_planners=functools.partial(_remake_planners, name, make),
        max_rows=slots.size,
        dtype=pool.dtype,
        kv_pool=pool,
        req_to_token_pool=slots,
        validate=envs.VALIDATE.get(),
    )


def _geometries(runner: Any) -> list[eligibility.Geometry]:
    """Distinct (q heads, KV heads, head dim) of the layers PAT can serve, from the model itself."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    reasons = {layer: eligibility.layer_reason(layer) for layer in layers}
    found = dict.fromkeys(eligibility.geometry(m) for m in layers if reasons[m] is None)
    if not found:
        why = ", ".join(sorted({r for r in reasons.values() if r})) or "no attention layer found"
        raise _Declined(f"no layer of this model can run on PAT ({why})")
    return list(found)


def _make_planners(
    geometries: list[eligibility.Geometry],
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    measure: Callable[[], GpuMemory],
    max_rows: int,
) -> dict[eligibility.Geometry, DecodePlanner]:
    from pat_sglang import DecodePlanner

    try:
        memory = measure() if device.type == "cuda" else None
        cap = _workspace_cap(geometries, max_tokens, max_rows, memory)
        return {
            (num_q_heads, num_kv_heads, head_dim): DecodePlanner(
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=str(device),
                max_rows=max_rows,
                max_tokens=max_tokens,
                max_workspace_bytes=cap,
                sharing=envs.FORCE.get(),
            )
            for num_q_heads, num_kv_heads, head_dim in geometries
        }
    except _Declined:
        raise
    except Exception as error:
        # No compiler, an unsupported GPU, a workspace cap below the minimum, free memory in pieces,
        # or a bug of ours: none of them may stop a server that the base can run.
        logger.debug("pat-sglang: no planner", exc_info=True)
        first = (str(error).splitlines() or [""])[0]
        hint = "`python -m pat_sglang doctor` tells more"
        if isinstance(error, ValueError):
            mib = envs.WORKSPACE_MIB.get()
            hint = f"PAT_SGLANG_WORKSPACE_MIB is {mib}, --max-running-requests counts rows"
        elif isinstance(error, torch.OutOfMemoryError):
            hint = "lower --mem-fraction-static"
        raise _Declined(f"{type(error).__name__}: {first} ({hint})") from error


def _workspace_cap(
    geometries: list[eligibility.Geometry], max_tokens: int, max_rows: int, memory: GpuMemory | None
) -> int:
    """Bytes that the planner of one geometry may take: fewer than asked where the GPU is full."""

    def needed(cap: int) -> int:
        return sum(workspace_for(*heads, max_rows, max_tokens, cap)[1] for heads in geometries)

    cap = (envs.WORKSPACE_MIB.get() << 20) // len(geometries)
    wanted = needed(cap)
    if memory is None or wanted <= memory.room:
        return cap
    cap = memory.room // len(geometries)
    try:
        reduced = needed(cap)
    except ValueError:
        raise _Declined(memory.advice(wanted)) from None
    logger.warning(
        "pat-sglang: %s. Until then they take %d MiB, and long runs are cut less finely",
        memory.advice(wanted),
        reduced >> 20,
    )
    return cap


def _gpu_memory(runner: Any, device: torch.device) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fraction, of = compat.static_fraction(runner)
    return GpuMemory(free=free + cached, fraction_of=of or total, fraction=fraction)


def _remake_planners(
    name: str, make: Callable[[int], dict[eligibility.Geometry, DecodePlanner]], max_rows: int
) -> dict[eligibility.Geometry, DecodePlanner]:
    """Planners for more rows; none, and the base from now on, when that fails."""
    try:
        return make(max_rows)
    except _Declined as declined:
        decline(name, str(declined), None)
        return {}


def _num_slots(pool: Any) -> int:
    """Slots that can be in use; page 0 of the pool is padding."""
    pool = getattr(pool, "full_kv_pool", pool)
    return int(pool.size) + int(pool.page_size)


def _default_base(device: str) -> str:
    if device == "cpu":
        return "torch_native"
    major, _ = torch.cuda.get_device_capability()
    return "fa3" if major == 9 else "flashinfer"


def _announce(name: str, runner: Any, state: PatState) -> None:
    device = state.req_to_token_pool.req_to_token.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no kernels)"
    mib = sum(planner.workspace_bytes for planner in state.planners.values()) / (1 << 20)
    native = all(planner.host.is_native for planner in state.planners.values())
    shapes = ", ".join(f"{hq}/{hkv} heads d{d}" for hq, hkv, d in state.planners)
    for gauge, value in (
        ("active", 1),
        ("base", name),
        ("gpu", gpu),
        ("kernels", f"{state.dtype} {shapes}"),
        ("workspace_mib", round(mib, 1)),
        ("planner", "C++" if native else "Python, slow"),
    ):
        METRICS.gauge(gauge, value)
    logger.info(
        "pat-sglang %s: decode attention by PAT on base %s, SGLang %s, %s, %s %s, "
        "workspace %.1f MiB, up to %d rows",
        pat_sglang.__version__,
        name,
        compat.sglang_version(),
        gpu,
        str(state.dtype).removeprefix("torch."),
        shapes,
        mib,
        state.max_rows,
    )
    if misspelt := envs.unknown_names():
        logger.warning("pat-sglang: unknown variables ignored: %s", ", ".join(misspelt))
