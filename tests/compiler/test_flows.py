"""Flow matching: a trained flow, planned, cached, quantized, compensated and judged like any diffusion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.capture.capture import capture
from qcgraph.evaluation.evaluate import Options, evaluate
from qcgraph.evaluation.settings import Subject
from qcgraph.export.run.open import runner_of
from qcgraph.export.targets import target_named
from qcgraph.ir.serialize import load_program
from qcgraph.models import LoadedModel, load_model
from qcgraph.models.classifier import load_classifier
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import NoiseSchedule
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import sample

LEVELS = 2000  # of noise that are tabulated
STEPS = 16
QUICK = '[calibration]\ntrajectories = 4\n[quantization]\nscales = "range"\nrounding = "nearest"\ngroups = 4\n'
pytestmark = pytest.mark.slow  # it compiles


class Flow(nn.Module):
    """The velocity, noise - x0, of the flow that has the trajectories of a denoiser of noise.

    At noise level s the latent of the flow is that of the diffusion where the ratio of noise to signal is as large, up
    to a factor.
    """

    def __init__(self, denoiser: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.denoiser = denoiser
        betas = np.linspace(schedule.beta_start, schedule.beta_end, schedule.train_steps)
        cumulative = np.cumprod(1 - betas)
        levels = np.clip(np.arange(LEVELS + 1) / LEVELS, 1e-4, 1 - 1e-4)
        noisiness = np.log(levels / (1 - levels))
        timesteps = np.interp(noisiness, -0.5 * np.log(cumulative / (1 - cumulative)), np.arange(len(betas)))
        signal = np.sqrt(np.interp(timesteps, np.arange(len(betas)), cumulative))
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.float32))
        self.register_buffer("signal", torch.tensor(signal, dtype=torch.float32))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        place = (t * (LEVELS / 1000)).round().long()
        signal = self.signal[place][:, None, None, None]
        noise = torch.sqrt(1 - signal * signal)
        latent = x * noise / (t / 1000 + 1e-6)[:, None, None, None]
        predicted = self.denoiser(latent, self.timesteps[place], y)
        return predicted - (latent - noise * predicted) / signal


@pytest.fixture(scope="module")
def flow() -> LoadedModel:
    digits = load_model("digits")
    module = Flow(digits.module, digits.spec.noise_schedule).eval().requires_grad_(False)
    spec = replace(digits.spec, name="flow-of-digits", noise_schedule=NoiseSchedule(prediction="flow_prediction"))
    return replace(digits, module=module, spec=spec)


@pytest.fixture(scope="module")
def bundle(flow: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe = Recipe.from_toml(QUICK).override(scheduler="flow-euler", steps=STEPS, cache="budget=0.5", compensate="vc")
    recipe = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"cost": "macs"})})
    return qcgraph.compile(flow, recipe, output=tmp_path_factory.mktemp("flow") / "flow")


def test_a_flow_is_compiled_and_judged(flow: LoadedModel, bundle: Bundle) -> None:
    origin = capture(flow.module, flow.spec, flow.input_names)
    origin = origin.with_facts(
        make_step_plan("flow-euler", STEPS, 1.5, flow.spec.noise_schedule, origin.constants_digest)
    )
    program, target = load_program(bundle.path), target_named(bundle.manifest.target)
    subject = Subject(flow, origin, program, bundle.plan, runner_of(bundle, None, 1), bundle.path, target, 1)
    options = Options(samples=10, seeds=1, metrics=("psnr",), sites=False)
    found = evaluate(subject, options, Progress()).to_json()
    rows = {row["key"]: row for row in found["rows"]}
    psnr = {key: row["metrics"]["psnr"]["value"] for key, row in rows.items() if "psnr" in row.get("metrics", {})}
    assert found["converged_reference"]["solver"] == "flow-euler"
    assert found["faults"] == []
    assert psnr["compiled"] > psnr["fewer_steps"] + 5
    assert Path(bundle.path, "full.onnx").is_file()
    labels = list(range(10))
    drawn = torch.from_numpy(sample(subject.runner, bundle.plan, bundle.spec, labels, 5))
    assert load_classifier().accuracy(drawn, torch.tensor(labels)) >= 0.9  # it is a flow of digits
