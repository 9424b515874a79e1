"""Judge the samples of a model by a feature network, a classifier and real images; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Judge:
    """The judge of a model's samples.

    The callables take and return NumPy arrays, whatever library computes them, and accept any number of images.

    Attributes:
        features: images f32[N,C,H,W] -> features f32[N,F].
        classify: images f32[N,C,H,W] -> class i64[N].
        feature_count: F.
        real: real images f32[M,C,H,W] of the same kind, in [-1, 1].
    """

    features: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    classify: Callable[[NDArray[np.float32]], NDArray[np.int64]]
    feature_count: int
    real: NDArray[np.float32]
