"""Read the ``scheduler_config.json`` of a diffusers folder: every setting is followed, noted, or refused by name.

A setting describes either the training of the model or the choice of steps. A training setting enters the noise
schedule, or the model is refused. A setting for steps is kept for the scheduler that it belongs to if a step plan can
represent it; otherwise a note names it.
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
from qcgraph.plan.fitted import SCHEDULER_CLASS
from qcgraph.plan.spec import FLOW, FolderSampler, NoiseSchedule

CONFIG_FILE = "scheduler_config.json"
INDEX_FILE = "model_index.json"  # the index of a pipeline folder; it names the class of each part

# Classes with linear updates -> the qcgraph scheduler that follows them. The parallel mode of two of them is ignored.
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
# Classes that sample the same processes, with updates that a step plan cannot represent -> the reason.
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
# Classes whose models follow another process -> the reason.
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
    SCHEDULER_CLASS: "it holds the updates of a bundle, and not the noise schedule of the model",
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
_TRAINED: dict[str, Any] = {  # settings that describe the training of the model, with their types
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
# Settings that are refused on a class that does not have them, except at the value listed here, which has no effect.
# Betas are not listed: the classes without betas are those of flows, which have none.
_SPEAKING: dict[str, Any] = {
    "prediction_type": FLOW,  # the value for classes of flows
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "flow_shift": 1,
    "shift": 1,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    # settings of older releases of diffusers, or of classes of other processes
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
_UNBOUNDED = ("lambda_min_clipped",)  # may be minus infinity, which is the default
# Values that diffusers knows and no linear update can follow.
_UNPLANNED: dict[str, tuple[Any, ...]] = {
    "variance_type": ("learned", "learned_range", None),
    "algorithm_type": ("sde-dpmsolver++", "sde-dpmsolver"),
}
_SWITCHED: dict[str, Any] = {"clip_sample": bool, "thresholding": bool, "stochastic_sampling": bool}
_OWNED: dict[str, tuple[Any, str]] = {  # settings that have an effect only where another setting is true
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
    """Read the noise schedule and the step settings from a pipeline folder.

    Args:
        folder: the folder of the pipeline, which may have ``scheduler/scheduler_config.json``.

    Returns:
        The noise schedule, by default the original DiT's, and notes on settings that are not followed.

    Raises:
        UsageError: a setting has a wrong value, or belongs to a model of an unsupported process.
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
    """Refuse a folder whose scheduler file is missing, as after an interrupted download.

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
        config: the settings by name.
    """

    path: Path
    config: dict[str, Any]

    @property
    def class_name(self) -> str:
        """The class that the file names, if it is supported.

        Raises:
            UsageError: the file names no class, or the class of another process.
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
        """Refuse a pipeline whose index names another class than the file; diffusers would use the one of the index."""
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
        """Return the noise schedule and the notes; see `read_schedule`."""
        name = self.class_name
        defaults = self._defaults(name)
        notes = self._check_unknown(name, defaults)
        settings = {key: self.config.get(key, default) for key, default in defaults.items()}
        is_supported = name in _SUPPORTED
        for key, value in settings.items():
            if is_supported or key in _TRAINED:
                self._check_type(key, value)
        schedule = self._process(name, settings)
        changed = {
            key: value
            for key, value in settings.items()
            if key not in (*_TRAINED, *_SWITCHED)
            and not _same(value, defaults[key])
            and (key not in _OWNERS or settings.get(_OWNERS[key]))
        }
        changed |= {key: True for key in _SWITCHED if settings.get(key)}  # some classes have this default
        if not is_supported:
            return schedule, (*notes, self._note_others(name, changed, schedule))
        own = {key: value for key, value in changed.items() if self._is_planned(key, value)}
        notes += self._notes(name, own, {key: value for key, value in changed.items() if key not in own})
        sampler = FolderSampler(_SUPPORTED[name], tuple(own.items()))
        return replace(schedule, sampler=sampler), tuple(notes)

    @staticmethod
    def _is_planned(key: str, value: Any) -> bool:
        """Return whether a step plan can represent a setting, whatever the values of other settings."""
        return key in _SPACED and value not in _UNPLANNED.get(key, ())

    def _notes(self, name: str, own: dict[str, Any], unplanned: dict[str, Any]) -> list[str]:
        """Return notes on the settings for steps: those that are used, and those that no step plan can represent."""
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
        """Return the settings of a class of the installed diffusers, with their defaults."""
        import diffusers

        kind = getattr(diffusers, name, None)
        parameters = inspect.signature(kind.__init__).parameters if kind is not None else {}
        defaults = {key: value.default for key, value in parameters.items() if key not in ("self", "kwargs", "args")}
        if "num_train_timesteps" not in defaults:
            raise self._refusal(f"the installed diffusers {diffusers.__version__} has no {name}", "upgrade diffusers")
        return defaults

    def _check_unknown(self, name: str, defaults: dict[str, Any]) -> list[str]:
        """Return notes on settings that the class does not have and that diffusers ignores.

        Raises:
            UsageError: a setting, perhaps misspelt, would mean that the model is of another process.
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
            return  # a setting of a class that is not followed; it is noted with the class
        try:
            TypeAdapter(kind, config=_Any if key in _UNBOUNDED else _STRICT).validate_python(value)
        except ValidationError as error:
            raise self._refusal(
                f"{key} = {_short(value)} does not fit: {error.errors()[0]['msg']}", "save it with diffusers"
            ) from None

    def _process(self, name: str, settings: dict[str, Any]) -> NoiseSchedule:
        """Return the noise schedule that the model was trained with."""
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
        """Return the note on a class whose updates no step plan can represent."""
        instead = "flow-euler" if schedule.is_flow else "ddim"
        besides = f", nor its {_listed(changed)}" if changed else ""
        return (
            f"{self.path.name}: the folder samples with {name}, which is not followed{besides}: {_OTHERS[name]}; "
            f"{instead} is taken where no scheduler is asked for"
        )

    def _refusal(self, message: str, hint: str) -> UsageError:
        return UsageError(message, where=str(self.path), hint=hint)


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are the same; true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}.."
