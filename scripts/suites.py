# SPDX-License-Identifier: MIT
"""What bench_decode measures: four suites of cells, a cell being a tree and a head layout.

published  the 20 trees of PAT's paper at its four head layouts
tp8        8 query heads on one KV head (a 70B model on 8 GPUs), the trees tabled in anchors.md
plain      nothing shared: batch 1 to 256 at 1K to 32K
ragged     the 40 forests of forests.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forests import ragged_suite
from trees import PUBLISHED, Tree, plain, published

HEAD_DIM = 128
MAX_KV_BYTES = 60e9  # cells with more KV are left out of `plain`

_EVERY = ("fa3_p1", "fa3_p64", "fi_decode_p1", "fi_decode_p64", "xqa_p64")
TP8_TREES = (1, 4, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)  # tabled in anchors.md
PLAIN_ROWS = (1, 8, 64, 256)
PLAIN_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Suite:
    """Trees (made when asked for), head layouts "query/kv" and backends measured by default."""

    name: str
    trees: Callable[[], list[Tree]]
    heads: tuple[str, ...]
    backends: tuple[str, ...]

    def has(self, tree: Tree, heads: str) -> bool:
        """Whether a cell belongs to the suite: its KV must fit."""
        return kv_bytes(tree.unique_tokens(), heads) <= MAX_KV_BYTES


def kv_bytes(tokens: int, heads: str) -> int:
    """Bytes of K and V of that many tokens, 16 bits an element."""
    return tokens * int(heads.split("/")[1]) * HEAD_DIM * 2 * 2


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "published",
            lambda: [published(number) for number in range(1, len(PUBLISHED) + 1)],
            ("32/32", "16/8", "32/8", "64/8"),
            (*_EVERY, "cascade", "pat", "pat_p64"),
        ),
        Suite(
            "tp8",
            lambda: [published(number) for number in TP8_TREES],
            ("8/1",),
            (*_EVERY, "cascade", "pat", "pat_p64"),
        ),
        Suite(
            "plain",
            lambda: [plain(rows, tokens) for rows in PLAIN_ROWS for tokens in PLAIN_TOKENS],
            ("32/8", "8/1", "32/32"),
            (*_EVERY, "pat", "pat_p64"),
        ),
        Suite(
            "ragged",
            ragged_suite,
            ("32/8", "64/8"),
            ("fa3_p1", "fa3_p64", "fi_decode_p1", "fi_decode_p64", "pat"),
        ),
    )
}
