# SPDX-License-Identifier: MIT
"""Counters and gauges of this process, as plain Python values.

SGLang's scheduler is one process per rank and its hot path is one thread, so nothing here locks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

# Every counter there is. "by reason" counters are a dict reason -> count.
COUNTERS = {
    "hook_fired": "forwards seen by the structure hook",
    "plans_made": "decode steps that made a new plan",
    "plans_unshared": "new plans of known sharing that share nothing: no gain, or forced off",
    "plans_kept": "decode steps that kept the plan (no upload)",
    "appends_launched": "launches for the new slots of a kept plan, where no graph appends them",
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
    """Steps of one owner that all add the same: most are like the one before, and only counted."""

    step: Mapping[str, int] = field(default_factory=dict)  # by COUNTERS
    no_sharing: str | None = None  # a reason each step adds too
    times: int = 0  # not added yet


class Metrics:
    """Counts and gauges by name."""

    def __init__(self) -> None:
        self._repeated: list[Repeated] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far (tests)."""
        for steps in self._repeated:
            steps.times = 0
        self._counts: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self._reasons: dict[str, dict[str, int]] = {
            name: defaultdict(int) for name in COUNTERS_BY_REASON
        }
        self._gauges: dict[str, float | int | str] = {}

    def repeated(self, step: Mapping[str, int] | None = None) -> Repeated:
        """For an owner to count its steps in; ``step``: what each of them adds at first."""
        self._repeated.append(Repeated(step or {}))
        return self._repeated[-1]

    def change(self, steps: Repeated, step: Mapping[str, int], no_sharing: str | None) -> None:
        """What each of an owner's steps adds from now on."""
        self._settle(steps)
        steps.step, steps.no_sharing = step, no_sharing

    def _settle(self, steps: Repeated) -> None:
        times, steps.times = steps.times, 0
        if times:
            for name, by in steps.step.items():
                self._counts[name] += times * by
            if steps.no_sharing is not None:
                self._reasons["no_sharing"][steps.no_sharing] += times

    def _settle_all(self) -> None:
        for steps in self._repeated:
            self._settle(steps)

    def count(self, name: str) -> None:
        """Add one to a counter of COUNTERS."""
        self._counts[name] += 1

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
