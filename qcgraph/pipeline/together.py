"""How many rows of a batch, and how many trajectories, run together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, find_sites
from qcgraph.pipeline.calibration_budget import FLOAT_BYTES
from qcgraph.plan.steps import StepPlan

MOST_TOGETHER = 64  # trajectories
HELD_BYTES = 96 * 2**20  # bytes that the widest activation of rows that run together may take
NEAR_BYTES = 12 * 2**20  # the same for speed: where more rows leave the cache of a CPU, each takes a fifth longer


def rows_together(sites: Sequence[Site], held: int = HELD_BYTES) -> int:
    """Return how many rows may run together, at least two, so that no site's input takes more than ``held`` bytes."""
    widest = max((prod(dim for dim in site.input_shape if isinstance(dim, int)) for site in sites), default=1)
    return max(2, held // (FLOAT_BYTES * widest))


def trajectories_together(program: Program) -> int:
    """Return how many trajectories may run together, at least one: at most 64, and fewer of a larger model."""
    sites = find_sites(program.variants[program.computing])
    return max(1, min(MOST_TOGETHER, rows_together(sites, NEAR_BYTES) // program.facts[StepPlan].halves))


def tokens(sites: Sequence[Site]) -> int:
    """Return the largest number of tokens that a row has at any site."""
    return max((prod(dim for dim in site.input_shape[:-1] if isinstance(dim, int)) for site in sites), default=1)
