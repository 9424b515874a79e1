"""group-timesteps: group neighbouring steps that share activation scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qcgraph.facts import AttentionPlan, QuantPlan, Ranges, TimestepGroups
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.plan.steps import StepPlan

SegmentErrors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupTimesteps(Pass):
    """Group neighbouring steps that will share activation scales (TQ-DiT's time grouping).

    ``optimal`` chooses the boundaries by dynamic programming so that the summed quantization error expected from the
    ranges is least; ``uniform`` cuts the steps into groups of equal width. Groups are intervals of the timestep value,
    and only computing steps count; a reusing step belongs to the group of the last computing step.

    Attributes:
        groups: the number of groups; fewer when fewer steps compute.
        strategy: ``optimal`` or ``uniform``.
    """

    name: ClassVar[str] = "group-timesteps"
    requires: ClassVar[tuple[type, ...]] = (Ranges, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (QuantPlan, AttentionPlan)
    provides: ClassVar[tuple[type, ...]] = (TimestepGroups,)

    groups: int = option(8, least=1, hint="1 means static scales")
    strategy: Literal["optimal", "uniform"] = "optimal"

    def run(self, program: Program, context: PassContext) -> Program:
        plan, ranges = program.facts[StepPlan], program.facts[Ranges]
        steps = ranges.steps
        groups = min(self.groups, len(steps))
        if groups < self.groups:
            context.refuse("step plan", f"{groups} groups instead of {self.groups}: that many steps compute")
        if self.strategy == "optimal":
            starts = optimal_starts(segment_costs(ranges), groups)
        else:
            starts = uniform_starts(steps, len(plan), groups)
        first_steps = [steps[start] for start in starts]
        assigned = [sum(index >= first for first in first_steps[1:]) for index in range(len(plan))]
        lowest = [plan.timesteps[last] for last in [*(first - 1 for first in first_steps[1:]), len(plan) - 1]]
        return program.with_facts(plan.with_groups(assigned), TimestepGroups(tuple(lowest)))


def segment_costs(ranges: Ranges) -> SegmentErrors:
    """Return the expected quantization error of every group [i, j) of computing steps, as an array [n, n + 1].

    A uniform quantizer over a range R has error R^2 / (12 * levels^2). It is summed over the steps of the group and
    over sites, relative to the mean square of each site. The constant 12 * levels^2 does not change the optimum. Sites
    whose range is not finite do not count; they stay in floating point.
    """
    sites = [site for site in ranges.planned.values() if site.is_finite]
    position = {step: place for place, step in enumerate(ranges.steps)}
    count = len(position)
    lows = np.full((len(sites), count), np.inf)  # a step that does not run a site does not widen its range
    highs = np.full((len(sites), count), -np.inf)
    power = np.empty(len(sites))
    for row, site in enumerate(sites):
        places = [position[step] for step in site.steps]
        lows[row, places], highs[row, places] = site.lows, site.highs
        power[row] = max(float(np.mean(site.mean_squares)), np.finfo(float).tiny)
    costs = np.full((count, count + 1), np.inf)
    for start in range(count):
        low = np.minimum.accumulate(lows[:, start:], axis=1)
        high = np.maximum.accumulate(highs[:, start:], axis=1)
        relative = (np.maximum(high - low, 0.0) ** 2 / power[:, None]).sum(axis=0)
        costs[start, start + 1 :] = relative * np.arange(1, count - start + 1)
    return costs


def optimal_starts(costs: SegmentErrors, groups: int) -> list[int]:
    """Return the first step of each group in the partition into ``groups`` groups with the least summed cost.

    Args:
        costs: the cost of each group [i, j), [n, n + 1].
        groups: the number of groups, at most n.
    """
    count = len(costs)
    best = np.full((groups + 1, count + 1), np.inf)
    best[0, 0] = 0.0
    choice = np.zeros((groups + 1, count + 1), dtype=int)
    for group in range(1, groups + 1):
        for end in range(group, count + 1):
            totals = best[group - 1, :end] + costs[:end, end]
            choice[group, end] = int(np.argmin(totals))
            best[group, end] = totals[choice[group, end]]
    starts: list[int] = []
    end = count
    for group in range(groups, 0, -1):
        end = int(choice[group, end])
        starts.append(end)
    return starts[::-1]


def uniform_starts(steps: tuple[int, ...], total: int, groups: int) -> list[int]:
    """Return the first computing step of each group of equal width over all steps.

    A group in which no step computes is left out.
    """
    members = [step * groups // total for step in steps]
    return [members.index(group) for group in dict.fromkeys(members)]
