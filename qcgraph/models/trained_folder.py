"""Load folders that the training tools wrote: a DiT, its judge and its card. One ships as ``digits``.

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
    """The card of a trained model; loading needs no field that is a plain dictionary, people and tests do.

    Attributes:
        name: the name of the model.
        config: the sizes of the network.
        schedule: the noise schedule of the training.
        data: the data that the model draws: ``digits`` of scikit-learn, or ``images``, some of which are in the folder.
        training: settings, loss curve and wall time of the training.
        classifier: settings and accuracies of the classifier.
        environment: versions and other conditions that the weights depend on besides the settings.
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
    """Return whether a training tool wrote the folder, even if it is incomplete."""
    return any((folder / name).is_file() for name in (CARD_FILE, WEIGHTS_FILE, IMAGES_WEIGHTS_FILE))


def read_card(folder: Path = DIGITS_FOLDER) -> Card:
    """Read the card of a trained folder, by default of the embedded model.

    Raises:
        UsageError: the card is missing, is not JSON, or has an unknown key or a wrong value.
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
    """Load the weight average that the training stored, as float32, with the judge of the folder.

    Args:
        folder: has ``card.json`` and ``digits.safetensors`` or, for images, ``model.safetensors``; the judge also needs
            ``classifier.safetensors`` and, for images, ``real.safetensors``.

    Raises:
        UsageError: a file is missing or damaged, or the sizes of the weights differ from the card.
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
    """Return the path of a file that must be in the folder."""
    path = folder / name
    if not path.is_file():
        raise UsageError(f"the folder has no {name}", where=str(folder), hint=_HINT)
    return path
