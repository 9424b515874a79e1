"""What judges the samples of a model: a feature network, a classifier and real images. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Judge:
    """What the samples of a model are judged with.

    The callables take and return NumPy arrays, whatever computes behind them, and take any number of images at once.

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
