"""Classify digits with a small network that judges generated images: class accuracy, and features for FID-small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcgraph.models.checkpoint import load_weights
from qcgraph.models.digits_data import CLASS_COUNT, load_digits
from qcgraph.models.files import CLASSIFIER_FILE, DIGITS_FOLDER
from qcgraph.models.judge import Judge


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers on images [N, 1, 8, 8] in [-1, 1]."""

    feature_count = 64

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),  # [N, 24, 8, 8]
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),  # [N, 48, 4, 4]
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1),  # [N, 64, 4, 4]
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, self.feature_count),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.feature_count, CLASS_COUNT)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits [N, 10] of images [N, 1, 8, 8]."""
        return self.head(self.trunk(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, 64] that FID-small compares, of images [N, 1, 8, 8] in [-1, 1]."""
        return self.trunk(images)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images [N, 1, 8, 8] classified as their label [N], between 0 and 1."""
        return float((self(images).argmax(dim=1) == labels).double().mean())


def load_classifier(path: Path = DIGITS_FOLDER / CLASSIFIER_FILE) -> DigitsClassifier:
    """Load a classifier, frozen, in evaluation mode and float32; by default the one that ships with the package.

    Args:
        path: a safetensors file of its weights, of any float type.

    Raises:
        UsageError: the file is missing, unreadable, or holds other weights.
    """
    with torch.device("meta"):
        classifier = DigitsClassifier()
    load_weights(classifier, path, hint="the file must be one that tools/train_digits.py wrote")
    return classifier.eval().requires_grad_(False)


def digits_judge(path: Path = DIGITS_FOLDER / CLASSIFIER_FILE) -> Judge:
    """Make a judge of digit images from a classifier and all of scikit-learn's digits.

    Args:
        path: as for :func:`load_classifier`.

    Raises:
        UsageError: as for :func:`load_classifier`.
    """
    real, _ = load_digits()
    classifier = load_classifier(path)

    def features(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return classifier.features(torch.tensor(images)).numpy()

    def classify(images: NDArray[np.float32]) -> NDArray[np.int64]:
        return classifier(torch.tensor(images)).argmax(dim=1).numpy()

    return Judge(features, classify, classifier.feature_count, real)
