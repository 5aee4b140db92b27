# SPDX-License-Identifier: MIT
"""A scheduler in miniature: real Req, prefix tree, ReqToTokenPool and allocator, no model.

Each method does to tree, slots and requests what the Scheduler method named in its docstring does.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import versions

POOL = 4096


class MiniScheduler:
    """Requests that live in a real prefix tree."""

    def __init__(
        self,
        tree: str | None = None,  # of versions.TREES; None: what a server of this version has
        page_size: int = 1,
        *,
        rows: int = 64,
        context: int = 512,
        slots: int = POOL,
        device: str = "cpu",
        disable: bool = False,
    ) -> None:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        self.pool = ReqToTokenPool(rows, context, device, enable_memory_saver=False)
        self.allocator = TokenToKVPoolAllocator(slots, torch.float32, device, None, False)
        self.tree = versions.make_tree(
            tree or versions.server_tree(),
            disable=disable,
            req_to_token_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
        )
        self.lens: dict[Any, int] = {}
        self._names = count()

    def request(self, tokens: Sequence[int], extra_key: str | None = None) -> Any:
        """A request that has just arrived."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(max_new_tokens=64)
        params.normalize(None)
        name = f"r{next(self._names)}"
        return Req(name, "", array("q", tokens), params, extra_key=extra_key, vocab_size=1 << 20)

    def admit(self, req: Any, chunk: int | None = None) -> Any:
        """PrefillAdder and alloc_for_extend: match, lock, take slots, up to ``chunk`` tokens."""
        req.init_next_round_input(self.tree)
        versions.lock(self.tree, req)
        found = versions.matched_slots(self.tree, req)
        self.pool.alloc([req])
        self.pool.write((self.row(req), slice(0, len(found))), found.to(torch.int32))
        return self._extend(req, len(found), chunk)

    def next_chunk(self, req: Any, chunk: int | None = None) -> Any:
        """The chunked request's next round: what it computed is in the tree and locked."""
        versions.refresh_fill_ids(req)
        return self._extend(req, versions.prefix_len(req), chunk)

    def _extend(self, req: Any, begin: int, chunk: int | None) -> Any:
        total = len(req.full_untruncated_fill_ids)
        end = total if chunk is None else min(total, begin + chunk)
        versions.extend(req, begin, end)
        slots = self._slots(end - begin)
        self.pool.write((self.row(req), slice(begin, end)), slots.to(torch.int32))
        self.lens[req] = end
        versions.hold(req, end)
        return req

    def _slots(self, count: int) -> torch.Tensor:
        """alloc_token_slots: what no request holds is evicted when there are too few."""
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        evict_from_tree_cache(self.tree, count)
        found = self.allocator.alloc(count)
        assert found is not None, "out of KV slots"
        return found

    def publish(self, req: Any, chunked: bool = False) -> Any:
        """process_batch_result_prefill: the prompt enters the tree, duplicate slots are freed."""
        versions.publish(self.tree, req, chunked)
        return req

    def serve(self, tokens: Sequence[int], extra_key: str | None = None) -> Any:
        """Admit, prefill, publish."""
        return self.publish(self.admit(self.request(tokens, extra_key)))

    def finish(self, req: Any) -> None:
        """process_batch_result_decode of a finished or aborted request."""
        versions.release(self.tree, req, self.lens.pop(req), keep=True)

    def retract(self, req: Any) -> None:
        """ScheduleBatch.release_req: slots are freed and nothing enters the tree."""
        versions.release(self.tree, req, self.lens.pop(req), keep=False)
        req.reset_for_retract()

    def decode(self, reqs: list[Any], token: int = 7) -> Any:
        """prepare_for_decode: one more token a row; the ScheduleBatch of the step."""
        for req in reqs:
            slot = self._slots(1)
            self.pool.write((self.row(req), slice(self.lens[req], self.lens[req] + 1)), slot.int())
            self.lens[req] += 1
            versions.hold(req, self.lens[req])
            req.output_ids.append(token)
        return self.batch(reqs, "DECODE")

    def batch(self, reqs: list[Any], mode: str = "DECODE") -> Any:
        """What ForwardBatch.init_new is given."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lens = torch.tensor([self.lens[req] for req in reqs], dtype=torch.int64)
        return SimpleNamespace(
            reqs=reqs,
            tree_cache=self.tree,
            seq_lens=lens.to(self.pool.device),
            seq_lens_cpu=lens,
            forward_mode=ForwardMode[mode],
            spec_info=None,
        )

    def row(self, req: Any) -> int:
        """The request's row in req_to_token."""
        return versions.row(req)

    def slots(self, req: Any) -> np.ndarray:
        """KV slots of a request's tokens."""
        return self.pool.req_to_token[self.row(req), : self.lens[req]].numpy()


def forward_view(**fields: Any) -> Any:
    """As much of a ForwardBatch as a backend reads on the way of a decode step."""
    common = {"spec_info": None, "encoder_lens": None, "out_cache_loc_is_physical": True}
    return SimpleNamespace(**{**common, **fields})


def model_runner(scheduler: MiniScheduler, layers: Sequence[Any], pool: Any) -> Any:
    """As much of a ModelRunner as the backend builder asks for, of a server that wants PAT."""
    runner = SimpleNamespace(
        server_args=SimpleNamespace(_pat={"asked_by": "test"}),
        is_draft_worker=False,
        use_mla_backend=False,
        device=scheduler.pool.device,
        model_config=SimpleNamespace(is_encoder_decoder=False),
        model=torch.nn.ModuleList(layers),
        req_to_token_pool=scheduler.pool,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=scheduler.allocator,
    )
    versions.set_attention_backends(runner, "torch_native", "torch_native")
    return runner


def row_depths(structure: Any) -> list[list[int]]:
    """Tokens each pair of rows shares, as the structure says."""
    rows = len(structure.reqs)
    if structure.forest is None:
        return [[0] * rows for _ in range(rows)]
    parent, length = structure.forest.parent, structure.forest.length

    def path(node: int) -> list[int]:
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(parent[node])
        return nodes[::-1]

    paths = [path(int(leaf)) for leaf in structure.leaf_of_row]
    return [
        [sum(int(length[a]) for a, b in zip(x, y, strict=False) if a == b) for y in paths]
        for x in paths
    ]


def assert_exact(scheduler: MiniScheduler, structure: Any) -> None:
    """Shared ranges hold equal slots, and no equal leading slot is missed."""
    depths = row_depths(structure)
    rows = [scheduler.slots(req) for req in structure.reqs]
    for i, first in enumerate(rows):
        for j, second in enumerate(rows[:i]):
            n = min(first.size, second.size)
            differ = np.nonzero(first[:n] != second[:n])[0]
            common = int(differ[0]) if differ.size else n
            assert depths[i][j] == common, f"rows {j} and {i} share {common}, not {depths[i][j]}"
