"""Names of what the training tools write, where the embedded model is, and whether a file is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

DIGITS_FOLDER = Path(__file__).parent / "digits"
CARD_FILE = "card.json"
WEIGHTS_FILE = "digits.safetensors"
IMAGES_WEIGHTS_FILE = "model.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
REAL_FILE = "real.safetensors"


def is_there(path: Path, kind: Callable[[Path], bool] = Path.is_file) -> bool:
    """Return whether there is a file, or what else ``kind`` asks for, at a path that the file system may not know."""
    try:
        return kind(path)
    except (OSError, ValueError):  # too long, in a folder that may not be read, or with a zero byte
        return False
