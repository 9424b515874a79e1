"""A small classifier of digits: the judge of generated images (class accuracy, features for FID-small)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcgraph.models.digits_data import CLASS_COUNT

CLASSIFIER_FILE = Path(__file__).parent / "digits" / "classifier.safetensors"


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
        """Class logits [N, 10] of images [N, 1, 8, 8]."""
        return self.head(self.trunk(images))

    def features(self, images: Tensor) -> Tensor:
        """The features that FID-small compares, [N, 64], of images [N, 1, 8, 8] in [-1, 1]."""
        return self.trunk(images)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images [N, 1, 8, 8] classified as their label [N], between 0 and 1."""
        return float((self(images).argmax(dim=1) == labels).double().mean())


def load_classifier(path: Path = CLASSIFIER_FILE) -> DigitsClassifier:
    """Loads the classifier that ships with the package, frozen, in evaluation mode, float32.

    Args:
        path: a safetensors file of its weights, of any float type.

    Raises:
        FileNotFoundError: the file is missing.
        RuntimeError: the file holds other weights.
    """
    classifier = DigitsClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)
