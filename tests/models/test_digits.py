"""The trained models generate digits, their judges recognise them, and the cards say what was measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.models import load_model
from qcgraph.models.classifier import DigitsClassifier, load_classifier
from qcgraph.models.digits_data import load_digits, split_indices
from qcgraph.models.files import CLASSIFIER_FILE, DIGITS_FOLDER, WEIGHTS_FILE
from qcgraph.models.trained_folder import read_card


@torch.no_grad()
def sample_digits(folder: Path, labels: torch.Tensor, *, guidance: float = 1.5, seed: int = 31_000) -> torch.Tensor:
    """Plain DDIM-50, apart from qcgraph's own sampling: a fault there must not look like one of the model."""
    from diffusers import DDIMScheduler

    model = load_model(str(folder))
    schedule = model.spec.noise_schedule
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    latent = torch.randn(len(labels), *model.spec.latent_shape, generator=torch.Generator().manual_seed(seed))
    classes = torch.cat([labels, torch.full_like(labels, model.spec.conditions[0].null)])
    for timestep in scheduler.timesteps:
        noise = model.module(latent.repeat(2, 1, 1, 1), timestep.repeat(len(classes)), classes)
        conditional, unconditional = noise.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latent = scheduler.step(guided, timestep, latent).prev_sample
    return latent


@pytest.mark.slow
def test_samples_are_of_their_class(trained_folder: Path) -> None:
    labels = torch.arange(10).repeat(2)
    images = sample_digits(trained_folder, labels)
    assert load_classifier(trained_folder / CLASSIFIER_FILE).accuracy(images, labels) >= 0.95
    assert images.min() > -1.6
    assert images.max() < 1.6


@pytest.mark.slow
def test_samples_of_a_class_differ(trained_folder: Path) -> None:
    images = sample_digits(trained_folder, torch.full((8,), 3))
    assert torch.pdist(images.flatten(1)).min() > 1.0


@pytest.mark.slow
def test_classifier_features() -> None:
    classifier = load_classifier()
    images = torch.from_numpy(load_digits()[0][:5])
    features = classifier.features(images)
    assert features.shape == (5, DigitsClassifier.feature_count)
    assert torch.equal(classifier.head(features), classifier(images))
    assert not classifier.training
    assert not features.requires_grad


def test_digits_are_images_in_the_range_of_the_model() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


def test_split_is_disjoint_complete_and_repeatable() -> None:
    train, held_out = split_indices(0.8, 0)
    assert sorted([*train, *held_out]) == list(range(1797))
    assert np.array_equal(split_indices(0.8, 0)[0], train)
    assert not np.array_equal(split_indices(0.8, 1)[0], train)


def test_files_are_small(trained_folder: Path) -> None:
    assert (trained_folder / WEIGHTS_FILE).stat().st_size <= 4_000_000
    assert (trained_folder / CLASSIFIER_FILE).stat().st_size <= 500_000


def test_card_states_what_was_measured(trained_folder: Path) -> None:
    card = read_card(trained_folder)
    assert card.name == trained_folder.name
    assert card.evaluation["samples"] == 1000
    assert card.evaluation["class_accuracy"] >= 0.97
    assert 0 < card.evaluation["fid_small_real_floor"] < card.evaluation["fid_small"]
    assert card.classifier["held_out_accuracy"] >= 0.97
    assert card.training["parameters"] == card.config.parameter_count
    assert card.training["loss_curve"][-1] == [card.training["steps"], card.training["final_loss"]]
    assert card.evaluation["seed"] not in {card.training["seed"], card.classifier["seed"]}


def test_the_two_models_differ(second_folder: Path) -> None:
    first, second = (read_card(folder) for folder in (DIGITS_FOLDER, second_folder))
    assert first.config.token_count != second.config.token_count
    assert first.config.depth != second.config.depth
    assert first.training["split_seed"] != second.training["split_seed"]
