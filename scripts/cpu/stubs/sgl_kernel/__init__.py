# SPDX-License-Identifier: MIT
"""Stands for SGLang's kernel package, which PyPI has for CUDA only.

The torch_native backend calls none of its operators, but SGLang imports them by name. Any name can
be imported; the one that CPU serving may call is written out, the others say what is wrong.
"""

__version__ = "0.0.0+pat.cpu"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, stride):
    """Write each request's new slots into its row of `req_to_token`, positions [start, end)."""
    taken = 0
    spans = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    for row, first, last in spans:
        slots = out_cache_loc[taken : taken + last - first]
        req_to_token[row, first:last] = slots.to(req_to_token.dtype)
        taken += last - first


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build (scripts/cpu/stubs)")

    unavailable.__name__ = name
    return unavailable
