"""Find the trained models that are in qcgraph's repository and too large for its package; imports no torch."""

from __future__ import annotations

from pathlib import Path

from qcgraph.models.files import CARD_FILE

NAMES = ("cifar10", "digits-b")
"""The models in the repository, known by name even where there is no checkout of it."""

PLACE = Path("tools", "models")
INSTALLATION = Path(__file__).parents[2]  # the checkout, if qcgraph is installed from one in place


def checkout_folders() -> dict[str, Path]:
    """Return the trained folders in ``tools/models`` of a checkout, by their names.

    The checkout is the one that qcgraph is installed from and, for names that it lacks, the current folder.
    """
    return _folders_in(PLACE) | _folders_in(INSTALLATION / PLACE)


def is_found_anywhere(folder: Path) -> bool:
    """Return whether the name of a folder finds it whatever the current folder is."""
    return folder.resolve().parent == (INSTALLATION / PLACE).resolve()


def _folders_in(place: Path) -> dict[str, Path]:
    return {card.parent.name: card.parent for card in sorted(place.glob(f"*/{CARD_FILE}"))}
