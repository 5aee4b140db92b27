# SPDX-License-Identifier: MIT
"""The ragged suite: 40 forests from one seed, fixed before the kernels and the planner were tuned.

What a server decodes, other than the uniform published trees: RL sampling (groups of one prompt,
each with tails from one token to 16K), agents that fork off a long root and carry chains of turns,
and one row of 32K tokens among 63 short ones. Nothing here may be changed to better a number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from trees import Builder, Tree

SUITE_SEED = 20261122
SUITE_SIZE, REGRET_SIZE = 40, 12
MAX_UNIQUE_TOKENS = 1 << 20  # of pat20, the largest published tree; larger forests are drawn again
LONG_ROW = 32768
# Ten in a row; a forest's kind is its index modulo 10.
ORDER = ("rl", "agents", "rl", "long", "rl", "agents", "rl", "rl", "agents", "long")


def _rl(b: Builder) -> None:
    """4 to 32 groups of 8 to 64 samples: prompts of 0.5 to 4K, tails log-uniform from 1 to 16K."""
    groups, samples = b.log_int(4, 32), b.log_int(8, 64)
    for _ in range(groups):
        prompt = b.node(-1, b.log_int(512, 4096))
        for _ in range(samples):
            b.row(prompt, b.log_int(1, 16384))


def _agents(b: Builder) -> None:
    """4 to 48 agents on one root of 2 to 10K: up to 8 turns each, then 1 to 8 rows fork off."""
    root = b.node(-1, b.log_int(2048, 10240))
    for _ in range(b.log_int(4, 48)):
        tip = root
        for _ in range(int(b.rng.integers(0, 9))):
            tip = b.node(tip, b.log_int(16, 1024))
        for _ in range(b.log_int(1, 8)):
            b.row(tip, b.log_int(1, 2048))


def _long(b: Builder) -> None:
    """One row of 32K tokens and 63 short ones, about half of all on a common prefix."""
    prefix = b.node(-1, b.log_int(64, 1024))
    for index in range(64):
        leaf = prefix if b.rng.random() < 0.5 else -1
        total = LONG_ROW - (b.depth[leaf] if leaf >= 0 else 0)
        b.row(leaf, total if index == 0 else b.log_int(1, 1024))


_KINDS: dict[str, Callable[[Builder], None]] = {"rl": _rl, "agents": _agents, "long": _long}


def _forest(index: int) -> Tree:
    rng = np.random.default_rng([SUITE_SEED, index])
    kind = ORDER[index % len(ORDER)]
    while True:
        builder = Builder(rng)
        _KINDS[kind](builder)
        tree = builder.tree(f"ragged{index:02d}-{kind}")
        if tree.unique_tokens() <= MAX_UNIQUE_TOKENS:
            return tree


def ragged_suite() -> list[Tree]:
    """The 40 forests, ragged00 to ragged39, rows in random order."""
    return [_forest(index) for index in range(SUITE_SIZE)]


def regret_suite() -> list[Tree]:
    """The 12 of them that the planner's choice is searched around: every third from the first."""
    return [_forest(3 * index) for index in range(REGRET_SIZE)]
