# SPDX-License-Identifier: MIT
"""HostPlanner: the planner's hot path, C++ where it builds, else the Python oracle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import jit
from ._types import Int32Array
from .cost import CostModel
from .forest import Forest, build_segment_tree
from .layout import Capacity, CapacityError, lay_out
from .packing import Search, Shape, pack_rows

logger = logging.getLogger(__name__)

_SHARING = ("auto", "on", "off")  # order of the C++ enum


class HostPlanner:
    """Plans a batch into the caller's words; one thread at a time.

    Args:
        shape: the attention layer and the sizes of the plan.
        model: constants of the GPU.
        capacity: the fixed buffers.
        native: False: use the Python oracle without trying C++.
        search: narrows what the Python oracle may choose from; needs ``native=False``.

    Attributes:
        is_native: whether the C++ planner is used.

    Raises:
        ValueError: a value of ``shape`` or ``model`` makes no sense, or ``search`` is given to C++.
    """

    def __init__(
        self,
        shape: Shape,
        model: CostModel,
        capacity: Capacity,
        *,
        native: bool = True,
        search: Search | None = None,
    ) -> None:
        if native and search is not None:
            raise ValueError(
                "search needs native=False: the C++ planner always searches everything"
            )
        self.shape, self.model, self.capacity, self.search = shape, model, capacity, search
        self._plan: Any = None
        self._describe_failure: Any = None
        module = _native_module() if native else None
        if module is not None:
            layer = [shape.group_size, shape.num_kv_heads, shape.max_parts, shape.max_items]
            self._plan, self._describe_failure = module.create_planner(
                [*layer, _SHARING.index(shape.sharing)],
                model.words(),
                [capacity.rows, capacity.slots],
            )
        self.is_native = module is not None

    def plan(
        self,
        forest: Forest,
        leaf_of_row: Sequence[int] | Int32Array,
        host_lens: Sequence[int] | Int32Array,
        out: Int32Array,
    ) -> int:
        """Writes the words of a plan, see layout.py.

        Args:
            forest: prefix-tree nodes of the batch.
            leaf_of_row: int32 ``[rows]``, deepest node of each row, -1: none.
            host_lens: int32 ``[rows]``, sequence lengths as the host knows them.
            out: int32 ``[words]``, contiguous and writable.

        Returns:
            Number of words written.

        Raises:
            ValueError: the batch is inconsistent, or not even one item a row fits the shape.
            CapacityError: more rows, unique tokens or words than the buffers hold.
        """
        leaves = np.ascontiguousarray(leaf_of_row, np.int32)
        lens = np.ascontiguousarray(host_lens, np.int32)
        if self._plan is None:
            return self._plan_in_python(forest, leaves, lens, out)
        batch = (forest.parent, forest.length, leaves, lens)
        try:
            count = self._plan(*batch, out)
        except BufferError:  # DLPack refuses read-only arrays; rare enough to copy
            count = self._plan(*(array.copy() for array in batch), out)
        if count < 0:
            raise CapacityError(str(self._describe_failure()))
        return int(count)

    def _plan_in_python(
        self, forest: Forest, leaves: Int32Array, lens: Int32Array, out: Int32Array
    ) -> int:
        if lens.size > self.capacity.rows:
            raise CapacityError(
                f"the batch has {lens.size} rows, the planner was made for "
                f"{self.capacity.rows}: raise max_rows"
            )
        tree = build_segment_tree(forest, leaves, lens)
        packing = pack_rows(tree, self.shape, self.model, self.search)
        words = lay_out(tree, packing, self.shape, self.capacity)
        if words.size > out.size:
            raise CapacityError(f"the plan has {words.size} words, the buffer holds {out.size}")
        out[: words.size] = words
        return int(words.size)


_missing_logged = False


def _native_module() -> Any:
    """The C++ planner, or None after one line in the log."""
    global _missing_logged
    try:
        return jit.load_host()
    except jit.BuildError as error:
        if not _missing_logged:
            _missing_logged = True
            logger.warning("pat_sglang: planning in Python, about 100x slower: %s", error)
        return None
