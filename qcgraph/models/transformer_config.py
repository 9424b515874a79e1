"""Read the ``config.json`` of a diffusers transformer, and check that a network can be built from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcgraph.errors import UsageError, shown
from qcgraph.models.json_file import read_config

CONFIG_FILE = "config.json"
_SUPPORTED, _OLDER = "DiTTransformer2DModel", "Transformer2DModel"
_METADATA = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
_LARGEST_GRID = 1024  # patches along a side; a million tokens exceed every known model

_Size = Annotated[int, Field(ge=1, le=2**20)]


class TransformerConfig(BaseModel):
    """The settings of a ``DiTTransformer2DModel``; missing settings have the defaults of diffusers."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    num_attention_heads: _Size
    attention_head_dim: _Size
    in_channels: _Size
    out_channels: _Size | None
    num_layers: Annotated[int, Field(ge=1, le=2**12)]
    dropout: Annotated[float, Field(ge=0, le=1)]
    norm_num_groups: int
    attention_bias: bool
    sample_size: _Size
    patch_size: _Size
    activation_fn: Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]
    num_embeds_ada_norm: _Size
    upcast_attention: bool
    norm_type: Literal["ada_norm_zero"]
    norm_elementwise_affine: bool
    norm_eps: Annotated[float, Field(gt=0)]


def read_transformer_config(folder: Path) -> tuple[TransformerConfig, tuple[str, ...]]:
    """Read and check the configuration of a class-conditional transformer.

    Args:
        folder: the folder of the model, which has ``config.json``.

    Returns:
        The settings, and notes on those that diffusers ignores.

    Raises:
        UsageError: the model is of another kind, is quantized, or a setting has a wrong value.
    """
    from diffusers import DiTTransformer2DModel

    path = folder / CONFIG_FILE
    config = read_config(path)
    _check_kind(config, folder)
    defaults = _defaults(DiTTransformer2DModel)
    notes = _check_unknown(config, defaults, path)
    try:
        settings = TransformerConfig(**{key: config.get(key, default) for key, default in defaults.items()})
    except ValidationError as error:
        raise _misfit(error, path) from None
    _check_sizes(settings, path)
    return settings, notes


def _check_kind(config: dict[str, Any], folder: Path) -> None:
    """Refuse models that are quantized, or not conditioned on a class label through adaLN."""
    kind = config.get("_class_name")
    if kind is None:
        raise UsageError(
            "config.json names no _class_name, so it is not a diffusers model",
            where=str(folder),
            hint="save the model with diffusers' save_pretrained",
        )
    # The released DiT folders were saved under the older name, which diffusers still maps to the newer class.
    if kind != _SUPPORTED and not (kind == _OLDER and config.get("norm_type") == "ada_norm_zero"):
        raise UsageError(
            f"{kind} is not supported: only class-conditional transformers are, and it is conditioned differently",
            where=str(folder),
            hint=f"supported: {_SUPPORTED}; for your own class-conditional model use package.module:factory",
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UsageError(
            f"the weights are quantized already (quantization_config, method {method!r})",
            where=str(folder / CONFIG_FILE),
            hint="take the model in floating point: qcgraph quantizes it itself",
        )


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the settings of a class of diffusers with their defaults."""
    parameters = inspect.signature(kind.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key != "self"}


def _check_unknown(config: dict[str, Any], defaults: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Return notes on settings that the class does not have.

    Raises:
        UsageError: a setting belongs to the older class, and would make another network.
    """
    import diffusers

    unknown = [key for key in config if key not in defaults and key not in _METADATA]
    if "dtype" in unknown:  # the only unknown key that diffusers passes to the class, which refuses it
        raise UsageError(
            f"dtype = {shown(config['dtype'])} is no setting of {_SUPPORTED}, and diffusers cannot load it",
            where=str(path),
            hint="take it out: the weights say themselves in which precision they are",
        )
    older = _defaults(diffusers.Transformer2DModel)
    for key in unknown:
        if key in older and config[key] != older[key] and key != "use_linear_projection":
            raise UsageError(
                f"{key} = {config[key]!r} is not supported: {_SUPPORTED} has no such setting, and would ignore it",
                where=str(path),
                hint="for a model of your own use package.module:factory",
            )
    if config["_class_name"] == _OLDER:
        absent = [key for key in defaults if key not in config and defaults[key] != older[key]]
        if absent:
            raise UsageError(
                f"leaves out {absent[0]}, whose default in {_OLDER} is another than in {_SUPPORTED}",
                where=str(path),
                hint="write it into the file",
            )
    names = [key for key in unknown if key not in older and key != "quantization_config"]
    if not names:
        return ()
    return (
        (
            f"{path.name}: {', '.join(names)} is no setting of {_SUPPORTED} in diffusers {diffusers.__version__}, and "
            "ignored, as it is by diffusers"
        ),
    )


def _misfit(error: ValidationError, path: Path) -> UsageError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    if key == "sample_size" and isinstance(first["input"], list):
        return UsageError(
            f"sample_size = {first['input']!r} is a list: {_SUPPORTED} takes one number, the side of a square latent",
            where=str(path),
            hint="write one number where both are the same; latents that are not square are not supported",
        )
    return UsageError(
        f"{key} = {first['input']!r} does not fit: {first['msg']}",
        where=str(path),
        hint="the file must be as diffusers' save_pretrained writes it",
    )


def _check_sizes(config: TransformerConfig, path: Path) -> None:
    """Refuse sizes that are not divisible as the network requires."""
    width = config.num_attention_heads * config.attention_head_dim
    outputs = config.out_channels or config.in_channels
    complaints = (
        (
            config.sample_size % config.patch_size,
            (f"sample_size {config.sample_size} is not a multiple of patch_size {config.patch_size}"),
        ),
        (
            config.sample_size // config.patch_size > _LARGEST_GRID,
            (f"sample_size {config.sample_size} makes more than {_LARGEST_GRID} patches a side"),
        ),
        (
            width % 4,
            (
                f"num_attention_heads * attention_head_dim = {width} is not a multiple of 4, which position "
                "embeddings need"
            ),
        ),
        (width > 2**16, f"num_attention_heads * attention_head_dim = {width} is too large"),
        (
            outputs not in (config.in_channels, 2 * config.in_channels),
            (
                f"out_channels {outputs} is neither in_channels "
                f"{config.in_channels} nor, with a learned sigma, twice that"
            ),
        ),
    )
    for is_wrong, complaint in complaints:
        if is_wrong:
            raise UsageError(
                complaint, where=str(path), hint="the file must be as diffusers' save_pretrained writes it"
            )
