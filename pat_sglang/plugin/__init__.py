# SPDX-License-Identifier: MIT
"""The SGLang plug-in: the only package here that imports sglang.

register() is the entry point of group ``sglang.srt.plugins``. SGLang calls it once in every
process that may parse arguments or run a scheduler, so it does cheap things only: it accepts the
name `pat`, hooks argument resolution, and wraps the backend builders. Everything else happens in
the wrapped builder, in a scheduler process that was asked for PAT (builder.py).
"""

from __future__ import annotations

import logging

from pat_sglang import envs


def register() -> None:
    """Make ``--attention-backend pat`` and ``PAT_SGLANG=1`` work. Idempotent."""
    try:
        from . import builder, hooks, server_args
    except ImportError as error:  # SGLang's loader would leave a traceback and "invalid choice"
        if envs.STRICT.get():
            raise
        logging.getLogger(__name__).error(
            "pat-sglang does not fit this SGLang (%s), decode stays on SGLang's own backends: "
            "install sglang 0.5.17, or drop `--attention-backend pat`",
            error,
        )
        return

    server_args.accept_name()
    hooks.install_translation(server_args.translate_hook)
    builder.wrap_registry()
