"""The summary that qcgraph compile prints, where the plan is that of a fitted solver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle import Bundle
from qcgraph.cli.compile import _summary

Command = Callable[..., Any]


@pytest.mark.slow
def test_a_fitted_solver(fitted_bundle: Path) -> None:
    bundle = Bundle.open(fitted_bundle)
    assert bundle.report is not None
    fields = dict(_summary(bundle.report, bundle))
    assert fields["sampling"] == "ddim, 4 fitted of 8 steps, guidance 1.5"
    assert fields["solver"] == "4 of 8 steps, fitted to the converged run"
    assert fields["work"] == "50.0% of the multiply-accumulates of 8 steps of the model"


@pytest.mark.slow
def test_a_dry_run(qcgraph: Command, small_digits: Path) -> None:
    out = qcgraph("compile", small_digits, "--steps", 8, "--solver", "fitted=4", "--dry-run").out
    assert "sampling   ddim, 4 fitted of 8 steps, guidance 1.5" in out
    assert "solver     fitted; its timesteps follow from samples" in out
    assert "variants   main 4 (steps each)" in out
    assert "work       50.0% of the multiply-accumulates of 8 steps of the model" in out
    plain = qcgraph("compile", small_digits, "--steps", 8, "--dry-run").out
    assert "solver" not in plain.split("pipeline")[0]
    assert "100.0% of the multiply-accumulates of the model" in plain
