"""Observed channels, programs whose channels hold something else, and programs with sharp attention in products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, fx

from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Call

Run = Callable[[str, Program], Program]
OBSERVED = "calibrate{trajectories=4 selection=uniform latents=24},group-timesteps{groups=2}"
COUNT = 2  # trajectories
GAIN, SHIFT = 32, 0  # the first rows of adaLN for the attention


@dataclass(frozen=True)
class Channels:
    """What the channels of an activation held on the calibration trajectories."""

    low: Tensor
    high: Tensor
    values: Tensor

    @property
    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def half_width(self) -> Tensor:
        return (self.high - self.low) / 2

    @property
    def power(self) -> Tensor:
        return ((self.values - self.middle) ** 2).mean(dim=0)


def _observed(program: Program) -> Mapping[str, Channels]:
    sites = {site.node: site.name for site in find_sites(program.variants["main"]) if not site.refusal}
    found: dict[str, list[Tensor]] = {name: [] for name in sites.values()}

    def observe(_: Call, node: fx.Node, value: Tensor) -> None:
        if node.name in sites:
            found[sites[node.name]].append(value.clone())

    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    sample_calibration(TorchRunner(program, observe), plan, spec, COUNT, 0)
    return {name: _channels(torch.cat(values)) for name, values in found.items()}


def _channels(value: Tensor) -> Channels:
    """The channels of values [R,...,C], with the limits that are expected of 1024 rows (see test_extremes)."""
    rows = value.flatten(1, -2)
    beyond = math.sqrt(6) / math.pi * math.log(1024 / len(rows))
    lows, highs = (extremes.double() for extremes in (rows.amin(dim=1), rows.amax(dim=1)))
    low = lows.amin(dim=0) - beyond * lows.std(dim=0, correction=0)
    high = highs.amax(dim=0) + beyond * highs.std(dim=0, correction=0)
    return Channels(low.float(), high.float(), rows.flatten(0, 1))


@pytest.fixture(scope="session")
def observed() -> Callable[[Program], Mapping[str, Channels]]:
    """Observe what enters every linear layer of the blocks, by site."""
    return _observed


@pytest.fixture(scope="session")
def seen(captured: Program) -> Mapping[str, Channels]:
    """What entered every linear layer of the captured program, by site."""
    return _observed(captured)


@pytest.fixture(scope="session")
def with_channels() -> Callable[[Program, float, float, slice], Program]:
    """Give a program other adaLN rows of the first attention: norm * (1 + gain) + shift, whatever the condition."""

    def changed(program: Program, gain: float, shift: float, channels: slice) -> Program:
        name = "blocks.0.adaLN_modulation.1"
        weight, bias = (program.constants[f"{name}.{kind}"].clone() for kind in ("weight", "bias"))
        for start, value in ((GAIN, gain), (SHIFT, shift)):
            rows = slice(start + channels.start, start + channels.stop)
            weight[rows], bias[rows] = 0, value
        return replace(program, constants={**program.constants, f"{name}.weight": weight, f"{name}.bias": bias})

    return changed


@pytest.fixture(scope="module")
def sharp(cached: Program, sharpened: Callable[[Program], Program]) -> Program:
    """The cached tiny denoiser with sharp attention."""
    return sharpened(cached)


@pytest.fixture(scope="module")
def split(sharp: Program, run: Run) -> Program:
    """The same, split into products and calibrated in two timestep groups."""
    return run(f"split-attention,{OBSERVED}", sharp)


@pytest.fixture(scope="session")
def inputs() -> Mapping[str, Tensor]:
    """Four latents of one timestep, in the second timestep group."""
    return {
        "latent": torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((4,), 700.0),
        "class_label": torch.arange(4),
        "group": torch.tensor(1),
    }


@pytest.fixture(scope="session")
def prediction(inputs: Mapping[str, Tensor]) -> Callable[[Program], Tensor]:
    """Gives what the computing variant of a program predicts for these inputs."""

    def predict(program: Program) -> Tensor:
        names = program.variants["full"].interface.input_names
        return program.run("full", {name: inputs[name] for name in names})["noise_prediction"]

    return predict
