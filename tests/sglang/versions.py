# SPDX-License-Identifier: MIT
"""What SGLang versions call differently, of all that the tests drive: 0.5.17 and 0.5.23.

Each function looks for what the version at hand has. Where 0.5.23 has one function for several
calls here (release_kv_cache, alloc_for_extend), that one wants a whole server's arguments or batch.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# -- prefix trees ---------------------------------------------------------------------------------


def has_tree(kind: str) -> bool:
    """Whether this SGLang has such a tree; looks without importing it."""
    files = {"rust": "rust_tree_core/mem_cache.*", "chunk": "chunk_cache.py"}
    sglang = find_spec("sglang")
    if sglang is None or sglang.origin is None:
        return False
    folder = Path(sglang.origin).parent / "srt" / "mem_cache"
    return any(folder.glob(files.get(kind, "radix_cache.py")))


# RadixCache, and UnifiedRadixCache on its two cores, of which only the ids of nodes are seen.
TREES = [kind for kind in ("radix", "unified", "rust") if has_tree(kind)]


def server_tree() -> str:
    """The tree that a server has unless it is told otherwise."""
    from sglang.srt.environ import envs

    # 0.5.17 can be told to have the unified one; 0.5.23 has it for whatever PAT serves.
    return "radix" if hasattr(envs, "SGLANG_ENABLE_UNIFIED_RADIX_TREE") else "rust"


def make_tree(kind: str, **params: Any) -> Any:
    """One of TREES, or ``chunk``: 0.5.17's ChunkCache; ``params`` of CacheInitParams."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    if kind == "radix":
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache(CacheInitParams(**params))
    if kind == "chunk":
        from sglang.srt.mem_cache.chunk_cache import ChunkCache

        return ChunkCache(CacheInitParams(**params))
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if any(field.name == "tree_core_backend" for field in dataclasses.fields(CacheInitParams)):
        params["tree_core_backend"] = "rust" if kind == "rust" else "python"
    tree = UnifiedRadixCache(CacheInitParams(**params, tree_components=(ComponentType.FULL,)))
    is_rust = type(tree.tree_core).__name__ == "RustUnifiedTreeCore"
    assert is_rust == (kind == "rust"), "SGLang took the other core"
    return tree


# -- requests in trees ----------------------------------------------------------------------------


def row(req: Any) -> int:
    """The request's row in req_to_token."""
    holder = req if hasattr(req, "req_pool_idx") else req.kv  # 0.5.23: all of its KV is there
    index: int = holder.req_pool_idx
    return index


def lock(tree: Any, req: Any) -> None:
    """PrefillAdder: the nodes that were matched stay."""
    if hasattr(req, "lock"):  # 0.5.23: of the request; to be given back as it is
        req.lock = tree.lock(req.last_node)
    else:
        tree.inc_lock_ref(req.last_node)


def matched_slots(tree: Any, req: Any) -> torch.Tensor:
    """Slots of the tokens that an arriving request found in the tree."""
    if hasattr(req, "prefix_indices"):
        found: torch.Tensor = req.prefix_indices
    else:  # 0.5.23: the request has their number only
        found = tree.prefix_device_indices(req)
    return found


def prefix_len(req: Any) -> int:
    """Tokens that the next chunk begins behind."""
    return len(req.prefix_indices) if hasattr(req, "prefix_indices") else req.prefix_len


def refresh_fill_ids(req: Any) -> None:
    """The tokens to compute are those of the prompt and of the answer so far."""
    if hasattr(req, "refresh_fill_ids"):
        req.refresh_fill_ids()
    else:
        req._refresh_fill_ids()


def extend(req: Any, begin: int, end: int) -> None:
    """These tokens of the request are computed next."""
    if hasattr(req, "set_extend_range"):
        req.set_extend_range(begin, end)
    else:  # 0.5.23: they begin at prefix_len
        req.extend_end = end


def hold(req: Any, tokens: int) -> None:
    """alloc_for_extend and alloc_for_decode: the request has slots for so many tokens."""
    if hasattr(req.kv, "kv_committed_len"):  # 0.5.23; the trees of 0.5.17 are told when it ends
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens


def publish(tree: Any, req: Any, chunked: bool) -> None:
    """process_batch_result_prefill: what was computed enters the tree."""
    if hasattr(tree, "checkpoint"):
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(req, tree)
    else:
        tree.cache_unfinished_req(req, chunked=chunked)


def release(tree: Any, req: Any, tokens: int, keep: bool) -> None:
    """release_kv_cache: lock, slots and row go back; ``keep``: the tree takes what it can."""
    if hasattr(tree, "checkpoint"):
        if keep:
            req.refresh_fill_ids()
            tree.checkpoint(req, up_to=tokens)
        tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, tokens)])
        tree.unlock(req.lock)
        req.lock = None
        tree.on_release(req, checkpointed=keep)
        tree.req_to_token_pool.free(req)
        req.kv.mark_kv_released()
    else:
        tree.cache_finished_req(req, is_insert=keep, kv_len_to_handle=tokens)
        tree.req_to_token_pool.free(req)


# -- arguments ------------------------------------------------------------------------------------


def resolve(args: Any) -> Any:
    """ServerArgs as a launcher leaves them; 0.5.17 resolves as it makes them."""
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    return args


def attention_backends(args: Any) -> tuple[str | None, str | None]:
    """(prefill, decode) backend names of resolved ServerArgs."""
    if hasattr(args, "get_attention_backends"):
        names: tuple[str | None, str | None] = args.get_attention_backends()
    else:
        from sglang.srt.arg_groups import model_override_base as overrides

        names = overrides.attention_backends_of(overrides.resolved_view(args))
    return names


def set_attention_backends(runner: Any, prefill: str, decode: str) -> None:
    """Names that the builder of a backend finds at a ModelRunner."""
    from sglang.srt.server_args import ServerArgs

    if hasattr(ServerArgs, "get_attention_backends"):
        runner.server_args.get_attention_backends = lambda: (prefill, decode)
    else:  # 0.5.23 resolves them ahead of building
        runner.prefill_attention_backend_str = prefill
        runner.decode_attention_backend_str = decode
