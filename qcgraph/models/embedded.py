"""The model that ships with the package: a trained DiT of handwritten digits. Its sizes are in its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.models.geometry import DiTConfig

if TYPE_CHECKING:
    from qcgraph.models.dit import DiT

DIGITS_FOLDER = Path(__file__).parent / "digits"


def read_card(folder: Path = DIGITS_FOLDER) -> dict[str, Any]:
    """The model card: ``config``, ``schedule``, ``training``, ``classifier``, ``evaluation``, ``environment``."""
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def digits_config(folder: Path = DIGITS_FOLDER) -> DiTConfig:
    """The sizes of the digits model, from its card."""
    return DiTConfig(**read_card(folder)["config"])


def load_digits_dit(folder: Path = DIGITS_FOLDER) -> DiT:
    """Loads a digits model that ``tools/train_digits.py`` wrote, as float32.

    Args:
        folder: where ``card.json`` and ``digits.safetensors`` are.
    """
    from qcgraph.models.checkpoint import load_dit

    return load_dit(digits_config(folder), folder / "digits.safetensors")
