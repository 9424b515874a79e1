"""The turn of a candidate: a whole trajectory, or a section of one that holds every variant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcgraph.benchmark.timing import TimedCall
from qcgraph.plan.roles import COMPUTES
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.runner import Runner

FORWARD = "forward"  # the variant of baselines, which have one


@dataclass(frozen=True)
class Turn:
    """What a candidate does when it is its turn.

    Attributes:
        plan: the steps.
        spec: the model.
        samples: how many samples are drawn at once; with guidance the denoiser sees twice as many.
    """

    plan: StepPlan
    spec: ModelSpec
    samples: int

    def draw(self, runner: Runner) -> None:
        """Sample."""
        sample(runner, self.plan, self.spec, in_turn(self.samples, self.spec), seed=0, batch=self.samples)


def section(plan: StepPlan) -> StepPlan:
    """The shortest beginning of a plan that holds every variant after its first step; all of it when none does.

    The first step of a section warms up and does not count (see `counted`).
    """
    for end in range(2, len(plan)):
        if {step.variant for step in plan.steps[1:end]} == set(plan.variants):
            return replace(plan, steps=plan.steps[:end])
    return plan


def first_step(plan: StepPlan) -> StepPlan:
    """The first step of a plan alone: it computes, which wakes threads and brings the weights near."""
    return replace(plan, steps=plan.steps[:1])


def single_variant(plan: StepPlan) -> StepPlan:
    """The same steps for a baseline."""
    steps = tuple(replace(step, variant=FORWARD) for step in plan.steps)
    return replace(plan, steps=steps, roles={FORWARD: COMPUTES})


def counted(calls: Sequence[TimedCall]) -> tuple[TimedCall, ...]:
    """The calls of a section that count: all but the first, which counts only where its variant does not come again."""
    first, *rest = calls
    return tuple(rest) if any(call.variant == first.variant for call in rest) else tuple(calls)


def by_variant(calls: Sequence[TimedCall]) -> dict[str, list[float]]:
    """The seconds of calls by variant, in the order of first use."""
    found: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        found[call.variant].append(call.seconds)
    return dict(found)


def denoiser_batch(plan: StepPlan, samples: int) -> int:
    """How many latents the denoiser sees at once: with guidance, two halves of each sample."""
    return samples * plan.halves
