# SPDX-License-Identifier: MIT
"""HostPlanner: the planner's hot path (Python oracle until csrc/host is built)."""

from __future__ import annotations

from ._types import Int32Array
from .cost import CostModel
from .forest import Forest, build_segment_tree
from .layout import Capacity, lay_out
from .packing import Shape, pack_rows


class HostPlanner:
    """Plans a batch into the caller's words."""

    is_native = False

    def __init__(self, shape: Shape, model: CostModel, capacity: Capacity) -> None:
        self.shape, self.model, self.capacity = shape, model, capacity

    def plan(
        self, forest: Forest, leaf_of_row: Int32Array, host_lens: Int32Array, out: Int32Array
    ) -> int:
        """Writes the plan's words to ``out`` and returns their number."""
        tree = build_segment_tree(forest, leaf_of_row, host_lens)
        words = lay_out(tree, pack_rows(tree, self.shape, self.model), self.shape, self.capacity)
        out[: words.size] = words
        return int(words.size)
