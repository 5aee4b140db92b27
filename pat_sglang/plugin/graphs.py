# SPDX-License-Identifier: MIT
"""Which of SGLang's decode graphs append each row's new slot by themselves.

SGLang gives a backend the captured batch twice: before the capture of a graph, and inside it, where
what is launched becomes part of the graph. A replay names no graph, but the size of its batch and
the address of its lengths, both fixed at capture. Several graphs may have both in common (with and
without LoRA): a replay is known to append if all of them do.
"""

from __future__ import annotations

from typing import Any

_Key = tuple[int, int]  # padded rows, address of seq_lens


class AppendingGraphs:
    """The captures seen so far."""

    def __init__(self) -> None:
        self._without: dict[_Key, int] = {}  # graphs that do not append, or not yet
        self._begun: _Key | None = None  # of the graph that is being captured, unless it appends

    def begin(self, forward_batch: Any) -> None:
        """A graph is about to be captured for this batch."""
        self._begun = key = _key(forward_batch)
        self._without[key] = self._without.get(key, 0) + 1

    def append(self, forward_batch: Any) -> None:
        """The append of this batch has just been captured in it, perhaps not for the first time."""
        if self._begun == _key(forward_batch):
            self._without[self._begun] -= 1
            self._begun = None

    def all_append(self, forward_batch: Any) -> bool:
        """Whether every graph that the replay of this batch may be of appends."""
        return self._without.get(_key(forward_batch)) == 0


def _key(forward_batch: Any) -> _Key:
    return forward_batch.batch_size, forward_batch.seq_lens.data_ptr()
