"""The work of a compilation, counted in runs of the model on one latent; a dry run estimates time by it."""

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
        trajectories: the number of calibration trajectories.
        rows: the number of latents in the calibration set, both halves of guidance; 0 where no pass selects one.
        share: the arithmetic of a trajectory under the step plan, relative to one on which every step computes.
    """

    program: Program
    trajectories: int
    rows: int
    share: float

    @property
    def trajectory(self) -> int:
        """The runs of the computing graph on one latent in a trajectory of computing steps alone."""
        plan = self.program.facts[StepPlan]
        return plan.halves * len(plan)

    def run(self, variant: str) -> float:
        """Return the cost of one run of a variant, relative to one of the computing graph."""
        macs = macs_by_variant(self.program.variants)
        return (macs[variant] + RUN_MACS) / (macs[self.program.computing] + RUN_MACS)
