# SPDX-License-Identifier: MIT
"""How plans and slots get to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import layout
from ._types import Int32Array
from .layout import PlanTables

if TYPE_CHECKING:
    from .plan import DecodePlan


class Transfer(NamedTuple):
    """What brings plans and slots to the device, on the current stream.

    On CUDA ``bind_plan`` of csrc/binding.cc, which knows the buffers; else a ``CpuTransfer``.
    ``tensors``: ``seq_lens``, ``req_to_token``, ``req_pool_indices``, see ``DecodePlanner.plan``.
    """

    acquire: Callable[[int], None]  # (turn): waits until this buffer of the ring may be written
    # (turn, *tensors): the plan in this buffer, and its slots. False: by the copy engine, slower
    upload: Callable[..., bool]
    append: Callable[..., None]  # (*tensors): the slots that are new since
    # (seq_lens, new_slots): at most one slot a row, see ``DecodePlanner.append_one``
    append_one: Callable[[torch.Tensor, torch.Tensor], None]


class CpuTransfer:
    """The same in PyTorch.

    Args:
        plan: whose buffers are filled.
        ring: int32 ``[words]`` each, where new plans lie.
    """

    def __init__(self, plan: DecodePlan, ring: Sequence[Int32Array]) -> None:
        self.plan, self.ring = plan, ring

    def acquire(self, turn: int) -> None:
        """Nothing is in flight on a CPU."""

    def upload(
        self,
        turn: int,
        seq_lens: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> bool:
        """See ``Transfer``; raises ValueError and changes nothing if a tensor is too short."""
        plan, words = self.plan, self.ring[turn]
        tables = PlanTables.parse(words)
        _check_rows(len(tables.tails), seq_lens, req_pool_indices)
        count = int(words[layout.H_WORDS])
        plan.words[:count] = torch.from_numpy(words[:count])
        for (slot, length, _, begin), rep in zip(
            tables.runs.tolist(), tables.reps.tolist(), strict=True
        ):
            line = req_to_token[req_pool_indices[rep]]
            plan.slots[slot : slot + length] = line[begin : begin + length]
        plan.filled[: len(tables.tails)] = torch.from_numpy(tables.tails[:, 1].copy())
        self.append(seq_lens, req_to_token, req_pool_indices)
        return True

    def append(
        self, seq_lens: torch.Tensor, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor
    ) -> None:
        """See ``Transfer``; as the fill kernel in csrc/device/fill.cu."""
        plan = self.plan
        tails = PlanTables.parse(plan.words.numpy()).tails
        rows = len(tails)
        _check_rows(rows, seq_lens, req_pool_indices)
        overflows = seq_lens[:rows] > torch.from_numpy(tails[:, 1] + tails[:, 2])
        plan.live_lens[:rows] = torch.where(overflows, -1, seq_lens[:rows])
        for row, (slot, begin, cap, _) in enumerate(tails.tolist()):
            have = int(plan.filled[row])
            end = min(int(seq_lens[row]), begin + cap)
            if have < end:
                line = req_to_token[req_pool_indices[row]]
                plan.slots[slot + have - begin : slot + end - begin] = line[have:end]
                plan.filled[row] = end

    def append_one(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        """See ``Transfer``; as the append kernel in csrc/device/append.cu."""
        plan = self.plan
        if len(seq_lens) != len(new_slots):
            raise ValueError(f"seq_lens has {len(seq_lens)} rows, new_slots {len(new_slots)}")
        tails = PlanTables.parse(plan.words.numpy()).tails[: len(seq_lens)]
        for row, (slot, begin, cap, _) in enumerate(tails.tolist()):
            length, have = int(seq_lens[row]), int(plan.live_lens[row])
            if length == have:
                continue
            position = have - begin  # negative, too, of a row that is marked
            fits = length == have + 1 and 0 <= position < cap
            if fits:
                plan.slots[slot + position] = new_slots[row]
                plan.filled[row] = length
            plan.live_lens[row] = length if fits else -1


def _check_rows(rows: int, seq_lens: torch.Tensor, req_pool_indices: torch.Tensor) -> None:
    if min(len(seq_lens), len(req_pool_indices)) < rows:
        raise ValueError(
            f"the plan has {rows} rows, but req_pool_indices has {len(req_pool_indices)} and "
            f"seq_lens {len(seq_lens)}"
        )
