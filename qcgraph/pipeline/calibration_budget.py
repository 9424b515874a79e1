"""The calibration budget: the number of trajectories that a measurement may sample."""

from __future__ import annotations

from math import prod

from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites, total_macs
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.reference import COARSE_STEPS, FINE_STEPS

CALIBRATION_MACS = 2.5e12  # multiply-accumulates of the trajectories whose ranges are observed: a minute on two cores
LATENT_MACS = 1.1e12  # the same of the latents that scales are searched on, with their derivatives
CALIBRATION_LIMITS = (24, 64)  # fewer do not show what the classes have in common, whatever the model costs
TRAJECTORY_LIMITS = (2, 16)
RECORD_MACS = 0.6e12  # multiply-accumulates that each part of the measurement may take: seconds on two cores
RECORD_BYTES = 2**30  # bytes of recorded cached values; one trajectory is recorded whatever its size
FLOAT_BYTES = 4
TARGET_MACS = 1.3e13  # multiply-accumulates of the runs that a solver is fitted to: three minutes on two cores
TARGET_LIMITS = (2, 64)
TARGET_VALUES = 49_152  # values of latents, over all of these trajectories: more of them hardly change a fit


def calibration_trajectories(program: Program) -> int:
    """Return how many trajectories activation ranges are observed on, by arithmetic; never fewer than a floor."""
    return affordable(trajectory_macs(program), CALIBRATION_MACS, CALIBRATION_LIMITS)


def affordable_trajectories(program: Program) -> int:
    """Return how many trajectories with computing steps alone can be recorded, by arithmetic and by memory."""
    plan, values = program.facts[StepPlan], program.variants[program.computing].interface.caches
    size = FLOAT_BYTES * sum(prod(dim for dim in value.shape if isinstance(dim, int)) for value in values)
    held = RECORD_BYTES // max(1, size * plan.halves * len(plan))
    return max(1, min(held, affordable(trajectory_macs(program), RECORD_MACS, TRAJECTORY_LIMITS)))


def target_trajectories(program: Program) -> int:
    """Return how many trajectories a solver is fitted to, by arithmetic and by the size of latents.

    Args:
        program: the captured program.
    """
    macs = trajectory_macs(program, COARSE_STEPS + FINE_STEPS)
    enough = -(-TARGET_VALUES // prod(program.facts[ModelSpec].latent_shape))
    least, most = TARGET_LIMITS
    return min(affordable(macs, TARGET_MACS, TARGET_LIMITS), max(8 * least, min(enough, most)))


def affordable(macs: float, limit: float, bounds: tuple[int, int]) -> int:
    """Return how many runs fit into a limit, within bounds.

    Args:
        macs: multiply-accumulates of one run; 0 in a model without products.
        limit: multiply-accumulates of all runs.
        bounds: the smallest and the largest result.
    """
    least, most = bounds
    return max(least, min(most, int(limit / macs))) if macs else most


def trajectory_macs(program: Program, steps: int | None = None) -> float:
    """Return the multiply-accumulates of one trajectory on which every step computes.

    Args:
        program: the program.
        steps: the number of steps; None for those of its plan.
    """
    plan = program.facts[StepPlan]
    count = len(plan) if steps is None else steps
    return float(total_macs(find_sites(program.variants[program.computing]))) * count * plan.halves
