"""The scheduler of a step plan: the numbers of qcgraph's own sampling, saved and loaded, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from qcgraph.bundle import Bundle, write_plan, write_scheduler, writing
from qcgraph.errors import BundleError, UsageError
from qcgraph.plan.fitted import SCHEDULER_CLASS
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.spec import FLOW, Interface, ModelSpec, NoiseSchedule
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe
from qcgraph.sampling.loop import Updates
from qcgraph.sampling.runner import Array
from qcgraph.schedulers import FittedScheduler

SCHEDULE = NoiseSchedule()
FLOWING = NoiseSchedule(prediction=FLOW)
SHAPE = (2, 4, 8, 8)
# Three steps of a run of twenty that no scheduler of diffusers makes.
CHOSEN = StepPlan(
    Fingerprint("model", "ddim", 20, 1.0),
    (
        Step(950.0, Update(1.25, -0.75)),
        Step(600.0, Update(1.5, -0.875, history=(Earlier(0.0, 0.3),))),
        Step(100.0, Update(1.1, -1.2, history=(Earlier(-0.01, 0.4), Earlier(0.02, -1 / 3)))),
    ),
)


def plan_of(name: str) -> tuple[StepPlan, NoiseSchedule]:
    if name == "chosen":
        return CHOSEN, SCHEDULE
    schedule = FLOWING if name == "flow-euler" else SCHEDULE
    return make_step_plan(name, 9, 1.0, schedule, "model"), schedule


def draws(count: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(SHAPE, np.float32) for _ in range(count)]


def walk(
    scheduler: FittedScheduler, dtype: torch.dtype = torch.float32, seed: int | None = None, **options: Any
) -> list[torch.Tensor]:
    """The latents of a trajectory whose predictions are random."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    latent, *predictions = (torch.from_numpy(values).to(dtype) for values in draws(1 + len(scheduler.timesteps)))
    latents = []
    for timestep, prediction in zip(scheduler.timesteps, predictions, strict=True):
        scaled = scheduler.scale_model_input(latent, timestep)
        latent = scheduler.step(prediction, timestep, scaled, generator=generator, **options).prev_sample
        latents.append(latent)
    return latents


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++", "flow-euler", "chosen"])
def test_its_latents_are_those_of_qcgraph_bit_for_bit(name: str) -> None:
    plan, schedule = plan_of(name)
    updates, generator = Updates(plan), torch.Generator().manual_seed(3)
    latent, *predictions = draws(1 + len(plan))
    expected = []
    for index, (step, prediction) in enumerate(zip(plan.steps, predictions, strict=True)):
        latent = updates.update(index, latent, prediction)
        if noise := step.update.noise:
            latent = latent + np.float32(noise) * torch.randn(SHAPE, generator=generator).numpy()
        expected.append(latent)
    drawn = walk(FittedScheduler.of_plan(plan, schedule), seed=3)
    assert all(np.array_equal(one.numpy(), other) for one, other in zip(drawn, expected, strict=True))


def test_what_a_pipeline_reads() -> None:
    scheduler = FittedScheduler.of_plan(CHOSEN, replace(FLOWING, train_steps=999))
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 999)
    config: Any = scheduler.config
    assert (config.num_train_timesteps, config.prediction_type, config.run_steps) == (999, FLOW, 20)
    latent = torch.ones(SHAPE)
    assert scheduler.scale_model_input(latent, 950) is latent
    (after,) = scheduler.step(latent, 950, latent, return_dict=False)
    assert torch.equal(after, 0.5 * latent)


@pytest.mark.parametrize(
    "asked", [{}, {"num_inference_steps": 3}, {"num_inference_steps": 20}, {"timesteps": [950, 600, 100]}]
)
def test_the_steps_that_it_accepts(asked: dict[str, Any]) -> None:
    scheduler = FittedScheduler.of_plan(CHOSEN, SCHEDULE)
    scheduler.timesteps = torch.empty(0)
    scheduler.set_timesteps(**asked, device="cpu")
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [950, 600, 100]


@pytest.mark.parametrize("kind", [float, int, np.float32, torch.tensor, lambda value: torch.tensor([value]).half()])
def test_timesteps_of_every_kind(kind: Callable[[float], Any]) -> None:
    scheduler = FittedScheduler.of_plan(CHOSEN, SCHEDULE)
    latent = torch.ones(SHAPE)
    for timestep in CHOSEN.timesteps:
        scheduler.step(latent, kind(timestep), latent)


def test_timesteps_that_are_no_whole_numbers() -> None:
    plan = replace(CHOSEN, steps=tuple(replace(step, timestep=step.timestep + 0.3) for step in CHOSEN.steps))
    scheduler = FittedScheduler.of_plan(plan, SCHEDULE)
    assert scheduler.timesteps.dtype == torch.float32
    assert len(walk(scheduler)) == 3
    scheduler.set_timesteps(timesteps=scheduler.timesteps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Each step is computed in float32 at least, and rounded once."""
    plan, schedule = plan_of("dpmsolver++")
    exact, scheduler = walk(FittedScheduler.of_plan(plan, schedule)), FittedScheduler.of_plan(plan, schedule)
    drawn = walk(scheduler, dtype)
    assert {latent.dtype for latent in drawn} == {dtype}
    tolerance = 20 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert torch.linalg.norm(drawn[-1].float() - exact[-1]) < tolerance * torch.linalg.norm(exact[-1])
    latent, prediction = (torch.from_numpy(values).to(dtype) for values in draws(2))
    update = plan.steps[0].update
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    once = (update.latent * latent.to(wide) + update.noise_prediction * prediction.to(wide)).to(dtype)
    assert torch.equal(scheduler.step(prediction, plan.timesteps[0], latent).prev_sample, once)


def test_tensors_that_the_host_changes_in_place_do_not_matter() -> None:
    expected, scheduler = walk(FittedScheduler.of_plan(CHOSEN, SCHEDULE)), FittedScheduler.of_plan(CHOSEN, SCHEDULE)
    latent, *predictions = map(torch.from_numpy, draws(4))
    for timestep, prediction in zip(scheduler.timesteps, predictions, strict=True):
        after = scheduler.step(prediction, timestep, latent).prev_sample
        latent.copy_(after)
        prediction.zero_()
    assert torch.equal(latent, expected[-1])


def test_a_trajectory_starts_anew() -> None:
    scheduler = FittedScheduler.of_plan(CHOSEN, SCHEDULE)
    expected = walk(scheduler)
    latent = torch.ones(1, *SHAPE[1:])
    scheduler.step(latent, 950, latent)
    scheduler.step(latent, 600, latent)
    assert all(map(torch.equal, walk(scheduler), expected))  # another shape, at the first timestep
    scheduler.step(latent, 950, latent)
    scheduler.set_timesteps(3)
    with pytest.raises(BundleError, match="timestep 600 is out of order; timestep 950 comes next"):
        scheduler.step(latent, 600, latent)


def test_a_copy_has_a_trajectory_of_its_own() -> None:
    scheduler = FittedScheduler.of_plan(CHOSEN, SCHEDULE)
    expected, latent = walk(scheduler), torch.ones(SHAPE)
    scheduler.step(latent, 950, latent)
    assert all(map(torch.equal, walk(copy.deepcopy(scheduler)), expected))
    scheduler.step(latent, 600, latent)


ONES = torch.ones(SHAPE)


@pytest.mark.parametrize(
    ("call", "said", "hint"),
    [
        (
            lambda it: it.set_timesteps(10),
            r"10 steps were asked for; this scheduler has 3 steps of a run of 20, which visit 950, 600, 100$",
            "num_inference_steps=3",
        ),
        (lambda it: it.set_timesteps(timesteps=[950, 600]), "other timesteps were asked for", "leave timesteps out"),
        (lambda it: it.step(ONES, 600, ONES), "timestep 600 is out of order; timestep 950 comes next", "copy"),
        (lambda it: (walk(it), it.step(ONES, 100, ONES)), "timestep 100 is out of order; no step is left", "copy"),
        (lambda it: it.step(ONES, 900, ONES), "timestep 900 is not one of this scheduler", "set_timesteps"),
        (lambda it: it.step(ONES, torch.tensor([950, 950]), ONES), r"timestep \[950, 950\] is not", "set_timesteps"),
        (
            lambda it: (it.step(ONES, 950, ONES), it.step(ONES[:1], 600, ONES[:1])),
            r"the latent is \(1, 4, 8, 8\), this trajectory began with \(2, 4, 8, 8\)",
            "first timestep",
        ),
    ],
)
def test_what_its_plan_was_not_made_for(call: Callable[[FittedScheduler], object], said: str, hint: str) -> None:
    with pytest.raises(BundleError) as caught:
        call(FittedScheduler.of_plan(CHOSEN, SCHEDULE))
    assert re.search(said, caught.value.message)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eta": 0.5}, "eta has no effect"),
        ({"use_clipped_model_output": True}, "use_clipped_model_output has no effect"),
        ({"model_output": torch.ones(2, 8, 8, 8)}, r"the prediction is \(2, 8, 8, 8\), the latent \(2, 4, 8, 8\)"),
    ],
)
def test_arguments_of_a_step_that_are_refused(given: dict[str, Any], said: str) -> None:
    scheduler, accepted = FittedScheduler.of_plan(CHOSEN, SCHEDULE), {"eta": 0.0, "variance_noise": None}
    arguments = {"model_output": ONES, "timestep": 950, "sample": ONES, **accepted}
    scheduler.step(**arguments)
    with pytest.raises(UsageError, match=said) as caught:
        scheduler.step(**arguments | given)
    assert caught.value.hint


def changed(step: int, text: str, new: str) -> list[Any]:
    steps = json.loads(json.dumps(FittedScheduler.of_plan(CHOSEN, SCHEDULE).config["steps"]))
    steps[step] = json.loads(json.dumps(steps[step]).replace(text, new))
    return steps


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "the scheduler has no steps"),
        (3, "the steps are not those of a plan"),
        ([{"timestep": 3.0}], "the steps are not those of a plan"),
        (changed(0, "-0.75", "NaN"), "a number is NaN or infinite"),
        (changed(1, "600", "960"), "the timesteps do not fall strictly"),
        (changed(2, "", "")[2:], "an update looks back farther than the first step"),
    ],
)
def test_settings_that_are_refused(steps: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        FittedScheduler(steps, 20)
    assert "from_pretrained" in str(caught.value.hint)


def test_the_settings_of_another_scheduler_are_refused() -> None:
    other: Any = DDIMScheduler()
    with pytest.raises(UsageError, match="the scheduler has no steps"):
        FittedScheduler.from_config(other.config)


# Saved and loaded.


def settings(scheduler: FittedScheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "flow-euler", "chosen"])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    made = FittedScheduler.of_plan(*plan_of(name))
    made.save_pretrained(tmp_path)
    loaded = FittedScheduler.from_pretrained(tmp_path)
    again = FittedScheduler.from_config(made.config)
    assert isinstance(loaded, FittedScheduler)
    assert isinstance(again, FittedScheduler)
    assert settings(made) == settings(loaded) == settings(again)
    expected = walk(made, seed=1)
    assert all(map(torch.equal, walk(loaded, seed=1), expected))
    assert all(map(torch.equal, walk(again, seed=1), expected))


def test_a_bundle_holds_what_diffusers_saves(tmp_path: Path) -> None:
    spec = ModelSpec.class_conditional("toy", SHAPE[1:], class_count=10, null_class=10, output_channels=4)
    with writing(tmp_path / "out", model="toy", target="torch") as folder:
        write_plan(folder, spec, CHOSEN, {"main": Interface((), ())})
        write_scheduler(folder, spec, CHOSEN)
        (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
    assert "scheduler/scheduler_config.json" in Bundle.open(tmp_path / "out").manifest.files
    of_bundle = FittedScheduler.of_bundle(tmp_path / "out")
    loaded = FittedScheduler.from_pretrained(str(tmp_path / "out"), subfolder="scheduler")
    assert isinstance(loaded, FittedScheduler)
    assert settings(loaded) == settings(of_bundle) == settings(FittedScheduler.of_plan(CHOSEN, spec.noise_schedule))
    of_bundle.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "scheduler_config.json").read_text())
    del saved["_diffusers_version"]
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()) == saved
    assert FittedScheduler.__name__ == SCHEDULER_CLASS
