# SPDX-License-Identifier: MIT
"""DecodePlanner and DecodePlan: fixed buffers, one upload a new plan, at most one launch a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import __version__, jit, layout, saved_cost
from ._types import Int32Array
from .cost import FRAGMENT_ROWS, TILES
from .forest import Forest
from .host import HostPlanner
from .layout import Capacity, CapacityError, PlanTables, capacity_for
from .metrics import METRICS
from .packing import MAX_HORIZON, Shape
from .transfer import CpuTransfer, Transfer

logger = logging.getLogger("pat_sglang")

RING = 4  # pinned upload buffers: the scheduler runs at most a step or two ahead of the device
LAG = 8  # tokens by which host lengths may lag behind the device
_NOTHING_SHARED = Forest.empty()
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

Lengths = Sequence[int] | Int32Array | torch.Tensor


@dataclass(frozen=True)
class PlanStats:
    """What a plan does, in KV tokens of one layer."""

    rows: int
    unique_tokens: int  # every shared token once
    unshared_tokens: int  # what a kernel that knows no prefixes reads
    planned_tokens: int  # what the plan reads, a token once for every tile that reads it
    items: dict[str, int]  # work items per KV head, by tile
    shared_segments: int  # packs of two rows or more
    chains: int  # work items per KV head that read private runs too
    partial_slots: int
    splits: int
    coarsened: int  # choices of packs that did not fit the workspace
    sharing: bool
    slots_compared: bool  # sharing nobody told of had to be found to make the batch fit
    predicted_us: float
    plan_us: float

    @property
    def tokens_saved(self) -> int:
        """KV tokens the plan reads less than a kernel that knows no prefixes."""
        return self.unshared_tokens - self.planned_tokens


def explain(words: Int32Array) -> str:
    """The packed forest and the work items of a plan, as text; ``words``: see layout.py."""
    tables = PlanTables.parse(words)
    header = tables.header
    planned, chains = int(header[layout.H_PLANNED_TOKENS]), int(header[layout.H_CHAINS])
    unshared = int(header[layout.H_UNSHARED_TOKENS])
    saved = 1 - planned / max(unshared, 1)
    lines = [
        f"{header[layout.H_ROWS]} rows: {unshared} KV tokens without sharing, "
        f"{header[layout.H_UNIQUE_TOKENS]} unique, {planned} read ({saved:.1%} saved)",
        f"{len(tables.runs)} shared segments (position, length, parent):",
    ]
    lines += [
        f"  s{i}: [{begin}, {begin + length}) under {'root' if parent < 0 else f's{parent}'}"
        for i, (_, length, parent, begin) in enumerate(tables.runs.tolist())
    ]
    lines.append(
        f"work items per KV head: {_items_by_tile(tables)}, {header[layout.H_PARTS]} partials of "
        f"{np.count_nonzero(np.diff(tables.part_ptr))} rows"
    )
    if chains:
        lines.append(
            f"chains: {chains} of the items, {len(tables.steps)} private steps in "
            f"{len(tables.fragments)} fragments of {FRAGMENT_ROWS} query rows"
        )
    return "\n".join(lines)


def _items_by_tile(tables: PlanTables) -> dict[str, int]:
    counts = tables.header[layout.H_ITEM_COUNT : layout.H_ITEM_COUNT + len(TILES)].tolist()
    return {f"{tile.rows}x{tile.tokens}": n for tile, n in zip(TILES, counts, strict=True) if n}


@dataclass
class Layer:
    """The attention layer that plans are made for.

    Attributes:
        num_q_heads, num_kv_heads, head_dim: its geometry on this GPU.
        dtype: of q and the KV cache.
        device: where they are.
        module: the loaded kernels, None on the CPU.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    module: Any = None

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads


class DecodePlan:
    """Everything a decode step needs on the device, at fixed addresses.

    A planner owns exactly one; ``DecodePlanner.plan`` refills it, so a captured ``pat_decode``
    replays with the new contents.

    Attributes:
        words: int32 device tensor, see layout.py.
        slots: int32 device tensor, the slot snapshot.
        live_lens: int32 device tensor ``[max_rows]``, true lengths as of the last plan, advance
            or append_one.
        partial_out: float32 ``[parts, q_heads, d]`` (CUDA only).
        partial_lse: float32 ``[parts, q_heads]``, base 2 (CUDA only).
        host_words: the words of the current plan on the host, a view of the upload buffer.
        header: their header as a list, for those who ask every step.
    """

    def __init__(self, layer: Layer, capacity: Capacity) -> None:
        device = layer.device

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        # NOTE: not its planner, so that both are gone, with their memory, when nobody needs them.
        self.layer = layer
        self.words = torch.zeros(capacity.words, dtype=torch.int32, device=device)
        self.slots = torch.zeros(capacity.slots, dtype=torch.int32, device=device)
        self.live_lens = torch.zeros(capacity.rows, dtype=torch.int32, device=device)
        self.filled = torch.zeros(capacity.rows, dtype=torch.int32, device=device)
        # Work counters of the persistent kernel; the merge kernel leaves them zero.
        self.counters = torch.zeros(8, dtype=torch.int32, device=device)
        on_device = device.type == "cuda"
        parts = max(capacity.parts, 1) if on_device else 0
        self.partial_out = empty(parts, layer.num_q_heads, layer.head_dim, dtype=torch.float32)
        self.partial_lse = empty(parts, layer.num_q_heads, dtype=torch.float32)
        self.host_words = np.zeros(0, np.int32)
        self.header = [0] * layout.HEADER_WORDS
        self.slots_compared = False
        self.plan_us = 0.0
        self._stats: PlanStats | None = None  # of the current plan, once somebody has asked
        self.version = 0  # changes so far; the CPU path keys its caches by it

    @property
    def buffer_bytes(self) -> int:
        """Device memory held."""
        buffers = (
            self.words, self.slots, self.live_lens, self.filled, self.counters,
            self.partial_out, self.partial_lse,
        )  # fmt: skip
        return sum(b.numel() * b.element_size() for b in buffers)

    @property
    def tables(self) -> PlanTables:
        """Host view of the current plan."""
        return PlanTables.parse(self.host_words)

    @property
    def stats(self) -> PlanStats | None:
        """What the current plan does; None: there is none yet."""
        if self._stats is None and self.host_words.size:
            self._stats = self._make_stats()
        return self._stats

    def explain(self) -> str:
        """The packed forest and the work items, as text."""
        if not self.host_words.size:
            return "no plan yet"
        return explain(self.host_words)

    def renew(self, words: Int32Array, slots_compared: bool) -> None:
        """Takes over the host side of a new plan."""
        self.host_words = words
        self.header = words[: layout.HEADER_WORDS].tolist()
        self.slots_compared = slots_compared
        self._stats = None
        self.version += 1

    def validate(
        self, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
    ) -> None:
        """Proves the plan against the slot table: every row reads exactly its own slots.

        Raises:
            AssertionError: a row reads a wrong slot, misses one or reads one twice.
        """
        tables = self.tables
        rows = int(tables.header[layout.H_ROWS])
        group = self.layer.group_size
        slots = self.slots.cpu().numpy()
        lens = seq_lens[:rows].cpu().numpy()
        read: list[list[Int32Array]] = [[] for _ in range(rows * group)]
        for index in range(len(tables.items)):
            query_rows = tables.rows_of_item(index, group)
            for lo, hi, offsets in tables.steps_of_item(index, group, lens):
                of_step = slots[offsets]
                for row, head, _ in query_rows[lo:hi]:
                    read[row * group + head].append(of_step)
        for row in range(rows):
            wanted = np.sort(
                req_to_token[req_pool_indices[row].long(), : int(lens[row])].cpu().numpy()
            )
            for head in range(group):
                got = np.sort(np.concatenate(read[row * group + head]))
                assert np.array_equal(got, wanted), (
                    f"row {row} head {head}: reads {got.size} slots, owns {wanted.size}"
                )

    def _make_stats(self) -> PlanStats:
        tables, header = self.tables, self.header
        return PlanStats(
            rows=header[layout.H_ROWS],
            unique_tokens=header[layout.H_UNIQUE_TOKENS],
            unshared_tokens=header[layout.H_UNSHARED_TOKENS],
            planned_tokens=header[layout.H_PLANNED_TOKENS],
            items=_items_by_tile(tables),
            shared_segments=header[layout.H_SHARED_PACKS],
            chains=header[layout.H_CHAINS],
            partial_slots=header[layout.H_PARTS],
            splits=header[layout.H_SPLITS],
            coarsened=header[layout.H_COARSENED],
            sharing=bool(header[layout.H_SHARING]),
            slots_compared=self.slots_compared,
            predicted_us=header[layout.H_PREDICTED_NS] / 1e3,
            plan_us=self.plan_us,
        )


def workspace_for(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_rows: int,
    max_tokens: int,
    cap_bytes: int,
) -> tuple[Capacity, int]:
    """Sizes of a planner's buffers, and the GPU memory they take.

    What remains under the cap after the fixed part goes to partials.

    Raises:
        ValueError: the cap is below the minimum (which it names).
    """

    def sized(parts: int) -> tuple[Capacity, int]:
        sizes = capacity_for(max_rows, max_tokens, parts, num_q_heads // num_kv_heads, MAX_HORIZON)
        part_bytes = 4 * num_q_heads * (head_dim + 1)
        fixed = 4 * (sizes.words + sizes.slots + 2 * max_rows + 8)
        return sizes, fixed + max(parts, 1) * part_bytes

    minimum = sized(0)[1]
    if minimum > cap_bytes:
        raise ValueError(
            f"max_workspace_bytes {cap_bytes} is below the minimum {minimum} for "
            f"{max_rows} rows and {max_tokens} tokens"
        )
    # Words end at whole 16 bytes: four parts end where none do, others up to 12 bytes later.
    each = (sized(5)[1] - sized(1)[1]) // 4
    wanted = 6 * max_rows + 4096  # a few levels for every row, and cuts of a few long ones
    return sized(min(wanted, max(cap_bytes - minimum - 12, 0) // each))


def _count_copied() -> None:
    if METRICS.get("uploads_copied") == 0:
        logger.warning(
            "pat_sglang: the GPU cannot read pinned host memory: plans are uploaded by the copy "
            "engine, some microseconds a new plan slower"
        )
    METRICS.count("uploads_copied")


class DecodePlanner:
    """Makes decode plans for one attention geometry; owns every buffer they need.

    Args:
        num_q_heads, num_kv_heads, head_dim: the layer's geometry on this GPU.
        dtype: of q and the KV cache; bfloat16 or float16 on CUDA, float32 too on the CPU.
        device: "cuda", "cuda:1", "cpu".
        max_rows: request rows of the largest batch.
        max_tokens: unique KV tokens of the largest batch; the slots of the KV pool are enough.
        max_workspace_bytes: cap of the device memory held.
        sharing: "auto" (the cost model decides), "on" or "off".
        path: kernel path, "sm80" or "sm90"; default: the best of the GPU.

    Raises:
        ValueError: bad geometry, or the cap is below the minimum (which it names).
        BuildError: the kernels cannot be built or loaded. Nothing is built after construction.
    """

    def __init__(
        self,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device = "cuda",
        max_rows: int,
        max_tokens: int,
        max_workspace_bytes: int = 256 << 20,
        sharing: str = "auto",
        path: str | None = None,
    ) -> None:
        if num_kv_heads < 1 or num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads {num_q_heads} is not a multiple of num_kv_heads {num_kv_heads}"
            )
        if max_rows < 1 or max_tokens < 1:
            raise ValueError(f"max_rows {max_rows} and max_tokens {max_tokens} must be positive")
        if sharing not in ("auto", "on", "off"):
            raise ValueError(f"sharing {sharing!r} is not one of 'auto', 'on', 'off'")
        layer = Layer(num_q_heads, num_kv_heads, head_dim, dtype, torch.device(device))
        num_sms, gpu_name = 132, "cpu"
        if layer.device.type == "cuda":
            if layer.device.index is None:
                layer.device = torch.device("cuda", torch.cuda.current_device())
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"dtype {dtype} is not supported on CUDA: use bfloat16 or float16")
            properties = torch.cuda.get_device_properties(layer.device)
            num_sms, gpu_name = properties.multi_processor_count, properties.name
            arch = jit.arch_of_capability(properties.major, properties.minor)
            layer.module = jit.load(arch, DTYPE_NAMES[dtype], head_dim, path)
        self.layer = layer

        model = saved_cost.model_for(gpu_name, num_sms, head_dim, __version__)
        capacity, _ = workspace_for(
            num_q_heads, num_kv_heads, head_dim, max_rows, max_tokens, max_workspace_bytes
        )
        shape = Shape(layer.group_size, num_kv_heads, capacity.parts, capacity.items, sharing)
        self.host = HostPlanner(shape, model, capacity)
        self.max_rows = max_rows
        self._plan = plan = DecodePlan(layer, capacity)
        on_device = layer.module is not None
        ring = torch.zeros((RING, capacity.words), dtype=torch.int32, pin_memory=on_device)
        self._ring = list(ring.numpy())  # the same memory
        self._turn = 0
        if on_device:
            buffers = (plan.words, plan.slots, plan.filled, plan.live_lens, ring)
            self.transfer = Transfer(*layer.module.bind_plan(*buffers))
        else:
            on_cpu = CpuTransfer(plan, self._ring)
            self.transfer = Transfer(
                on_cpu.acquire, on_cpu.upload, on_cpu.append, on_cpu.append_one
            )
        self._warned = False
        self._planned_lens = np.zeros(0, np.int64)
        self._next_lens = self._planned_lens  # those told last, one token longer
        self._grown = 0  # tokens of the row that has grown most since the plan was made
        self._tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def workspace_bytes(self) -> int:
        """Device memory held by the plan's buffers."""
        return self._plan.buffer_bytes

    def plan(
        self,
        forest: Forest | None,
        leaf_of_row: Sequence[int] | Int32Array | None,
        host_lens: Lengths,
        seq_lens: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
    ) -> DecodePlan:
        """Plans a batch, uploads the plan and gathers the slot snapshot, on the current stream.

        Outside of CUDA graphs: of a step, only ``pat_decode`` is captured.

        Args:
            forest: the batch's prefix-tree nodes; None: nothing is shared.
            leaf_of_row: int32 ``[rows]``, deepest shared node of each row, -1: none. All tokens
                from the root to the leaf must lie in slots that are equal for all rows below.
            host_lens: int ``[rows]``, may lag by a few tokens: used for balance only.
            seq_lens: int32 or int64 ``[>= rows]`` on the device, the true lengths.
            req_to_token: int32 ``[requests, max_context]`` on the device.
            req_pool_indices: int32 or int64 ``[>= rows]`` on the device.

        Returns:
            The planner's plan, always the same object.

        Raises:
            ValueError: more rows than ``max_rows``, or inconsistent input.
            CapacityError: more unique tokens than ``max_tokens`` and headroom hold, also after
                looking for shared slots in ``req_to_token`` itself.
            RuntimeError: the current stream is being captured.
        """
        started = time.perf_counter()
        # A copy: callers count their lengths up in place.
        lens = np.array(host_lens, dtype=np.int32)
        rows = lens.size
        if rows > self.max_rows:
            raise ValueError(f"the batch has {rows} rows, the planner was made for {self.max_rows}")
        if forest is None or leaf_of_row is None:
            forest, leaf_of_row = _NOTHING_SHARED, np.full(rows, -1, np.int32)
        leaves = np.ascontiguousarray(leaf_of_row, dtype=np.int32)

        turn = (self._turn + 1) % RING
        words = self._ring[turn]
        self.transfer.acquire(turn)  # returns at once unless RING plans are ahead
        slots_compared = False
        try:
            count = self.host.plan(forest, leaves, lens, words)
        except CapacityError as error:
            # The rows hold more tokens than the pool has slots, so they share some that the caller
            # knows nothing of. Rare and slow (it waits for the device), but served.
            slots_compared = True
            if not self._warned:
                self._warned = True
                logger.warning("pat_sglang: comparing the slots of all rows, slowly: %s", error)
            indices = req_pool_indices[:rows].long()
            table = req_to_token[indices, : int(lens.max(initial=0))].cpu().numpy()
            forest, leaves = Forest.from_slots(table, lens)
            count = self.host.plan(forest, leaves, lens, words)
        if not self.transfer.upload(turn, seq_lens, req_to_token, req_pool_indices):
            _count_copied()
        plan = self._plan
        plan.renew(words[:count], slots_compared)
        self._turn = turn  # a batch that was refused leaves the current plan's words alone
        self._tensors = (seq_lens, req_to_token, req_pool_indices)
        self._planned_lens = lens.astype(np.int64)  # as a scheduler has them
        self._next_lens = self._planned_lens + 1
        self._grown = 0
        plan.plan_us = (time.perf_counter() - started) * 1e6
        return plan

    def advance(
        self,
        plan: DecodePlan,
        host_lens: Lengths | None = None,
        seq_lens: torch.Tensor | None = None,
        req_to_token: torch.Tensor | None = None,
        req_pool_indices: torch.Tensor | None = None,
        *,
        in_graph: bool = False,
    ) -> bool:
        """A later step with the same rows: one launch that appends new slots, no upload.

        Not even that launch if the graph about to be replayed appends by itself and, by
        ``host_lens``, every row has grown by one token since the last step that told them.

        Args:
            plan: the current plan.
            host_lens: int ``[rows]``; None: every call is taken for one token a row.
            seq_lens, req_to_token, req_pool_indices: as for ``plan``; None: the tensors given
                there, read again.
            in_graph: ``append_one`` was captured in the graph that is replayed next, which it is
                once, and ``host_lens`` do not lag.

        Returns:
            False when the horizon is passed: plan anew. Should a row outgrow the horizon unseen by
            the host, its output is NaN, never a plausible wrong value.

        Raises:
            ValueError: another planner's plan, or a tensor does not fit; nothing has changed then.
            RuntimeError: the current stream is being captured.
        """
        if plan is not self._plan or self._tensors is None:
            raise ValueError("advance() takes the plan that plan() of this planner returned")
        lens = None if host_lens is None else np.asarray(host_lens, dtype=np.int64)
        if lens is not None and lens.shape != self._planned_lens.shape:
            raise ValueError(
                f"advance() got {lens.size} rows, the plan has {self._planned_lens.size}"
            )
        kept = self._tensors
        tensors = (
            kept[0] if seq_lens is None else seq_lens,
            kept[1] if req_to_token is None else req_to_token,
            kept[2] if req_pool_indices is None else req_pool_indices,
        )
        # As bytes, which takes a third of the time of comparing arrays.
        by_one = lens is not None and lens.tobytes() == self._next_lens.tobytes()
        if not (in_graph and by_one):
            # Launched before the horizon is looked at: a fill too many does no harm, the next plan
            # fills everything again.
            self.transfer.append(*tensors)
            METRICS.count("appends_launched")
        self._tensors = tensors
        plan.version += 1
        if by_one:
            self._next_lens += 1
            self._grown += 1
        elif lens is None:
            self._grown += 1
        else:
            self._next_lens = lens + 1
            # A row that shrank makes these not the rows of this plan: as an unsigned number it has
            # grown beyond any horizon.
            of_row = (lens - self._planned_lens).view(np.uint64)
            self._grown = int(of_row[of_row.argmax()]) if of_row.size else 0  # max() takes longer
        return self._grown <= plan.header[layout.H_HORIZON] - LAG

    def append_one(self, seq_lens: torch.Tensor, new_slots: torch.Tensor) -> None:
        """Appends each row's one new slot to whatever plan there is: one launch, to be captured.

        A graph that begins with it spares ``advance`` the launch. Rows whose length the plan has
        already are left alone; the output of one that has grown by more than a token is NaN until
        ``advance`` launches or ``plan`` is called.

        Args:
            seq_lens: int32 or int64 ``[rows]`` on the device, the true lengths; rows beyond the
                plan's are padding.
            new_slots: int32 or int64 ``[rows]`` on the device, the KV slot of each row's last
                token, which ``req_to_token`` must hold too when the graph is replayed.

        Raises:
            ValueError: a tensor does not fit.
        """
        self.transfer.append_one(seq_lens, new_slots)
        self._plan.version += 1
