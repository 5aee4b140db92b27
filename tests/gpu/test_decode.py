# SPDX-License-Identifier: MIT
"""The kernels against the fp32 oracle, eager and under CUDA-graph replay with changing plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_case, random_forest
from compare import assert_close

from pat_sglang import DecodePlanner, Forest, pat_decode

HEADS = [(4, 4), (6, 2), (10, 2), (7, 1), (16, 1), (32, 8), (9, 3), (40, 2)]
PAGE = {1: 1, 2: 16}


def make_planner(q_heads, kv_heads, head_dim, dtype=torch.bfloat16, **kwargs):
    return DecodePlanner(
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        device="cuda", max_rows=600, max_tokens=1 << 17, **kwargs,
    )  # fmt: skip


def cuda_case(heads, head_dim, forest, leaves, lens, dtype=torch.bfloat16, **kwargs):
    return make_case(
        forest, leaves, lens, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
        dtype=dtype, device="cuda", **kwargs,
    )  # fmt: skip


def plan_case(planner, case):
    return planner.plan(
        case.forest, case.leaf_of_row, case.seq_lens.cpu().numpy(), case.seq_lens,
        case.req_to_token, case.req_pool_indices,
    )  # fmt: skip


def run(case, plan, padded=0):
    q = torch.cat([case.q, torch.full_like(case.q[:1], torch.nan).expand(padded, -1, -1)])
    out = torch.full_like(q, torch.nan)
    pat_decode(q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale, out=out)
    return out


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_random_forests(heads, head_dim, dtype, sharing):
    rng = np.random.default_rng(hash((heads, head_dim)) % 2**31)
    planner = make_planner(*heads, head_dim, dtype, sharing=sharing)
    for seed, (rows, longest) in enumerate([(1, 700), (5, 300), (40, 500), (150, 90)]):
        case = cuda_case(
            heads, head_dim, *random_forest(rng, rows, max_len=longest), dtype, seed=seed,
            page_size=PAGE[1 + seed % 2],
        )  # fmt: skip
        plan = plan_case(planner, case)
        plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
        assert_close(run(case, plan, padded=seed), case)


def test_graph_replay_with_changing_plans():
    heads, head_dim, padded = (32, 8), 128, 64
    rng = np.random.default_rng(3)
    planner = make_planner(*heads, head_dim)
    pool = cuda_case(heads, head_dim, Forest.empty(), np.full(1, -1), np.array([1]), spare=60000)
    q = torch.zeros(padded, 32, head_dim, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn_like(pool.k_cache), torch.randn_like(pool.v_cache)
    out = torch.empty_like(q)
    lens = torch.ones(padded, dtype=torch.int64, device="cuda")
    table = torch.zeros(padded + 3, 4, dtype=torch.int32, device="cuda")
    plan = planner.plan(None, None, np.ones(padded), lens, table, torch.arange(padded).cuda())
    pat_decode(q, k, v, plan, sm_scale=head_dim**-0.5, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pat_decode(q, k, v, plan, sm_scale=head_dim**-0.5, out=out)
    for seed in range(12):
        rows = int(rng.integers(1, padded + 1))
        case = cuda_case(heads, head_dim, *random_forest(rng, rows, max_len=200), seed=seed)
        assert case.k_cache.shape[0] <= k.shape[0]
        case.k_cache, case.v_cache = k, v
        q[:rows] = case.q
        plan_case(planner, case)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, case)


@pytest.mark.parametrize("heads", [(32, 8), (4, 4)])
def test_tails_grow_on_the_device(heads):
    rng = np.random.default_rng(4)
    forest, leaves, lens = random_forest(rng, 20, max_len=150)
    case = cuda_case(heads, 128, forest, leaves, lens, spare=64)
    planner = make_planner(*heads, 128)
    plan = plan_case(planner, case)
    for _ in range(40):
        case.grow(np.ones(20, np.int64))
        assert planner.advance(plan)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_close(run(case, plan), case)


def test_one_long_row_among_short_ones():
    lens = np.array([32768] + [int(n) for n in np.random.default_rng(5).integers(1, 80, 63)])
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(64, -1), lens)
    plan = plan_case(make_planner(32, 8, 128), case)
    assert plan.stats.splits > 0
    assert_close(run(case, plan), case)


def test_everything_shared_and_nothing_private():
    forest = Forest(np.array([-1]), np.array([3000]))
    case = cuda_case((32, 8), 128, forest, np.zeros(300, np.int32), np.full(300, 3000))
    plan = plan_case(make_planner(32, 8, 128), case)
    assert plan.stats.shared_segments == 1
    assert_close(run(case, plan), case)


def test_same_plan_same_bits():
    case = cuda_case((32, 8), 128, *random_forest(np.random.default_rng(6), 200, max_len=300))
    plan = plan_case(make_planner(32, 8, 128), case)
    first = run(case, plan)
    for _ in range(5):
        assert torch.equal(first.view(torch.int16), run(case, plan).view(torch.int16))


def test_a_row_that_outgrows_its_tail_unseen_is_nan():
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(3, -1), np.array([5, 9, 700]), spare=600)
    planner = make_planner(32, 8, 128)
    plan = plan_case(planner, case)
    case.grow(np.array([500, 1, 1]))
    assert planner.advance(plan)  # the host was told of one token only
    out = run(case, plan)
    assert torch.isnan(out[0]).all()
    assert torch.isfinite(out[1:]).all()


def test_sm80_path_on_this_gpu():
    case = cuda_case((32, 8), 128, *random_forest(np.random.default_rng(7), 100, max_len=300))
    plan = plan_case(make_planner(32, 8, 128, path="sm80"), case)
    assert_close(run(case, plan), case)


def test_bad_tensors_name_the_value():
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(2, -1), np.array([3, 4]))
    plan = plan_case(make_planner(32, 8, 128), case)
    good = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache}
    for change, message in [
        ({"q": case.q.float()}, "bfloat16"),
        ({"q": case.q[:, :16]}, "geometry|contiguous"),
        ({"k_cache": case.k_cache[:, :, :64]}, "k_cache"),
        ({"k_cache": case.k_cache.cpu()}, "cuda"),
        ({"v_cache": case.v_cache[1:]}, "v_cache"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            pat_decode(**{**good, **change}, plan=plan, sm_scale=1.0)
