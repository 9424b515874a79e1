"""Programs with attention in its products, which is sharp enough for its probabilities to need small codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qcgraph.ir.program import Program

Run = Callable[[str, Program], Program]
OBSERVED = "calibrate{trajectories=4 selection=uniform samples=24},group-timesteps{groups=2}"


@pytest.fixture(scope="module")
def sharp(cached: Program, sharpened: Callable[[Program], Program]) -> Program:
    """The cached tiny denoiser with sharp attention."""
    return sharpened(cached)


@pytest.fixture(scope="module")
def split(sharp: Program, run: Run) -> Program:
    """The same, split into products and calibrated in two timestep groups."""
    return run(f"split-attention,{OBSERVED}", sharp)
