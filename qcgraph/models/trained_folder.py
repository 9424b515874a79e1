"""Folders that the training tools wrote: a DiT, its judge and its card. One ships as ``digits``.

``tools/train_digits.py`` trains models of digits, ``tools/train_dit.py`` models of any images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcgraph.errors import UsageError
from qcgraph.models.files import CARD_FILE, CLASSIFIER_FILE, DIGITS_FOLDER, IMAGES_WEIGHTS_FILE, REAL_FILE, WEIGHTS_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.models.judge import Judge
from qcgraph.models.loaded import LoadedModel
from qcgraph.plan.spec import NoiseSchedule

_TOOL = "tools/train_digits.py or tools/train_dit.py"
_HINT = f"the folder must be as {_TOOL} wrote it: card and weights of one training, complete"


class Card(BaseModel):
    """The card of a trained model; what is a plain dictionary is for people and tests, loading does not need it.

    Attributes:
        name: how the model is called.
        config: the sizes of the network.
        schedule: the noise schedule that it was trained on.
        data: what it draws: ``digits``, which scikit-learn has, or ``images``, of which the folder has some.
        training: settings, loss curve and wall time of the training.
        classifier: settings and accuracies of the classifier.
        environment: what the weights depend on besides the settings.
        evaluation: settings and figures of the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    config: DiTConfig
    schedule: NoiseSchedule
    data: Literal["digits", "images"] = "digits"
    training: dict[str, Any] = {}
    classifier: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}


def is_trained_folder(folder: Path) -> bool:
    """Whether the folder was written by the training tool, be it complete or not."""
    return any((folder / name).is_file() for name in (CARD_FILE, WEIGHTS_FILE, IMAGES_WEIGHTS_FILE))


def read_card(folder: Path = DIGITS_FOLDER) -> Card:
    """The card of a trained folder; of the embedded model by default.

    Raises:
        UsageError: there is none, it is not JSON, or it holds an unknown key or a wrong value.
    """
    path = _file(folder, CARD_FILE)
    try:
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path), hint=_HINT) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{place}: {first['msg']}" if place else first["msg"], where=str(path), hint=_HINT) from None


def load_trained_folder(folder: Path = DIGITS_FOLDER) -> LoadedModel:
    """Loads the weight average that the training stored, as float32, with the judge of the folder.

    Args:
        folder: has ``card.json`` and ``digits.safetensors``, of images ``model.safetensors``; the judge also needs
            ``classifier.safetensors``, and of images ``real.safetensors``.

    Raises:
        UsageError: a file is missing or damaged, or the weights are not of the sizes on the card.
    """
    from qcgraph.models.checkpoint import load_dit
    from qcgraph.models.dit import INPUT_NAMES

    card = read_card(folder)
    weights = WEIGHTS_FILE if card.data == "digits" else IMAGES_WEIGHTS_FILE
    notes: list[str] = []
    module = load_dit(card.config, _file(folder, weights), hint=_HINT, note=notes.append)
    spec = card.config.model_spec(card.name, noise_schedule=card.schedule, is_image=True)
    return LoadedModel(
        module, spec, INPUT_NAMES, judge=partial(_load_judge, folder.resolve(), card), notes=tuple(notes)
    )


def _load_judge(folder: Path, card: Card) -> Judge:
    classifier, config = _file(folder, CLASSIFIER_FILE), card.config
    if card.data == "digits":
        from qcgraph.models.classifier import digits_judge

        return digits_judge(classifier)
    from qcgraph.models.image_classifier import image_judge

    shape = (config.channels, config.input_size, config.input_size)
    return image_judge(classifier, _file(folder, REAL_FILE), shape, config.class_count)


def _file(folder: Path, name: str) -> Path:
    """The path of a file of the folder, which must be there."""
    path = folder / name
    if not path.is_file():
        raise UsageError(f"the folder has no {name}", where=str(folder), hint=_HINT)
    return path
