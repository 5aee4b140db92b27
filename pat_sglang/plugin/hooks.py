# SPDX-License-Identifier: MIT
"""Installing hooks in SGLang. patches/README.md is the ledger of every target named here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
SCHEDULER = "sglang.srt.managers.scheduler"


def install_translation(hook: Callable[..., None]) -> None:
    """Run ``hook(server_args)`` before SGLang resolves its arguments.

    Registered here, applied by load_plugins(). Both names are hooked where both exist: a msgspec
    ServerArgs (0.5.20+) never calls a patched __post_init__.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    for method in ("__post_init__", "resolve_once"):
        target = f"{SERVER_ARGS}.{method}"
        installed = any(entry[1] is hook for entry in HookRegistry._hooks.get(target, ()))
        if hasattr(ServerArgs, method) and not installed:
            HookRegistry.register(target, hook, HookType.BEFORE)


def install_runtime(on_init_new: Callable[..., None], on_state: Callable[..., None]) -> None:
    """Hook the running scheduler; called by the backend builder, in scheduler processes only.

    The state hook is left out where no scheduler module is loaded (benchmark.one_batch): importing
    it would cost seconds and nobody would ask.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    _after(ForwardBatch, "init_new", on_init_new)
    scheduler = sys.modules.get(SCHEDULER)
    if scheduler is not None and hasattr(scheduler.Scheduler, "get_internal_state"):
        _after(scheduler.Scheduler, "get_internal_state", on_state)


def _after(owner: type, name: str, hook: Callable[..., None]) -> None:
    """Call ``hook(result, *args, **kwargs)`` after ``owner.name``. Idempotent.

    Not through HookRegistry: it silently skips a target that another plug-in has hooked before.
    """
    raw = owner.__dict__[name]
    function = raw.__func__ if isinstance(raw, classmethod) else raw
    if hook in getattr(function, "_pat_hooks", ()):
        return

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        hook(result, *args, **kwargs)
        return result

    wrapper._pat_hooks = (*getattr(function, "_pat_hooks", ()), hook)  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapper) if isinstance(raw, classmethod) else wrapper)
