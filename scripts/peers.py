# SPDX-License-Identifier: MIT
"""The kernels PAT is compared with, each behind prepare() / plan() / run().

`prepare` allocates and plans, `plan` is the host work of a decode step (once a step, not a layer),
`run` is the attention call alone and can be captured in a CUDA graph. What each of them calls was
read in SGLang 0.5.17, sglang-kernel 0.4.5 and FlashInfer 0.6.15.post1.

Page size 64: an engine with such pages shares a page only where all of it is shared. So backends of
page 64 get a layout in which every page that is shared in part exists once for each of its owners
(`Tree.at_page_size`). Both layouts lie in the same pool, so their outputs are not the same.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpu_common import ROOT
from trees import Layout, Tree

FLASHINFER_WORKSPACE = 1 << 30  # cascade levels of 1024 rows need more than the usual 128 MB
XQA_WORKSPACE = 256 << 20  # its own: the first 8 MB are counters that must stay zero between calls
AOT_ENV = "PAT_FLASHINFER_AOT"  # folder of build_peers.sh; default .carry/flashinfer_aot


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark, in one page size.

    What follows from the layout alone is made once and shared by the copies for other heads.
    """

    tree: Tree  # aligned to the page size
    layout: Layout
    q: torch.Tensor  # [rows, q_heads, d]
    k: torch.Tensor  # [slots, kv_heads, d]
    v: torch.Tensor  # [slots, kv_heads, d]
    req_to_token: torch.Tensor  # int32 [rows, tokens] on the device
    seq_lens: torch.Tensor  # int32 [rows] on the device
    sm_scale: float
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()` of the first call with this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def page_table(self) -> torch.Tensor:
        """int32 [rows, pages] on the device."""
        return self.once(
            "page_table", lambda: torch.from_numpy(self.layout.page_table()).to(self.k.device)
        )

    def stream_slots(self) -> torch.Tensor:
        """int32 [unique tokens] on the device, in the order of the tokens."""
        return self.once(
            "stream_slots",
            lambda: torch.from_numpy(self.layout.stream_slots(self.tree)).to(self.k.device),
        )

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
        self.page_table = case.page_table()
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


@functools.cache
def flashinfer_workspace(nbytes: int = FLASHINFER_WORKSPACE) -> torch.Tensor:
    """One zeroed workspace for all FlashInfer peers of a kind: they run one after the other."""
    return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")


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
        self.indptr, self.indices, self.last = case.once("csr", self._csr)
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

    def _csr(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of the rows: offsets (host), pages (device), tokens in the last page (host)."""
        lens = self.case.tree.seq_lens
        pages = -(-lens // self.page_size)
        table = self.case.page_table()
        live = torch.arange(table.shape[1]) < torch.from_numpy(pages)[:, None]
        return (
            torch.from_numpy(np.append(0, np.cumsum(pages)).astype(np.int32)),
            table[live.to(table.device)],
            torch.from_numpy(((lens - 1) % self.page_size + 1).astype(np.int32)),
        )

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
        self.levels = case.once("levels", self._levels)
        self.wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            len(self.levels[0]), flashinfer_workspace(), "NHD"
        )
        for level in self.wrapper._batch_prefill_wrappers:
            level._backend = "fa2"
        self.cache = case.paged()
        self.plan()

    def _levels(self) -> list[list[torch.Tensor]]:
        """By level: qo_indptr, kv_indptr (host), slots (device), tokens in the last page (host)."""
        table = self.case.layout.req_to_token
        columns: list[list[torch.Tensor]] = [[], [], [], []]
        for qo_indptr, spans in self.case.tree.levels():
            lengths = [end - begin for _, begin, end in spans]
            slots = np.concatenate([table[row, begin:end] for row, begin, end in spans])
            arrays = (
                qo_indptr,
                np.append(0, np.cumsum(lengths)).astype(np.int32),
                slots,
                np.ones(len(spans), np.int32),
            )
            for place, array in zip(columns, arrays, strict=True):
                place.append(torch.from_numpy(array))
        columns[2] = [slots.to(self.case.q.device) for slots in columns[2]]
        return columns

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


class Xqa(Peer):
    """TensorRT-LLM's XQA, through FlashInfer; it has no plan."""

    def prepare(self, case: Case) -> None:
        import_flashinfer()
        from flashinfer.decode import trtllm_batch_decode_with_kv_cache

        self.kernel = trtllm_batch_decode_with_kv_cache
        self.case = case
        self.cache = case.paged()
        self.page_table = case.page_table()
        self.max_seq_len = int(case.tree.seq_lens.max())
        self.workspace = flashinfer_workspace(XQA_WORKSPACE)
        self.out = torch.empty_like(case.q)

    def plan(self) -> None:
        """Nothing to plan."""

    def run(self) -> torch.Tensor:
        return self.kernel(
            self.case.q,
            self.cache,
            self.workspace,
            self.page_table,
            self.case.seq_lens,
            self.max_seq_len,
            bmm1_scale=self.case.sm_scale,
            bmm2_scale=1.0,
            out=self.out,
            kv_layout="NHD",
            backend="xqa",
        )


PEERS: dict[str, Any] = {
    "fa3_p1": lambda: Fa3(1),
    "fa3_p64": lambda: Fa3(64),
    "fi_decode_p1": lambda: FlashInferDecode(1),
    "fi_decode_p64": lambda: FlashInferDecode(64),
    "fi_decode_p1_graph": lambda: FlashInferDecode(1, graph=True),
    "fi_decode_p64_graph": lambda: FlashInferDecode(64, graph=True),
    "cascade": lambda: Cascade(1),
    "xqa_p64": lambda: Xqa(64),
}
