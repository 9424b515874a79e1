"""The trained models of digits: the one in the package, and the one beside the tools that never ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcgraph.models.files import DIGITS_FOLDER

SECOND_FOLDER = Path(__file__).resolve().parents[2] / "tools" / "models" / "digits-b"


@pytest.fixture
def second_folder() -> Path:
    """The folder of the model that does not ship."""
    return SECOND_FOLDER


@pytest.fixture(params=[DIGITS_FOLDER, SECOND_FOLDER], ids=["digits", "digits-b"])
def trained_folder(request: pytest.FixtureRequest) -> Path:
    """A folder that the training tool wrote."""
    folder: Path = request.param
    return folder
