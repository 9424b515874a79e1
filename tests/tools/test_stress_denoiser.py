"""The tool that looks for wrong results of one loaded denoiser: short runs, with what has to be right in them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.runner import Array, Call

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("stress_denoiser")


def denoisers(program: Program, runner: type[TorchRunner] = TorchRunner) -> tuple[Denoiser, Denoiser]:
    made = runner(program)
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    return Denoiser(made, plan, spec), Denoiser(made, plan, spec, own_updates=True)


@pytest.mark.slow
def test_no_trajectory_is_wrong(tool: Any, cached: Program) -> None:
    counts = tool.stress(*denoisers(cached), tries=4, workers=6, seed=0, ways=tool.WAYS)
    assert {way: counted["wrong"] for way, counted in counts.items()} == dict.fromkeys(tool.WAYS, 0)
    assert counts["requests"] == {"right": 24}
    assert counts["moving"] == {"right": 8}
    assert all(counts[way]["right"] and counts[way]["refused"] for way in ("threads", "own-updates", "turns"))


class Mixing(TorchRunner):
    """A backend that is wrong as soon as caches of two trajectories meet: all share one state."""

    shared: dict[tuple[str, int], Any] = {}  # noqa: RUF012

    def run(self, call: Call) -> Array:
        return super().run(replace(call, state=self.shared))


def test_what_is_wrong_is_found(tool: Any, cached: Program) -> None:
    counts = tool.stress(*denoisers(cached, Mixing), tries=2, workers=6, seed=0, ways=["requests"])
    assert counts["requests"]["wrong"]


def test_trajectories_that_come_one_after_the_other(tool: Any, cached: Program) -> None:
    denoiser, _ = denoisers(cached)
    found = tool.repeat(denoiser, 8)
    assert (found["right"], found["wrong"]) == (8, 0)
    assert found["end_bytes"] >= 0
    host = tool.Host(3, 1)
    assert np.array_equal(tool.ended(host.walk(denoiser)), tool.ended(host.walk(denoiser.request())))
