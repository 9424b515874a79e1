"""A compiled denoiser in the place of the transformer of a real DiTPipeline, with random weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import qcgraph
from qcgraph.bundle import Bundle
from qcgraph.capture.capture import capture
from qcgraph.errors import BundleError, UsageError
from qcgraph.export.run.open import runner_of
from qcgraph.facts import Compensation
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.models import load_model
from qcgraph.plan.schedulers import make_scheduler, make_step_plan
from qcgraph.plan.spec import ModelSpec, class_label
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe
from qcgraph.sampling.denoiser import Denoiser
from qcgraph.sampling.loop import sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array
from qcgraph.schedulers import FittedScheduler

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
NAME = "DiT-XL-2-256"  # as the README calls it
STEPS, GUIDANCE, LABELS, SEED = 50, 4.0, [207, 360], 3
ROUNDING = 1e-5  # of both loops, relative: NumPy updates latents there, diffusers here
Run = Callable[[str, Program], Program]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it: 1000 classes, two blocks of 16 tokens, and an autoencoder of a block."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer: Any = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.06)
        autoencoder: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    place = tmp_path_factory.mktemp("pipeline") / NAME
    pipe: Any = DiTPipeline(transformer.eval(), autoencoder.eval(), scheduler)
    pipe.save_pretrained(place)
    return place


@pytest.fixture
def pipe(folder: Path) -> Any:
    from diffusers import DiTPipeline

    loaded: Any = DiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    """The transformer as captured, with a plan of nine steps."""
    model = load_model(str(folder))
    captured = capture(model.module, model.spec, model.input_names)
    return captured.with_facts(
        make_step_plan("ddim", 9, GUIDANCE, model.spec.noise_schedule, captured.constants_digest)
    )


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With all that the graphs may hold: quantization, cache, compensation, and a modulation of its own."""
    recipe = Recipe().override(
        steps=STEPS, guidance=GUIDANCE, groups=1, cache="interval=3", compensate="vc", hoist_adaln=True
    )
    calibration = recipe.calibration.model_copy(update={"trajectories": 2, "selection": "random"})  # it is quicker
    quantization = recipe.quantization.model_copy(update={"scales": "range", "rounding": "nearest"})
    recipe = recipe.model_copy(update={"calibration": calibration, "quantization": quantization})
    return qcgraph.compile(str(folder), recipe, output=tmp_path_factory.mktemp("bundle") / "dit")


def denoiser_of(program: Program) -> Denoiser:
    return Denoiser(TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec])


@contextmanager
def initial_noise(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """The pipeline starts from the noise of qcgraph's sampling; it takes no latents from outside."""
    drawn = torch.from_numpy(Noise(SEED, range(len(LABELS)), (4, 8, 8)).initial()).to(dtype)
    with patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: drawn):
        yield


def draw(pipe: Any, steps: int, guidance: float = GUIDANCE) -> tuple[Array, Array]:
    """The latents that the pipeline decodes, and its images [B,H,W,3] in 0 .. 1."""
    decode = pipe.vae.decode
    with initial_noise(), patch.object(pipe.vae, "decode", side_effect=decode) as decoded:
        result = pipe(class_labels=LABELS, num_inference_steps=steps, guidance_scale=guidance, output_type="np")
    latents: torch.Tensor = decoded.call_args.args[0] * pipe.vae.config.scaling_factor
    return latents.numpy(), result.images


def distance(one: Array, other: Array) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def interrupted_after(denoiser: Denoiser, calls: int) -> Any:
    """The denoiser, for a pipeline that is stopped after some calls."""

    class Stopping:
        config, dtype, taken = denoiser.config, denoiser.dtype, 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.taken == calls:
                raise KeyboardInterrupt
            self.taken += 1
            return denoiser(*args, **kwargs)

    return Stopping()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_the_pipeline_draws_what_qcgraph_draws(pipe: Any, bundle: Bundle, backend: str) -> None:
    """With quantization, cache, compensation and hoisted modulation; images are near those of full precision."""
    assert set(bundle.plan.preparing) == {"full", "reuse"}
    latents, images = draw(pipe, STEPS)
    pipe.transformer = qcgraph.load(bundle.path, backend=backend, threads=1)
    compiled_latents, compiled_images = draw(pipe, STEPS)
    own = sample(runner_of(bundle, backend, 1), bundle.plan, bundle.spec, LABELS, SEED)
    assert distance(compiled_latents, own) < ROUNDING
    assert ROUNDING < distance(compiled_latents, latents) < 0.02
    assert np.abs(compiled_images - images).max() < 0.02


@pytest.mark.slow
def test_every_call_of_the_pipeline_is_a_trajectory_of_its_own(pipe: Any, bundle: Bundle) -> None:
    denoiser = pipe.transformer = qcgraph.load(bundle.path, threads=1)
    expected, _ = draw(pipe, STEPS)
    assert np.array_equal(draw(pipe, STEPS)[0], expected)
    pipe.transformer = interrupted_after(denoiser, 20)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, STEPS)
    pipe.transformer = denoiser
    assert np.array_equal(draw(pipe, STEPS)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/diffusers.md"])
def test_the_example_of_a_page_runs(
    page: str, folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / NAME)
    shutil.copytree(bundle.path, tmp_path / "out" / "dit")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (example,) = (text for text in examples if "DiTPipeline" in text)
    assert f"qcgraph compile {NAME} -o out/dit --recipe balanced --steps {STEPS} --guidance 4\n" in README
    names: dict[str, Any] = {}
    exec(compile(example, page, "exec"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("passes", "variants"),
    [
        ("plan-cache{interval=1},insert-cache", ("main",)),
        (
            "plan-cache{interval=3},insert-cache,calibrate{trajectories=2},insert-forecast,fit-forecast",
            ("full", "reuse"),
        ),
        (
            "plan-cache{interval=2 blocks=all+guidance},insert-cache,apply-plan{plan=888-111:FCRFRCFCR}",
            ("full", "conditional", "reuse"),
        ),
    ],
    ids=["exact", "forecast", "guidance-difference"],
)
def test_programs_of_every_kind(pipe: Any, program: Program, run: Run, passes: str, variants: tuple[str, ...]) -> None:
    compiled = run(passes, program)
    plan = compiled.facts[StepPlan]
    assert set(plan.variants) == set(variants)
    latents, _ = draw(pipe, 9)
    pipe.transformer = denoiser_of(compiled)
    drawn, _ = draw(pipe, 9)
    own = sample(TorchRunner(compiled), plan, compiled.facts[ModelSpec], LABELS, SEED)
    assert distance(drawn, own) < ROUNDING
    assert distance(drawn, latents) < (ROUNDING if variants == ("main",) else 0.02)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_every_scheduler(pipe: Any, program: Program, scheduler: str, guidance: float) -> None:
    """Noise comes from elsewhere in a pipeline, so DDPM draws other samples; it is accepted."""
    spec = program.facts[ModelSpec]
    plan = make_step_plan(scheduler, 9, guidance, spec.noise_schedule, "model")
    pipe.scheduler = make_scheduler(scheduler, spec.noise_schedule)
    pipe.transformer = denoiser_of(program.with_facts(plan))
    drawn, _ = draw(pipe, 9, guidance)
    if scheduler != "ddpm":
        assert distance(drawn, sample(TorchRunner(program), plan, spec, LABELS, SEED)) < ROUNDING


@pytest.mark.parametrize("of_plan", [False, True])
def test_compensation_of_a_multistep_solver(pipe: Any, program: Program, run: Run, of_plan: bool) -> None:
    """A pipeline keeps the corrected predictions for later updates, as qcgraph's own sampling does."""
    spec = program.facts[ModelSpec]
    plain = program.with_facts(make_step_plan("dpmsolver++", 9, GUIDANCE, spec.noise_schedule, "model"))
    gains = tuple((1 + 0.01 * (index % 3), 0.98, 1.02, 1.0) for index in range(9))
    means = ((0.1, -0.1, 0.2, 0.3),) * 9
    compiled = run("insert-compensation", plain.with_facts(Compensation(gains, means, 0, 0.0)))
    plan = compiled.facts[StepPlan]
    assert sum(len(step.update.history) for step in plan.steps) > 5
    pipe.transformer = denoiser_of(compiled)
    pipe.scheduler = make_scheduler("dpmsolver++", spec.noise_schedule)
    if of_plan:
        pipe.scheduler = FittedScheduler.of_plan(plan, spec.noise_schedule)
    drawn, _ = draw(pipe, 9)
    assert distance(drawn, sample(TorchRunner(compiled), plan, spec, LABELS, SEED)) < ROUNDING
    assert distance(drawn, sample(TorchRunner(plain), plan, spec, LABELS, SEED)) > 0.01


def fitted_plan(spec: ModelSpec) -> StepPlan:
    """Five steps of a run of twenty: of DDIM from each to the next, with predictions as Adams and Bashforth weigh them.

    Two made-up terms of the latents are added, which all but cancel.
    """
    timesteps = [950, 800, 550, 300, 100]
    cumulative = make_scheduler("ddim", spec.noise_schedule).alphas_cumprod.double()
    alphas = [*(cumulative[timestep].item() for timestep in timesteps), 1.0]
    steps = []
    for index, (now, after) in enumerate(pairwise(alphas)):
        latent = (after / now) ** 0.5
        prediction = (1 - after) ** 0.5 - latent * (1 - now) ** 0.5
        update = Update(latent, prediction)
        if index:
            update = Update(latent + 0.01, 1.5 * prediction, history=(Earlier(-0.01, -0.5 * prediction),))
        steps.append(Step(float(timesteps[index]), update))
    return StepPlan(Fingerprint("model", "ddim", 20, GUIDANCE), tuple(steps))


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpmsolver++", "fitted"])
def test_the_scheduler_of_a_plan_draws_what_qcgraph_draws(pipe: Any, program: Program, kind: str) -> None:
    spec = program.facts[ModelSpec]
    plan = fitted_plan(spec) if kind == "fitted" else make_step_plan(kind, 9, GUIDANCE, spec.noise_schedule, "model")
    pipe.scheduler = FittedScheduler.of_plan(plan, spec.noise_schedule)
    pipe.transformer = denoiser_of(program.with_facts(plan))
    drawn, images = draw(pipe, plan.fingerprint.steps)
    if kind != "ddpm":  # noise comes from elsewhere in a pipeline
        own = sample(TorchRunner(program), plan, spec, LABELS, SEED)
        assert distance(drawn, own) < ROUNDING
        decoded = pipe.vae.decode(torch.from_numpy(own) / pipe.vae.config.scaling_factor).sample.detach()
        own_images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(images, own_images, atol=ROUNDING)
        assert np.array_equal(draw(pipe, len(plan))[0], drawn)


def test_the_updates_of_a_fitted_plan_are_checked(pipe: Any, program: Program) -> None:
    spec = program.facts[ModelSpec]
    plan = fitted_plan(spec)
    pipe.transformer = denoiser_of(program.with_facts(plan))
    pipe.scheduler = FittedScheduler.of_plan(plan, spec.noise_schedule)
    with pytest.raises(BundleError, match="10 steps were asked for; this scheduler has 5 steps of a run of 20"):
        draw(pipe, 10)
    plain = replace(plan, steps=tuple(replace(step, update=replace(step.update, history=())) for step in plan.steps))
    pipe.scheduler = FittedScheduler.of_plan(plain, spec.noise_schedule)
    with pytest.raises(BundleError, match=r"the latent that came after timestep 800 is \S+ off") as caught:
        draw(pipe, 5)
    assert "FittedScheduler" in str(caught.value.hint)


def test_the_scheduler_of_a_plan_is_saved_with_its_pipeline(pipe: Any, program: Program, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    spec = program.facts[ModelSpec]
    plan = fitted_plan(spec)
    pipe.transformer = denoiser_of(program.with_facts(plan))
    pipe.scheduler = FittedScheduler.of_plan(plan, spec.noise_schedule)
    expected, _ = draw(pipe, 20)
    pipe.save_pretrained(tmp_path)
    loaded: Any = DiTPipeline.from_pretrained(tmp_path, transformer=pipe.transformer)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, FittedScheduler)
    assert np.array_equal(draw(loaded, 20)[0], expected)


def test_what_a_pipeline_does_with_its_parts(pipe: Any, program: Program, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    denoiser = pipe.transformer = denoiser_of(program)
    assert pipe.components["transformer"] is denoiser
    assert pipe.to("cpu").transformer is denoiser
    assert '"Denoiser"' in repr(pipe)
    again: Any = DiTPipeline(denoiser, pipe.vae, pipe.scheduler)  # type: ignore[arg-type]
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again, 9)[0], draw(pipe, 9)[0])
    pipe.save_pretrained(tmp_path)  # without it: a bundle is saved already
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "vae"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_plan", [False, True])
def test_a_pipeline_in_half_precision(pipe: Any, program: Program, dtype: torch.dtype, of_plan: bool) -> None:
    exact, _ = draw(pipe, 9)
    if of_plan:
        pipe.scheduler = FittedScheduler.of_plan(program.facts[StepPlan], program.facts[ModelSpec].noise_schedule)
    half = pipe.transformer = denoiser_of(program).to(dtype)
    pipe.vae = pipe.vae.to(dtype)
    with initial_noise(dtype), patch.object(pipe.vae, "decode", side_effect=pipe.vae.decode) as decoded:
        pipe(class_labels=LABELS, num_inference_steps=9, guidance_scale=GUIDANCE, output_type="np")
        latents = decoded.call_args.args[0] * pipe.vae.config.scaling_factor
        assert latents.dtype == dtype
        assert distance(latents.float().numpy(), exact) < 0.1
        pipe.transformer = half.request()
        with pytest.raises(BundleError, match="were sampled with guidance"):
            pipe(class_labels=LABELS, num_inference_steps=9, guidance_scale=30.0, output_type="np")


@pytest.mark.parametrize(
    ("steps", "guidance", "said"),
    [
        (
            20,
            GUIDANCE,
            r"timestep 950 is not in the plan \(ddim, 9 steps, guidance 4\), which visits 888, 777, 666 \.\.",
        ),
        (10, GUIDANCE, "timestep 900 is not in the plan"),
        (9, 1.5, r"compiled for ddim, 9 steps, guidance 4; the latents that came were sampled with guidance 1\.5"),
        (9, 1.0, "compiled for ddim, 9 steps, guidance 4; the latents that came were sampled without guidance"),
    ],
)
def test_other_settings_are_refused(pipe: Any, program: Program, steps: int, guidance: float, said: str) -> None:
    pipe.transformer = denoiser_of(program)
    with pytest.raises(BundleError, match=said) as caught:
        draw(pipe, steps, guidance)
    assert caught.value.hint
    draw(pipe, 9)


def test_fewer_steps_that_are_all_in_the_plan_are_refused(pipe: Any, program: Program) -> None:
    spec = program.facts[ModelSpec]
    pipe.transformer = denoiser_of(
        program.with_facts(make_step_plan("ddim", 20, GUIDANCE, spec.noise_schedule, "model"))
    )
    with pytest.raises(BundleError, match="timestep 900 is out of order; timestep 950 comes next") as caught:
        draw(pipe, 10)
    assert "ddim, 20 steps, guidance 4" in str(caught.value.hint)


def test_guidance_where_none_was_planned_is_refused(pipe: Any, program: Program) -> None:
    plan = program.facts[StepPlan]
    plain = replace(plan, fingerprint=replace(plan.fingerprint, guidance=1.0))
    pipe.transformer = denoiser_of(program.with_facts(plain))
    with pytest.raises(BundleError, match=r"guidance 1, which is no guidance; this batch of 4 holds both halves"):
        draw(pipe, 9)
    draw(pipe, 9, guidance=1.0)


def test_no_guidance_where_one_half_is_restored_is_refused(pipe: Any, program: Program, run: Run) -> None:
    pipe.transformer = denoiser_of(run("plan-cache{interval=2 blocks=guidance},insert-cache", program))
    with pytest.raises(UsageError, match="the second half of this batch is not unconditional"):
        draw(pipe, 9, guidance=1.0)


@pytest.mark.parametrize(
    "settings", [{"clip_sample": True, "clip_sample_range": 0.5}, {"beta_end": 0.03}, {"prediction_type": "sample"}]
)
def test_another_scheduler_at_the_same_timesteps_is_refused(
    pipe: Any, program: Program, settings: dict[str, Any]
) -> None:
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    pipe.transformer = denoiser_of(program)
    with pytest.raises(BundleError, match=r"the latent that came after timestep 888 is \S+ off") as caught:
        draw(pipe, 9)
    assert "make_scheduler" in str(caught.value.hint)
    pipe.transformer = Denoiser(
        TorchRunner(program), program.facts[StepPlan], program.facts[ModelSpec], own_updates=True
    )
    draw(pipe, 9)


def test_a_scheduler_that_adds_no_noise_is_refused_where_some_was_planned(pipe: Any, program: Program) -> None:
    spec = program.facts[ModelSpec]
    pipe.transformer = denoiser_of(
        program.with_facts(make_step_plan("ddpm", 9, GUIDANCE, spec.noise_schedule, "model"))
    )
    with pytest.raises(BundleError, match=r"compiled for ddpm, 9 steps, guidance 4; the latent that came .* off"):
        draw(pipe, 9)


def test_a_class_out_of_range_is_refused(pipe: Any, program: Program) -> None:
    pipe.transformer = denoiser_of(program)
    with pytest.raises(UsageError, match="class_labels: 1001 is out of range"):
        pipe(class_labels=[1001], num_inference_steps=9, guidance_scale=GUIDANCE)


def test_a_model_of_few_classes_is_refused(pipe: Any, program: Program) -> None:
    """The pipeline's unconditional class is 1000, whatever the model."""
    few = replace(program.facts[ModelSpec], conditions=(class_label(500),))
    pipe.transformer = denoiser_of(program.with_facts(few))
    with pytest.raises(UsageError, match="class_labels: 1000 is out of range") as caught:
        draw(pipe, 9)
    assert "DiTPipeline gives 1000 for that half" in str(caught.value.hint)
