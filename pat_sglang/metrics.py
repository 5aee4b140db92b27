# SPDX-License-Identifier: MIT
"""Counters and gauges of this process, as plain Python values.

SGLang's scheduler is one process per rank and its hot path is one thread, so nothing here locks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

# Every counter there is. "by reason" counters are a dict reason -> count.
COUNTERS = {
    "hook_fired": "forwards seen by the structure hook",
    "plans_made": "decode steps that made a new plan",
    "plans_unshared": "new plans of known sharing that share nothing: no gain, or forced off",
    "plans_kept": "decode steps that kept the plan (one launch, no upload)",
    "slots_compared": "plans that had to find sharing by comparing slots, since nobody told of it",
    "dummy_plans": "warm-up, capture and idle steps, planned without sharing",
    "uploads_copied": "new plans uploaded by the copy engine: pinned memory is not mapped, slower",
    "maps_refused": "attention calls without tensor maps: every slot was copied by itself",
    "shared_segments": "shared segments packed, summed over decode steps",
    "planned_kv_tokens": "KV tokens the plans read, summed over decode steps",
    "unshared_kv_tokens": "KV tokens a kernel without sharing reads, summed over decode steps",
}
COUNTERS_BY_REASON = {
    "steps_on_base": "decode steps served by the base backend",
    "layers_on_base": "attention layers served by the base backend (each layer once)",
    "no_sharing": "decode steps whose sharing structure was not known",
    "declined": "backends left untouched at start",
}


@dataclass(eq=False)
class Repeated:
    """Steps that all add the same: most are like the one before, and are only counted."""

    step: Mapping[str, int]
    no_sharing: str | None
    times: int = 0  # not added yet


class Metrics:
    """Counts and gauges by name."""

    def __init__(self) -> None:
        self._repeated: list[Repeated] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far (tests)."""
        for kind in self._repeated:
            kind.times = 0
        self._counts: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self._reasons: dict[str, dict[str, int]] = {
            name: defaultdict(int) for name in COUNTERS_BY_REASON
        }
        self._gauges: dict[str, float | int | str] = {}

    def repeat(
        self, step: Mapping[str, int], no_sharing: str | None, instead_of: Repeated | None
    ) -> Repeated:
        """What later steps of a kind add: to COUNTERS, and to no_sharing if there is a reason.

        ``instead_of``: the kind that the caller's steps have been of until now.
        """
        if instead_of is not None:
            self._settle(instead_of)
            self._repeated.remove(instead_of)
        kind = Repeated(step, no_sharing)
        self._repeated.append(kind)
        return kind

    def _settle(self, kind: Repeated) -> None:
        times, kind.times = kind.times, 0
        if times:
            for name, by in kind.step.items():
                self._counts[name] += times * by
            if kind.no_sharing is not None:
                self._reasons["no_sharing"][kind.no_sharing] += times

    def _settle_all(self) -> None:
        for kind in self._repeated:
            self._settle(kind)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        self._counts[name] += by

    def count_reason(self, name: str, reason: str) -> None:
        """Add one to ``reason`` of a counter of COUNTERS_BY_REASON."""
        self._reasons[name][reason] += 1

    def gauge(self, name: str, value: float | int | str) -> None:
        """Set the present value of something."""
        self._gauges[name] = value

    def get(self, name: str) -> int:
        """Total of a counter of either kind."""
        self._settle_all()
        if name in self._counts:
            return self._counts[name]
        return sum(self._reasons[name].values())

    def as_dict(self) -> dict[str, object]:
        """Everything, in builtins that any serialiser takes."""
        self._settle_all()
        reasons = {name: dict(counts) for name, counts in self._reasons.items()}
        return {**self._counts, **reasons, **self._gauges}


METRICS = Metrics()
