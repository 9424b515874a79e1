"""A folder of the training tool is a model like the embedded one; a damaged one says what is wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qcgraph.errors import UsageError
from qcgraph.models import list_models, load_model
from qcgraph.models.classifier import DigitsClassifier, load_classifier
from qcgraph.models.digits_data import load_digits, split_indices
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.files import CARD_FILE, CLASSIFIER_FILE, DIGITS_FOLDER, WEIGHTS_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.models.trained_folder import load_trained_folder, read_card
from qcgraph.plan.spec import NoiseSchedule

SMALL = DiTConfig(input_size=8, patch_size=4, channels=1, width=16, depth=1, heads=2, class_count=10, learn_sigma=False)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder in the form of the tool, of a tiny random DiT called ``small``."""
    model = DiT(SMALL)
    initialize_random(model, torch.Generator().manual_seed(0))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    shutil.copy(DIGITS_FOLDER / CLASSIFIER_FILE, folder)
    card = {"name": "small", "config": asdict(SMALL), "schedule": asdict(NoiseSchedule(beta_end=0.01))}
    (folder / CARD_FILE).write_text(json.dumps(card))
    return folder


def refusal_of(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_model(str(folder))
    assert caught.value.hint
    assert str(folder) in str(caught.value.where)
    return caught.value


def edit_card(folder: Path, *path: str, value: object) -> None:
    """Sets one value of the card."""
    card = json.loads((folder / CARD_FILE).read_text())
    place: Any = card
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / CARD_FILE).write_text(json.dumps(card))


def test_name_sizes_and_schedule_come_from_the_card(small: Path) -> None:
    model = load_model(str(small))
    assert model.spec == SMALL.model_spec("small", noise_schedule=NoiseSchedule(beta_end=0.01), is_image=True)
    assert model.input_names == ("x", "t", "y")
    stored = load_file(small / WEIGHTS_FILE)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.module.state_dict().items())


def test_by_path_it_is_the_model_of_its_name(trained_folder: Path) -> None:
    model = load_model(str(trained_folder))
    assert model.spec.name == trained_folder.name
    assert model.spec == read_card(trained_folder).config.model_spec(trained_folder.name, is_image=True)
    output = model.module(torch.zeros(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 10]))
    assert output.shape == (2, 1, 8, 8)


def test_digits_is_the_folder_in_the_package() -> None:
    named, by_path = load_model("digits"), load_model(str(DIGITS_FOLDER))
    assert named.spec == by_path.spec
    weights = by_path.module.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in named.module.state_dict().items())


def test_the_form_is_listed() -> None:
    assert "tools/train_digits.py" in {model.name: model.description for model in list_models()}["TRAINED_FOLDER"]


def test_relative_folder_keeps_its_judge(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.parent)
    model = load_model(small.name)
    monkeypatch.chdir("/")
    assert model.judge is not None
    assert model.judge().feature_count == DigitsClassifier.feature_count


def test_judge_recognises_held_out_digits(trained_folder: Path) -> None:
    card = read_card(trained_folder).classifier
    judge = load_trained_folder(trained_folder).judge
    assert judge is not None
    images, labels = load_digits()
    _, held_out = split_indices(card["train_fraction"], card["split_seed"])
    assert len(held_out) == card["held_out_images"]
    right = int((judge().classify(images[held_out]) == labels[held_out]).sum())
    # Another CPU may round one image to the other side.
    assert right >= round(card["held_out_accuracy"] * len(held_out)) - 1
    assert right >= 0.97 * len(held_out)


def test_judge_is_numpy_in_and_out(trained_folder: Path) -> None:
    make = load_trained_folder(trained_folder).judge
    assert make is not None
    judge = make()
    images, _ = load_digits()
    assert np.array_equal(judge.real, images)
    assert judge.real.dtype == np.float32
    few = images[::200]
    few.setflags(write=False)
    features, classes = judge.features(few), judge.classify(few)
    assert (features.shape, features.dtype) == ((len(few), judge.feature_count), np.float32)
    assert (classes.shape, classes.dtype) == ((len(few),), np.int64)
    classifier = load_classifier(trained_folder / CLASSIFIER_FILE)
    assert np.array_equal(features, classifier.features(torch.tensor(few)).numpy())
    assert np.array_equal(classes, classifier(torch.tensor(few)).argmax(1).numpy())


def test_each_folder_has_a_classifier_of_its_own(small: Path) -> None:
    weights = load_file(small / CLASSIFIER_FILE)
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, small / CLASSIFIER_FILE)
    own, shipped = load_model(str(small)).judge, load_model("digits").judge
    assert own is not None
    assert shipped is not None
    images = load_digits()[0][:4]
    assert not own().features(images).any()
    assert shipped().features(images).any()


@pytest.mark.slow
def test_loading_needs_no_scikit_learn() -> None:
    code = "import sys, qcgraph.models as m; m.load_model('digits'); print(*({'torch', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch"]


@pytest.mark.parametrize("name", [CARD_FILE, WEIGHTS_FILE])
def test_missing_file(name: str, small: Path) -> None:
    (small / name).unlink()
    assert refusal_of(small).message == f"the folder has no {name}"


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "\xff"}', b"[1]", b"{}"])
def test_damaged_card(content: bytes, small: Path) -> None:
    (small / CARD_FILE).write_bytes(content)
    assert refusal_of(small).where == str(small / CARD_FILE)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("nmae",), "x", "nmae: "),
        (("name",), "", "name: "),
        (("name",), 3, "name: "),
        (("config",), None, "config: "),
        (("config", "widht"), 16, "config.widht: Unexpected"),
        (("config", "width"), "16", "config.width: "),
        (("config", "width"), 18, "width 18 is not a multiple of 4"),
        (("config", "width"), 0, "width 0 is not positive"),
        (("config", "patch_size"), 0, "patch_size 0 is not positive"),
        (("config", "mlp_ratio"), float("nan"), "config.mlp_ratio: "),
        (("config", "mlp_ratio"), 1e-3, "leaves the MLP no channel"),
        (("schedule", "beta"), 0.1, "schedule.beta: Unexpected"),
        (("schedule", "train_steps"), 0.5, "schedule.train_steps: "),
        (("training",), [], "training: "),
    ],
)
def test_card_with_a_wrong_value(path: tuple[str, ...], value: object, complaint: str, small: Path) -> None:
    edit_card(small, *path, value=value)
    refusal = refusal_of(small)
    assert refusal.where == str(small / CARD_FILE)
    assert complaint in refusal.message


@pytest.mark.parametrize(
    ("field", "value"), [("beta_schedule", "sigmoid"), ("prediction", "sample")], ids=["betas", "prediction"]
)
def test_card_with_an_unsupported_schedule(field: str, value: str, small: Path) -> None:
    edit_card(small, "schedule", field, value=value)
    assert f"{field} {value!r} is not supported" in refusal_of(small).message


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("width", 32, "the shapes are not those"), ("depth", 2, "missing blocks.1.attn.qkv.weight")],
)
def test_weights_of_other_sizes_than_the_card(field: str, value: int, complaint: str, small: Path) -> None:
    edit_card(small, "config", field, value=value)
    refusal = refusal_of(small)
    assert complaint in refusal.message
    assert "tools/train_digits.py" in str(refusal.hint)


def test_truncated_weights(small: Path) -> None:
    path = small / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot read safetensors" in refusal_of(small).message


def test_weights_that_diverged(small: Path) -> None:
    weights = load_file(small / WEIGHTS_FILE)
    weights["blocks.0.mlp.fc1.bias"][2] = float("inf")
    save_file(weights, small / WEIGHTS_FILE)
    assert "blocks.0.mlp.fc1.bias is not finite" in refusal_of(small).message


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (Path.unlink, f"the folder has no {CLASSIFIER_FILE}"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot read safetensors"),
        (lambda path: save_file({"head.bias": torch.zeros(10)}, path), "missing trunk.0.weight"),
        (lambda path: save_file(load_file(path) | {"head.bias": torch.zeros(3)}, path), "head.bias is [3]"),
    ],
    ids=["missing", "truncated", "other parameters", "other shapes"],
)
def test_damaged_classifier_is_refused_when_something_is_judged(
    damage: Callable[[Path], Any], complaint: str, small: Path
) -> None:
    damage(small / CLASSIFIER_FILE)
    judge = load_model(str(small)).judge
    assert judge is not None
    with pytest.raises(UsageError) as refusal:
        judge()
    assert complaint in refusal.value.message
    assert refusal.value.hint


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("schedule", "beta_start"), None, "schedule.beta_start"),
        (("schedule", "beta_start"), -1.0, "schedule.beta_start = -1.0"),
        (("schedule", "train_steps"), "1000", "schedule.train_steps"),
        (("schedule", "train_steps"), 0, "schedule.train_steps = 0"),
        (("schedule", "zero_snr"), True, "schedule.zero_snr"),
        (("config", "depht"), 1, "config.depht"),
        (("config", "depth"), 1000, "a network of 1000 blocks has more than the"),
        (("config", "width"), 10**12, "is more than 1048576"),
    ],
)
def test_values_of_the_card_are_typed(path: tuple[str, ...], value: object, complaint: str, small: Path) -> None:
    edit_card(small, *path, value=value)
    assert complaint in refusal_of(small).message


def test_integers_as_weights(small: Path) -> None:
    weights = load_file(small / WEIGHTS_FILE)
    save_file({name: tensor.to(torch.int8) for name, tensor in weights.items()}, small / WEIGHTS_FILE)
    assert "is int8, and not floating point" in refusal_of(small).message


def test_prefixes_of_wrappers_are_noted(small: Path) -> None:
    weights = load_file(small / WEIGHTS_FILE)
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, small / WEIGHTS_FILE)
    assert "'module.'" in load_model(str(small)).notes[0]
