"""Turns the name of a model into a loaded model. Listing imports no torch; loading does, inside the functions."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcgraph.errors import UsageError, closest
from qcgraph.models.geometry import GEOMETRIES, DiTConfig
from qcgraph.models.loaded import LoadedModel
from qcgraph.models.trained_folder import is_trained_folder, load_trained_folder, read_card
from qcgraph.spec import FLOW, NoiseSchedule

if TYPE_CHECKING:
    from torch import nn

    from qcgraph.models.dit import DiT

EMBEDDED = "digits"
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS = ("epsilon", "v_prediction", FLOW)
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models.

    Attributes:
        name: what to type where a model is asked for; capitals stand for something to fill in.
        description: one line on what it is.
        parameters: number of parameters, or None where it depends on what is filled in.
        geometry: the sizes, or None likewise.
    """

    name: str
    description: str
    parameters: int | None
    geometry: DiTConfig | None


def list_models() -> tuple[ModelInfo, ...]:
    """The models that :func:`load_model` accepts, without loading any."""
    digits = read_card().config
    checkpoints = tuple(
        ModelInfo(
            f"{name}:FILE.pt",
            f"original DiT, {config.input_size * 8}-pixel images, patch {config.patch_size}; or :random weights",
            config.parameter_count,
            config,
        )
        for name, config in GEOMETRIES.items()
    )
    return (
        ModelInfo(EMBEDDED, "trained on handwritten digits, ships with qcgraph", digits.parameter_count, digits),
        *checkpoints,
        ModelInfo("DIFFUSERS_FOLDER", "a diffusers DiTTransformer2DModel, or a pipeline with one", None, None),
        ModelInfo("TRAINED_FOLDER", "what tools/train_digits.py or tools/train_dit.py wrote", None, None),
        ModelInfo("PACKAGE.MODULE:FACTORY", "your function that returns a qcgraph.models.LoadedModel", None, None),
    )


class CodeError(UsageError):
    """A model's name asks for code where only data is read."""


def load_model(name: str, *, seed: int = 0, calls: bool = True) -> LoadedModel:
    """Loads a model by name.

    Args:
        name: ``digits``; ``GEOMETRY:FILE`` for an original checkpoint or ``GEOMETRY:random``; a folder that
            diffusers or ``tools/train_digits.py`` wrote; or ``package.module:factory``. A factory's module is used as
            it is, frozen and converted in place.
        seed: seed of ``:random`` weights; the others ignore it.
        calls: whether a factory is imported and called; not where the name was read from a file.

    Raises:
        CodeError: the name is that of a factory, and none is to be called.
        UsageError: the name is unknown, or what it names cannot be read, does not fit, was trained on an unsupported
            noise schedule, or holds NaN or infinity.
    """
    model = _load(name, seed, calls=calls)
    _check_schedule(model.spec.schedule, name)
    model.module.eval().requires_grad_(False).float()
    _check_finite(model.module, name)
    return model


def _load(name: str, seed: int, *, calls: bool) -> LoadedModel:
    """Chooses the source by the form of the name."""
    if name == EMBEDDED:
        return load_trained_folder()
    geometry, separator, source = name.partition(":")
    if geometry in GEOMETRIES:
        return _load_geometry(geometry, source, seed)
    if name and Path(name).is_dir():  # an empty path would be the current folder
        return _load_folder(Path(name))
    if Path(name).is_file():
        raise UsageError(
            "a checkpoint file alone does not say which geometry it has",
            where=name,
            hint=f"put the geometry in front, for example dit-xl-2:{name}",
        )
    if _FACTORY.fullmatch(name):
        if not calls:
            raise CodeError("is a function, which is not called", where=name, hint="name it yourself")
        return _call_factory(name)
    if separator and geometry.startswith("dit-"):
        raise UsageError(f"unknown geometry {geometry!r}", where=name, hint=closest(geometry, GEOMETRIES))
    raise UsageError(
        "unknown model: neither a name nor a folder", where=repr(name), hint=closest(name, [EMBEDDED, *GEOMETRIES])
    )


def _load_folder(folder: Path) -> LoadedModel:
    """A folder of one of the two known forms, told apart by its files."""
    from qcgraph.models.diffusers_folder import is_diffusers_folder, load_diffusers_folder

    if is_diffusers_folder(folder):
        return load_diffusers_folder(folder)
    if is_trained_folder(folder):
        return load_trained_folder(folder)
    raise UsageError(
        "the folder holds no model: neither one that diffusers saved nor one that a training tool wrote",
        where=str(folder),
        hint="the first has a config.json, or a transformer/ with one; the second a card.json",
    )


def _load_geometry(geometry: str, source: str, seed: int) -> LoadedModel:
    """An original DiT with weights from a file, or random ones."""
    from qcgraph.models.checkpoint import load_dit
    from qcgraph.models.dit import INPUT_NAMES

    if not source:
        raise UsageError(
            "a geometry needs weights", where=geometry, hint=f"use {geometry}:FILE.pt, or {geometry}:random to try it"
        )
    config = GEOMETRIES[geometry]
    module = _random_dit(config, seed) if source == "random" else load_dit(config, Path(source))
    return LoadedModel(module, config.model_spec(geometry), INPUT_NAMES)


def _random_dit(config: DiTConfig, seed: int) -> DiT:
    """A DiT with random weights that depend on the seed alone."""
    import torch

    from qcgraph.models.dit import DiT, initialize_random

    # Built without memory first: the default initialisation takes long and would draw from the global generator.
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    initialize_random(model, torch.Generator().manual_seed(seed))
    return model


def _call_factory(name: str) -> LoadedModel:
    """Imports ``package.module`` and calls its ``factory``."""
    module_name, _, factory_name = name.partition(":")
    expected = "a factory takes no arguments and returns a qcgraph.models.LoadedModel"
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(
            f"cannot import {module_name}: {error}",
            where=name,
            hint="install the package, or put its folder on PYTHONPATH; `qcgraph models` lists the built-in names",
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"{module_name} has no function {factory_name!r}", where=name, hint=expected)
    model = factory()
    if not isinstance(model, LoadedModel):
        raise UsageError(f"the factory returned {type(model).__name__}", where=name, hint=expected)
    parameters = inspect.signature(model.module.forward).parameters
    absent = [parameter for parameter in model.input_names if parameter not in parameters]
    if absent:
        raise UsageError(
            f"the module's forward has no parameter {absent[0]!r}; it has {', '.join(parameters)}",
            where=name,
            hint="input_names are the forward parameters for latent, timestep and class label, in this order",
        )
    return model


def _check_schedule(schedule: NoiseSchedule, name: str) -> None:
    """Refuses noise schedules that the schedulers do not know."""
    for field, value, known in (
        ("beta_schedule", schedule.beta_schedule, _BETA_SCHEDULES),
        ("prediction", schedule.prediction, _PREDICTIONS),
    ):
        if value not in known:
            raise UsageError(f"{field} {value!r} is not supported", where=name, hint=f"known: {', '.join(known)}")


def _check_finite(module: nn.Module, name: str) -> None:
    """Refuses weights that would turn every output into NaN."""
    for path, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"parameter {path} is not finite: it holds NaN or infinity",
                where=name,
                hint="the training diverged or the file is damaged; use an earlier checkpoint",
            )
