"""How much a compilation computes, counted in runs of the model on one latent: what a dry run estimates time by."""

from __future__ import annotations

from dataclasses import dataclass

from qcgraph.ir.program import Program
from qcgraph.ir.structure import macs_by_variant
from qcgraph.plan.steps import StepPlan

RUN_MACS = 3e6  # multiply-accumulates that take as long as starting to run a small graph on one latent


@dataclass(frozen=True)
class Workload:
    """The sizes that the work of passes depends on.

    Attributes:
        program: the program after the passes that need no samples.
        trajectories: how many calibration samples.
        rows: latents of the calibration set, both halves of guidance; 0 where no pass selects one.
        share: the arithmetic of a trajectory under the step plan, relative to one on which every step computes.
    """

    program: Program
    trajectories: int
    rows: int
    share: float

    @property
    def trajectory(self) -> int:
        """Runs of the computing graph on one latent in a trajectory on which every step computes."""
        plan = self.program.facts[StepPlan]
        return plan.halves * len(plan)

    def run(self, variant: str) -> float:
        """Return what one run of a variant costs, relative to one of the computing graph."""
        macs = macs_by_variant(self.program.variants)
        return (macs[variant] + RUN_MACS) / (macs[self.program.computing] + RUN_MACS)
