"""The embedded model generates digits, its judge recognises them, and the card says what was measured."""

from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.models import load_model
from qcgraph.models.classifier import DigitsClassifier, load_classifier
from qcgraph.models.digits_data import load_digits, split_indices
from qcgraph.models.embedded import DIGITS_FOLDER, read_card


@torch.no_grad()
def sample_digits(labels: torch.Tensor, *, guidance: float = 1.5, seed: int = 31_000) -> torch.Tensor:
    """Plain DDIM-50, apart from qcgraph's own sampling: a fault there must not look like one of the model."""
    from diffusers import DDIMScheduler

    model = load_model("digits")
    schedule = model.spec.schedule
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    latent = torch.randn(len(labels), *model.spec.latent_shape, generator=torch.Generator().manual_seed(seed))
    classes = torch.cat([labels, torch.full_like(labels, model.spec.null_class)])
    for timestep in scheduler.timesteps:
        noise = model.module(latent.repeat(2, 1, 1, 1), timestep.repeat(len(classes)), classes)
        conditional, unconditional = noise.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latent = scheduler.step(guided, timestep, latent).prev_sample
    return latent


@pytest.mark.slow
def test_samples_are_of_their_class() -> None:
    labels = torch.arange(10).repeat(10)
    images = sample_digits(labels)
    assert load_classifier().accuracy(images, labels) >= 0.97
    assert images.min() > -1.6
    assert images.max() < 1.6


@pytest.mark.slow
def test_samples_of_a_class_differ() -> None:
    images = sample_digits(torch.full((8,), 3))
    assert torch.pdist(images.flatten(1)).min() > 1.0


def test_classifier_recognises_held_out_digits() -> None:
    card = read_card()["classifier"]
    images, labels = (torch.from_numpy(array) for array in load_digits())
    _, held_out = split_indices(card["train_fraction"], card["split_seed"])
    accuracy = load_classifier().accuracy(images[held_out], labels[held_out])
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(card["held_out_accuracy"], abs=1.5 / len(held_out))


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


def test_files_are_small() -> None:
    assert (DIGITS_FOLDER / "digits.safetensors").stat().st_size <= 5_000_000
    assert (DIGITS_FOLDER / "classifier.safetensors").stat().st_size <= 500_000


def test_card_states_what_was_measured() -> None:
    card = read_card()
    assert card["evaluation"]["samples"] == 1000
    assert card["evaluation"]["class_accuracy"] >= 0.97
    assert card["evaluation"]["fid_small"] > 0
    assert card["evaluation"]["fid_small_real_floor"] > 0
    assert card["classifier"]["held_out_accuracy"] >= 0.98
    assert card["training"]["loss_curve"][-1] == [card["training"]["steps"], card["training"]["final_loss"]]
    seeds = {card["training"]["seed"], card["classifier"]["seed"]}
    assert card["evaluation"]["seed"] not in seeds


def test_card_for_people_agrees_with_the_card_for_programs() -> None:
    text = (DIGITS_FOLDER / "CARD.md").read_text(encoding="utf-8")
    evaluation = read_card()["evaluation"]
    for figure in (f"{evaluation['class_accuracy']:.1%}", f"{evaluation['fid_small']:.3f}"):
        assert f"| {figure} |" in text
