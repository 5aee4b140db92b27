# SPDX-License-Identifier: MIT
"""The ragged suite stays what it was when it was fixed, before anything was tuned for it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from forests import ragged_suite, regret_suite

DIGEST = "6ab2811683037fce"


def test_suite_is_frozen() -> None:
    digest = hashlib.sha256()
    for tree in ragged_suite():
        for array in (tree.parent, tree.length, tree.leaf, tree.seq_lens):
            digest.update(array.astype(np.int32).tobytes())
    assert digest.hexdigest()[:16] == DIGEST


def test_regret_suite_is_a_part_of_it_with_every_kind() -> None:
    suite = {tree.name: tree for tree in ragged_suite()}
    assert len(suite) == 40  # results are told apart by these names
    part = regret_suite()
    assert len({tree.name for tree in part}) == 12
    for tree in part:
        assert np.array_equal(tree.seq_lens, suite[tree.name].seq_lens)
    assert {tree.name.partition("-")[2] for tree in part} == {"rl", "agents", "long"}
