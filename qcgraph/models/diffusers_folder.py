"""Reads class-conditional transformers that diffusers saved, with the noise schedule beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models.loaded import LoadedModel
from qcgraph.spec import FLOW, ModelSpec, NoiseSchedule

INPUT_NAMES = ("hidden_states", "timestep", "class_labels")


class DiffusersDenoiser(nn.Module):
    """Gives a diffusers transformer the signature of a denoiser: three tensors in, one out."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predicts the noise in ``hidden_states`` [B, C, H, W] at ``timestep`` [B] for ``class_labels`` [B]."""
        return self.transformer(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]


def is_diffusers_folder(folder: Path) -> bool:
    """Whether the folder, or a ``transformer`` in it, has the ``config.json`` that diffusers writes."""
    return any((place / "config.json").is_file() for place in (folder, folder / "transformer"))


def load_diffusers_folder(folder: Path) -> LoadedModel:
    """Loads a model folder, or the transformer of a pipeline folder; nothing is downloaded.

    Args:
        folder: has ``config.json``, or ``transformer/config.json`` and perhaps ``scheduler/scheduler_config.json``
            (see :func:`is_diffusers_folder`).

    Returns:
        The denoiser, in the float32 and evaluation mode that diffusers loads it in.

    Raises:
        UsageError: the model is of another kind, or its configuration or weights are damaged.
    """
    is_pipeline = (folder / "transformer" / "config.json").is_file()
    model_folder = folder / "transformer" if is_pipeline else folder
    config = _read_json(model_folder / "config.json")
    _check_supported(config, model_folder)
    transformer = _load_transformer(model_folder)
    loaded = transformer.config  # with the defaults of whatever the file leaves out
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    spec = ModelSpec(
        name=folder.resolve().name,
        latent_shape=(loaded.in_channels, loaded.sample_size, loaded.sample_size),
        class_count=loaded.num_embeds_ada_norm,
        null_class=loaded.num_embeds_ada_norm,  # diffusers, too, puts the null class in the row after the last
        output_channels=loaded.out_channels or loaded.in_channels,
        schedule=_read_schedule(schedule_file) if schedule_file.is_file() else NoiseSchedule(),
    )
    return LoadedModel(DiffusersDenoiser(transformer), spec, INPUT_NAMES)


def _check_supported(config: dict[str, Any], folder: Path) -> None:
    """Refuses models that are not conditioned on a class label through adaLN."""
    kind = config.get("_class_name")
    if kind == "DiTTransformer2DModel":
        return
    # The released DiT folders were saved under this older name, which diffusers still maps to the newer class.
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return
    if kind is None:
        raise UsageError(
            "config.json names no _class_name, so it is not a diffusers model",
            where=str(folder),
            hint="save the model with diffusers' save_pretrained",
        )
    raise UsageError(
        f"{kind} is not supported: only class-conditional transformers are, and this one is conditioned differently",
        where=str(folder),
        hint="supported: DiTTransformer2DModel; for your own class-conditional model use package.module:factory",
    )


def _load_transformer(folder: Path) -> Any:
    """Loads the weights, and refuses what diffusers would only warn of: parameters left at random."""
    from diffusers import DiTTransformer2DModel

    try:
        transformer, report = DiTTransformer2DModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"diffusers cannot load the model: {error}", where=str(folder), hint="is the download complete?"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            f"{len(missing)} parameters are not in the weight file, the first is {missing[0]}",
            where=str(folder),
            hint="is the download complete?",
        )
    return transformer


def _read_schedule(path: Path) -> NoiseSchedule:
    """The training noise schedule that a scheduler configuration states."""
    config = _read_json(path)
    default = NoiseSchedule()
    if config.get("trained_betas") is not None:
        raise UsageError("trained_betas are not supported", where=str(path), hint="use a schedule that has a name")
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        if config.get("shift", 1.0) != 1.0 or config.get("use_dynamic_shifting"):
            raise UsageError("flows with shifted timesteps are not supported", where=str(path), hint="shift must be 1")
        return NoiseSchedule(config.get("num_train_timesteps", default.train_steps), prediction=FLOW)
    return NoiseSchedule(
        train_steps=config.get("num_train_timesteps", default.train_steps),
        beta_start=config.get("beta_start", default.beta_start),
        beta_end=config.get("beta_end", default.beta_end),
        beta_schedule=config.get("beta_schedule", default.beta_schedule),
        prediction=config.get("prediction_type", default.prediction),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"not JSON: {error}", where=str(path), hint="is the download complete?") from error
    if not isinstance(content, dict):
        raise UsageError("not a configuration: expected a JSON object", where=str(path), hint="save it with diffusers")
    return content
