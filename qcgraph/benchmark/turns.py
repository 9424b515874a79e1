"""Define the turn of a candidate: a whole trajectory, or a section that contains every variant."""

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

FORWARD = "forward"  # the only variant of a baseline


@dataclass(frozen=True)
class Turn:
    """The work of a candidate in its turn.

    Attributes:
        plan: the step plan.
        spec: the spec of the model.
        samples: the number of samples drawn at once; with guidance the denoiser sees twice as many.
    """

    plan: StepPlan
    spec: ModelSpec
    samples: int

    def draw(self, runner: Runner) -> None:
        """Draw the samples with a runner."""
        sample(runner, self.plan, self.spec, in_turn(self.samples, self.spec), seed=0, batch=self.samples)


def section(plan: StepPlan) -> StepPlan:
    """Return the shortest start of a plan that has every variant after its first step; the whole plan if there is none.

    The first step of a section warms up and does not count (see `counted`).
    """
    for end in range(2, len(plan)):
        if {step.variant for step in plan.steps[1:end]} == set(plan.variants):
            return replace(plan, steps=plan.steps[:end])
    return plan


def first_step(plan: StepPlan) -> StepPlan:
    """Return the first step of a plan: it computes, which wakes threads and loads weights into the CPU caches."""
    return replace(plan, steps=plan.steps[:1])


def single_variant(plan: StepPlan) -> StepPlan:
    """Return the same steps with the single variant of a baseline."""
    steps = tuple(replace(step, variant=FORWARD) for step in plan.steps)
    return replace(plan, steps=steps, roles={FORWARD: COMPUTES})


def counted(calls: Sequence[TimedCall]) -> tuple[TimedCall, ...]:
    """Return the calls of a section without the first one; it is kept if no other call has its variant."""
    first, *rest = calls
    return tuple(rest) if any(call.variant == first.variant for call in rest) else tuple(calls)


def by_variant(calls: Sequence[TimedCall]) -> dict[str, list[float]]:
    """Return the seconds of calls by variant, in the order of first use."""
    found: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        found[call.variant].append(call.seconds)
    return dict(found)


def denoiser_batch(plan: StepPlan, samples: int) -> int:
    """Return the number of latents that the denoiser sees at once: with guidance, two halves of each sample."""
    return samples * plan.halves
