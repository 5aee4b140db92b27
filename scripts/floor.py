# SPDX-License-Identifier: MIT
"""The measured floor of a cell: the stream kernels of csrc/bench, as a peer like the others.

A stream reads the K and V of every slot of the batch once, in the order of the slot list, reads q
and writes it to out: the bytes any attention has to move, and nothing else. scripts/bench_floor.py
measures all variants and writes down which one is used for all cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpu_common as common
import torch
from peers import Case, Peer

DIGEST_WORDS = 1 << 14  # kMaxWarps of csrc/bench/stream.h


@dataclass(frozen=True)
class Variant:
    """A stream kernel and the order it reads in: all heads of a slot, or head after head."""

    kernel: str
    by_head: bool

    def __str__(self) -> str:
        return f"{self.kernel} {'heads' if self.by_head else 'slots'}"

    @staticmethod
    def parse(text: str) -> Variant:
        kernel, _, order = text.rpartition(" ")
        return Variant(kernel, order == "heads")


DEFAULT = Variant("cp.async 256x8x3", False)  # until bench_floor has run on this kind of GPU


def module() -> Any:
    """The stream kernels, ready to be captured."""
    from pat_sglang import jit

    loaded = jit.load_stream()
    loaded.prepare()
    return loaded


def variants() -> list[Variant]:
    """All there are."""
    loaded = module()
    names = [loaded.variant_name(i) for i in range(loaded.num_variants())]
    return [Variant(name, by_head) for name in names for by_head in (False, True)]


def chosen(gpu: str) -> Variant:
    """The one variant of all floors on this kind of GPU, by results/floor-<gpu>.jsonl."""
    for path in common.result_paths(f"floor-{gpu}.jsonl"):
        for row in common.read_rows(path):
            if row["kind"] == "chosen":
                return Variant.parse(row["variant"])
    print(f"no results/floor-{gpu}.jsonl: floors are of {DEFAULT}, see bench_floor.py", flush=True)
    return DEFAULT


class Floor(Peer):
    """A stream through the slots of a case."""

    def __init__(self, page_size: int, variant: Variant) -> None:
        super().__init__(page_size)
        self.variant = variant

    def prepare(self, case: Case) -> None:
        self.case = case
        self.module = module()
        names = [self.module.variant_name(i) for i in range(self.module.num_variants())]
        self.number = names.index(self.variant.kernel)
        self.slots = case.stream_slots()
        self.out = torch.empty_like(case.q)
        self.digest = torch.zeros(DIGEST_WORDS, dtype=torch.int32, device=case.q.device)

    def plan(self) -> None:
        """Nothing: the slot list is the input."""

    def run(self) -> torch.Tensor:
        self.module.stream(
            self.case.k, self.case.v, self.slots, self.case.q, self.out, self.digest,
            self.number, self.variant.by_head,
        )  # fmt: skip
        return self.out

    def check(self) -> bool:
        """Whether the last run read every slot once (odd times, to be exact) and copied q."""
        index = self.slots.long()
        read = fold(self.case.k[index]) ^ fold(self.case.v[index])
        return fold(self.digest) == read and torch.equal(self.out, self.case.q)


def fold(tensor: torch.Tensor) -> int:
    """Exclusive or of the 32-bit words of a tensor."""
    words = tensor.contiguous().view(torch.int32).reshape(-1)
    while words.numel() > 1:
        half = words.numel() // 2
        rest = words[2 * half :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return int(words)
