# SPDX-License-Identifier: MIT
"""The PAT backend on a base backend: real pools, layers and tree, a fake model runner."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backends import HEAD_DIM, HEADS, KV_HEADS, SYSTEM, Fixture, counts, graph_base
from scheduling import forward_view
from versions import set_attention_backends

from pat_sglang.metrics import METRICS
from pat_sglang.plan import workspace_for
from pat_sglang.plugin import builder
from pat_sglang.plugin.feed import on_init_new
from pat_sglang.plugin.memory import MIB, GpuMemory


@pytest.fixture
def fixture(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_VALIDATE", "1")
    # The prompts are short: the cost model alone would not pack them.
    monkeypatch.setenv("PAT_SGLANG_FORCE", "on")
    made = Fixture()
    assert made.active
    return made


# -- decode ---------------------------------------------------------------------------------------


def test_the_instance_is_still_the_base(fixture):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    assert isinstance(fixture.backend, TorchNativeAttnBackend)
    assert type(fixture.backend).__name__ == "PatTorchNativeAttnBackend"
    assert fixture.backend.support_triton() is False
    assert type(fixture.base) is TorchNativeAttnBackend


def test_steps_share_and_are_kept(fixture):
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(4)]
    for _ in range(5):
        fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_made", "plans_kept") == (1, 4)
    shared, planned, unshared = counts("shared_segments", "planned_kv_tokens", "unshared_kv_tokens")
    assert shared >= 5 and planned < unshared
    assert counts("no_sharing", "layers_on_base", "steps_on_base") == ({}, {}, {})


@pytest.mark.parametrize(
    ("force", "rows", "unshared"),
    [("auto", 4, 1), ("auto", 16, 0), ("off", 16, 1), ("on", 4, 0)],
)
def test_plans_that_share_nothing_are_counted(monkeypatch, force, rows, unshared):
    """Packing a prompt pays for 16 rows and not for 4: the planner's word, plan by plan."""
    monkeypatch.setenv("PAT_SGLANG_FORCE", force)
    fixture = Fixture()
    reqs = [fixture.serve([*range(1000, 1400), i]) for i in range(rows)]
    for _ in range(3):
        fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_made", "plans_kept", "plans_unshared") == (1, 2, unshared)
    assert (METRICS.get("shared_segments") == 0) == bool(unshared)
    fixture.decode(fixture.scheduler.decode([reqs[0]]))  # nothing to share is no such plan
    assert counts("plans_made", "plans_unshared") == (2, unshared)


def test_what_is_counted_is_what_the_statistics_say(fixture):
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(4)]
    for _ in range(2):
        fixture.decode(fixture.scheduler.decode(reqs))
    (plan,) = fixture.backend._pat.plans.values()
    stats = plan.stats
    assert counts("shared_segments", "planned_kv_tokens", "unshared_kv_tokens") == (
        2 * stats.shared_segments,
        2 * stats.planned_tokens,
        2 * stats.unshared_tokens,
    )
    assert fixture.backend._pat.best.tokens_saved == stats.tokens_saved > 0


def test_mixed_step_between_equal_decode_batches(fixture):
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    fixture.decode(fixture.scheduler.decode(reqs))
    mixed = fixture.scheduler.decode(reqs)  # the rows advance by one token outside of PAT
    for req in reqs:
        fixture.prefill(req)
    mixed.forward_mode = type(mixed.forward_mode)["MIXED"]
    on_init_new(None, None, mixed, fixture.runner)
    fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_made", "plans_kept") == (2, 0)


def test_retract_all_and_resume(fixture):
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    fixture.decode(fixture.scheduler.decode(reqs))
    for req in reqs:
        fixture.scheduler.retract(req)
    for buffer in (*fixture.pool.k_buffer, *fixture.pool.v_buffer):
        buffer[1:] = torch.nan
    for req in reversed(reqs):
        fixture.scheduler.admit(req)
        fixture.prefill(req)
        fixture.scheduler.publish(req)
    fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_made", "plans_kept") == (2, 0)


def test_tail_that_starts_at_length_zero(fixture):
    reqs = [fixture.serve(SYSTEM) for _ in range(3)]  # nothing private but the decoded tokens
    for _ in range(3):
        fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_kept") == (2,)


def test_random_serving(monkeypatch, tree):
    """Arrivals, ends, retractions, reorderings and mixed steps; validated plans, equal outputs."""
    monkeypatch.setenv("PAT_SGLANG_VALIDATE", "1")
    monkeypatch.setenv("PAT_SGLANG_FORCE", "on")
    fixture = Fixture(tree=tree)
    chance = random.Random(3)
    prompts = [SYSTEM, [*SYSTEM, *range(300, 320)], list(range(500, 530))]
    running = []
    for step in range(80):
        if len(running) < 10 and chance.random() < 0.4:
            tail = [chance.randrange(1000) for _ in range(chance.randrange(12))]
            running = [*running, fixture.serve([*chance.choice(prompts), *tail])]
        if running and chance.random() < 0.15:
            running = fixture.lose_one(chance, running)
        if chance.random() < 0.1:
            running = chance.sample(running, len(running))
        if running:
            batch = fixture.scheduler.decode(running, token=step)
            padded = chance.choice([None, len(running), len(running) + 3])
            fixture.decode(batch, padded_rows=padded, replay=padded is not None)
    made, kept = counts("plans_made", "plans_kept")
    assert made > 15 and kept > 5
    assert counts("no_sharing") == ({},)


# -- graph life cycle -----------------------------------------------------------------------------


def capture(fixture, calls, rows=4):
    """What the decode graph runner does for one batch size."""
    view = forward_view(
        batch_size=rows,
        forward_mode=fixture.scheduler.batch([], "DECODE").forward_mode,
        req_pool_indices=torch.zeros(rows, dtype=torch.int64),
        seq_lens=torch.ones(rows, dtype=torch.int64),
        seq_lens_cpu=torch.ones(rows, dtype=torch.int64),
        out_cache_loc=torch.zeros(rows, dtype=torch.int64),
    )
    fixture.backend.init_cuda_graph_state(rows, rows)
    fixture.backend.init_forward_metadata_out_graph(view, in_capture=True)
    for layer in fixture.layers:
        q = torch.randn(rows, HEADS * HEAD_DIM)
        kv = torch.randn(rows, KV_HEADS, HEAD_DIM)
        assert fixture.backend.forward_decode(q, kv, kv.clone(), layer, view).isfinite().all()


def test_base_metadata_is_skipped_at_replay_once_capture_has_shown_no_need():
    calls = []
    fixture = Fixture(graph_base(calls))
    capture(fixture, calls)
    assert calls == [("state", 4), "capture"]
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    calls.clear()
    outs = fixture.decode(fixture.scheduler.decode(reqs), padded_rows=4, replay=True)
    # "eager" and "base layer" are of the untouched base that the output is compared with.
    assert calls == ["eager", "base layer", "base layer"]
    assert all(torch.equal(out[3:], torch.zeros_like(out[3:])) for out in outs)
    assert counts("plans_made", "dummy_plans") == (1, 1)


def test_base_metadata_is_prepared_at_replay_without_a_capture():
    calls = []
    fixture = Fixture(graph_base(calls))
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    fixture.decode(fixture.scheduler.decode(reqs), padded_rows=4, replay=True)
    assert calls[0] == "replay"


def test_base_metadata_is_prepared_at_replay_when_a_captured_layer_needs_it():
    calls = []
    fixture = Fixture(graph_base(calls))
    fixture.layers[1].logit_cap = 30.0
    capture(fixture, calls)
    assert calls == [("state", 4), "capture", "base layer"]
    calls.clear()
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    fixture.decode(fixture.scheduler.decode(reqs), padded_rows=4, replay=True)
    assert calls[0] == "replay"
    assert counts("layers_on_base") == ({"logit soft cap": 1},)


def test_base_metadata_of_eager_steps():
    calls = []
    fixture = Fixture(graph_base(calls))
    fixture.layers[1].sliding_window_size = 8
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    batch = fixture.scheduler.decode(reqs)
    on_init_new(None, None, batch, fixture.runner)
    view = fixture.forward_batch(batch)
    q, kv = torch.randn(3, HEADS * HEAD_DIM), torch.randn(3, KV_HEADS, HEAD_DIM)
    fixture.backend.init_forward_metadata(view)
    assert calls == ["eager"]  # nobody has seen a forward of this model, anything may read it
    fixture.backend.forward_decode(q, kv, kv.clone(), fixture.layers[0], view)
    fixture.backend.init_forward_metadata(view)
    assert calls == ["eager"]  # no layer needed it
    fixture.backend.forward_decode(q, kv, kv.clone(), fixture.layers[0], view)
    fixture.backend.forward_decode(q, kv, kv.clone(), fixture.layers[1], view)
    assert calls[1:] == ["eager", "base layer"]  # one that did not run before does
    fixture.backend.init_forward_metadata(view)
    assert calls[3:] == ["eager"]  # from now on in time


def test_idle_replay_of_a_padding_only_batch():
    fixture = Fixture(graph_base([]))
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(4)]
    fixture.decode(fixture.scheduler.decode(reqs))
    idle = fixture.scheduler.batch([], "IDLE")
    on_init_new(None, None, idle, fixture.runner)
    idle.forward_mode = type(idle.forward_mode)["DECODE"]  # the view has the captured mode
    view = fixture.forward_batch(idle, padded_rows=2)
    fixture.backend.init_forward_metadata_out_graph(view)
    q, kv = torch.randn(2, HEADS * HEAD_DIM), torch.zeros(2, KV_HEADS, HEAD_DIM)
    out = fixture.backend.forward_decode(q, kv, kv.clone(), fixture.layers[0], view)
    assert torch.equal(out, torch.zeros_like(out))
    fixture.decode(fixture.scheduler.decode(reqs))
    assert counts("plans_made") == (2,)


def test_dummy_forward_never_sees_an_old_structure(fixture):
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    batch = fixture.scheduler.decode(reqs)
    on_init_new(None, None, batch, fixture.runner)
    view = fixture.forward_batch(batch)
    view.rids = None
    fixture.backend.init_forward_metadata(view)
    assert counts("plans_made", "dummy_plans", "shared_segments") == (0, 1, 0)


def test_more_graph_rows_than_request_slots():
    fixture = Fixture(graph_base([]))
    assert fixture.backend._pat.max_rows == 64
    capture(fixture, [], rows=100)
    assert fixture.backend._pat.max_rows == 100


def test_more_graph_rows_than_the_workspace_holds(monkeypatch, caplog):
    from pat_sglang import DecodePlanner

    calls = []
    fixture = Fixture(graph_base(calls))

    def refuse(self, **options):
        raise ValueError("too small")

    monkeypatch.setattr(DecodePlanner, "__init__", refuse)
    capture(fixture, calls, rows=100)
    assert calls == [("state", 100), "capture", "base layer", "base layer"]
    assert "decode stays on torch_native: ValueError: too small" in caplog.text
    calls.clear()
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(3)]
    fixture.decode(fixture.scheduler.decode(reqs), padded_rows=4, replay=True)
    assert calls[:3] == ["replay", "eager", "base layer"]


@pytest.mark.parametrize("padded", [3, 5], ids=["plain", "padded by DP attention"])
def test_a_step_the_hook_missed_is_right_and_reported(fixture, caplog, padded):
    reqs = [fixture.scheduler.serve([*SYSTEM, i]) for i in range(3)]
    for req in reqs:
        fixture.prefill(req)
    view = fixture.forward_batch(fixture.scheduler.decode(reqs), padded)
    view.rids = [req.rid for req in reqs]
    fixture.backend.init_forward_metadata(view)
    fixture.base.init_forward_metadata(view)
    fixture.compare(fixture.layers[0], view, 3)
    assert "never fired" in caplog.text
    assert counts("no_sharing") == ({"the hook did not see this step": 1},)
    (plan,) = fixture.backend._pat.plans.values()
    assert plan.stats.rows == 3


@pytest.mark.parametrize("entry", ["init_forward_metadata", "init_forward_metadata_out_graph"])
def test_beams_are_rows_without_a_request_and_take_over_each_others_slots(monkeypatch, entry):
    """As 0.5.23 runs beam search: the list of requests is the same, req_to_token is not."""
    monkeypatch.setenv("PAT_SGLANG_VALIDATE", "1")
    fixture = Fixture(graph_base([]))
    scheduler, table = fixture.scheduler, fixture.scheduler.pool.req_to_token
    leader, running = fixture.serve(SYSTEM), []
    running.append(leader)
    rows = torch.tensor([scheduler.row(leader), scheduler.pool.free_slots.pop()])
    prompt = scheduler.lens[leader]
    table[rows[1], :prompt] = table[rows[0], :prompt]
    for step in range(4):
        batch = scheduler.decode(running)
        at = scheduler.lens[leader] - 1
        table[rows[1], at] = scheduler._slots(1)[0]
        batch.seq_lens = batch.seq_lens.repeat(2)
        on_init_new(None, None, batch, fixture.runner)
        view = forward_view(
            batch_size=2, num_padding=0, rids=[leader.rid], forward_mode=batch.forward_mode,
            req_pool_indices=rows, seq_lens=batch.seq_lens,
            seq_lens_cpu=batch.seq_lens.clone(), out_cache_loc=table[rows, at].long(),
        )  # fmt: skip
        getattr(fixture.backend, entry)(view)
        fixture.base.init_forward_metadata(view)
        for layer in fixture.layers:
            fixture.compare(layer, view, 2)
        survivors = rows.flip(0) if step % 2 else rows[[1, 1]]
        table[rows, prompt : at + 1] = table[survivors, prompt : at + 1]
    assert counts("plans_made", "plans_kept") == (4, 0)
    assert counts("no_sharing") == ({"rows that are no requests (beam search)": 4},)


def test_a_hook_that_never_fires_stops_a_strict_server(fixture, monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    req = fixture.scheduler.serve(SYSTEM)
    fixture.prefill(req)
    with pytest.raises(RuntimeError, match="never fired"):
        fixture.backend.init_forward_metadata(
            fixture.forward_batch(fixture.scheduler.decode([req]))
        )


# -- layers on the base ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("is_cross_attention", True, "cross attention"),
        ("sliding_window_size", 16, "sliding window"),
        ("use_irope", True, "chunked local attention"),
        ("logit_cap", 50.0, "logit soft cap"),
        ("xai_temperature_len", 1024, "xai temperature"),
        ("v_head_dim", 32, "head dims of K and V differ"),
        ("k_scale", torch.ones(()), "K/V scales"),
    ],
)
def test_layers_pat_does_not_know(name, value, reason):
    from pat_sglang.plugin import eligibility

    layer = Fixture().layers[0]
    assert eligibility.layer_reason(layer) is None
    setattr(layer, name, value)
    assert eligibility.layer_reason(layer) == reason


@pytest.mark.parametrize(("k", "v"), [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0)])
def test_scales_of_one_are_none(k, v):
    """FP8 weights bring them, whatever the KV cache is."""
    from pat_sglang.plugin import eligibility

    layer = Fixture().layers[0]
    layer.k_scale, layer.v_scale = (torch.nn.Parameter(torch.tensor(x)) for x in (k, v))
    layer.k_scale_float, layer.v_scale_float = k, v
    assert eligibility.layer_reason(layer) == (None if k == v == 1 else "K/V scales")


def test_encoder_only_layers_and_head_dims():
    from sglang.srt.layers.radix_attention import AttentionType

    from pat_sglang.plugin import eligibility

    layer = Fixture(attn_type=AttentionType.ENCODER_ONLY).layers[0]
    assert eligibility.layer_reason(layer) == "attention type encoder_only"
    layer.attn_type = AttentionType.DECODER
    layer.qk_head_dim = layer.v_head_dim = 96
    assert eligibility.layer_reason(layer) == "head dim 96"


def test_unknown_arguments_go_to_the_base():
    calls = []
    fixture = Fixture(graph_base(calls))
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(2)]
    batch = fixture.scheduler.decode(reqs)
    on_init_new(None, None, batch, fixture.runner)
    view = fixture.forward_batch(batch)
    q, kv = torch.randn(2, HEADS * HEAD_DIM), torch.randn(2, KV_HEADS, HEAD_DIM)
    layer = fixture.layers[0]
    for _ in range(2):
        fixture.backend.init_forward_metadata(view)
        calls.clear()
        fixture.backend.forward_decode(q, kv, kv.clone(), layer, view, sinks=None)
    assert calls == []
    fixture.backend.forward_decode(q, kv, kv.clone(), layer, view, sinks=torch.zeros(HEADS))
    assert calls == ["eager", "base layer"]


def test_kv_that_is_not_written():
    fixture = Fixture()
    view = fixture.prepared(2)
    q, kv = torch.randn(2, HEADS * HEAD_DIM), torch.randn(2, KV_HEADS, HEAD_DIM)
    before = fixture.pool.k_buffer[0].clone()
    fixture.backend.forward_decode(q, kv, kv, fixture.layers[0], view, save_kv_cache=False)
    fixture.backend.forward_decode(q, None, None, fixture.layers[0], view)
    assert torch.equal(before.nan_to_num(7.0), fixture.pool.k_buffer[0].nan_to_num(7.0))


def test_queries_in_a_strided_view(fixture):
    """Models split q out of one qkv tensor."""
    view = fixture.prepared(3)
    wide = torch.randn(3, HEADS * HEAD_DIM + 100)
    q = wide[:, : HEADS * HEAD_DIM]
    layer = fixture.layers[0]
    strided = fixture.backend.forward_decode(q, None, None, layer, view)
    assert torch.equal(strided, fixture.backend.forward_decode(q.clone(), None, None, layer, view))


def test_queries_with_gaps_between_heads(fixture):
    """A gate beside every query head leaves strides that the kernels do not take."""
    view = fixture.prepared(3)
    q = torch.randn(3, HEADS, 2 * HEAD_DIM)[:, :, :HEAD_DIM]
    layer = fixture.layers[0]
    gaps = fixture.backend.forward_decode(q, None, None, layer, view)
    dense = q.reshape(3, HEADS * HEAD_DIM)
    assert torch.equal(gaps, fixture.backend.forward_decode(dense, None, None, layer, view))


def test_more_rows_than_planned_for_in_a_dummy_forward(fixture):
    """Warm-up and data-parallel padding may bring more rows than there are request slots."""
    view = fixture.forward_batch(fixture.scheduler.batch([], "DECODE"), padded_rows=40)
    fixture.backend._pat.max_rows = 32
    fixture.backend._pat_plan(view, 40, real=False)
    (plan,) = fixture.backend._pat.plans.values()
    assert plan.stats.rows == 32


# -- declined at start ----------------------------------------------------------------------------


def declined(fixture, caplog):
    assert not fixture.active
    (reason,) = METRICS.as_dict()["declined"]
    (record,) = [r for r in caplog.records if "not active" in r.message]
    assert reason in record.message and "\n" not in record.message
    assert METRICS.as_dict()["active"] == 0
    return reason


def remade(fixture, name="torch_native"):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    METRICS.reset()
    fixture.backend = builder.wrap(name, TorchNativeAttnBackend)(fixture.runner)
    return fixture


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("enable_deterministic_inference", "deterministic inference"),
        ("enable_two_batch_overlap", "two-batch overlap"),
        ("enable_pdmux", "PD multiplexing"),
        ("speculative_algorithm", "speculative decoding"),
        ("dllm_algorithm", "diffusion LLM"),
        ("radix_cache_backend", "cannot be read"),
        ("enable_streaming_session", "streaming sessions"),
    ],
)
def test_server_options(option, reason, caplog):
    fixture = Fixture()
    setattr(fixture.runner.server_args, option, "x")
    assert reason in declined(remade(fixture), caplog)


def test_decode_context_parallelism(caplog):
    fixture = Fixture()
    fixture.runner.server_args.dcp_size = 2
    assert declined(remade(fixture), caplog) == "decode context parallelism"


def test_mla(caplog):
    fixture = Fixture()
    fixture.runner.use_mla_backend = True
    assert declined(remade(fixture), caplog) == "MLA model"


def test_prefill_aware_sliding_window(caplog):
    fixture = Fixture()
    fixture.runner.prefill_aware_swa = True
    assert "prefill-aware" in declined(remade(fixture), caplog)


def test_metadata_glue_graph(monkeypatch, caplog):
    fixture = Fixture()
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    assert "unset it" in declined(remade(fixture), caplog)


def test_unknown_pool(caplog):
    fixture = Fixture()
    fixture.runner.token_to_kv_pool = type("MHATokenToKVPoolFP4", (), {})()
    fixture.runner.token_to_kv_pool.dtype = torch.uint8
    assert "MHATokenToKVPoolFP4" in declined(remade(fixture), caplog)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("dtype", torch.float8_e4m3fn, "KV cache dtype"),
        ("store_dtype", torch.uint8, "KV cache dtype"),
        ("use_hnd", True, "KV cache layout"),
        ("is_quantized_kv_cache", True, "quantised"),
    ],
)
def test_pool_properties(name, value, reason, caplog, monkeypatch):
    fixture = Fixture()
    monkeypatch.setattr(type(fixture.pool), name, value, raising=False)  # one is a property
    vars(fixture.pool).pop(name, None)
    assert reason in declined(remade(fixture), caplog)


def test_workspace_too_small(monkeypatch, caplog):
    from pat_sglang import DecodePlanner

    def refuse(**options):
        raise ValueError(f"max_workspace_bytes {options['max_workspace_bytes']} is below 9999")

    fixture = Fixture()
    monkeypatch.setattr(DecodePlanner, "__init__", lambda self, **options: refuse(**options))
    reason = declined(remade(fixture), caplog)
    assert reason.startswith(f"ValueError: max_workspace_bytes {256 << 20} is below 9999")
    assert "PAT_SGLANG_WORKSPACE_MIB is 256" in reason


def test_too_little_gpu_memory_is_declined_before_anything_is_allocated(monkeypatch):
    from pat_sglang import DecodePlanner

    monkeypatch.setattr(DecodePlanner, "__init__", lambda self, **options: pytest.fail("allocated"))
    measure = partial(GpuMemory, free=100 * MIB, fraction_of=80 << 30, fraction=0.88)
    with pytest.raises(builder._Declined, match=r"100 MiB are free: lower --mem-fraction-static"):
        builder._make_planners(
            [(32, 8, 128)], torch.bfloat16, torch.device("cuda"), 10_000, measure, 64
        )


def test_a_gpu_that_is_nearly_full_gets_smaller_buffers(caplog):
    """Fewer partials mean coarser plans; only when the fixed part does not fit is PAT off."""
    heads, tokens, rows = [(32, 8, 128)], 10_000, 64
    fraction = {"fraction_of": 80 << 30, "fraction": 0.88}
    roomy = GpuMemory(free=1 << 30, **fraction)
    assert builder._workspace_cap(heads, tokens, rows, roomy) == 256 * MIB
    assert builder._workspace_cap(heads, tokens, rows, None) == 256 * MIB
    assert not caplog.records
    tight = GpuMemory(free=(512 + 20) * MIB, **fraction)
    cap = builder._workspace_cap(heads, tokens, rows, tight)
    assert cap == 20 * MIB
    assert workspace_for(*heads[0], rows, tokens, cap)[1] <= 20 * MIB
    (record,) = caplog.records
    assert "532 MiB are free: lower --mem-fraction-static by 0.01" in record.message
    assert "they take 19 MiB" in record.message


def test_memory_that_runs_out_all_the_same(monkeypatch, caplog):
    from pat_sglang import DecodePlanner

    def run_out(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand many lines")

    fixture = Fixture()
    monkeypatch.setattr(DecodePlanner, "__init__", run_out)
    reason = declined(remade(fixture), caplog)
    assert reason == "OutOfMemoryError: CUDA out of memory. (lower --mem-fraction-static)"


@pytest.mark.parametrize(
    ("free", "wanted", "fraction", "advice"),
    [
        (767, 256, 0.88, "by 0.01, from 0.88 to 0.87"),
        # 1.5 of 10 GiB are missing at most: to the next hundredth, never below.
        (0, 1024, 0.9, "by 0.15, from 0.9 to 0.75"),
        (0, 1025, 0.9, "by 0.16, from 0.9 to 0.74"),
        (0, 1024, None, "by 0.15"),
    ],
)
def test_advice_about_memory(free, wanted, fraction, advice):
    text = GpuMemory(free * MIB, 10 << 30, fraction).advice(wanted * MIB)
    assert text == (
        f"PAT's buffers need {wanted} MiB and 512 MiB must stay free, {free} MiB are free: "
        f"lower --mem-fraction-static {advice} (or --max-total-tokens, where that sets the KV pool)"
    )


def test_what_the_fraction_is_a_fraction_of():
    from pat_sglang.plugin import compat

    args = SimpleNamespace(mem_fraction_static=0.85)
    runner = SimpleNamespace(server_args=args, pre_model_load_memory=79.5)
    assert compat.static_fraction(runner) == (0.85, int(79.5 * (1 << 30)))
    assert compat.static_fraction(SimpleNamespace(server_args=args)) == (0.85, None)


def test_no_compiler(monkeypatch, caplog):
    from pat_sglang import DecodePlanner, jit

    def refuse(self, **options):
        raise jit.BuildError("no CUDA toolkit found: set CUDA_HOME\nand more lines")

    fixture = Fixture()
    monkeypatch.setattr(DecodePlanner, "__init__", refuse)
    reason = declined(remade(fixture), caplog)
    assert reason.startswith("BuildError: no CUDA toolkit found: set CUDA_HOME (")


def test_a_seam_that_differs_from_what_was_probed(caplog):
    fixture = Fixture()
    del fixture.runner.model_config
    assert declined(remade(fixture), caplog).startswith("AttributeError: ")


def test_no_layer_of_the_model(caplog):
    fixture = Fixture()
    for layer in fixture.layers:
        layer.qk_head_dim = layer.v_head_dim = 80
    assert "(head dim 80)" in declined(remade(fixture), caplog)


def test_backend_that_is_no_base(caplog):
    fixture = Fixture()
    set_attention_backends(fixture.runner, "aiter", "aiter")
    assert declined(remade(fixture, "aiter"), caplog).startswith("aiter is no base backend")


def test_unsupported_version(monkeypatch, caplog):
    from pat_sglang.plugin import compat

    fixture = Fixture()
    monkeypatch.setattr(compat, "sglang_version", lambda: "0.5.12")
    assert "older than 0.5.13.post1" in declined(remade(fixture), caplog)


def test_strict_makes_each_of_them_an_error(monkeypatch):
    fixture = Fixture()
    fixture.runner.use_mla_backend = True
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    with pytest.raises(builder.StrictError, match="MLA model"):
        remade(fixture)


def test_servers_that_did_not_ask():
    fixture = Fixture()
    fixture.runner.server_args._pat = None
    assert not remade(fixture).active
    assert METRICS.get("declined") == 0


def test_environment_switch_needs_no_flag(monkeypatch):
    fixture = Fixture()
    del fixture.runner.server_args._pat
    monkeypatch.setenv("PAT_SGLANG", "1")
    assert remade(fixture).active


def test_draft_workers_and_prefill_children_are_left_alone():
    fixture = Fixture()
    fixture.runner.is_draft_worker = True
    assert not remade(fixture).active
    fixture.runner.is_draft_worker = False
    set_attention_backends(fixture.runner, "torch_native", "triton")
    assert not remade(fixture).active
    set_attention_backends(fixture.runner, "triton", "torch_native")
    assert remade(fixture).active


def test_the_literal_name(registered):
    """ServerArgs made before the plug-ins were loaded keep the name `pat`."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    fixture = Fixture()
    fixture.runner.server_args = SimpleNamespace()
    set_attention_backends(fixture.runner, "pat", "pat")
    backend = ATTENTION_BACKENDS["pat"](fixture.runner)
    assert type(backend).__name__ == "PatTorchNativeAttnBackend"


def test_host_lengths_without_a_mirror(fixture):
    """seq_lens_cpu may be None: the requests know their length, a token or two late."""
    reqs = [fixture.serve([*SYSTEM, i]) for i in range(2)]
    batch = fixture.scheduler.decode(reqs)
    on_init_new(None, None, batch, fixture.runner)
    view = fixture.forward_batch(batch)
    view.seq_lens_cpu = None
    fixture.backend.init_forward_metadata(view)
    fixture.base.init_forward_metadata(view)
    fixture.compare(fixture.layers[0], view, 2)
    assert fixture.backend._pat.feed.reqs is None  # the next step has no requests: it is nobody's
    assert np.array_equal(fixture.backend._pat_host_lens(view, 2), view.seq_lens)
