# SPDX-License-Identifier: MIT
"""Plans other than the chosen one, made in processes and timed on the GPU through one graph.

The Python oracle of the planner can be narrowed (`Search`); what it then returns is put in place of
the planner's own words. A cell's graph is captured once: plans change, addresses do not.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gpu_common as common
import numpy as np
import torch
from cells import Pool, heads_of, slots_needed
from pat_backend import Pat, Planners
from peers import Case
from trees import Tree

from pat_sglang import layout, packing
from pat_sglang.cost import CostModel
from pat_sglang.forest import Forest
from pat_sglang.host import HostPlanner
from pat_sglang.layout import Capacity
from pat_sglang.packing import Search, Shape

WRONG = 0.02  # difference from the chosen plan's output, relative, that no rounding explains


@dataclass(frozen=True)
class Option:
    """What a planner may do.

    Attributes:
        name: for result files.
        search: choices it has.
        sharing: as of `Shape`.
        levels: levels of a tree that one pack may span beyond its own; None: as the planner has it.
        part_quarters: price of a partial in quarters of the true one.
    """

    name: str
    search: Search = field(default_factory=Search)
    sharing: str = "auto"
    levels: int | None = None
    part_quarters: int = 4


@dataclass(frozen=True)
class Job:
    """One cell to be planned with many options; goes to another process."""

    tree: Tree
    heads: str
    shape: Shape
    model: CostModel
    capacity: Capacity
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Candidate:
    """A plan and the options that lead to it."""

    names: list[str]
    words: np.ndarray  # int32


def make_plans(job: Job) -> tuple[Job, list[Candidate]]:
    """Different plans of the job's options, in their order; an option that fits nothing has none.

    Plans that differ in their predicted time alone are the same plan.
    """
    forest = Forest(job.tree.parent, job.tree.length)
    out = np.zeros(job.capacity.words, np.int32)
    found: dict[bytes, Candidate] = {}
    for option in job.options:
        host = HostPlanner(
            replace(job.shape, sharing=option.sharing),
            replace(job.model, part_ps=job.model.part_ps * option.part_quarters // 4),
            job.capacity,
            native=False,
            search=option.search,
        )
        normal = packing.MAX_INHERIT
        packing.MAX_INHERIT = normal if option.levels is None else option.levels
        try:
            count = host.plan(forest, job.tree.leaf, job.tree.seq_lens, out)
        except ValueError:  # includes CapacityError
            continue
        finally:
            packing.MAX_INHERIT = normal
        words = out[:count].copy()
        key = words.copy()
        key[layout.H_PREDICTED_NS] = 0
        found.setdefault(key.tobytes(), Candidate([], words)).names.append(option.name)
    return job, list(found.values())


class Words:
    """Stands where a planner has its HostPlanner, and hands out given words."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def plan(self, forest: Any, leaves: Any, lens: Any, out: np.ndarray) -> int:
        out[: self.words.size] = self.words
        return self.words.size


def load(pat: Pat, words: np.ndarray) -> None:
    """Makes these words the plan of a prepared backend."""
    planner = pat.planner
    native, planner.host = planner.host, Words(words)
    try:
        pat.plan()
    finally:
        planner.host = native


class Lab:
    """A pool, planners and processes for a list of cells; page size 1.

    Make it first thing: the processes are forked before CUDA is touched.
    """

    def __init__(self, cells: Sequence[tuple[Tree, str]], processes: int, dry_run: bool) -> None:
        # Behind the process that times: a launch that waits for a core is timed with the kernel.
        context = multiprocessing.get_context("fork")
        self._processes = context.Pool(processes, os.nice, (19,))
        self.cells, self.cpu = cells, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.pool = Pool(cells, (1,), self.device)
        trees = [tree for tree, _ in cells]
        self.max_rows = max(tree.num_rows for tree in trees)
        self.max_tokens = max(slots_needed(tree, 1) for tree in trees)
        self.planners = self.new_planners()
        size = 1 << 20 if dry_run else common.L2_FLUSH_BYTES
        self.flush = torch.empty(size, dtype=torch.uint8, device=self.device)

    def new_planners(self) -> Planners:
        """Planners that hold any of the cells, with buffers of their own."""
        return Planners(self.max_rows, self.max_tokens)

    def plans(self, options: Sequence[Option]) -> Iterator[tuple[Bed, list[Candidate]]]:
        """Every cell on its bed with its different plans, the one of the first option first."""
        jobs = []
        for tree, heads in self.cells:
            host = self.planners.of(*heads_of(heads), self.pool.dtype, self.device).host
            shape, model, capacity = host.shape, host.model, host.capacity
            jobs.append(Job(tree, heads, shape, model, capacity, tuple(options)))
        for job, candidates in self._processes.imap(make_plans, jobs):
            yield Bed(self, job.tree, job.heads), candidates
        self._processes.close()


class Bed:
    """One cell, its planner and its graph."""

    def __init__(self, lab: Lab, tree: Tree, heads: str) -> None:
        self.lab, self.tree, self.heads = lab, tree, heads
        self.case: Case = lab.pool.with_heads(lab.pool.case(tree, 1), heads)
        self.pat = Pat(1, lab.planners)
        self.pat.prepare(self.case)
        self.graph: Any = None
        self.expected: torch.Tensor | None = None

    def time(self, words: np.ndarray, repeats: int = 15) -> float:
        """Cold microseconds of a plan; its output must be that of the first plan timed here.

        Without a GPU: the predicted time.

        Raises:
            RuntimeError: the output is another.
        """
        load(self.pat, words)
        if self.lab.cpu:
            self.compare(self.pat.run())
            return float(self.pat.current.stats.predicted_us)
        if self.graph is None:
            self.graph, _ = common.capture(self.pat.run)
        self.pat.out.fill_(float("nan"))
        self.graph.replay()
        self.compare(self.pat.out)
        return common.time_cold(self.graph, self.lab.flush, common.COLD_BUDGET_US / repeats)

    def compare(self, out: torch.Tensor) -> None:
        """Raises RuntimeError if an output is not that of the first plan."""
        if self.expected is None:
            self.expected = out.float()
        error = float((out.float() - self.expected).norm() / self.expected.norm())
        if not error < WRONG:
            raise RuntimeError(f"{self.tree.name} {self.heads}: a plan's output is off by {error}")

    def predicted_us(self) -> float:
        """What the planner expects of the plan that is loaded."""
        return float(self.pat.current.stats.predicted_us)
