# SPDX-License-Identifier: MIT
"""The name `pat` on the command line, translated into the base backend before SGLang resolves.

About forty places of SGLang decide by backend name, so a new name must never reach them. What the
user asked for is kept on the ServerArgs object itself (``_pat``, plain builtins): it is pickled to
the scheduler processes, and several engines in one process do not disturb each other.
"""

from __future__ import annotations

import logging
from typing import Any

from pat_sglang import envs

from . import compat

logger = logging.getLogger("pat_sglang")

NAME = "pat"
FLAG = "_pat"
NAME_FIELDS = ("attention_backend", "decode_attention_backend", "prefill_attention_backend")


def accept_name() -> None:
    """Let argparse take ``pat`` for the three backend options. Idempotent."""
    from sglang.srt import server_args

    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])


def requested(server_args: Any) -> bool:
    """Whether decode of this server should run PAT."""
    return bool(getattr(server_args, FLAG, None)) or envs.PAT_SGLANG.get()


def translate(server_args: Any) -> None:
    """Replace the name ``pat`` by the base backend and remember that it was there. Idempotent.

    Raises:
        EnvError: PAT was asked for and a PAT_SGLANG_* variable is not valid.
    """
    named = [field for field in NAME_FIELDS if getattr(server_args, field, None) == NAME]
    if not named:
        if envs.PAT_SGLANG.get():
            envs.check_all()
            _flag(server_args, envs.PAT_SGLANG.name)
        return
    envs.check_all()
    base = envs.BASE.get() or _base_of_device(server_args)
    for field in named:
        setattr(server_args, field, base)
    if "attention_backend" in named or "decode_attention_backend" in named:
        _flag(server_args, "--" + named[0].replace("_", "-"))
    elif not envs.PAT_SGLANG.get():
        logger.warning(
            "pat-sglang: PAT is decode attention; --prefill-attention-backend pat alone only "
            "selects the base backend. Use --attention-backend pat."
        )


def translate_hook(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook on ServerArgs.__post_init__ (to 0.5.19) and ServerArgs.resolve_once (0.5.19+)."""
    translate(server_args)


def _flag(server_args: Any, asked_by: str) -> None:
    if getattr(server_args, FLAG, None) is None:
        setattr(server_args, FLAG, {"asked_by": asked_by})


def _base_of_device(server_args: Any) -> str | None:
    """None leaves the choice to SGLang; its CPU default (intel_amx) is no base of PAT."""
    device = getattr(server_args, "device", None)
    if device == "cpu" or (device is None and compat.switched_on("SGLANG_USE_CPU_ENGINE")):
        return "torch_native"
    return None
