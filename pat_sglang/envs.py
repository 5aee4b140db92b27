# SPDX-License-Identifier: MIT
"""Every PAT_SGLANG_* environment variable, in one table. Imports neither torch nor SGLang.

The table is read at every access, never cached, so tests and child processes see what is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

BASE_BACKENDS = ("fa3", "flashinfer", "triton", "torch_native")


class EnvError(ValueError):
    """A PAT_SGLANG_* variable has a value nobody can act on."""


@dataclass(frozen=True)
class EnvVar(Generic[T]):
    """One variable: where it is read, what it may be, what it means."""

    name: str
    default: T
    kind: str  # the accepted values, as words
    parse: Callable[[str], T]
    meaning: str

    def get(self) -> T:
        """The value in force; unset and empty mean the default.

        Raises:
            EnvError: the value is not one of ``kind``.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except (ValueError, KeyError):
            raise EnvError(f"{self.name}={text!r} is not valid: expected {self.kind}") from None


def _switch(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


PAT_SGLANG = EnvVar(
    "PAT_SGLANG", False, "0 or 1", _switch, "1: wrap whatever attention backend SGLang chooses"
)
BASE = EnvVar[str | None](
    "PAT_SGLANG_BASE",
    None,
    " | ".join(BASE_BACKENDS),
    _one_of(*BASE_BACKENDS),
    "base backend that `pat` stands for; default: SGLang's own choice for the model and GPU",
)
FORCE = EnvVar(
    "PAT_SGLANG_FORCE",
    "auto",
    "on | off",
    _one_of("on", "off", "auto"),
    "on: every shared run is packed, even where that is predicted slower; off: the unshared plan",
)
STRICT = EnvVar(
    "PAT_SGLANG_STRICT", False, "0 or 1", _switch, "1: every fallback to the base is an error"
)
VALIDATE = EnvVar(
    "PAT_SGLANG_VALIDATE",
    False,
    "0 or 1",
    _switch,
    "1: prove every plan against req_to_token (slow; synchronises)",
)
CACHE_DIR = EnvVar(
    "PAT_SGLANG_CACHE_DIR",
    Path("~/.cache/pat_sglang").expanduser(),
    "a folder",
    lambda text: Path(text).expanduser(),
    "where built kernels are kept",
)
DISABLE_JIT = EnvVar(
    "PAT_SGLANG_DISABLE_JIT", False, "0 or 1", _switch, "1: use the built kernels, never compile"
)
RACECHECK = EnvVar(
    "PAT_SGLANG_RACECHECK",
    False,
    "0 or 1",
    _switch,
    "1: Hopper kernels whose barriers compute-sanitizer's racecheck can follow (slower)",
)
WORKSPACE_MIB = EnvVar(
    "PAT_SGLANG_WORKSPACE_MIB", 256, "a whole number above 0", _positive, "GPU memory cap, in MiB"
)

TABLE: tuple[EnvVar[Any], ...] = (
    PAT_SGLANG,
    BASE,
    FORCE,
    STRICT,
    VALIDATE,
    CACHE_DIR,
    DISABLE_JIT,
    RACECHECK,
    WORKSPACE_MIB,
)


def check_all() -> None:
    """Raise one EnvError that names every bad value."""
    problems = []
    for variable in TABLE:
        try:
            variable.get()
        except EnvError as error:
            problems.append(str(error))
    if problems:
        raise EnvError("; ".join(problems))


def unknown_names() -> list[str]:
    """Set variables that look like ours and are not: most likely misspelt."""
    known = {variable.name for variable in TABLE}
    return sorted({name for name in os.environ if name.startswith("PAT_SGLANG_")} - known)
