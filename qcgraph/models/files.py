"""Name the files of the training tools and the folder of the embedded model, and check whether files exist."""

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
    """Return whether a file, or whatever ``kind`` checks for, exists at a path that may be invalid."""
    try:
        return kind(path)
    except (OSError, ValueError):  # the path is too long, in an unreadable folder, or contains a zero byte
        return False
