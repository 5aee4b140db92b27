# SPDX-License-Identifier: MIT
"""Whether the planners' buffers fit into the GPU memory that SGLang has left free.

The KV pool is sized and allocated before any attention backend is built, so PAT never takes a slot
from it (the one exception, SGLANG_ENABLE_POST_CAPTURE_KV_SIZING, is off unless somebody sets it).
PAT's buffers live in what ``--mem-fraction-static`` leaves over, which graph capture and
activations need as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 1 << 20

# What must be left for capture and activations: the floor of SGLang's own estimate
# (ServerArgs, mem_fraction_static: "constant meta data + activation slack").
HEADROOM = 512 * MIB


@dataclass(frozen=True)
class GpuMemory:
    """Numbers of one GPU, in bytes, right before PAT allocates."""

    free: int  # of the driver, and of torch's cache
    fraction_of: int  # what --mem-fraction-static is a fraction of
    fraction: float | None  # its value in force; None: not known

    @property
    def room(self) -> int:
        """What PAT may take at most."""
        return max(self.free - HEADROOM, 0)

    def advice(self, wanted: int) -> str:
        """How much is needed, how much there is, and what to lower by how much."""
        missing = wanted - self.free + HEADROOM
        lower = -(-100 * missing // self.fraction_of) / 100  # rounded up
        change = f"by {lower:g}"
        if self.fraction is not None:
            change += f", from {self.fraction:g} to {self.fraction - lower:g}"
        return (
            f"PAT's buffers need {_mib(wanted)} MiB and {HEADROOM // MIB} MiB must stay free, "
            f"{self.free // MIB} MiB are free: lower --mem-fraction-static {change} "
            "(or --max-total-tokens, where that sets the KV pool)"
        )


def _mib(size: int) -> int:
    return math.ceil(size / MIB)
