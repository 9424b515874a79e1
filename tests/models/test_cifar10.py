"""The trained model of natural images: its card, its sizes, its judge and its samples."""

from __future__ import annotations

import numpy as np
import pytest

from qcgraph.models import LoadedModel, load_model
from qcgraph.models.checkout import checkout_folders
from qcgraph.models.files import IMAGES_WEIGHTS_FILE
from qcgraph.models.trained_folder import read_card
from qcgraph.plan.spec import ModelSpec, NoiseSchedule


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("cifar10")


def test_card_states_what_was_measured() -> None:
    card = read_card(checkout_folders()["cifar10"])
    assert (card.name, card.data, card.config.token_count) == ("cifar10", "images", 256)
    assert len(card.classifier["classes"]) == card.config.class_count
    assert card.evaluation["samples"] == 2000
    assert card.evaluation["class_accuracy"] > 0.65
    assert card.classifier["held_out_accuracy"] > 0.8
    assert 0 < card.evaluation["fid_small_real_floor"] < card.evaluation["fid_small"]
    assert card.training["parameters"] == card.config.parameter_count
    assert card.evaluation["seed"] not in {card.training["seed"], card.classifier["seed"]}


def test_files_are_small() -> None:
    assert (checkout_folders()["cifar10"] / IMAGES_WEIGHTS_FILE).stat().st_size <= 30_000_000


def test_spec(model: LoadedModel) -> None:
    assert model.spec == ModelSpec.class_conditional(
        name="cifar10",
        latent_shape=(3, 32, 32),
        class_count=10,
        null_class=10,
        output_channels=3,
        noise_schedule=NoiseSchedule(),
        is_image=True,
    )


@pytest.mark.slow
def test_judge_sees_the_classes_in_real_images(model: LoadedModel) -> None:
    assert model.judge is not None
    judge = model.judge()
    assert judge.real.shape == (2000, 3, 32, 32)
    assert (judge.real.min(), judge.real.max()) == (-1.0, 1.0)
    counts = np.bincount(judge.classify(judge.real[::5]), minlength=10)
    assert counts.min() > 20  # of about 40 real images of each class
    assert counts.max() < 60


@pytest.mark.slow
def test_samples_look_like_real_images(model: LoadedModel) -> None:
    from qcgraph.evaluation.solvers import sample_with
    from qcgraph.models.eager import EagerRunner
    from qcgraph.sampling.conditions import of_labels

    conditions = of_labels([1, 7], model.spec)
    images = sample_with("ddim", 8, 1.5, EagerRunner(model), model.spec, conditions, 31_000)
    assert images.shape == (2, 3, 32, 32)
    assert np.abs(images).max() < 2
    assert all(0.2 < image.std() < 0.9 for image in images)
    steps = np.abs(np.diff(images, axis=3)).mean()
    assert steps < 0.3  # neighbouring pixels are alike, as in no noise
    assert np.abs(images[0] - images[1]).mean() > 0.1
