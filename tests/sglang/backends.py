# SPDX-License-Identifier: MIT
"""A PAT backend on a base backend with real pools, layers and tree, and what drives it."""

from __future__ import annotations

from unittest import mock

import torch
from scheduling import POOL, MiniScheduler, forward_view, model_runner

from pat_sglang import reference
from pat_sglang.metrics import METRICS
from pat_sglang.plugin import builder, compat
from pat_sglang.plugin.feed import on_init_new

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
SYSTEM = list(range(100, 140))


class Fixture:
    """A runner with two attention layers, its scheduler, a PAT backend and an untouched base."""

    def __init__(self, make_base=None, heads=(HEADS, HEADS), tree=None, **layer_options):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        make_base = make_base or TorchNativeAttnBackend
        self.scheduler = MiniScheduler(tree)
        options = {"head_dim": HEAD_DIM, "scaling": HEAD_DIM**-0.5, "num_kv_heads": KV_HEADS}
        self.layers = [
            RadixAttention(num_heads=n, layer_id=i, **{**options, **layer_options})
            for i, n in enumerate(heads)
        ]
        self.pool = MHATokenToKVPool(
            POOL, 1, torch.float32, KV_HEADS, HEAD_DIM, 2, "cpu", enable_memory_saver=False
        )
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.fill_(torch.nan)  # a slot nobody wrote must never be read
            buffer[0] = 0
        self.runner = model_runner(self.scheduler, self.layers, self.pool)
        self.base = make_base(self.runner)
        self.backend = builder.wrap("torch_native", make_base)(self.runner)

    @property
    def active(self) -> bool:
        return hasattr(self.backend, "_pat")

    def forward_batch(self, batch, padded_rows=None):
        """What the runner hands to the backend; padding as the decode graph runner pads."""
        rows = len(batch.reqs)
        padded = padded_rows or rows
        fill = padded - rows

        def pad(values, value):
            return torch.tensor([*values, *([value] * fill)], dtype=torch.int64)

        lens = pad(batch.seq_lens_cpu.tolist(), 1)
        out_loc = [int(self.scheduler.slots(req)[-1]) for req in batch.reqs]
        view = forward_view(
            batch_size=padded,
            forward_mode=batch.forward_mode,
            req_pool_indices=pad([self.scheduler.row(req) for req in batch.reqs], 0),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=pad(out_loc, 0),
        )
        if padded_rows is None:
            view.rids = [req.rid for req in batch.reqs]
        else:
            view.num_padding = fill
        return view

    def prefill(self, req):
        """K and V of a request's prompt, as its forward would have written them."""
        slots = torch.from_numpy(self.scheduler.slots(req)).long()
        empty = slots[torch.isnan(self.pool.k_buffer[0][slots][:, 0, 0])]
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer[empty] = torch.randn(empty.numel(), KV_HEADS, HEAD_DIM)

    def prepared(self, rows):
        """Requests that share SYSTEM, ready for a decode step: prompts written, plan made."""
        reqs = [self.serve([*SYSTEM, i]) for i in range(rows)]
        batch = self.scheduler.decode(reqs)
        for req in reqs:
            self.prefill(req)
        on_init_new(None, None, batch, self.runner)
        view = self.forward_batch(batch)
        self.backend.init_forward_metadata(view)
        return view

    def decode(self, batch, padded_rows=None, replay=False):
        """One decode step through PAT, each layer compared with base and reference."""
        on_init_new(None, None, batch, self.runner)
        view = self.forward_batch(batch, padded_rows)
        if replay:
            self.backend.init_forward_metadata_out_graph(view)
        else:
            self.backend.init_forward_metadata(view)
        self.base.init_forward_metadata(view)
        return [self.compare(layer, view, len(batch.reqs)) for layer in self.layers]

    def compare(self, layer, view, rows):
        heads = layer.tp_q_head_num
        q = torch.randn(view.batch_size, heads * HEAD_DIM)
        k, v = (torch.randn(view.batch_size, KV_HEADS, HEAD_DIM) for _ in range(2))
        out = self.backend.forward_decode(q.clone(), k.clone(), v.clone(), layer, view)
        written = [b.clone() for b in self.pool.get_kv_buffer(layer.layer_id)]
        expected = self.base.forward_decode(q.clone(), k.clone(), v.clone(), layer, view)
        for mine, base in zip(written, self.pool.get_kv_buffer(layer.layer_id), strict=True):
            assert torch.equal(mine.nan_to_num(7.0), base.nan_to_num(7.0))
        assert out.shape == expected.shape and out.dtype == expected.dtype
        torch.testing.assert_close(out[:rows], expected[:rows], rtol=1e-4, atol=1e-5)
        oracle = reference.attention(
            q.view(-1, heads, HEAD_DIM)[:rows],
            *self.pool.get_kv_buffer(layer.layer_id),
            self.scheduler.pool.req_to_token,
            view.req_pool_indices,
            view.seq_lens,
            layer.scaling,
        )
        torch.testing.assert_close(out[:rows], oracle.flatten(1), rtol=1e-4, atol=1e-5)
        return out

    def serve(self, tokens):
        req = self.scheduler.admit(self.scheduler.request(tokens))
        on_init_new(None, None, self.scheduler.batch([req], "EXTEND"), self.runner)
        self.prefill(req)
        return self.scheduler.publish(req)

    def lose_one(self, chance, running):
        """One request ends, or is retracted and comes back; the requests that run then."""
        victim = chance.choice(running)
        running = [req for req in running if req is not victim]
        if chance.random() < 0.5:
            self.scheduler.finish(victim)
            return running
        self.scheduler.retract(victim)
        self.scheduler.admit(victim)
        self.prefill(victim)
        return [*running, self.scheduler.publish(victim)]


def counts(*names):
    values = METRICS.as_dict()
    return tuple(values[name] for name in names)


def graph_base(calls, **extra):
    """A base with the CUDA graph methods of the real ones, recording what it is asked for."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class GraphBase(TorchNativeAttnBackend):
        def init_cuda_graph_state(self, max_bs, max_num_tokens):
            calls.append(("state", max_bs))

        def init_forward_metadata(self, forward_batch):
            calls.append("eager")
            super().init_forward_metadata(forward_batch)

        def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
            calls.append("capture" if in_capture else "replay")

        def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None):
            calls.append("base layer")
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

    return GraphBase


class GraphRunner:
    """What a backend sees of SGLang's decode graph runner: static inputs, captures and replays.

    On a CPU the part of a graph ahead of its layers is run again by calling what captured it.
    """

    sizes = (4, 8, 16)

    def __init__(self, fixture):
        self.fixture = fixture
        self.req_pool_indices = torch.zeros(self.sizes[-1], dtype=torch.int64)
        self.out_cache_loc = torch.zeros(self.sizes[-1], dtype=torch.int64)
        self.seq_lens = torch.ones(self.sizes[-1], dtype=torch.int64)
        self.seq_lens_cpu = torch.ones(self.sizes[-1], dtype=torch.int64)
        self.captured = {}
        fixture.backend.init_cuda_graph_state(self.sizes[-1], self.sizes[-1])

    def inputs(self, size, mode):
        return forward_view(
            batch_size=size,
            forward_mode=mode,
            req_pool_indices=self.req_pool_indices[:size],
            seq_lens=self.seq_lens[:size],
            seq_lens_cpu=self.seq_lens_cpu[:size],
            out_cache_loc=self.out_cache_loc[:size],
        )

    def capture(self, appends=True):
        """All graphs; not ``appends``: by a runner that puts no metadata into them."""
        backend = self.fixture.backend
        self.seq_lens.fill_(1)
        self.seq_lens_cpu.fill_(1)
        self.req_pool_indices.zero_()
        self.out_cache_loc.zero_()
        mode = self.fixture.scheduler.batch([], "DECODE").forward_mode
        for size in reversed(self.sizes):
            batch = self.inputs(size, mode)
            backend.init_forward_metadata_out_graph(batch, in_capture=True)
            for warms_up in (True, True, False):
                with mock.patch.object(compat, "is_capturing", return_value=not warms_up):
                    if appends:
                        backend.init_forward_metadata_in_graph(batch)
                for layer in self.fixture.layers:
                    q = torch.randn(size, layer.tp_q_head_num * HEAD_DIM)
                    kv = torch.zeros(size, KV_HEADS, HEAD_DIM)
                    out = backend.forward_decode(q, kv, kv.clone(), layer, batch)
                    assert out.isfinite().all()
            self.captured[size] = (batch, appends)
        return self

    def replay(self, batch, **changes):
        """One decode step of a ScheduleBatch; ``changes`` to what the backend is handed."""
        fixture, rows = self.fixture, len(batch.reqs)
        on_init_new(None, None, batch, fixture.runner)
        size = next(size for size in self.sizes if size >= rows)
        live = fixture.forward_batch(batch, padded_rows=size)
        for name in ("req_pool_indices", "out_cache_loc", "seq_lens", "seq_lens_cpu"):
            getattr(self, name)[:size].copy_(getattr(live, name))
        view = self.inputs(size, batch.forward_mode)
        view.num_padding, view.out_cache_loc = size - rows, live.out_cache_loc[:rows]
        vars(view).update(changes)
        fixture.backend.init_forward_metadata_out_graph(view)
        captured, appends = self.captured[size]
        if appends:
            fixture.backend.init_forward_metadata_in_graph(captured)
        fixture.base.init_forward_metadata(captured)
        return [fixture.compare(layer, captured, rows) for layer in fixture.layers]
