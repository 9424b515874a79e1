"""Names of what the training tools write, and where the embedded model is."""

from __future__ import annotations

from pathlib import Path

DIGITS_FOLDER = Path(__file__).parent / "digits"
CARD_FILE = "card.json"
WEIGHTS_FILE = "digits.safetensors"
IMAGES_WEIGHTS_FILE = "model.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
REAL_FILE = "real.safetensors"
