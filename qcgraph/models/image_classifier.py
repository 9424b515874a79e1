"""Classify images with a small network that judges generated images: class accuracy, and features for FID-small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models.checkpoint import load_weights
from qcgraph.models.judge import Judge

REAL_IMAGES = "images"
"""The tensor u8[M,C,H,W] in the file of real images."""

_HINT = "the file must be one that tools/train_dit.py wrote"
_BATCH = 256  # images that are judged at once
_WIDTHS = (32, 64, 128)


class ImageClassifier(nn.Module):
    """Three stages of two convolutions each, for images [N, C, S, S] in [-1, 1] of at least 4 pixels.

    Args:
        channels: C, the number of channels of the images.
        class_count: the number of classes.
    """

    feature_count = 64

    def __init__(self, channels: int, class_count: int) -> None:
        super().__init__()
        stages = []
        for before, width in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            stages += [_convolution(before, width), _convolution(width, width), nn.MaxPool2d(2, ceil_mode=True)]
        self.trunk = nn.Sequential(
            *stages,
            nn.AdaptiveAvgPool2d(1),  # [N, 128, 1, 1]
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(_WIDTHS[-1], self.feature_count),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.feature_count, class_count)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits [N, K] of images [N, C, S, S]."""
        return self.head(self.trunk(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, 64] that FID-small compares, of images [N, C, S, S] in [-1, 1]."""
        return self.trunk(images)


def _convolution(before: int, width: int) -> nn.Sequential:
    """Return a convolution with group norm: unlike batch norm, it judges an image the same in any batch."""
    return nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())


def load_image_classifier(path: Path, channels: int, class_count: int) -> ImageClassifier:
    """Load a classifier, frozen, in evaluation mode and float32.

    Args:
        path: a safetensors file of its weights, of any float type.
        channels: the number of channels of the images.
        class_count: the number of classes.

    Raises:
        UsageError: the file is missing, unreadable, or holds other weights.
    """
    with torch.device("meta"):
        classifier = ImageClassifier(channels, class_count)
    load_weights(classifier, path, hint=_HINT)
    return classifier.eval().requires_grad_(False)


def image_judge(classifier_path: Path, real_path: Path, shape: tuple[int, int, int], class_count: int) -> Judge:
    """Make a judge of images from a classifier and real images that it was not trained on.

    Args:
        classifier_path: as for :func:`load_image_classifier`.
        real_path: a safetensors file with the tensor ``images`` u8[M,C,H,W].
        shape: C, H, W of the images.
        class_count: the number of classes.

    Raises:
        UsageError: a file is missing or unreadable, or has the wrong content.
    """
    classifier = load_image_classifier(classifier_path, shape[0], class_count)
    real = _real_images(real_path, shape)

    def features(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return in_batches(classifier.features, torch.tensor(images)).numpy()

    def classify(images: NDArray[np.float32]) -> NDArray[np.int64]:
        return in_batches(classifier, torch.tensor(images)).argmax(dim=1).numpy()

    return Judge(features, classify, classifier.feature_count, scaled(real).numpy())


def scaled(images: Tensor) -> Tensor:
    """Return u8 pixels as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function to many images, a few hundred at a time."""
    return torch.cat([function(part) for part in images.split(_BATCH)])


def _real_images(path: Path, shape: tuple[int, int, int]) -> Tensor:
    try:
        images = load_file(path).get(REAL_IMAGES)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"cannot read safetensors: {error}", where=str(path), hint="is the file complete?") from error
    if images is None or images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
        raise UsageError(f"it has no {REAL_IMAGES} u8[M,{','.join(map(str, shape))}]", where=str(path), hint=_HINT)
    return images
