"""Load class-conditional transformers that diffusers saved, with the noise schedule beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models.diffusers_weights import check_prefix, find_weights
from qcgraph.models.loaded import LoadedModel
from qcgraph.models.scheduler_config import CONFIG_FILE as SCHEDULER_FILE
from qcgraph.models.scheduler_config import read_schedule
from qcgraph.models.transformer_config import CONFIG_FILE, TransformerConfig, read_transformer_config
from qcgraph.plan.spec import ModelSpec, NoiseSchedule
from qcgraph.quiet import quiet

_HINT = "is the download complete, and are config.json and weights of the same model?"
INPUT_NAMES = ("hidden_states", "timestep", "class_labels")


class DiffusersDenoiser(nn.Module):
    """A diffusers transformer with the signature of a denoiser: three tensors in, one out."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the noise in ``hidden_states`` [B, C, H, W] at ``timestep`` [B] for ``class_labels`` [B]."""
        return self.transformer(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0]


def is_diffusers_folder(folder: Path) -> bool:
    """Return whether the folder, or a ``transformer`` in it, has the ``config.json`` that diffusers writes."""
    return any((place / "config.json").is_file() for place in (folder, folder / "transformer"))


def load_diffusers_folder(folder: Path) -> LoadedModel:
    """Load a model folder, or the transformer of a pipeline folder; nothing is downloaded.

    Args:
        folder: has ``config.json``, or ``transformer/config.json`` and perhaps ``scheduler/scheduler_config.json``
            (see :func:`is_diffusers_folder`).

    Returns:
        The denoiser, in the float32 and evaluation mode that diffusers loads it in.

    Raises:
        UsageError: the model is of another kind or process, its configuration or weights are damaged, or they do not
            match each other.
    """
    is_pipeline = (folder / "transformer" / CONFIG_FILE).is_file()
    model_folder = folder / "transformer" if is_pipeline else folder
    config, notes = read_transformer_config(model_folder)
    schedule, said = read_schedule(folder) if is_pipeline else _no_schedule(folder)
    transformer, found = _load_transformer(model_folder, config)
    spec = ModelSpec.class_conditional(
        name=folder.resolve().name,
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        class_count=config.num_embeds_ada_norm,
        null_class=config.num_embeds_ada_norm,  # like qcgraph, diffusers puts the null class in the row after the last
        output_channels=config.out_channels or config.in_channels,
        noise_schedule=schedule,
    )
    return LoadedModel(DiffusersDenoiser(transformer), spec, INPUT_NAMES, notes=(*notes, *said, *found))


def _no_schedule(folder: Path) -> tuple[NoiseSchedule, tuple[str, ...]]:
    """Return the original DiT's noise schedule, with a note, for a model folder that has no schedule of its own."""
    note = "a model folder states no noise schedule: it is taken to be that of the original DiT"
    if (folder.resolve().parent / "scheduler" / SCHEDULER_FILE).is_file():
        note += "; name the folder above it to have that of the pipeline"
    return NoiseSchedule(), (note,)


def _load_transformer(folder: Path, config: TransformerConfig) -> tuple[Any, tuple[str, ...]]:
    """Load the weights, and refuse names or shapes of another network, for which diffusers would only warn."""
    from diffusers import DiTTransformer2DModel

    files = find_weights(folder)
    check_prefix(files, folder)
    if config.num_layers > len(files.names):  # checked before any block is built
        raise UsageError(
            f"num_layers = {config.num_layers}, and the weights are {len(files.names)} tensors in all",
            where=str(folder / CONFIG_FILE),
            hint=_HINT,
        )
    try:
        with quiet("diffusers"):  # diffusers warns where accelerate is missing, and of weights that are refused below
            transformer, report = DiTTransformer2DModel.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=torch.float32,
                use_safetensors=files.is_safetensors,
                variant=files.variant,
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"diffusers cannot load the model: {error}", where=str(folder), hint=_HINT) from error
    _check_loaded(report, folder)
    note = f"the folder has the weights as variant {files.variant} only: they are converted to float32"
    return transformer, (note,) if files.variant else ()


def _check_loaded(report: Mapping[str, Any], folder: Path) -> None:
    """Refuse a network whose parameters differ from those of the weight files."""
    complaints = [
        f"{len(names)} {what}, the first is {min(names)}"
        for names, what in (
            (report["missing_keys"], "parameters are not in the weight file"),
            (report["unexpected_keys"], "tensors of the weight file are no parameters of it"),
            (
                [str(entry[0]) for entry in report["mismatched_keys"]],
                "parameters have another shape in the weight file",
            ),
            ([str(entry) for entry in report["error_msgs"]], "messages of diffusers"),
        )
        if names
    ]
    if complaints:
        raise UsageError(
            f"the weights are not those of the network that config.json describes: {'; '.join(complaints)}",
            where=str(folder),
            hint=_HINT,
        )
