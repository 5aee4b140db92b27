# SPDX-License-Identifier: MIT
"""From the ForwardBatch.init_new hook to the backend: the batch about to run, and its structure.

The batch travels on the ModelRunner (attribute ``_pat_feed``), not on the ForwardBatch: SGLang
copies that one field by field before the forward and drops everything it does not know. It is
taken once, so a dummy forward (warm-up, capture) can never see the structure of an earlier step.
The tree is read when the batch is taken, in the same thread and the same step: by then the backend
has launched what a step without any change needs.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy.typing as npt

from pat_sglang import envs
from pat_sglang.metrics import METRICS

from .structure import BatchStructure, StructureTracker

logger = logging.getLogger("pat_sglang")

ATTRIBUTE = "_pat_feed"


class StructureFeed:
    """One slot between the hook (writer) and the backend (reader), both on the scheduler thread."""

    def __init__(self) -> None:
        self.tracker = StructureTracker()
        self.fired = False
        self._seen = METRICS.repeated({"hook_fired": 1})
        self._pending: Any = None  # the ScheduleBatch of the decode step to come
        self._checked = False

    def on_forward(self, batch: Any) -> None:
        """A ForwardBatch was just made from this ScheduleBatch."""
        self.fired = True
        self._seen.times += 1
        if batch.forward_mode.is_decode() and batch.spec_info is None:
            self._pending = batch
        else:
            if batch.forward_mode.is_decode():
                METRICS.count_reason("steps_on_base", "speculative decode")
            self._pending = None
            self.tracker.drop_if_touched(batch.reqs or ())

    @property
    def reqs(self) -> list[Any] | None:
        """The request of each row of the step to come; None: not known."""
        return None if self._pending is None else self._pending.reqs

    def rows(self, forward_batch: Any) -> int:
        """Rows of the step to come; DP attention appends others behind them as padding.

        Not one a request: beam search has rows that no request stands for.
        """
        of = forward_batch.rids if self._pending is None else self._pending.seq_lens
        return min(len(of), int(forward_batch.batch_size))

    def expected(self, rows: int) -> BatchStructure | None:
        """What ``take`` will most likely return, if that is the structure of the last step."""
        batch = self._pending
        if batch is None or len(batch.reqs) != rows:
            return None
        return self.tracker.expected(batch.reqs)

    def take(self, host_lens: npt.NDArray[Any]) -> BatchStructure | None:
        """The structure of a decode step whose live rows are so long, once; None: not known."""
        batch, self._pending = self._pending, None
        if batch is None:
            return None
        if len(batch.reqs) != len(host_lens):
            # Beam search, which also moves what a row has written so far to other rows: each step
            # is planned anew, from what req_to_token has.
            return self.tracker.unknown("rows that are no requests (beam search)")
        return self.tracker.observe(batch, host_lens)

    def check_fired(self) -> None:
        """Called at real steps with a new plan: SGLang swallows hooks that failed to install.

        Raises:
            RuntimeError: the hook never fired, under PAT_SGLANG_STRICT.
        """
        if self._checked:
            return
        self._checked = True
        if self.fired:
            return
        message = (
            "pat-sglang: the hook on ForwardBatch.init_new never fired, so no prefix is shared. "
            "Is another plug-in replacing it, or is this SGLang version not supported? "
            "`python -m pat_sglang doctor` tells."
        )
        if envs.STRICT.get():
            raise RuntimeError(message)
        logger.warning(message)


def on_init_new(
    result: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any
) -> None:
    """AFTER hook on ForwardBatch.init_new."""
    feed = getattr(model_runner, ATTRIBUTE, None)
    if feed is not None:
        feed.on_forward(batch)
