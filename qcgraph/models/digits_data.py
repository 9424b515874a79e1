"""Load scikit-learn's handwritten digits in the form that the trained models and their classifiers use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_SHAPE = (1, 8, 8)
CLASS_COUNT = 10


def load_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load all 1797 digits.

    Returns:
        images: [1797, 1, 8, 8], float32 in [-1, 1].
        labels: [1797], int64 in 0 .. 9.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).astype("float32")  # pixels are 0 .. 16
    return images.reshape(-1, *IMAGE_SHAPE), labels.astype("int64")


def split_indices(train_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the digits into a training and a held-out part, with every class in the same proportion.

    Args:
        train_fraction: share of the training part, between 0 and 1, both excluded.
        seed: seed of the shuffle.

    Returns:
        The indices of the training part and of the held-out part, each sorted.

    Raises:
        ValueError: the fraction leaves one of the parts without a class.
    """
    import numpy as np
    from sklearn.model_selection import train_test_split

    _, labels = load_digits()
    train, held_out = train_test_split(
        np.arange(len(labels)), train_size=train_fraction, random_state=seed, stratify=labels
    )
    return np.sort(train), np.sort(held_out)
