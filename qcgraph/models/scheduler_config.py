"""Reads the ``scheduler_config.json`` of a diffusers folder: every setting is followed, noted, or refused by name.

A setting says either what the model was trained on, or which steps are taken. One of the first kind enters the noise
schedule, or the model is refused. One of the second kind is kept for the scheduler that it belongs to, where a step
plan can hold what it does; else a note names it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qcgraph.errors import UsageError, closest
from qcgraph.models.json_file import read_config, read_json
from qcgraph.plan.spec import FLOW, FolderSampler, NoiseSchedule

CONFIG_FILE = "scheduler_config.json"
INDEX_FILE = "model_index.json"  # of a pipeline folder; names the class of each part

# Classes whose updates are linear -> the scheduler that follows them. What is parallel in two of them is for training.
_SUPPORTED = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
}
_SCALES, _TWICE = "it scales the input of the denoiser", "it calls the denoiser twice for a step"
_UNSUPPORTED = "none of qcgraph's schedulers does the same"
# Classes that sample the same processes by updates that no step plan holds -> the reason.
_OTHERS = {
    "DEISMultistepScheduler": _UNSUPPORTED,
    "DPMSolverSinglestepScheduler": _UNSUPPORTED,
    "EulerAncestralDiscreteScheduler": _SCALES,
    "EulerDiscreteScheduler": _SCALES,
    "FlowMatchHeunDiscreteScheduler": _TWICE,
    "HeunDiscreteScheduler": _TWICE,
    "KDPM2AncestralDiscreteScheduler": _TWICE,
    "KDPM2DiscreteScheduler": _TWICE,
    "LMSDiscreteScheduler": _SCALES,
    "PNDMScheduler": _TWICE,
    "SASolverScheduler": _UNSUPPORTED,
    "UniPCMultistepScheduler": "its steps depend on all earlier ones",
}
_SIGMAS = "it is for models whose noise has its own scale of sigmas (EDM), not one of betas"
_DISTILLED = "it is for models that were distilled to a few steps, which an ordinary solver does not sample"
# Classes that say that the model is of another process -> the reason.
_FOREIGN = {
    "CMStochasticIterativeScheduler": _DISTILLED,
    "CogVideoXDDIMScheduler": "it shifts the signal-to-noise ratio of the betas (snr_shift_scale)",
    "CogVideoXDPMScheduler": "it shifts the signal-to-noise ratio of the betas (snr_shift_scale)",
    "CosineDPMSolverMultistepScheduler": _SIGMAS,
    "DDIMInverseScheduler": "it goes from images to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from images to noise",
    "DPMSolverSDEScheduler": "it needs torchsde, and draws noise along a Brownian path",
    "EDMDPMSolverMultistepScheduler": _SIGMAS,
    "EDMEulerScheduler": _SIGMAS,
    "FlowMapEulerDiscreteScheduler": _DISTILLED,
    "FlowMatchLCMScheduler": _DISTILLED,
    "IPNDMScheduler": "its timesteps are angles, not numbers of training steps",
    "KarrasVeScheduler": _SIGMAS,
    "LCMScheduler": _DISTILLED,
    "RePaintScheduler": "it fills in parts of a given image",
    "SCMScheduler": _DISTILLED,
    "ScoreSdeVeScheduler": _SIGMAS,
    "ScoreSdeVpScheduler": "its timesteps are continuous",
    "TCDScheduler": _DISTILLED,
    "UnCLIPScheduler": "it is for unCLIP's models alone",
}

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_Beta = Annotated[float, Field(gt=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]
_Any = ConfigDict(strict=True)
_TRAINED: dict[str, Any] = {  # settings that say what the model was trained on, with their types
    "num_train_timesteps": Annotated[int, Field(ge=1, le=100_000)],
    "beta_start": _Beta,
    "beta_end": _Beta,
    "beta_schedule": str,
    "trained_betas": list[float] | None,
    "prediction_type": str,
    "rescale_betas_zero_snr": bool,
    "timestep_type": str,
    "use_flow_sigmas": bool,
    "flow_shift": _Positive,
    "shift": _Positive,
    "use_dynamic_shifting": bool,
    "invert_sigmas": bool,
}
# Settings that must not come with a class that does not have them, but for the value at which they say nothing. Betas
# are not among them: the classes without betas are those of flows, which have none.
_SPEAKING: dict[str, Any] = {
    "prediction_type": FLOW,  # of classes for flows
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "flow_shift": 1,
    "shift": 1,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    # of older releases of diffusers, or of classes of other processes
    "predict_epsilon": True,
    "snr_shift_scale": 1,
    "sigma_data": None,
}
_SPACED: dict[str, Any] = {  # settings that choose the steps
    "timestep_spacing": Literal["leading", "trailing", "linspace"],
    "steps_offset": Annotated[int, Field(ge=0)],
    "set_alpha_to_one": bool,
    "variance_type": Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
    "solver_order": Annotated[int, Field(ge=1, le=3)],
    "algorithm_type": Literal["dpmsolver++", "dpmsolver", "deis"],
    "solver_type": Literal["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": bool,
    "euler_at_final": bool,
    "use_karras_sigmas": bool,
    "use_exponential_sigmas": bool,
    "use_beta_sigmas": bool,
    "use_lu_lambdas": bool,
    "final_sigmas_type": Literal["zero", "sigma_min"],
    "lambda_min_clipped": float,
    "shift_terminal": Annotated[float, Field(gt=0, lt=1)] | None,
}
_UNBOUNDED = ("lambda_min_clipped",)  # may be minus infinity, which it is by default
# Values of these that no linear update follows, but that diffusers knows.
_UNPLANNED: dict[str, tuple[Any, ...]] = {
    "variance_type": ("learned", "learned_range", None),
    "algorithm_type": ("sde-dpmsolver++", "sde-dpmsolver"),
}
_SWITCHED: dict[str, Any] = {"clip_sample": bool, "thresholding": bool, "stochastic_sampling": bool}
_OWNED: dict[str, tuple[Any, str]] = {  # settings that mean something only where another is true
    "clip_sample_range": (_Positive, "clip_sample"),
    "dynamic_thresholding_ratio": (Annotated[float, Field(ge=0, le=1)], "thresholding"),
    "sample_max_value": (_Positive, "thresholding"),
    "time_shift_type": (Literal["exponential", "linear"], "use_dynamic_shifting"),
    "base_shift": (float | None, "use_dynamic_shifting"),
    "max_shift": (float | None, "use_dynamic_shifting"),
    "base_image_seq_len": (Annotated[int, Field(ge=1)], "use_dynamic_shifting"),
    "max_image_seq_len": (Annotated[int, Field(ge=1)], "use_dynamic_shifting"),
}
_OWNERS = {key: owner for key, (_, owner) in _OWNED.items()}
_METADATA = ("_class_name", "_diffusers_version", "_use_default_values")


def read_schedule(folder: Path) -> tuple[NoiseSchedule, tuple[str, ...]]:
    """Read what a pipeline folder says of the process that its model was trained on, and of its steps.

    Args:
        folder: the folder of the pipeline, which may have ``scheduler/scheduler_config.json``.

    Returns:
        The noise schedule, the original DiT's where the folder states none, and notes on what is not followed.

    Raises:
        UsageError: a setting has a wrong value, or says that the model is of a process that is not supported.
    """
    path = folder / "scheduler" / CONFIG_FILE
    if not path.is_file():
        _check_absent(path, folder / INDEX_FILE)
        return NoiseSchedule(), (
            f"the folder has no scheduler/{CONFIG_FILE}: the noise schedule is taken to be that of the original DiT",
        )
    reader = _Reader(path, read_config(path))
    reader.check_index(folder / INDEX_FILE)
    return reader.read()


def _check_absent(path: Path, index: Path) -> None:
    """Refuse a folder that has a scheduler of which there is no file, as after a download that was interrupted.

    Raises:
        UsageError: the file is a link to nothing or no ordinary file, or the pipeline's index names a scheduler.
    """
    if os.path.lexists(path):
        raise UsageError("is not a file, or a link to none", where=str(path), hint="is the download complete?")
    entry = read_json(index).get("scheduler") if index.is_file() else None
    if entry and entry != [None, None]:
        raise UsageError(
            f"names a scheduler, and the folder has no scheduler/{CONFIG_FILE}, which says how the model was trained",
            where=str(index),
            hint="is the download complete? Without its scheduler the model cannot be sampled",
        )


@dataclass(frozen=True)
class _Reader:
    """The settings of one file.

    Attributes:
        path: the file.
        config: what it holds.
    """

    path: Path
    config: dict[str, Any]

    @property
    def class_name(self) -> str:
        """The class that the file names, one that can be read.

        Raises:
            UsageError: it names none, or one of another process.
        """
        name = self.config.get("_class_name")
        if not isinstance(name, str):
            raise self._refusal("names no _class_name", "save the scheduler with diffusers' save_pretrained")
        if name in _SUPPORTED or name in _OTHERS:
            return name
        readable = closest(name, [*_SUPPORTED, *_OTHERS])
        if name in _FOREIGN:
            raise self._refusal(f"{name} is not supported: {_FOREIGN[name]}", readable)
        raise self._refusal(f"{name} is not supported: it is not known what it is for", readable)

    def check_index(self, path: Path) -> None:
        """Refuse a pipeline whose index names another class than the file, which diffusers would take instead."""
        if not path.is_file():
            return
        entry = read_json(path).get("scheduler")
        named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if named is not None and named != self.class_name:
            raise self._refusal(
                f"is of {self.class_name}, but {path.name} says that the scheduler is {named}",
                "which of the two is right? Write it into both",
            )

    def read(self) -> tuple[NoiseSchedule, tuple[str, ...]]:
        """The noise schedule and the notes; see `read_schedule`."""
        name = self.class_name
        defaults = self._defaults(name)
        notes = self._check_unknown(name, defaults)
        settings = {key: self.config.get(key, default) for key, default in defaults.items()}
        is_followed = name in _SUPPORTED
        for key, value in settings.items():
            if is_followed or key in _TRAINED:
                self._check_type(key, value)
        schedule = self._process(name, settings)
        changed = {
            key: value
            for key, value in settings.items()
            if key not in (*_TRAINED, *_SWITCHED)
            and not _same(value, defaults[key])
            and (key not in _OWNERS or settings.get(_OWNERS[key]))
        }
        changed |= {key: True for key in _SWITCHED if settings.get(key)}  # which is the default of some
        if not is_followed:
            return schedule, (*notes, self._note_others(name, changed, schedule))
        own = {key: value for key, value in changed.items() if self._is_planned(key, value)}
        notes += self._notes(name, own, {key: value for key, value in changed.items() if key not in own})
        sampler = FolderSampler(_SUPPORTED[name], tuple(own.items()))
        return replace(schedule, sampler=sampler), tuple(notes)

    @staticmethod
    def _is_planned(key: str, value: Any) -> bool:
        """Whether a step plan can hold what a setting does, whatever the other ones are."""
        return key in _SPACED and value not in _UNPLANNED.get(key, ())

    def _notes(self, name: str, own: dict[str, Any], unplanned: dict[str, Any]) -> list[str]:
        """Notes on the settings that choose steps: those that are taken, and those that no step plan holds."""
        notes = []
        if own:
            notes.append(f"{self.path.name}: the scheduler {_SUPPORTED[name]} takes {_listed(own)} from it")
        if unplanned:
            notes.append(
                f"{self.path.name}: {_listed(unplanned)} of {name} is not followed, because a step plan holds updates "
                "that are linear; samples differ from the folder's own by that"
            )
        return notes

    def _defaults(self, name: str) -> dict[str, Any]:
        """The settings of a class of the installed diffusers, with what they are where the file says nothing."""
        import diffusers

        kind = getattr(diffusers, name, None)
        parameters = inspect.signature(kind.__init__).parameters if kind is not None else {}
        defaults = {key: value.default for key, value in parameters.items() if key not in ("self", "kwargs", "args")}
        if "num_train_timesteps" not in defaults:
            raise self._refusal(f"the installed diffusers {diffusers.__version__} has no {name}", "upgrade diffusers")
        return defaults

    def _check_unknown(self, name: str, defaults: dict[str, Any]) -> list[str]:
        """Notes on settings that the class does not have, which diffusers ignores.

        Raises:
            UsageError: one of them would say that the model is of another process, or is a misspelt one that would.
        """
        import diffusers

        unknown = [key for key in self.config if key not in defaults and key not in _METADATA]
        for key in unknown:
            if key in _SPEAKING and not _same(self.config[key], _SPEAKING[key]):
                raise self._refusal(
                    f"{key} = {_short(self.config[key])} is no setting of {name}, and says what it was trained on",
                    "take it out if it means nothing, or name the class that it belongs to",
                )
            near = difflib.get_close_matches(key, _TRAINED, n=1, cutoff=0.85)
            if near and key not in _TRAINED:
                raise self._refusal(f"unknown setting {key!r} of {name}", f"did you mean {near[0]!r}?")
        if not unknown:
            return []
        release = f"diffusers {diffusers.__version__}"
        return [
            f"{self.path.name}: {', '.join(unknown)} is no setting of {name} in {release}, which ignores it as well"
        ]

    def _check_type(self, key: str, value: Any) -> None:
        """Refuse a value of a wrong type or out of range."""
        if key in _UNPLANNED and value in _UNPLANNED[key]:
            return
        owned = _OWNED.get(key)
        kind = owned[0] if owned else ({**_TRAINED, **_SPACED, **_SWITCHED}).get(key)
        if kind is None:
            return  # of a class that is not followed; noted with it
        try:
            TypeAdapter(kind, config=_Any if key in _UNBOUNDED else _STRICT).validate_python(value)
        except ValidationError as error:
            raise self._refusal(
                f"{key} = {_short(value)} does not fit: {error.errors()[0]['msg']}", "save it with diffusers"
            ) from None

    def _process(self, name: str, settings: dict[str, Any]) -> NoiseSchedule:
        """What the model was trained on."""
        if settings.get("trained_betas") is not None:
            raise self._refusal("trained_betas are not supported", "use a schedule that has a name")
        if settings.get("use_dynamic_shifting"):
            raise self._refusal(
                "use_dynamic_shifting is not supported: the steps would depend on the size of the image",
                "set use_dynamic_shifting to false, and shift to what it comes to at the size of the model",
            )
        if settings.get("invert_sigmas"):
            raise self._refusal("invert_sigmas is not supported: time runs backwards", "invert_sigmas must be false")
        if settings.get("timestep_type", "discrete") != "discrete":
            raise self._refusal(
                f"timestep_type = {settings['timestep_type']!r} is not supported: {_SIGMAS}", "it must be 'discrete'"
            )
        steps = settings["num_train_timesteps"]
        prediction = settings.get("prediction_type", FLOW)
        if name.startswith("FlowMatch"):
            return NoiseSchedule(steps, prediction=FLOW, shift=float(settings["shift"]))
        if settings.get("use_flow_sigmas", False) != (prediction == FLOW):
            raise self._refusal(
                f"prediction_type = {prediction!r} and use_flow_sigmas = "
                f"{str(settings.get('use_flow_sigmas', False)).lower()} contradict each other",
                f"a flow has prediction_type {FLOW!r} and use_flow_sigmas true, a diffusion neither",
            )
        if prediction == FLOW:
            return NoiseSchedule(steps, prediction=FLOW, shift=float(settings["flow_shift"]))
        return NoiseSchedule(
            steps,
            float(settings["beta_start"]),
            float(settings["beta_end"]),
            settings["beta_schedule"],
            prediction,
            settings.get("rescale_betas_zero_snr", False),
        )

    def _note_others(self, name: str, changed: dict[str, Any], schedule: NoiseSchedule) -> str:
        """The note on a class whose updates no step plan holds."""
        instead = "flow-euler" if schedule.is_flow else "ddim"
        besides = f", nor its {_listed(changed)}" if changed else ""
        return (
            f"{self.path.name}: the folder samples with {name}, which is not followed{besides}: {_OTHERS[name]}; "
            f"{instead} is taken where no scheduler is asked for"
        )

    def _refusal(self, message: str, hint: str) -> UsageError:
        return UsageError(message, where=str(self.path), hint=hint)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}.."
