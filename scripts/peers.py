# SPDX-License-Identifier: MIT
"""The kernels PAT is compared with, each behind prepare() / plan() / run().

`prepare` allocates and plans, `plan` is the host work of a decode step (once a step, not a layer),
`run` is the attention call alone and can be captured in a CUDA graph. What each of them calls was
read in SGLang 0.5.17, sglang-kernel 0.4.5 and FlashInfer 0.6.15.post1.

Page size 64: an engine with such pages shares a page only where all of it is shared. So the peers
of page 64 get a cache of their own in which every page that is shared in part exists once for each
of its owners (`Tree.at_page_size`), holding the same tokens; results are equal to page size 1.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_common import ROOT
from trees import Layout, Tree

FLASHINFER_WORKSPACE = 1 << 30  # cascade levels of 1024 rows need more than the usual 128 MB
AOT_ENV = "PAT_FLASHINFER_AOT"  # folder of build_peers.sh; default .carry/flashinfer_aot


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark, in one page size."""

    tree: Tree
    layout: Layout
    q: torch.Tensor  # [rows, q_heads, d]
    k: torch.Tensor  # [slots, kv_heads, d]
    v: torch.Tensor  # [slots, kv_heads, d]
    req_to_token: torch.Tensor  # int32 [rows, tokens] on the device
    seq_lens: torch.Tensor  # int32 [rows] on the device
    sm_scale: float

    @property
    def heads(self) -> tuple[int, int]:
        return self.q.shape[1], self.k.shape[1]

    def paged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [pages, page_size, kv_heads, d]."""
        shape = (-1, self.layout.page_size, *self.k.shape[1:])
        return self.k.view(shape), self.v.view(shape)


class Peer(ABC):
    """One kernel at one page size."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size

    @abstractmethod
    def prepare(self, case: Case) -> None:
        """Takes a case and plans it."""

    @abstractmethod
    def plan(self) -> None:
        """Host work of one decode step; also called to be timed."""

    @abstractmethod
    def run(self) -> torch.Tensor:
        """Attention of the prepared case, [rows, q_heads, d]."""


class Fa3(Peer):
    """FlashAttention-3 of sglang-kernel, called as SGLang's backend does for decode.

    That is: varlen queries of one token, a page table, scheduler metadata computed once a step.
    SGLang's table is as wide as the model's context; this one is as wide as the longest row, which
    is what its split heuristic likes best.
    """

    def prepare(self, case: Case) -> None:
        from sgl_kernel import flash_attn

        self.kernel = flash_attn.flash_attn_with_kvcache
        self.metadata_of = flash_attn.get_scheduler_metadata
        self.case = case
        self.k, self.v = case.paged()
        self.page_table = torch.from_numpy(case.layout.page_table()).to(case.q.device)
        self.cu_seqlens_q = torch.arange(
            case.tree.num_rows + 1, dtype=torch.int32, device=case.q.device
        )
        self.max_seqlen_k = int(case.tree.seq_lens.max())
        self.plan()

    def plan(self) -> None:
        q_heads, kv_heads = self.case.heads
        self.metadata = self.metadata_of(
            batch_size=self.case.tree.num_rows,
            max_seqlen_q=1,
            max_seqlen_k=self.max_seqlen_k,
            num_heads=q_heads,
            num_heads_k=kv_heads,
            headdim=self.case.q.shape[2],
            cache_seqlens=self.case.seq_lens,
            qkv_dtype=self.case.q.dtype,
            cu_seqlens_q=self.cu_seqlens_q,
            page_size=self.page_size,
            causal=True,
            has_softcap=False,
            num_splits=0,
        )

    def run(self) -> torch.Tensor:
        return self.kernel(
            q=self.case.q,
            k_cache=self.k,
            v_cache=self.v,
            page_table=self.page_table,
            cache_seqlens=self.case.seq_lens,
            cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=1,
            softmax_scale=self.case.sm_scale,
            causal=True,
            window_size=(-1, -1),
            softcap=0.0,
            return_softmax_lse=False,
            num_splits=0,
            ver=3,
            scheduler_metadata=self.metadata,
        )


_workspace: list[torch.Tensor] = []


def flashinfer_workspace() -> torch.Tensor:
    """One zeroed float workspace for all FlashInfer peers: they run one after the other."""
    if not _workspace:
        _workspace.append(torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device="cuda"))
    return _workspace[0]


def import_flashinfer() -> Any:
    """FlashInfer with the modules of build_peers.sh; a missing module is an error, not a build."""
    os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    import flashinfer
    import flashinfer.jit.env as jit_env

    folder = ROOT / os.environ.get(AOT_ENV, ".carry/flashinfer_aot")
    if folder.is_dir():
        jit_env.FLASHINFER_AOT_DIR = folder
    return flashinfer


class FlashInferDecode(Peer):
    """FlashInfer's paged batch decode with tensor cores (SGLang uses them from group 4 up).

    `graph=False` plans for exactly this batch, the fastest it can be. `graph=True` is what an
    engine has to use: fixed buffers and a grid that fits every batch of this size.
    """

    def __init__(self, page_size: int, graph: bool = False) -> None:
        super().__init__(page_size)
        self.graph = graph

    def prepare(self, case: Case) -> None:
        flashinfer = import_flashinfer()
        self.case = case
        rows, device = case.tree.num_rows, case.q.device
        lens = case.tree.seq_lens
        pages = -(-lens // self.page_size)
        table = case.layout.page_table()
        self.indptr = torch.from_numpy(np.append(0, np.cumsum(pages)).astype(np.int32))
        live = np.arange(table.shape[1]) < pages[:, None]
        self.indices = torch.from_numpy(table[live]).to(device)
        self.last = torch.from_numpy(((lens - 1) % self.page_size + 1).astype(np.int32))
        buffers: dict[str, Any] = {}
        if self.graph:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": torch.zeros(rows + 1, dtype=torch.int32, device=device),
                "paged_kv_indices_buffer": torch.zeros_like(self.indices),
                "paged_kv_last_page_len_buffer": torch.ones(rows, dtype=torch.int32, device=device),
            }
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            flashinfer_workspace(), "NHD", use_tensor_cores=True, backend="fa2", **buffers
        )
        self.cache = case.paged()
        self.out = torch.empty_like(case.q)
        self.plan()

    def plan(self) -> None:
        q_heads, kv_heads = self.case.heads
        self.wrapper.plan(
            self.indptr,
            self.indices,
            self.last,
            q_heads,
            kv_heads,
            self.case.q.shape[2],
            self.page_size,
            q_data_type=self.case.q.dtype,
            kv_data_type=self.case.k.dtype,
            sm_scale=self.case.sm_scale,
        )

    def run(self) -> torch.Tensor:
        return self.wrapper.run(self.case.q, self.cache, out=self.out)


class Cascade(Peer):
    """FlashInfer's multi-level cascade, given the true levels of the tree.

    Levels are computed by the fa2 template: left to itself on Hopper it takes fa3, which is twice
    as slow here (anchors.md: casc_auto).
    """

    def prepare(self, case: Case) -> None:
        flashinfer = import_flashinfer()
        self.case = case
        device = case.q.device
        table = case.layout.req_to_token
        self.levels: list[list[torch.Tensor]] = [[], [], [], []]
        for qo_indptr, spans in case.tree.levels():
            lengths = [end - begin for _, begin, end in spans]
            slots = np.concatenate([table[row, begin:end] for row, begin, end in spans])
            columns = (
                qo_indptr,
                np.append(0, np.cumsum(lengths)).astype(np.int32),
                slots,
                np.ones(len(spans), np.int32),
            )
            for place, column in zip(self.levels, columns, strict=True):
                place.append(torch.from_numpy(column))
        self.levels[2] = [slots.to(device) for slots in self.levels[2]]
        self.wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            len(self.levels[0]), flashinfer_workspace(), "NHD"
        )
        for level in self.wrapper._batch_prefill_wrappers:
            level._backend = "fa2"
        self.cache = case.paged()
        self.plan()

    def plan(self) -> None:
        q_heads, kv_heads = self.case.heads
        self.wrapper.plan(
            *self.levels,
            q_heads,
            kv_heads,
            self.case.q.shape[2],
            1,
            causal=False,
            sm_scale=self.case.sm_scale,
            q_data_type=self.case.q.dtype,
            kv_data_type=self.case.k.dtype,
        )

    def run(self) -> torch.Tensor:
        return self.wrapper.run(self.case.q, self.cache)


PEERS: dict[str, Any] = {
    "fa3_p1": lambda: Fa3(1),
    "fa3_p64": lambda: Fa3(64),
    "fi_decode_p1": lambda: FlashInferDecode(1),
    "fi_decode_p64": lambda: FlashInferDecode(64),
    "fi_decode_p1_graph": lambda: FlashInferDecode(1, graph=True),
    "fi_decode_p64_graph": lambda: FlashInferDecode(64, graph=True),
    "cascade": lambda: Cascade(1),
}
DEFAULT_PEERS = ["fa3_p1", "fa3_p64", "fi_decode_p1", "fi_decode_p64", "cascade"]
