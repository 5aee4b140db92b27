# SPDX-License-Identifier: MIT
"""The scheduler in miniature handles each tree of each SGLang version as that expects."""

from __future__ import annotations

import random

import numpy as np
from scheduling import POOL, MiniScheduler
from versions import prefix_len


def test_everything_is_given_back(tree):
    """Slots, rows and locks, however requests end; before that no slot is two tokens'."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    scheduler, chance, running = MiniScheduler(tree), random.Random(5), []
    for _ in range(300):
        for _ in range(len(running) < 12 and 2):
            tokens = [*range(chance.randrange(40)), *(chance.randrange(9) for _ in range(12))]
            req = scheduler.admit(scheduler.request(tokens), chunk=16)
            while scheduler.lens[req] < len(tokens):
                scheduler.publish(req, chunked=True)
                assert prefix_len(req) == scheduler.lens[req]
                scheduler.next_chunk(req, chunk=16)
            running.append(scheduler.publish(req))
        scheduler.decode(running)
        written = {}  # slot to the tokens up to and with its own
        for req in running:
            known = [*req.origin_input_ids, *req.output_ids]
            slots = scheduler.slots(req)
            assert len(slots) == len(known) == np.unique(slots).size
            for position, slot in enumerate(slots.tolist()):
                tokens = known[: position + 1]
                assert written.setdefault(slot, tokens) == tokens
        victim = running.pop(chance.randrange(len(running)))
        if chance.random() < 0.7:
            scheduler.finish(victim)
        else:
            scheduler.retract(victim)
            running.append(scheduler.publish(scheduler.admit(victim)))
    for req in running:
        scheduler.finish(req)
    assert scheduler.tree.protected_size() == 0
    assert scheduler.pool.available_size() == scheduler.pool.size
    scheduler.tree.evict(EvictParams(num_tokens=1 << 20))
    assert scheduler.allocator.available_size() == POOL
