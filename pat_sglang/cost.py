# SPDX-License-Identifier: MIT
"""Tiles the kernels are built for, and what they cost on the GPUs we know.

All costs are integers in picoseconds, so that the Python oracle and the C++ planner decide alike.
Two kinds of time appear:

* *SM time*: what a work item takes from one streaming multiprocessor when the GPU is full;
  the sum over all items divided by the number of SMs is the time of a perfectly balanced step.
* *solo time*: how long one work item lasts, by all its warps, beside as many others as its SM
  holds; the last item of a step is bounded by it, which is what limits how long an unsplit run may
  be. A private step of a chain has the solo time of the narrow tile where all warps share it, and
  ``ITEM_WARPS`` times as much where one warp computes it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Tile(NamedTuple):
    """Shape of a work item: query rows (request row x head of the group) x KV tokens a step."""

    rows: int
    tokens: int


# NOTE: csrc/plan_layout.h lists the same tiles in the same order. Warps of the narrow tile share
# the tokens of a step, all for the same 16 query rows; those of the others share the query rows.
TILES = (Tile(16, 64), Tile(64, 64), Tile(128, 64))
ALL_TILES = tuple(range(len(TILES)))
FRAGMENT_ROWS = 16  # query rows of one warp's MMA: what a private step of a chain is computed for
# Warps of an item. Fragment f of a chain is computed by warp f % ITEM_WARPS alone; the only one of
# a narrow item by all of them together. (On Hopper two halves of a block have eight warps for 128
# rows: what the model says of their private steps is pessimistic there.)
ITEM_WARPS = 4

PerTile = tuple[int, int, int]


@dataclass(frozen=True)
class CostModel:
    """Constants of one GPU, for one KV head of dimension 128 in a 16-bit type.

    Attributes:
        num_sms: streaming multiprocessors.
        item_ps: [tiles] SM time a work item costs before its first token.
        token_ps: [tiles] SM time of a KV token that comes from device memory.
        reread_ps: [tiles] SM time of a KV token another tile of the same pack has just read (L2).
        solo_item_ps: [tiles] solo time before the first token.
        solo_token_ps: [tiles] solo time a token.
        private_token_ps: solo time a token of private steps, had all four warps of the item that
            token; a warp alone takes ITEM_WARPS times as long.
        part_ps: SM time to write and merge one partial of one query row.
        step_ps: SM time of one private step of a chain before its first token.
        merge_ps: how much later a step ends if there is any partial to merge.
        provenance: where the numbers come from.
    """

    num_sms: int
    item_ps: PerTile
    token_ps: PerTile
    reread_ps: PerTile
    solo_item_ps: PerTile
    solo_token_ps: PerTile
    private_token_ps: int
    part_ps: int
    step_ps: int
    merge_ps: int
    provenance: str

    def scaled_to(self, head_dim: int) -> CostModel:
        """The model for another head dimension: everything that is bytes or FLOPs scales."""

        def scale(values: PerTile) -> PerTile:
            a, b, c = (max(1, v * head_dim // 128) for v in values)
            return (a, b, c)

        return CostModel(
            num_sms=self.num_sms,
            item_ps=self.item_ps,
            token_ps=scale(self.token_ps),
            reread_ps=scale(self.reread_ps),
            solo_item_ps=self.solo_item_ps,
            solo_token_ps=scale(self.solo_token_ps),
            private_token_ps=max(1, self.private_token_ps * head_dim // 128),
            part_ps=max(1, self.part_ps * head_dim // 128),
            step_ps=self.step_ps,
            merge_ps=self.merge_ps,
            provenance=self.provenance,
        )

    def words(self) -> list[int]:
        """Flat form handed to the C++ planner, in the order of its ``CostModel`` struct."""
        return [
            self.num_sms,
            *self.item_ps,
            *self.token_ps,
            *self.reread_ps,
            *self.solo_item_ps,
            *self.solo_token_ps,
            self.private_token_ps,
            self.part_ps,
            self.step_ps,
            self.merge_ps,
        ]


H100 = CostModel(
    num_sms=132,
    item_ps=(1_500_000, 7_000_000, 3_900_000),
    token_ps=(22_800, 12_400, 16_000),
    reread_ps=(14_800, 7_000, 17_600),
    solo_item_ps=(2_450_000, 2_050_000, 6_250_000),
    solo_token_ps=(33_000, 31_500, 26_000),
    private_token_ps=27_200,
    part_ps=48_700,
    step_ps=271_000,
    merge_ps=1_000_000,
    provenance="H100 SXM 80 GB, 2026-11-22: 10,000 plans of 18 trees, 9 unshared batches and 9 "
    "random forests at five head layouts timed, then random descent on those times; the solo times "
    "are those of items that share their SM with others; merge_ps by hand, 2026-11-23, from "
    "tree 5 at 16/8 with and without partials (results/ablation-h100.jsonl)",
)
H200 = replace(H100, provenance="those of the H100; not fitted on an H200")
A100 = CostModel(
    num_sms=108,
    item_ps=H100.item_ps,
    token_ps=(30_000, 30_000, 40_000),
    reread_ps=(20_000, 25_000, 40_000),
    solo_item_ps=H100.solo_item_ps,
    solo_token_ps=(24_000, 30_000, 50_000),
    private_token_ps=24_000,
    part_ps=120_000,
    step_ps=H100.step_ps,
    merge_ps=H100.merge_ps,
    provenance="scaled from H100 by bandwidth and tensor-core rate; not measured on A100",
)


def cost_model_for(gpu_name: str, num_sms: int, head_dim: int) -> CostModel:
    """The shipped constants for a GPU, scaled to its SM count and the head dimension."""
    base = A100 if "A100" in gpu_name else H200 if "H200" in gpu_name else H100
    model = base.scaled_to(head_dim)
    if num_sms == model.num_sms:
        return model
    return CostModel(**{**model.__dict__, "num_sms": num_sms})


def tiles_of(query_rows: int, allowed: tuple[int, ...] = ALL_TILES) -> list[int]:
    """Tile index of each work item a pack of ``query_rows`` needs: largest tiles, then the rest.

    The largest tile of ``allowed`` (ascending tile indices) comes first; the last one is the
    smallest that holds what is left.
    """
    largest = allowed[-1]
    full, rest = divmod(query_rows, TILES[largest].rows)
    kinds = [largest] * full
    if rest:
        kinds.append(next(k for k in allowed if rest <= TILES[k].rows))
    return kinds
