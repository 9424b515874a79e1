"""Load a model by its name. Listing models imports no torch; loading imports it inside the functions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.errors import UsageError, closest
from qcgraph.extensions import Extensions
from qcgraph.models import checkout
from qcgraph.models.checks import check_spec, check_weights
from qcgraph.models.factory import call_factory, check_parameters, made_by, try_forward, unwrapped
from qcgraph.models.files import is_there
from qcgraph.models.geometry import GEOMETRIES, DiTConfig
from qcgraph.models.loaded import LoadedModel
from qcgraph.models.trained_folder import is_trained_folder, load_trained_folder, read_card

if TYPE_CHECKING:
    from qcgraph.models.dit import DiT

EMBEDDED = "digits"
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class ModelInfo:
    """One line of the list of models.

    Attributes:
        name: the name to type on the command line; words in capitals stand for your own values.
        description: one line that describes the model.
        parameters: number of parameters, or None if it depends on the values filled in.
        geometry: the sizes, or None if they depend on the values filled in.
        distribution: the distribution that adds the model, empty for qcgraph.
    """

    name: str
    description: str
    parameters: int | None
    geometry: DiTConfig | None
    distribution: str = ""


def _problem_of(name: str, found: Any) -> str:
    return "" if callable(found) else f"is a {type(found).__name__}, not a function that returns a LoadedModel"


EXTENSIONS = Extensions("qcgraph.models", "model", lambda: (EMBEDDED, *GEOMETRIES), _problem_of)


def list_models() -> tuple[ModelInfo, ...]:
    """List the models that :func:`load_model` accepts; loads none, and imports no other distribution."""
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
        *(_checkout_info(name, folder) for name, folder in _checkout_models().items()),
        *checkpoints,
        *(
            ModelInfo(offer.name, f"made by {offer.value}", None, None, offer.distribution)
            for offer in EXTENSIONS.offers().values()
        ),
        ModelInfo("DIFFUSERS_FOLDER", "a diffusers DiTTransformer2DModel, or a pipeline with one", None, None),
        ModelInfo("TRAINED_FOLDER", "what tools/train_digits.py or tools/train_dit.py wrote", None, None),
        ModelInfo("PACKAGE.MODULE:FACTORY", "your function that returns a qcgraph.models.LoadedModel", None, None),
    )


def _checkout_models() -> dict[str, Path]:
    """Return the folders of a checkout's models whose names nothing else has."""
    taken = {EMBEDDED, *GEOMETRIES, *EXTENSIONS.offers()}
    return {name: folder for name, folder in checkout.checkout_folders().items() if name not in taken}


def _checkout_info(name: str, folder: Path) -> ModelInfo:
    try:
        card = read_card(folder)
    except UsageError:  # which loading the model raises again; one damaged folder must not hide the other models
        return ModelInfo(name, f"in {checkout.PLACE} of the checkout, with a card that cannot be read", None, None)
    config = card.config
    images = "handwritten digits" if card.data == "digits" else f"images of {config.class_count} classes"
    size = f"{config.input_size}x{config.input_size}"
    description = f"trained on {size} {images}, in {checkout.PLACE} of the checkout"
    return ModelInfo(name, description, config.parameter_count, config)


class CodeError(UsageError):
    """The name of a model asks for code in a place where only data is read."""


def load_model(name: str, *, seed: int = 0, calls: bool = True) -> LoadedModel:
    """Load a model by name.

    Args:
        name: ``digits``; ``GEOMETRY:FILE`` for an original checkpoint or ``GEOMETRY:random``; a folder that diffusers
            or a training tool wrote; the name that another distribution gives a model by an entry point; the name of a
            folder in ``tools/models`` of a checkout, such as ``cifar10``; or ``package.module:factory``. A factory's
            module is not copied, but frozen and converted in place.
        seed: seed of ``:random`` weights; it has no effect on other models.
        calls: whether a factory may be imported and called; false when the name was read from a file.

    Raises:
        CodeError: the name is that of a factory, or of another distribution's model, and ``calls`` is false.
        UsageError: the name is unknown; or the model cannot be read, does not fit, has an unsupported noise schedule,
            or holds weights that are NaN, infinite or not floating point; or a factory raises an error.
    """
    model = _load(name, seed, calls=calls)
    check_spec(model.spec, name)
    check_weights(model.module, name)
    model.module.eval().requires_grad_(False).float()
    if _FACTORY.fullmatch(name) or name in EXTENSIONS.offers():
        try_forward(model, name)
    return model


def lasting_name(name: str) -> str:
    """Return a name that loads the same model later, when another folder is the current one.

    Only a model of a checkout that is the current folder needs a longer name: the path of its folder. A path that was
    typed stays as it is, so that a project may move with its bundles.
    """
    folder = None if is_there(Path(name), Path.exists) else _checkout_models().get(name)
    return name if folder is None or checkout.is_found_anywhere(folder) else str(folder.resolve())


def check_loaded(model: LoadedModel) -> LoadedModel:
    """Check a model that was made in Python, and remove wrappers that cannot be captured.

    Args:
        model: the model, which is not changed.

    Returns:
        The model without wrappers.

    Raises:
        UsageError: the spec, weights, precision or mode of the model differ from the description in `LoadedModel`.
    """
    where = getattr(model.spec, "name", None) or "the model"
    model = unwrapped(model, where)
    check_spec(model.spec, where)
    check_parameters(model, where)
    check_weights(model.module, where)
    if model.module.training:
        raise UsageError("the model is in training mode", where=where, hint="call model.eval() first")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in model.module.parameters()} - {"float32"})
    if kinds:
        raise UsageError(f"the model computes in {kinds[0]}", where=where, hint="call model.float() first")
    return model


def _load(name: str, seed: int, *, calls: bool) -> LoadedModel:
    """Load a model from the source that the form of its name indicates."""
    if name == EMBEDDED:
        return load_trained_folder()
    geometry, separator, source = name.partition(":")
    if geometry in GEOMETRIES:
        return _load_geometry(geometry, source, seed)
    if name and is_there(Path(name), Path.is_dir):  # an empty path would be the current folder
        return _load_folder(Path(name))
    if is_there(Path(name)):
        raise UsageError(
            "a checkpoint file alone does not say which geometry it has",
            where=name,
            hint=f"put the geometry in front, for example dit-xl-2:{name}",
        )
    if _FACTORY.fullmatch(name):
        if not calls:
            raise CodeError("is a function, which is not called", where=name, hint="name it yourself")
        return _from_factory(name)
    if separator and geometry.startswith("dit-"):
        raise UsageError(f"unknown geometry {geometry!r}", where=name, hint=closest(geometry, GEOMETRIES))
    return _load_offered(name, calls=calls) or _load_of_checkout(name)


def _load_offered(name: str, *, calls: bool) -> LoadedModel | None:
    """Load the model that another distribution offers under a name; return None where none does."""
    if not calls and name in EXTENSIONS.offers():
        raise CodeError(
            "is a model of another distribution, which is not imported", where=name, hint="name it yourself"
        )
    factory = EXTENSIONS.load(name)
    return None if factory is None else _usable(made_by(factory, f"the factory of {name}", name, None), name)


def _load_of_checkout(name: str) -> LoadedModel:
    """Load a model of a checkout by its name; every other kind of name has been tried before."""
    models = _checkout_models()
    if name in models:
        return load_trained_folder(models[name])
    if name in checkout.NAMES:
        raise UsageError(
            "the model is in the repository of qcgraph, not in its package",
            where=name,
            hint=f"give the path of its folder in a checkout: {checkout.PLACE / name}",
        )
    raise UsageError(
        "unknown model: neither a name nor a folder",
        where=repr(name),
        hint=closest(name, [EMBEDDED, *models, *GEOMETRIES, *EXTENSIONS.offers()]),
    )


def _load_folder(folder: Path) -> LoadedModel:
    """Load a folder of one of the two known forms, told apart by their files."""
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
    """Load an original DiT with weights from a file, or with random weights."""
    from qcgraph.models.checkpoint import load_dit
    from qcgraph.models.dit import INPUT_NAMES

    if not source:
        raise UsageError(
            "a geometry needs weights", where=geometry, hint=f"use {geometry}:FILE.pt, or {geometry}:random to try it"
        )
    config = GEOMETRIES[geometry]
    notes: list[str] = []
    module = _random_dit(config, seed) if source == "random" else load_dit(config, Path(source), note=notes.append)
    return LoadedModel(module, config.model_spec(geometry), INPUT_NAMES, notes=tuple(notes))


def _random_dit(config: DiTConfig, seed: int) -> DiT:
    """Return a DiT with random weights that depend on the seed alone."""
    import torch

    from qcgraph.models.dit import DiT, initialize_random

    # Built without memory first: the default initialisation is slow and would draw from the global generator.
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    initialize_random(model, torch.Generator().manual_seed(seed))
    return model


def _from_factory(name: str) -> LoadedModel:
    """Return the model of a factory without wrappers; a module in half precision is noted."""
    return _usable(call_factory(name), name)


def _usable(model: LoadedModel, name: str) -> LoadedModel:
    """Return a model of a factory without wrappers, with a note on a module in half precision."""
    model = unwrapped(model, name)
    check_spec(model.spec, name)
    check_parameters(model, name)
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in model.module.parameters()} - {"float32"})
    note = f"the weights are converted from {' and '.join(kinds)} to float32"
    return replace(model, notes=(*model.notes, note)) if kinds else model
