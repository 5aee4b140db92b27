# SPDX-License-Identifier: MIT
"""The ragged suite stays what it was when it was fixed, before anything was tuned for it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from forests import MAX_UNIQUE_TOKENS, ragged_suite, regret_suite

DIGEST = "6ab2811683037fce"


def test_suite_is_frozen() -> None:
    digest = hashlib.sha256()
    for tree in ragged_suite():
        for array in (tree.parent, tree.length, tree.leaf, tree.seq_lens):
            digest.update(array.astype(np.int32).tobytes())
    assert digest.hexdigest()[:16] == DIGEST


def test_suite_is_what_it_says() -> None:
    suite = {tree.name: tree for tree in ragged_suite()}
    assert len(suite) == 40
    marked = regret_suite()
    assert len(marked) == 12
    assert {tree.name.partition("-")[2] for tree in marked} == {"rl", "agents", "long"}
    for name, tree in suite.items():
        assert tree.unique_tokens() <= MAX_UNIQUE_TOKENS
        tails = tree.seq_lens - tree.tail_begins()
        if name.endswith("-rl"):
            groups = np.bincount(tree.leaf)
            assert 4 <= len(groups) <= 32 and (groups == groups[0]).all() and 8 <= groups[0] <= 64
            assert tree.length.min() >= 512 and tree.length.max() <= 4096
            assert tails.min() >= 1 and tails.max() <= 16384
        elif name.endswith("-agents"):
            assert 2048 <= tree.length[0] <= 10240 and (tree.parent[1:] >= 0).all()
        else:
            assert sorted(tree.seq_lens)[-1] == 32768 and tree.num_rows == 64
            assert sorted(tree.seq_lens)[-2] <= 2048
