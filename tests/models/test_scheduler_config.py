"""What a folder says of its scheduler is followed exactly, named in a note, or refused: nothing is ignored."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch

from qcgraph.errors import UsageError
from qcgraph.facts import decode, encode
from qcgraph.models import LoadedModel, load_model
from qcgraph.models.eager import EagerRunner
from qcgraph.models.json_file import read_config
from qcgraph.models.scheduler_config import _FOREIGN, _OTHERS, _SUPPORTED, read_schedule
from qcgraph.plan.schedulers import AUTO, make_scheduler, make_step_plan
from qcgraph.plan.spec import FolderSampler, ModelSpec, NoiseSchedule
from qcgraph.sampling.loop import sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.runner import Array

STEPS, GUIDANCE, SEED, LABELS = 8, 1.5, 3, (0, 4)
DIFFUSION = {"_class_name": "DDIMScheduler", "clip_sample": False}
DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}

FOLLOWED: dict[str, dict[str, Any]] = {
    "ddim": DIFFUSION,
    "ddim-trailing": DIFFUSION | {"timestep_spacing": "trailing"},
    "ddim-linspace": DIFFUSION | {"timestep_spacing": "linspace", "beta_schedule": "scaled_linear"},
    "ddim-offset": DIFFUSION | {"steps_offset": 1, "set_alpha_to_one": False},
    "ddim-other-betas": DIFFUSION | {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"},
    "ddim-fewer-timesteps": DIFFUSION | {"num_train_timesteps": 400, "beta_schedule": "squaredcos_cap_v2"},
    "ddim-zero-snr": DIFFUSION | ZERO_SNR | {"timestep_spacing": "trailing"},
    "ddim-zero-snr-from-below": DIFFUSION | {"rescale_betas_zero_snr": True},
    "ddim-parallel": DIFFUSION | {"_class_name": "DDIMParallelScheduler", "timestep_spacing": "trailing"},
    "ddpm": DDPM,
    "ddpm-large": DDPM | {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
    "ddpm-zero-snr": DDPM | ZERO_SNR | {"timestep_spacing": "linspace"},
    "dpm": DPM,
    "dpm-karras": DPM | {"use_karras_sigmas": True},
    "dpm-lu": DPM | {"use_lu_lambdas": True},
    "dpm-third-order": DPM | {"solver_order": 3, "euler_at_final": True, "timestep_spacing": "trailing"},
    "dpm-first-version": DPM | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "dpm-heun": DPM | {"solver_type": "heun", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "dpm-clipped": DPM | {"lambda_min_clipped": -3.1, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 0},
    "flow": FLOW,
    "flow-shifted": FLOW | {"shift": 3.0, "shift_terminal": 0.1},
    "flow-exponential": FLOW | {"use_exponential_sigmas": True},
    "flow-dpm": DPM | {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0},
}


@pytest.fixture(scope="module")
def transformer() -> Any:
    """A random DiT of one block, whose weights are large enough to be seen."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = diffusers.DiTTransformer2DModel(**sizes, in_channels=2, out_channels=4, num_embeds_ada_norm=5)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
    return model.eval().requires_grad_(False)


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[[object], Path]:
    """Writes the scheduler of a pipeline folder."""

    def write(config: object) -> Path:
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def own_trajectory(folder: Path, transformer: Any, spec: ModelSpec) -> Array:
    """What the folder's own scheduler makes of the transformer, in the loop of diffusers' DiTPipeline."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler: Any = getattr(diffusers, config["_class_name"]).from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    noise = Noise(SEED, range(len(LABELS)), spec.latent_shape)
    latent = torch.from_numpy(noise.initial()).to(transformer.dtype)
    classes = torch.tensor([*LABELS, *[spec.conditions[0].null] * len(LABELS)])
    module = type(scheduler).__module__
    drawn = patch(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise.next()).to(transformer.dtype))
    for timestep in scheduler.timesteps:
        both = torch.cat([latent, latent])
        output = transformer(both, timestep=timestep.repeat(len(both)), class_labels=classes).sample[:, :2]
        conditional, unconditional = output.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        if module.endswith("ddpm"):  # qcgraph draws its noise from generators of its own
            with drawn:
                latent = scheduler.step(guided, timestep, latent).prev_sample
        else:
            latent = scheduler.step(guided, timestep, latent).prev_sample
    return latent.numpy()


@pytest.mark.parametrize("name", FOLLOWED)
def test_samples_are_those_of_the_folders_own_scheduler(
    name: str, transformer: Any, folder_with: Callable[[object], Path]
) -> None:
    folder = folder_with(FOLLOWED[name])
    schedule, notes = read_schedule(folder)
    assert not any("not followed" in note for note in notes)
    spec = ModelSpec.class_conditional("tiny", (2, 4, 4), 5, 5, 4, schedule)

    class Model(torch.nn.Module):
        def forward(self, x: Any, t: Any, y: Any) -> Any:
            return transformer(x, timestep=t, class_labels=y).sample

    plan = make_step_plan(AUTO, STEPS, GUIDANCE, schedule, "model")
    drawn = sample(EagerRunner(LoadedModel(Model(), spec, ("x", "t", "y"))), plan, spec, LABELS, SEED)
    expected = own_trajectory(folder, transformer, spec)
    assert np.linalg.norm(drawn - expected) < 1e-5 * np.linalg.norm(expected)
    # What a bundle holds of the schedule makes that scheduler again.
    stored = decode(NoiseSchedule, json.loads(json.dumps(encode(schedule))))
    assert stored == schedule
    again = make_scheduler(plan.fingerprint.scheduler, stored)
    again.set_timesteps(STEPS)
    assert tuple(float(timestep) for timestep in again.timesteps) == plan.timesteps


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (DIFFUSION | {"clip_sample": True}, "clip_sample = true of DDIMScheduler is not followed"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample = true"),  # which is diffusers' default
        (DIFFUSION | {"thresholding": True}, "thresholding = true"),
        (DIFFUSION | {"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample_range = 2.0"),
        (DDPM | {"variance_type": "learned_range"}, 'variance_type = "learned_range" of DDPMScheduler is not followed'),
        (DPM | {"algorithm_type": "sde-dpmsolver++"}, 'algorithm_type = "sde-dpmsolver++"'),
        (FLOW | {"stochastic_sampling": True}, "stochastic_sampling = true"),
        (
            DIFFUSION | {"timestep_spacing": "trailing"},
            'the scheduler ddim takes timestep_spacing = "trailing" from it',
        ),
        (DIFFUSION | {"skip_prk_steps": True, "my_note": 1}, "skip_prk_steps, my_note is no setting of DDIMScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = true"),
        ({"_class_name": "PNDMScheduler", "steps_offset": 1}, "nor its steps_offset = 1: it calls the denoiser twice"),
        ({"_class_name": "UniPCMultistepScheduler"}, "its steps depend on all earlier ones; ddim is taken"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "flow-euler is taken where no scheduler is asked for"),
    ],
)
def test_what_chooses_steps_and_is_not_followed_is_noted(
    config: dict[str, Any], note: str, folder_with: Callable[[object], Path]
) -> None:
    schedule, notes = read_schedule(folder_with(config))
    assert note in " ".join(notes)
    make_step_plan(AUTO, 10, 1.5, schedule, "model")


def test_the_betas_of_another_class_are_its_defaults(folder_with: Callable[[object], Path]) -> None:
    schedule, _ = read_schedule(folder_with({"_class_name": "HeunDiscreteScheduler"}))
    assert (schedule.beta_start, schedule.beta_end, schedule.sampler) == (0.00085, 0.012, None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"_class_name": "EDMDPMSolverMultistepScheduler"},
            "EDMDPMSolverMultistepScheduler is not supported: it is for",
        ),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler is not supported: it is for models that were distilled"),
        ({"_class_name": "FittedScheduler"}, "FittedScheduler is not supported: it holds the updates of a bundle"),
        ({"_class_name": "DDIMSchedular"}, "DDIMSchedular is not supported: it is not known"),
        ({"_class_name": None}, "names no _class_name"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, "is no setting of PNDMScheduler, and says"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = true is no setting of DDIMScheduler"),
        ({"predict_epsilon": False}, "predict_epsilon = false is no setting of DDIMScheduler"),
        (DPM | {"use_flow_sigmas": True}, "contradict each other"),
        (DPM | {"prediction_type": "flow_prediction"}, "contradict each other"),
        (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting is not supported"),
        (FLOW | {"invert_sigmas": True}, "invert_sigmas is not supported"),
        (FLOW | {"prediction_type": "epsilon"}, 'prediction_type = "epsilon" is no setting of FlowMatch'),
        (FLOW | {"shift": 0}, "shift = 0 does not fit"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are not supported"),
        ({"beta_strat": 0.1}, "unknown setting 'beta_strat' of DDIMScheduler"),
        ({"beta_start": None}, "beta_start = null does not fit"),
        ({"beta_start": -0.1}, "beta_start = -0.1 does not fit"),
        ({"beta_end": float("nan")}, "beta_end = NaN does not fit"),
        ({"num_train_timesteps": "1000"}, 'num_train_timesteps = "1000" does not fit'),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps = 1000.0 does not fit"),
        ({"num_train_timesteps": True}, "num_train_timesteps = true does not fit"),
        ({"num_train_timesteps": 10**400}, "more than 64 bits"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0 does not fit"),
        ({"rescale_betas_zero_snr": "yes"}, 'rescale_betas_zero_snr = "yes" does not fit'),
        ({"timestep_spacing": "behind"}, 'timestep_spacing = "behind" does not fit'),
        ({"steps_offset": -1}, "steps_offset = -1 does not fit"),
        ({"clip_sample": None}, "clip_sample = null does not fit"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one = 1 does not fit"),
        ({"prediction_type": 5}, "prediction_type = 5 does not fit"),
        (DPM | {"solver_order": 4}, "solver_order = 4 does not fit"),
    ],
)
def test_what_says_that_the_model_is_of_another_process_is_refused(
    change: dict[str, Any], complaint: str, folder_with: Callable[[object], Path]
) -> None:
    with pytest.raises(UsageError) as refusal:
        read_schedule(folder_with(DIFFUSION | change))
    assert complaint in refusal.value.message
    assert refusal.value.hint
    assert "scheduler_config.json" in str(refusal.value.where)


def test_every_scheduler_of_diffusers_is_known() -> None:
    """A new release may bring more: an unknown class is refused, so that this only asks for a better reason."""
    other = {  # not of latents of images, or of models without a class
        *("AmusedScheduler", "BlockRefinementScheduler", "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler"),
        *("EntropyBoundScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LTXEulerAncestralRFScheduler"),
        *("MiniMaxH3Scheduler", "PiflowScheduler", "RFD4ProteinaScheduler", "VQDiffusionScheduler"),
    }
    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert {*_SUPPORTED, *_OTHERS} <= names
    if diffusers.__version__ == "0.42.1":
        assert names <= {*_SUPPORTED, *_OTHERS, *_FOREIGN, *other}


def test_the_index_of_a_pipeline_names_the_same_class(folder_with: Callable[[object], Path]) -> None:
    folder = folder_with(DIFFUSION)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "DDIMScheduler"]}))
    read_schedule(folder)
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "PNDMScheduler"]}))
    with pytest.raises(UsageError, match=r"is of DDIMScheduler, but model_index\.json says .* PNDMScheduler"):
        read_schedule(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "not a configuration: expected a JSON object"),
        ('{"beta_start": 1, "beta_start": 2}', "says 'beta_start' twice"),
        ("[" * 100_000, "is nested more than"),
        ("\udcff", "is not UTF-8 text, at byte 0"),
    ],
)
def test_what_is_not_a_configuration(text: str, complaint: str, folder_with: Callable[[object], Path]) -> None:
    folder = folder_with({})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match=complaint):
        read_schedule(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_a_pipe_is_not_waited_for(folder_with: Callable[[object], Path]) -> None:
    path = folder_with({}) / "scheduler" / "scheduler_config.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is a pipe or a device, not a file"):
        read_config(path)


def test_a_folder_without_a_scheduler_is_noted(tmp_path: Path) -> None:
    schedule, (note,) = read_schedule(tmp_path)
    assert schedule == NoiseSchedule()
    assert "no scheduler/scheduler_config.json" in note


def test_settings_belong_to_the_scheduler_of_the_folder() -> None:
    """Another scheduler that is asked for does not take them, but for what the model was trained on."""
    sampler = FolderSampler("ddim", (("timestep_spacing", "trailing"),))
    schedule = NoiseSchedule(rescale_zero_snr=True, prediction="v_prediction", sampler=sampler)
    assert make_scheduler("ddim", schedule).config.timestep_spacing == "trailing"
    other = make_scheduler("ddpm", schedule)
    assert other.config.timestep_spacing == "leading"
    assert other.config.rescale_betas_zero_snr


def test_settings_come_with_the_model(transformer: Any, folder_with: Callable[[object], Path]) -> None:
    folder = folder_with(DIFFUSION | {"timestep_spacing": "trailing"})
    transformer.save_pretrained(folder / "transformer")
    model = load_model(str(folder))
    assert model.spec.noise_schedule.sampler == FolderSampler("ddim", (("timestep_spacing", "trailing"),))
    assert len(model.notes) == 1


def test_a_scheduler_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A download that was interrupted is not a folder that states no scheduler."""
    index = {"_class_name": "DiTPipeline", "scheduler": ["diffusers", "EDMDPMSolverMultistepScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"model_index\.json: names a scheduler, and the folder has no scheduler/"):
        read_schedule(tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").symlink_to("nothing")
    with pytest.raises(UsageError, match="is not a file, or a link to none"):
        read_schedule(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": [None, None]}))
    assert read_schedule(tmp_path)[0] == NoiseSchedule()


def test_settings_that_diffusers_does_not_use_are_not_used(folder_with: Callable[[object], Path]) -> None:
    folder = folder_with(DIFFUSION | {"beta_start": 0.001, "_use_default_values": ["beta_start"]})
    assert (
        read_schedule(folder)[0].beta_start
        == diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config["beta_start"]
    )
    with pytest.raises(UsageError, match="_use_default_values is no list of names"):
        read_schedule(folder_with(DIFFUSION | {"_use_default_values": 1}))
