"""apply-plan: set what every step does from a given cache schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcgraph.errors import UsageError
from qcgraph.facts import CachePlan, Compensation, ForecastFit
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import option
from qcgraph.plan.schedule import TimedSchedule
from qcgraph.plan.schedule.timed import COMPUTES_WORD, TEXT_HINT
from qcgraph.plan.steps import StepPlan

LONGEST_PLAN = 100_000  # characters, enough for thousands of steps that each have a timestep and a mode of their own


@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Let every step do what a given cache schedule does at its timestep, even one made for other steps.

    At the timesteps that the schedule was made for, the result is the schedule itself. At other timesteps, as large a
    share of the steps computes, as densely at each time (see `qcgraph.plan.schedule.TimedSchedule.at`). rehearse-steps
    measures what this does to the images.

    Attributes:
        plan: the cache schedule, such as ``980-20:FRRFR``: per run of timesteps the first, the spacing, and a letter
            a step.
    """

    name: ClassVar[str] = "apply-plan"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (ForecastFit, Compensation)

    plan: str = option("", longest=LONGEST_PLAN, hint=TEXT_HINT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.plan:
            return
        try:
            TimedSchedule.parse(self.plan)
        except UsageError as error:
            raise UsageError(error.message, where=f"pass {self.name}, option plan", hint=error.hint) from None

    def check(self, captured: Program) -> None:
        """Refuse an empty cache schedule."""
        if not self.plan:
            raise UsageError("there is no plan to follow", hint=TEXT_HINT)

    def run(self, program: Program, context: PassContext) -> Program:
        self.check(program)
        schedule, steps = TimedSchedule.parse(self.plan), program.facts[StepPlan]
        known = program.facts[CachePlan].modes
        for timestep, mode in zip(schedule.timesteps, schedule.modes, strict=True):
            if mode is not None and mode not in known:
                raise UsageError(
                    f"the plan has timestep {timestep:g} in the mode {mode}, which this compilation has not",
                    hint=f"it has {', '.join([COMPUTES_WORD, *known])}; blocks in [cache] of the recipe names a range "
                    "for each that reuses, 0..3+0..5 for example, and guidance for conditional: give those that it was "
                    "made with",
                )
        if not steps.reusing:
            context.refuse("step plan", "no variant reuses, so every step computes")
            return program
        return program.with_facts(steps.with_modes(schedule.at(steps.timesteps)))
