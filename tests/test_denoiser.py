"""The denoiser in the place of a diffusers transformer: its call, its attributes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.denoiser import Denoiser, DenoiserConfig
from qcgraph.errors import BundleError, UsageError
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.sampling import Array, Request
from qcgraph.schedulers import make_scheduler, make_step_plan
from qcgraph.spec import FLOW, ModelSpec, NoiseSchedule
from qcgraph.steps import StepPlan


def parts(program: Program) -> tuple[TorchRunner, StepPlan, ModelSpec]:
    return TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec]


@pytest.fixture
def denoiser(cached: Program) -> Denoiser:
    return Denoiser(*parts(cached))


def latents(seed: int = 0, batch: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 2, 8, 8), dtype=np.float32)


def first(denoiser: Denoiser, labels: Any = (0, 1), timestep: Any = 888) -> Array:
    prediction: Array = denoiser(latents(), timestep, labels).sample
    return prediction


def test_it_has_the_call_of_a_diffusers_transformer(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    request, labels = Request(runner, plan), np.arange(2)
    denoiser = Denoiser(runner, plan, spec)
    for timestep in plan.timesteps:
        result = denoiser(torch.from_numpy(latents()), timestep=torch.tensor(timestep), class_labels=torch.arange(2))
        expected = torch.from_numpy(request.denoise(latents(), timestep, labels))
        assert torch.equal(result.sample, expected)
        assert result[0] is result["sample"] is result.sample
    half = denoiser(torch.from_numpy(latents()).half(), plan.timesteps[0], torch.arange(2), return_dict=False)
    assert isinstance(half, tuple)
    assert half[0].dtype == torch.float16
    assert isinstance(denoiser.request()(latents(), plan.timesteps[0], np.arange(2)).sample, np.ndarray)


@pytest.mark.parametrize(
    "timestep",
    [
        888,
        888.0,
        np.float64(888),
        np.full(2, 888, dtype=np.int32),
        np.full((2, 1), 888, dtype=np.float16),
        *(torch.tensor(888, dtype=dtype) for dtype in (torch.int16, torch.int64, torch.float32, torch.float64)),
        *(torch.full((2,), 888, dtype=dtype) for dtype in (torch.int32, torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_timesteps_of_every_kind(denoiser: Denoiser, timestep: Any) -> None:
    assert np.array_equal(first(denoiser, timestep=timestep), first(denoiser.request()))


def test_a_timestep_of_few_digits_stands_for_the_one_that_rounds_to_it(cached: Program) -> None:
    runner, plan, spec = parts(cached)
    steps = [replace(step, timestep=step.timestep + 0.3) for step in plan.steps]  # as those of a flow
    denoiser = Denoiser(runner, replace(plan, steps=tuple(steps)), spec)
    exact = first(denoiser, timestep=888.3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert np.array_equal(first(denoiser, timestep=torch.tensor(888.3, dtype=dtype)), exact)
    with pytest.raises(BundleError, match="timestep 888 is not in the plan"):
        first(denoiser, timestep=888)
    near = [replace(plan.steps[0], timestep=889.0), replace(plan.steps[1], timestep=888.5)]
    close = Denoiser(runner, replace(plan, steps=tuple(near)), spec)
    with pytest.raises(UsageError, match=r"888 may be 889 or 888\.5, which torch\.bfloat16 does not tell apart"):
        first(close, timestep=torch.tensor(889.0, dtype=torch.bfloat16))


def test_labels_of_every_kind(denoiser: Denoiser) -> None:
    expected = first(denoiser, [3, 3])
    for labels in (3, [3], np.array([3, 3]), np.array([3.0, 3.0]), torch.tensor([3, 3], dtype=torch.int32)):
        assert np.array_equal(first(denoiser, labels), expected)


@pytest.mark.parametrize(
    ("labels", "message", "hint"),
    [
        ([0, 6], "class 6 is out of range", "the classes 0 to 4, and 5 for the unconditional half"),
        ([-1, 0], "class -1 is out of range", "0 to 4"),
        ([0, 1000], "class 1000 is out of range", "DiTPipeline gives 1000 for that half"),
        ([0, 1, 2], r"class labels int64\[3\] for a batch of 2", "one integer a sample"),
        ([0.5, 1.0], r"class labels float64\[2\] for a batch of 2", "one integer a sample"),
        (None, "no class labels were given", "tiny takes one a sample"),
    ],
)
def test_labels_that_are_refused(denoiser: Denoiser, labels: Any, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        first(denoiser, labels)
    assert hint in str(caught.value.hint)


def test_what_it_was_not_made_for(denoiser: Denoiser) -> None:
    for wrong in (np.zeros((1, 3, 8, 8)), np.zeros((2, 8, 8)), np.zeros((0, 2, 8, 8))):
        with pytest.raises(UsageError, match="the latent has shape") as caught:
            denoiser(wrong, 888.0, np.array([0]))
        assert caught.value.hint == "tiny takes (batch, 2, 8, 8)"
    with pytest.raises(UsageError, match="timesteps of a batch differ"):
        first(denoiser, timestep=np.array([888.0, 777.0]))
    with pytest.raises(UsageError, match="no timestep was given"):
        first(denoiser, timestep=None)
    with pytest.raises(UsageError, match="cross_attention_kwargs scale have no effect"):
        denoiser(latents(), 888, [0, 1], {"scale": 0.5})
    assert denoiser(latents(), 888, [0, 1], {}).sample.shape == (2, 4, 8, 8)


def test_a_null_half_that_comes_first_is_refused_where_it_is_restored(
    captured: Program, run: Callable[[str, Program], Program]
) -> None:
    halved = run("plan-cache{interval=2 blocks=guidance},insert-cache", captured)
    denoiser, both = Denoiser(*parts(halved)), np.concatenate([latents(batch=1)] * 2)
    with pytest.raises(UsageError, match=r"the second half of this batch is not unconditional: its classes are \[1\]"):
        denoiser(both, 888, [5, 1])
    assert denoiser(both, 888, [1, 5]).sample.shape == (2, 4, 8, 8)


def test_its_configuration(denoiser: Denoiser) -> None:
    config = denoiser.config
    assert (config.in_channels, config.out_channels, config.sample_size, config.num_embeds_ada_norm) == (2, 4, 8, 5)
    assert dict(config) == {"in_channels": 2, "out_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 5}
    assert config["sample_size"] == 8
    assert len(config) == 4
    assert config.get("of") is None
    with pytest.raises(KeyError):
        config["of"]
    with pytest.raises(FrozenInstanceError):
        config.sample_size = 16  # type: ignore[misc]
    assert DenoiserConfig.of(ModelSpec("wide", (2, 8, 16), 5, 5, 4)).sample_size == (8, 16)


def test_where_it_is(denoiser: Denoiser) -> None:
    assert denoiser.device == torch.device("cpu")
    assert denoiser.dtype == torch.float32
    assert denoiser.to("cpu").to(torch.device("cpu"), torch.float32).to(device=None) is denoiser
    assert denoiser.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert denoiser.request().dtype == torch.bfloat16
    for asked in ("cuda", torch.device("cuda:1"), torch.int8):
        with pytest.raises(UsageError, match="runs on the CPU, not on") as caught:
            denoiser.to(asked)
        assert caught.value.hint
    assert repr(denoiser) == "Denoiser(tiny: ddim, 9 steps, guidance 1.5)"


def guided(denoiser: Denoiser, weight: float, steps: int = 3) -> None:
    """The plan's sampler with a guidance weight of its own."""
    latent = latents(batch=1)
    for step in denoiser.plan.steps[:steps]:
        both = np.concatenate([latent, latent])
        conditional, null = np.split(denoiser(both, step.timestep, [1, 5]).sample[:, :2], 2)
        eps = null + np.float32(weight) * (conditional - null)
        latent = np.float32(step.update.latent) * latent + np.float32(step.update.noise_prediction) * eps


def test_another_sampler_is_refused_unless_it_is_meant(cached: Program) -> None:
    guided(Denoiser(*parts(cached)), 1.5, steps=9)
    with pytest.raises(BundleError, match=r"guidance 1\.5; the latents that came were sampled with guidance 4"):
        guided(Denoiser(*parts(cached)), 4.0)
    free = Denoiser(*parts(cached), own_updates=True)
    guided(free, 4.0)
    guided(free.request(), 4.0)


def test_a_latent_that_the_host_changes_in_place_does_not_matter(denoiser: Denoiser) -> None:
    """What is compared is what came."""
    latent = np.concatenate([latents(batch=1)] * 2)
    for step in denoiser.plan.steps[:3]:
        conditional, null = np.split(denoiser(latent, step.timestep, [1, 5]).sample[:, :2], 2)
        latent *= np.float32(step.update.latent)
        latent += np.float32(step.update.noise_prediction) * (null + np.float32(1.5) * (conditional - null))


class Arbitrary:
    """Predictions that follow from nothing; those of the halves differ by as much as they are long."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def run(self, variant: str, inputs: Mapping[str, np.ndarray], state: object) -> Array:
        return self._generator.standard_normal(inputs["latent"].shape, dtype=np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "flow"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++"])
def test_rounding_in_a_host_is_not_another_sampler(dtype: torch.dtype, betas: str, solver: str) -> None:
    """With diffusers' own schedulers, and also where coefficients are in the thousands."""
    process = NoiseSchedule(prediction=FLOW) if betas == "flow" else NoiseSchedule(beta_schedule=betas)
    solver = "flow-euler" if betas == "flow" and solver != "dpmsolver++" else solver
    spec = ModelSpec("arbitrary", (4, 8, 8), 5, 5, 4, process)
    for steps, guidance in [(2, 4.0), (9, 1.0), (20, 30.0)]:
        denoiser = Denoiser(Arbitrary(), make_step_plan(solver, steps, guidance, process, "m"), spec)
        scheduler = make_scheduler(solver, process)
        scheduler.set_timesteps(steps)
        latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
        for timestep in scheduler.timesteps:
            if guidance == 1.0:
                eps = denoiser(latent, timestep, [1]).sample
            else:
                conditional, null = denoiser(torch.cat([latent, latent]), timestep, [1, 5]).sample.chunk(2)
                eps = null + guidance * (conditional - null)
            latent = scheduler.step(eps, timestep, latent).prev_sample.to(dtype)
            if not latent.isfinite().all():  # half precision overflows here, with any denoiser
                assert dtype == torch.float16
                break
