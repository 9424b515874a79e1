"""The models of a checkout have names: which folders they stand for, and what has the same name and comes first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qcgraph.errors import UsageError
from qcgraph.models import checkout, lasting_name, list_models, load_model
from qcgraph.models.files import CARD_FILE
from qcgraph.models.trained_folder import read_card


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that is no checkout."""
    monkeypatch.setattr(checkout, "INSTALLATION", tmp_path / "site-packages")


def place(folder: Path, name: str, here: Path) -> Path:
    """Put a trained folder into the current folder's ``tools/models``."""
    placed = here / checkout.PLACE / name
    placed.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, placed)
    return placed


def test_every_folder_has_a_known_name_which_its_card_has_too() -> None:
    folders = checkout.checkout_folders()
    assert tuple(folders) == checkout.NAMES
    assert [read_card(folder).name for folder in folders.values()] == list(folders)


def test_the_checkout_of_the_installation_is_found_from_any_folder(here: Path, second_folder: Path) -> None:
    assert load_model("digits-b").spec == load_model(str(second_folder)).spec
    assert lasting_name("digits-b") == "digits-b"


@pytest.mark.usefixtures("elsewhere")
def test_without_a_checkout_the_error_says_where_the_model_is(here: Path) -> None:
    for name in checkout.NAMES:
        with pytest.raises(UsageError, match="in the repository of qcgraph, not in its package") as caught:
            load_model(name)
        assert f"the path of its folder in a checkout: tools/models/{name}" in str(caught.value.hint)
    assert not {model.name for model in list_models()} & set(checkout.NAMES)


@pytest.mark.usefixtures("elsewhere")
def test_the_checkout_of_the_current_folder_is_found_there(
    here: Path, small_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = place(small_digits, "small-digits", here)
    listed = {model.name: model for model in list_models()}["small-digits"]
    assert listed.parameters == read_card(placed).config.parameter_count
    assert load_model("small-digits").spec.name == "small-digits"
    assert lasting_name("small-digits") == str(placed)
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match="unknown model"):
        load_model("small-digits")
    assert load_model(str(placed)).spec.name == "small-digits"


def test_a_name_without_a_model_names_those_of_the_checkout(here: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        load_model("cifar-10")


def test_a_folder_of_that_name_comes_first(here: Path, small_digits: Path) -> None:
    shutil.copytree(small_digits, here / "digits-b")
    assert load_model("digits-b").spec.name == "small-digits"
    assert lasting_name("digits-b") == "digits-b"


def test_the_embedded_model_comes_first(here: Path, small_digits: Path) -> None:
    place(small_digits, "digits", here)
    assert load_model("digits").spec.name == "digits"
    assert [model.name for model in list_models()].count("digits") == 1
    assert lasting_name("digits") == "digits"


def test_a_model_of_another_distribution_comes_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = here / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qcgraph.models]\ncifar10 = other_module:found\n")
    (here / "other_module.py").write_text("def found():\n    raise ValueError('called')\n")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(UsageError, match="the factory of cifar10 raised ValueError: called"):
        load_model("cifar10")
    assert [model.distribution for model in list_models() if model.name == "cifar10"] == ["other 1.0"]


def test_a_damaged_card_hides_no_other_model(here: Path, small_digits: Path) -> None:
    card = place(small_digits, "broken", here) / CARD_FILE
    card.write_text("{")
    listed = {model.name: model.description for model in list_models()}
    assert "a card that cannot be read" in listed["broken"]
    assert "digits-b" in listed
    with pytest.raises(UsageError, match="JSON"):
        load_model("broken")
