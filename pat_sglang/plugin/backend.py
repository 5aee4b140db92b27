# SPDX-License-Identifier: MIT
"""PatMixin: decode attention by PAT on top of one of SGLang's attention backends.

The base instance keeps everything it has; adopt() only gives it a subclass of its own class, so
prefill, speculative verify, sliding-window layers and all SGLang code that asks for the base's type
or attributes go on as before.

Per decode step: init_forward_metadata (eager) or init_forward_metadata_out_graph (CUDA graph)
plans, on the current stream and before the replay. Inside the graph only the plan's own buffers
and the graph's inputs are read, never req_to_token: once the forward has published that its reads
are over, the scheduler may hand the rows of finished requests to new ones. The inputs are enough
for a step that keeps its plan: init_forward_metadata_in_graph captures a kernel that appends the
slots this step writes to (out_cache_loc), and the host launches nothing where it knows that the
replay does it all.

Per layer: forward_decode writes K and V as the base does and runs pat_decode, or calls the base.
Which one is a static property of the layer (eligibility.py), so it may be captured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from pat_sglang._types import Int32Array
from pat_sglang.decode import pat_decode
from pat_sglang.layout import H_PLANNED_TOKENS, H_RUNS, H_SHARED_PACKS, H_SHARING, H_UNSHARED_TOKENS
from pat_sglang.metrics import METRICS, Repeated

from . import compat, eligibility
from .feed import StructureFeed
from .graphs import AppendingGraphs
from .structure import BatchStructure

if TYPE_CHECKING:
    from pat_sglang import DecodePlan


class BestPlan(NamedTuple):
    """The plan that saved the most KV tokens so far, to explain."""

    tokens_saved: int
    words: Int32Array


@dataclass
class PatState:
    """Everything PAT keeps on a backend instance, under one attribute."""

    feed: StructureFeed
    planners: dict[eligibility.Geometry, Any]  # one DecodePlanner a geometry; normally exactly one
    make_planners: Any  # (max_rows) -> planners, or {} with one line that says why not
    max_rows: int
    dtype: torch.dtype
    kv_pool: Any
    req_to_token_pool: Any
    validate: bool
    plans: dict[eligibility.Geometry, DecodePlan] = field(default_factory=dict)
    planned_version: int = 0  # BatchStructure.version the plans were made for; 0: none
    verdicts: dict[Any, str | None] = field(default_factory=dict)  # layer -> why on the base
    base_needed: bool = False  # some decode layer ran on the base
    captured: bool = False  # some decode layer was captured or warmed up for capture
    capturing: bool = False
    graphs: AppendingGraphs = field(default_factory=AppendingGraphs)
    in_base: bool = False  # the base is preparing its metadata; its own nested calls are not ours
    best: BestPlan | None = None
    # Steps: all that have real plans, those that made them, those that kept them.
    steps: Repeated = field(default_factory=METRICS.repeated)
    made: Repeated = field(default_factory=lambda: METRICS.repeated({"plans_made": 1}))
    kept: Repeated = field(default_factory=lambda: METRICS.repeated({"plans_kept": 1}))
    base_pending: Any = None  # eager batch whose base metadata has not been prepared


def adopt(backend: Any, state: PatState) -> Any:
    """Turn a base backend instance into a PAT one, in place."""
    base = type(backend)
    backend._pat = state
    backend.__class__ = type(f"Pat{base.__name__}", (PatMixin, base), {})
    return backend


class PatMixin(AttentionBackend):
    """See the module. Comes before the base backend's class in the method resolution order.

    NOTE: an AttentionBackend itself, because an instance may change to a class of two bases only
    when both inherit their instance layout from the same class.
    """

    _pat: PatState

    # -- metadata ---------------------------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kw: Any) -> Any:
        """Graphs may be captured for more rows than there are request slots (DP padding)."""
        state = self._pat
        if max_bs > state.max_rows:
            # Free before allocating again; without planners every decode step is the base's.
            state.planners, state.plans, state.planned_version = {}, {}, 0
            state.graphs = AppendingGraphs()  # earlier ones append to buffers that are gone
            state.planners = state.make_planners(max_bs)
            state.max_rows = max_bs
        return super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kw)

    def init_forward_metadata(self, forward_batch: Any) -> Any:
        """Eager entry point."""
        state = self._pat
        if state.in_base or not self._pat_serves(forward_batch):
            return super().init_forward_metadata(forward_batch)
        # The rids come from the scheduler's batch; a dummy forward has none.
        real = bool(getattr(forward_batch, "rids", None))
        rows = state.feed.rows(forward_batch) if real else forward_batch.batch_size
        self._pat_plan(forward_batch, rows, real=real)
        state.base_pending = forward_batch
        # Before the first forward nobody knows which layers there are, or what else reads it.
        if state.base_needed or not state.verdicts:
            self._pat_base_metadata()
        return None

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> Any:
        """Outside the graph, before capture and before every replay."""
        state = self._pat
        if state.in_base or not self._pat_serves(forward_batch):
            return super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        state.capturing, state.base_pending = in_capture, None
        padding = 0 if in_capture else getattr(forward_batch, "num_padding", 0) or 0
        rows = forward_batch.batch_size - padding
        # With DP attention a rank may replay with padding only. One padded row is planned then:
        # the graph must not run the plan of an earlier, larger batch.
        if in_capture:
            state.graphs.begin(forward_batch)
        real = not in_capture and rows > 0
        self._pat_plan(forward_batch, max(rows, 1), real=real, in_graph=not in_capture)
        # Capture must leave the base in the state its own layers expect. At replay its metadata
        # is host work for nobody, once a capture has shown that no layer runs on the base.
        if in_capture or state.base_needed or not state.captured:
            state.in_base = True
            try:
                return super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
            finally:
                state.in_base = False
        return None

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> Any:
        """Inside the graph, when it is captured and in the runs that warm up for it."""
        if not self._pat.in_base and self._pat_serves(forward_batch):
            self._pat_append(forward_batch)
        return super().init_forward_metadata_in_graph(forward_batch)

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """0.5.18+: where the reads of scheduler-owned tensors end; ours, before the replay."""
        before_replay = compat.reads_end_before_replay()
        if before_replay is None or not forward_mode.is_decode() or self._pat.base_needed:
            return super().shared_read_ends(forward_mode)
        return before_replay

    # -- layers -----------------------------------------------------------------------------------

    @torch.compiler.disable
    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer: q ``[tokens, q_heads * d]``, k and v ``[tokens, kv_heads, d]`` or None."""
        state = self._pat
        if state.capturing:
            state.captured = True
        reason = self._pat_verdict(layer, forward_batch, q, kwargs)
        if reason is not None:
            state.base_needed = True
            self._pat_base_metadata()
            return super().forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
        num_q_heads, _, head_dim = geometry = eligibility.geometry(layer)
        pool = state.kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, compat.kv_write_loc(forward_batch), k, v)
        q = q.reshape(-1, num_q_heads, head_dim)
        if q.stride()[1:] != (head_dim, 1) or q.stride(0) % 8 or q.data_ptr() % 16:
            q = q.contiguous()  # the kernels load 16 bytes at a time
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        pat_decode(
            q,
            # Every call: under HiCache this waits until the layer's KV has been loaded.
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            state.plans[geometry],
            sm_scale=layer.scaling,
            out=out,
        )
        return out.view(-1, num_q_heads * head_dim)

    # -- private ----------------------------------------------------------------------------------

    def _pat_serves(self, forward_batch: Any) -> bool:
        """A plain decode step. During replay ``forward_mode`` is the captured mode."""
        decode = forward_batch.forward_mode.is_decode() and forward_batch.spec_info is None
        return decode and bool(self._pat.planners)

    def _pat_verdict(
        self, layer: Any, forward_batch: Any, q: torch.Tensor, kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call goes to the base. A layer's verdict is fixed at its first call."""
        state = self._pat
        if not state.plans or forward_batch.spec_info is not None:
            return "no plan for this forward"
        if layer in state.verdicts:
            # Extra arguments are static in every model, but ignoring one would be a wrong token.
            return state.verdicts[layer] or eligibility.arguments_reason(kwargs)
        reason = eligibility.layer_reason(layer) or eligibility.arguments_reason(kwargs)
        if reason is None and eligibility.geometry(layer) not in state.planners:
            reason = "geometry not known at start"
        if reason is None and q.dtype != state.dtype:
            reason = f"queries are {q.dtype}, the KV cache is {state.dtype}"
        state.verdicts[layer] = reason
        if reason is not None:
            METRICS.count_reason("layers_on_base", reason)
        return reason

    def _pat_base_metadata(self) -> None:
        """Prepare the base's own metadata of this eager step, if nobody has yet."""
        state = self._pat
        batch, state.base_pending = state.base_pending, None
        if batch is None:
            return
        state.in_base = True
        try:
            super().init_forward_metadata(batch)
        finally:
            state.in_base = False

    def _pat_plan(
        self, forward_batch: Any, rows: int, *, real: bool, in_graph: bool = False
    ) -> None:
        """Bring every plan up to this step.

        ``rows``: live rows, without padding. ``in_graph``: a graph is replayed next.
        """
        state = self._pat
        if not real:  # padded beyond what a plan holds, and nobody reads the output
            rows = min(rows, state.max_rows)
        host_lens = self._pat_host_lens(forward_batch, rows)
        tensors = (
            forward_batch.seq_lens,
            state.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
        )
        expected = state.feed.expected(rows) if real else None
        # Most steps change nothing: what they need is launched before anybody looks. A fill too
        # many does no harm, a new plan fills everything again.
        kept = expected is not None and expected.version == state.planned_version
        in_graph = in_graph and kept and self._pat_graph_appends(forward_batch)
        for geometry, plan in state.plans.items() if kept else ():
            planner = state.planners[geometry]
            kept = planner.advance(plan, host_lens, *tensors, in_graph=in_graph) and kept
        structure = state.feed.take(host_lens) if real else None
        kept = kept and structure is expected
        if not kept:
            forest = leaf_of_row = None
            if structure is not None:
                forest, leaf_of_row = structure.forest, structure.leaf_of_row
            for geometry, planner in state.planners.items():
                state.plans[geometry] = planner.plan(forest, leaf_of_row, host_lens, *tensors)
            state.planned_version = 0 if structure is None else structure.version
            if real:
                self._pat_count(structure)
                state.feed.check_fired()  # a step that keeps its plan has been seen by the hook
            else:
                METRICS.count("dummy_plans")
        else:
            state.steps.times += 1
            state.kept.times += 1
        if state.validate:
            seq_lens, req_to_token, indices = tensors
            for plan in state.plans.values():
                plan.validate(req_to_token, indices, seq_lens)

    def _pat_append(self, forward_batch: Any) -> None:
        """Capture the append of each row's new slot, if there is one a row."""
        state, slots = self._pat, forward_batch.out_cache_loc
        if slots is None or len(slots) != forward_batch.batch_size:
            return
        for planner in state.planners.values():
            planner.append_one(forward_batch.seq_lens, slots)
        if compat.is_capturing():
            state.graphs.append(forward_batch)

    def _pat_graph_appends(self, forward_batch: Any) -> bool:
        """Whether the replay to come appends what this step adds, by lengths the host knows.

        Plans are validated before the replay. Lengths that SGLang does not mirror may lag.
        """
        state = self._pat
        return (
            not state.validate
            and getattr(forward_batch, "seq_lens_cpu", None) is not None
            and state.graphs.all_append(forward_batch)
        )

    def _pat_host_lens(self, forward_batch: Any, rows: int) -> npt.NDArray[Any]:
        """[rows] sequence lengths on the host; only a step nobody knows synchronises for them."""
        lens = getattr(forward_batch, "seq_lens_cpu", None)
        if lens is not None:
            return lens.numpy()[:rows]
        reqs = self._pat.feed.reqs
        if reqs is not None and len(reqs) == rows:
            return np.array([req.seqlen for req in reqs], np.int32)
        # Guessed lengths would put true ones beyond the horizon.
        return forward_batch.seq_lens[:rows].cpu().numpy()

    def _pat_count(self, structure: BatchStructure | None) -> None:
        """A step with a new plan, and what steps that keep it will count too."""
        state = self._pat
        plan = next(iter(state.plans.values()))
        header = plan.header
        planned, unshared = header[H_PLANNED_TOKENS], header[H_UNSHARED_TOKENS]
        step = {
            "shared_segments": header[H_SHARED_PACKS],
            "planned_kv_tokens": planned,
            "unshared_kv_tokens": unshared,
        }
        reason = "the hook did not see this step" if structure is None else structure.no_sharing
        METRICS.change(state.steps, step, reason)
        state.steps.times = 1
        state.made.times += 1
        if plan.slots_compared:
            METRICS.count("slots_compared")
        if header[H_RUNS] > 0 and not header[H_SHARING]:
            METRICS.count("plans_unshared")
        best = state.best
        if best is None or unshared - planned > best.tokens_saved:
            state.best = BestPlan(unshared - planned, plan.host_words.copy())
