# SPDX-License-Identifier: MIT
"""The kernels against the fp32 oracle, eager and under CUDA-graph replay with changing plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CHAINY, make_case, random_forest
from compare import assert_close, oracle

from pat_sglang import DecodePlanner, Forest, pat_decode
from pat_sglang.host import HostPlanner
from pat_sglang.metrics import METRICS
from pat_sglang.packing import Search
from pat_sglang.plan import RING
from pat_sglang.transfer import Transfer

HEADS = [(4, 4), (6, 2), (10, 2), (7, 1), (16, 1), (32, 8), (9, 3), (40, 2)]
CHAIN_HEADS = [(4, 4), (6, 2), (16, 4), (16, 2), (16, 1), (24, 1)]  # groups 1, 3, 4, 8, 16, 24
CHAIN_ROWS = [16, 64, 128]  # query rows of a chain's items at most: each has a tile of its own
PAGE = {1: 1, 2: 16}


@pytest.fixture(params=["best", "sm80"])
def make_planner(request):
    """Makes planners of the GPU's own kernel path, then of the one that every GPU has."""
    if request.param == "sm80" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU's own path is sm80")
    path = None if request.param == "best" else request.param

    def make(q_heads, kv_heads, head_dim, dtype=torch.bfloat16, **kwargs):
        return DecodePlanner(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
            device="cuda", max_rows=600, max_tokens=1 << 17, path=path, **kwargs,
        )  # fmt: skip

    return make


def with_chains(planner, query_rows=128, num_sms=1):
    """The planner, now making chains wherever it can: the fewer SMs, the less is cut."""
    host = planner.host
    planner.host = HostPlanner(
        replace(host.shape, sharing="on"),
        replace(CHAINY, num_sms=num_sms),
        host.capacity,
        native=False,
        search=Search(chain_rows=(query_rows,), without_chains=False),
    )
    return planner


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


def check_batch(planner, heads, head_dim, batch, dtype, seed):
    """Plans a batch, validates the plan and compares its output, padded, with the oracle."""
    case = cuda_case(heads, head_dim, *batch, dtype, seed=seed, page_size=PAGE[1 + seed % 2])
    plan = plan_case(planner, case)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert_close(run(case, plan, padded=seed), case)
    return plan


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_random_forests(make_planner, heads, head_dim, dtype, sharing):
    rng = np.random.default_rng(hash((heads, head_dim)) % 2**31)
    planner = make_planner(*heads, head_dim, dtype, sharing=sharing)
    for seed, (rows, longest) in enumerate([(1, 700), (5, 300), (40, 500), (150, 90)]):
        batch = random_forest(rng, rows, max_len=longest)
        check_batch(planner, heads, head_dim, batch, dtype, seed)


def test_graph_replay_with_changing_plans(make_planner):
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
    hosts = [planner.host, *(with_chains(planner, n, 1).host for n in CHAIN_ROWS)]
    for seed in range(16):
        rows = int(rng.integers(1, padded + 1))
        case = cuda_case(heads, head_dim, *random_forest(rng, rows, max_len=200), seed=seed)
        assert case.k_cache.shape[0] <= k.shape[0]
        case.k_cache, case.v_cache = k, v
        q[:rows] = case.q
        planner.host = hosts[seed % len(hosts)]
        plan_case(planner, case)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, case)


@pytest.mark.parametrize("rows", [8, 90])  # the merge kernel takes eight warps a pair, or one
def test_a_plan_with_more_rows_than_a_graph_is_nan(make_planner, rows):
    heads, head_dim = (32, 8), 128
    rng = np.random.default_rng(15)
    planner = make_planner(*heads, head_dim)
    fits, larger = (
        cuda_case(heads, head_dim, *random_forest(rng, n, max_len=200)) for n in (rows, rows + 30)
    )
    beyond = torch.full((rows + 30, *fits.q.shape[1:]), 7.0, dtype=fits.q.dtype, device="cuda")
    out = beyond[:rows]
    plan = plan_case(planner, fits)
    replay = captured(
        lambda: pat_decode(
            fits.q, fits.k_cache, fits.v_cache, plan, sm_scale=fits.sm_scale, out=out
        )
    )
    replay()
    assert_close(out, fits)
    plan_case(planner, larger)
    replay()
    assert torch.isnan(out).all()
    assert (beyond[rows:] == 7).all()
    plan_case(planner, fits)
    replay()
    assert_close(out, fits)


def test_slots_of_long_runs_and_tails(make_planner):
    # Many blocks share one where there are few, and leave none of it out.
    heads, head_dim = (8, 1), 64
    for prompt, own, rows in ((70_000, 3, 2), (0, 120_001, 1), (513, 2_049, 30)):
        forest = Forest(np.array([-1]), np.array([prompt])) if prompt else Forest.empty()
        leaf = np.full(rows, 0 if prompt else -1, np.int32)
        case = cuda_case(heads, head_dim, forest, leaf, np.full(rows, prompt + own))
        plan_case(make_planner(*heads, head_dim), case).validate(
            case.req_to_token, case.req_pool_indices, case.seq_lens
        )


def test_uploads_are_exact(make_planner):
    rng = np.random.default_rng(7)
    planner = make_planner(32, 8, 128)
    copied = METRICS.get("uploads_copied")
    odd_words = set()  # beyond whole 16 bytes
    for rows in (1, 200, 2, 40, 3, 300):
        case = cuda_case((32, 8), 128, *random_forest(rng, rows, max_len=60))
        plan = plan_case(planner, case)
        count = plan.host_words.size
        odd_words.add(count % 4)
        assert torch.equal(plan.words[:count].cpu(), torch.from_numpy(plan.host_words))
        assert torch.equal(plan.live_lens[:rows].long(), case.seq_lens.long())
        assert_close(run(case, plan), case)
    assert odd_words == {0, 1, 2, 3}
    assert METRICS.get("uploads_copied") == copied  # the device has read the pinned buffers


def test_a_ring_that_the_device_cannot_read(make_planner):
    # Pageable memory: the copy engine uploads, and the fill kernel is no dependent.
    rng = np.random.default_rng(9)
    planner = make_planner(32, 8, 128)
    plan = planner._plan
    ring = torch.zeros(RING, plan.words.numel(), dtype=torch.int32)
    buffers = (plan.words, plan.slots, plan.filled, plan.live_lens, ring)
    planner.transfer = Transfer(*planner.layer.module.bind_plan(*buffers))
    planner._ring = list(ring.numpy())
    for seed in range(2 * RING):
        check_batch(planner, (32, 8), 128, random_forest(rng, 30, max_len=90), torch.bfloat16, seed)


def test_plans_back_to_back_on_another_stream(make_planner):
    # The device is kept behind, so that the ring's buffers are all taken: a plan must wait for one.
    rng = np.random.default_rng(8)
    planner = make_planner(32, 8, 128)
    batches = [random_forest(rng, int(rng.integers(1, 120)), max_len=120) for _ in range(4 * RING)]
    cases = [cuda_case((32, 8), 128, *batch, seed=i) for i, batch in enumerate(batches)]
    outs = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for case, (forest, leaves, lens) in zip(cases, batches, strict=True):
            torch.cuda._sleep(20_000_000)
            plan = planner.plan(
                forest, leaves, lens, case.seq_lens, case.req_to_token, case.req_pool_indices
            )
            outs.append(run(case, plan))
    stream.synchronize()
    for out, case in zip(outs, cases, strict=True):
        assert_close(out, case)


def test_a_step_that_is_refused_leaves_the_plan_alone(make_planner):
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(3, -1), np.array([5, 9, 70]), spare=60)
    planner = make_planner(32, 8, 128)
    plan = plan_case(planner, case)
    on_device = (case.seq_lens, case.req_to_token, case.req_pool_indices)
    for wrong, message in [(0, "seq_lens must be on cuda"), (1, "req_to_token must be on cuda")]:
        tensors = [t.cpu() if i == wrong else t for i, t in enumerate(on_device)]
        with pytest.raises(ValueError, match=message):
            planner.plan(None, None, np.array([50, 50, 50]), *tensors)
    case.grow(np.ones(3, np.int64))
    assert planner.advance(plan)
    assert_close(run(case, plan), case)


def test_a_step_cannot_be_captured(make_planner):
    # Its launches have counts and offsets of this plan in their arguments.
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(3, -1), np.array([5, 9, 70]), spare=60)
    planner = make_planner(32, 8, 128)
    plan = plan_case(planner, case)
    lens = case.seq_lens.cpu().numpy()
    tensors = (case.seq_lens, case.req_to_token, case.req_pool_indices)
    for _ in range(RING):  # every buffer has been uploaded once
        planner.plan(None, None, lens, *tensors)
    for step in (
        lambda: planner.advance(plan), lambda: planner.plan(None, None, lens, *tensors),
    ):  # fmt: skip
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            with pytest.raises(RuntimeError, match="cannot be captured"):
                step()
            torch.empty(1, device="cuda").zero_()  # a graph of nothing would be warned of
    for seed in range(2 * RING):  # and every buffer of the ring is still good
        check_batch(
            planner, (32, 8), 128, random_forest(np.random.default_rng(seed), 9, max_len=40),
            torch.bfloat16, seed,
        )  # fmt: skip


@pytest.mark.parametrize(
    "write", [lambda to, values: to.copy_(values), lambda to, values: torch.mul(values, 1, out=to)],
    ids=["copy engine", "kernel"],
)  # fmt: skip
@pytest.mark.parametrize("last", ["q", "k_cache", "v_cache"])
def test_what_was_just_written_is_read(make_planner, last, write):
    # Nothing of it may be asked for before the stream has come so far.
    case = cuda_case((32, 8), 128, *random_forest(np.random.default_rng(13), 90, max_len=900))
    plan = plan_case(make_planner(32, 8, 128), case)
    written = {name: getattr(case, name).clone() for name in ("q", "k_cache", "v_cache")}
    out = torch.empty_like(case.q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            for tensor in (out, case.q, case.k_cache, case.v_cache):
                tensor.fill_(torch.nan)
            for name in sorted(written, key=lambda name: name == last):
                write(getattr(case, name), written[name])
            pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale, out=out)
    graph.replay()
    assert_close(out, case)


def test_layers_without_a_kernel_between(make_planner):
    # The merge kernel of each resets the work counters for the next.
    case = cuda_case((32, 8), 128, *random_forest(np.random.default_rng(14), 200, max_len=300))
    plan = plan_case(make_planner(32, 8, 128), case)
    outs = torch.full((12, *case.q.shape), torch.nan, dtype=case.q.dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale, out=out)
    for _ in range(3):
        graph.replay()
    assert_close(outs[0], case)
    assert all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs)


def test_lengths_that_are_written_just_before_the_plan(make_planner):
    # The fill kernel starts before the upload has ended, and reads them first.
    rng = np.random.default_rng(11)
    case = cuda_case((32, 8), 128, *random_forest(rng, 50, max_len=90))
    lens = case.seq_lens.cpu().numpy()
    planner = make_planner(32, 8, 128)
    late = [torch.zeros_like(t) for t in (case.seq_lens, case.req_pool_indices)]
    for _ in range(4):
        for tensor in late:
            tensor.zero_()
        torch.cuda._sleep(2_000_000)
        late[0].copy_(case.seq_lens)
        late[1].copy_(case.req_pool_indices)
        plan = planner.plan(
            case.forest, case.leaf_of_row, lens, late[0], case.req_to_token, late[1]
        )
        assert_close(run(case, plan), case)


def test_a_planner_that_is_dropped_while_its_upload_waits(make_planner):
    rng = np.random.default_rng(12)
    case = cuda_case((32, 8), 128, *random_forest(rng, 60, max_len=90))
    lens = case.seq_lens.cpu().numpy()
    planner = make_planner(32, 8, 128)
    torch.cuda._sleep(20_000_000)
    plan = planner.plan(
        case.forest, case.leaf_of_row, lens, case.seq_lens, case.req_to_token,
        case.req_pool_indices,
    )  # fmt: skip
    del planner  # and with it the ring
    torch.empty(1 << 22, dtype=torch.int32, pin_memory=True).fill_(-1)  # may take its place
    assert_close(run(case, plan), case)


@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (8, 1)])
def test_a_row_of_very_many_parts(make_planner, heads):
    # Eight warps merge a row, in several batches each.
    lens = np.array([60_000])
    case = cuda_case(heads, 128, Forest.empty(), np.full(1, -1), lens)
    plan = plan_case(make_planner(*heads, 128), case)
    assert heads != (8, 1) or plan.stats.partial_slots > 128
    assert_close(run(case, plan), case)


@pytest.mark.parametrize("heads", [(32, 8), (4, 4)])
def test_tails_grow_on_the_device(make_planner, heads):
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


def captured(run):
    """What replays the launches of ``run``."""
    run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class AppendingGraph:
    """A captured step of up to ``rows`` rows: each row's new slot is appended, then a layer."""

    def __init__(self, planner, heads, head_dim, rows, dtypes=(torch.int64, torch.int64)):
        pool = cuda_case(heads, head_dim, Forest.empty(), np.full(1, -1), np.ones(1), spare=60000)
        self.k, self.v = pool.k_cache, pool.v_cache
        self.q = torch.zeros(rows, heads[0], head_dim, dtype=self.k.dtype, device=self.k.device)
        self.out = torch.empty_like(self.q)
        self.lens = torch.ones(rows, dtype=dtypes[0], device=self.k.device)
        self.new_slots = torch.zeros(rows, dtype=dtypes[1], device=self.k.device)
        self.planner = planner
        table = torch.zeros(rows, 4, dtype=torch.int32, device=self.k.device)
        indices = torch.arange(rows, device=self.k.device)
        plan = planner.plan(None, None, np.ones(rows), self.lens, table, indices)

        def run():
            planner.append_one(self.lens, self.new_slots)
            pat_decode(self.q, self.k, self.v, plan, sm_scale=head_dim**-0.5, out=self.out)

        self.replay = captured(run)

    def plan(self, case):
        """A plan of a case that lives in the graph's pool from now on."""
        for mine, its in ((self.k, case.k_cache), (self.v, case.v_cache)):
            mine.fill_(torch.nan)
            mine[: len(its)] = its
        case.k_cache, case.v_cache = self.k, self.v
        self.q[: len(case.q)] = case.q
        return plan_case(self.planner, case)

    def advance(self, case, plan):
        """A later step of a case that has grown; the host knows how much."""
        return self.planner.advance(
            plan, case.seq_lens.cpu().numpy(), case.seq_lens, case.req_to_token,
            case.req_pool_indices, in_graph=True,
        )  # fmt: skip

    def step(self, case):
        """The replay; its output."""
        lens, new_slots = case.graph_inputs(len(self.q) - len(case.q))
        self.lens.copy_(lens)
        self.new_slots.copy_(new_slots)
        self.out.fill_(torch.nan)
        self.replay()
        return self.out


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)]
)
def test_a_graph_that_appends_spares_the_launch(make_planner, dtypes, chains):
    heads, head_dim = (32, 8), 128
    planner = make_planner(*heads, head_dim)
    if chains:
        with_chains(planner)
    graph = AppendingGraph(planner, heads, head_dim, 200, dtypes)
    rng = np.random.default_rng(15)
    launched = METRICS.get("appends_launched")
    for seed, rows in enumerate((200, 3, 130)):  # in one block of the kernel, and in two
        batch = random_forest(rng, rows, max_len=150)
        case = cuda_case(heads, head_dim, *batch, spare=30, seed=seed)
        plan = graph.plan(case)
        assert_close(graph.step(case), case)
        for step in range(25):
            case.grow(np.ones(rows, np.int64))
            assert graph.advance(case, plan)
            out = graph.step(case)
            if step % 8 == 0:
                assert_close(out, case)
        assert torch.equal(plan.live_lens[:rows].long(), case.seq_lens)
        plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
        assert_close(graph.step(case), case)  # once more: there is nothing to append
    assert METRICS.get("appends_launched") == launched


def test_a_row_that_the_graph_cannot_append_to_is_nan_until_it_is_filled(make_planner):
    heads, head_dim = (32, 8), 128
    planner = make_planner(*heads, head_dim)
    graph = AppendingGraph(planner, heads, head_dim, 8)
    lens = np.array([50, 95, 70, 40])
    case = cuda_case(heads, head_dim, Forest.empty(), np.full(4, -1), lens, spare=600)
    plan = graph.plan(case)
    case.grow(np.array([1, 2, 1, 1]))
    for _ in range(2):  # a later step does not forget
        out = graph.step(case)[:4]
        assert torch.isnan(out[1]).all() and torch.isfinite(out[[0, 2, 3]]).all()
        case.grow(np.ones(4, np.int64))
    assert planner.advance(plan)
    assert_close(graph.step(case), case)
    while int(case.seq_lens[0]) <= plan.tables.tails[0, 2]:  # to the end of its tail, and further
        case.grow(np.array([1, 0, 0, 0]))
        out = graph.step(case)[:4].clone()
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1:]).all()
    plan = plan_case(planner, case)
    assert_close(graph.step(case), case)


def test_one_long_row_among_short_ones(make_planner):
    lens = np.array([32768] + [int(n) for n in np.random.default_rng(5).integers(1, 80, 63)])
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(64, -1), lens)
    plan = plan_case(make_planner(32, 8, 128), case)
    assert plan.stats.splits > 0
    assert_close(run(case, plan), case)


def test_everything_shared_and_nothing_private(make_planner):
    forest = Forest(np.array([-1]), np.array([3000]))
    case = cuda_case((32, 8), 128, forest, np.zeros(300, np.int32), np.full(300, 3000))
    plan = plan_case(make_planner(32, 8, 128), case)
    assert plan.stats.shared_segments == 1
    assert_close(run(case, plan), case)


def test_same_plan_same_bits(make_planner):
    case = cuda_case((32, 8), 128, *random_forest(np.random.default_rng(6), 200, max_len=300))
    plan = plan_case(make_planner(32, 8, 128), case)
    first = run(case, plan)
    for _ in range(5):
        assert torch.equal(first.view(torch.int16), run(case, plan).view(torch.int16))


def test_a_row_that_outgrows_its_tail_unseen_is_nan(make_planner):
    case = cuda_case((32, 8), 128, Forest.empty(), np.full(3, -1), np.array([5, 9, 700]), spare=600)
    planner = make_planner(32, 8, 128)
    plan = plan_case(planner, case)
    case.grow(np.array([500, 1, 1]))
    assert planner.advance(plan)  # the host was told of one token only
    out = run(case, plan)
    assert torch.isnan(out[0]).all()
    assert torch.isfinite(out[1:]).all()


def chains_possible(heads, query_rows):
    """Whether an item of so many query rows holds two requests; one alone would share nothing."""
    return query_rows // (heads[0] // heads[1]) >= 2


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
@pytest.mark.parametrize("heads", CHAIN_HEADS)
def test_chains_on_random_forests(make_planner, heads, head_dim, dtype, query_rows, num_sms):
    if not chains_possible(heads, query_rows):
        pytest.skip("an item would have one request")
    rng = np.random.default_rng(heads[0] * query_rows)
    planner = with_chains(make_planner(*heads, head_dim, dtype), query_rows, num_sms)
    chains = 0
    for seed, (rows, longest) in enumerate([(3, 900), (12, 300), (40, 120), (150, 40)]):
        batch = random_forest(rng, rows, max_len=longest)
        plan = check_batch(planner, heads, head_dim, batch, dtype, seed)
        chains += plan.stats.chains
    assert chains > 0


def binary_tree(rows, root=330):
    """A root, four levels of two children each, and tails of 0 to 39 tokens."""
    below = 21
    parent = [-1, *(node // 2 for node in range(30))]
    length = [root] + [below] * 30
    leaves = np.arange(rows, dtype=np.int32) % 16 + 15
    lens = root + 4 * below + np.arange(rows) * 7 % 40
    return Forest(np.array(parent, np.int32), np.array(length, np.int32)), leaves, lens


@pytest.mark.parametrize("rows", [32, 33, 100, 128])
@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (16, 4)])
def test_chains_of_many_steps(make_planner, heads, query_rows, rows):
    # More steps than a warp reads at once: at group 1 a fragment of 33 rows has 35 of them, and on
    # the sm_80 path the two fragments of a warp of 128 rows have 42.
    case = cuda_case(heads, 128, *binary_tree(rows), seed=rows)
    plan = plan_case(with_chains(make_planner(*heads, 128), query_rows), case)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert plan.stats.chains > 0 and plan.stats.partial_slots == 0
    assert_close(run(case, plan), case)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("root", [200, 2000])
@pytest.mark.parametrize("rows", [33, 48])
@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (16, 4)])
def test_private_runs_before_a_shared_run(
    make_planner, heads, query_rows, rows, root, head_dim, page_size
):
    # On Hopper every other piece of a chain with such a run starts with its private runs.
    case = cuda_case(heads, head_dim, *binary_tree(rows, root), seed=rows, page_size=page_size)
    plan = plan_case(with_chains(make_planner(*heads, head_dim), query_rows), case)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert plan.stats.chains > 0 and plan.stats.splits == 0
    is_wide = any(not tile.startswith("16x") for tile in plan.stats.items)
    assert is_wide == (query_rows > 16)
    assert_close(run(case, plan), case)


def test_rows_of_a_chain_that_is_cut(make_planner):
    # The shared run and one tail are cut off: their rows are merged, the others too.
    forest, leaves, lens = binary_tree(32, root=6000)
    lens[5] += 3000
    case = cuda_case((16, 4), 128, forest, leaves, lens)
    plan = plan_case(with_chains(make_planner(16, 4, 128), num_sms=132), case)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)
    assert plan.stats.chains > 0 and plan.stats.splits > 0 and plan.stats.partial_slots > 64
    assert_close(run(case, plan), case)


@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (32, 8)])
def test_tails_of_chains_grow_on_the_device(make_planner, heads, query_rows):
    case = cuda_case(heads, 128, *binary_tree(48), spare=64)
    planner = with_chains(make_planner(*heads, 128), query_rows)
    plan = plan_case(planner, case)
    assert plan.stats.chains > 0
    for step in range(40):
        case.grow(np.sign((np.arange(48) + step) % 3))
        assert planner.advance(plan)
        if step % 13 == 0 or step == 39:
            assert_close(run(case, plan), case)
    plan.validate(case.req_to_token, case.req_pool_indices, case.seq_lens)


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (32, 8)])
def test_rows_of_a_chain_that_outgrow_their_tails_unseen_are_nan(
    make_planner, heads, query_rows, num_sms
):
    root = 330 if num_sms == 1 else 6000  # so long that it is cut
    case = cuda_case(heads, 128, *binary_tree(48, root), spare=500)
    planner = with_chains(make_planner(*heads, 128), query_rows, num_sms)
    plan = plan_case(planner, case)
    assert plan.stats.chains > 0
    outgrown = [0, 7, 8, 40]  # row 0 has an empty tail
    grown = np.ones(48, np.int64)
    grown[outgrown] = 450
    case.grow(grown)
    assert planner.advance(plan)  # the host was told of one token only
    out = run(case, plan)
    assert torch.isnan(out[outgrown]).all()
    out[outgrown] = oracle(case)[outgrown].to(out.dtype)
    assert_close(out, case)


def test_same_chains_same_bits(make_planner):
    case = cuda_case((32, 8), 128, *binary_tree(200))
    plan = plan_case(with_chains(make_planner(32, 8, 128)), case)
    first = run(case, plan)
    for _ in range(5):
        assert torch.equal(first.view(torch.int16), run(case, plan).view(torch.int16))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("query_rows", CHAIN_ROWS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_runs_of_chains_are_the_same_bits(make_planner, head_dim, query_rows, page_size):
    # Every worker has several pieces, some of which start with their private runs. A slice of the
    # ring that is written before it has been read shows in one layer of hundreds.
    parent = (np.arange(1 + 4 + 16 + 64 + 256) - 1) // 4
    forest = Forest(parent, np.repeat((256, 32, 256, 64, 32), (1, 4, 16, 64, 256)))
    leaves = parent.size - 256 + np.arange(512, dtype=np.int32) // 2
    batch = (forest, leaves, np.full(512, 640 + 200))
    case = cuda_case((64, 8), head_dim, *batch, page_size=page_size)
    plan = plan_case(with_chains(make_planner(64, 8, head_dim), query_rows), case)
    items = 4096 // query_rows
    assert plan.stats.chains == plan.stats.items[f"{query_rows}x64"] == items
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    assert 8 * items > (sms if query_rows == 128 else 2 * sms)
    first, differs = run(case, plan), torch.zeros((), dtype=torch.bool, device="cuda")
    assert_close(first, case)
    out = torch.empty_like(first)
    for _ in range(500):
        pat_decode(case.q, case.k_cache, case.v_cache, plan, sm_scale=case.sm_scale, out=out)
        differs |= (out != first).any()
    assert not differs


def test_bad_tensors_name_the_value(make_planner):
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
