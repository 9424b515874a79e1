"""rehearse-steps: measure what the cache schedule does to the final latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qcgraph.facts import CachePlan, Rehearsed
from qcgraph.ir.program import Program
from qcgraph.passes.caching._reuse_errors import OpenLoop, Rehearsal
from qcgraph.passes.caching._trajectories import record
from qcgraph.passes.caching.forecasters import forecaster_named, known_forecasters
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.calibration_budget import affordable_trajectories
from qcgraph.pipeline.options import AUTO_HINT, MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.schedule import even
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan


@dataclass(frozen=True)
class RehearseSteps(Pass):
    """Measure what reusing does to the final latents, under the cache schedule and an even one of the same cost.

    Trajectories on which every step computes are recorded on the program as it is (quantized or not), and sampled again
    under both schedules with forecasts that are fitted to them. The even schedule has as many computing steps, and its
    reusing steps have the modes of the plan, in order.

    Attributes:
        forecast: the forecaster of the cached values.
        trajectories: how many; by default as many as a fixed amount of arithmetic allows, 2 to 16.
        seed: the seed of the trajectories.
    """

    name: ClassVar[str] = "rehearse-steps"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, ModelSpec, StepPlan)
    provides: ClassVar[tuple[type, ...]] = (Rehearsed,)
    samples: ClassVar[bool] = True

    forecast: str = option("affine", among=known_forecasters)
    trajectories: int | None = option(None, least=1, most=MOST_TRAJECTORIES, hint=AUTO_HINT)
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return (self.trajectories or affordable_trajectories(work.program)) * work.trajectory * (1 + 2 * work.share)

    def run(self, program: Program, context: PassContext) -> Program:
        if not set(program.facts[CachePlan].modes) & set(program.variants):
            context.refuse("step plan", "no variant reuses, so every step computes")
            return program.with_facts(Rehearsed(0.0, 0.0, 0))
        count = self.trajectories or affordable_trajectories(program)
        trajectories = record(program, count, self.seed, context.progress)
        rehearsal = Rehearsal(program, trajectories, OpenLoop(program, trajectories, forecaster_named(self.forecast)))
        planned = program.facts[StepPlan].modes
        error, even_error = rehearsal.final_error(planned), rehearsal.final_error(tuple(evenly(planned)))
        return program.with_facts(Rehearsed(error, even_error, count))


def evenly(planned: Sequence[str | None]) -> Iterator[str | None]:
    """Yield an even schedule that has the modes of a given one."""
    skips = (mode for mode in planned if mode is not None)
    for computes in even(len(planned), list(planned).count(None)):
        yield None if computes else next(skips)
