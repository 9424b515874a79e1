"""The noise of sampling, from NumPy's generator in every backend: the same seed is the same noise everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError

Array = npt.NDArray[np.float32]
MOST_SEEDS = 2**64  # seeds are kept beside the samples, as integers of 64 bits


class Noise:
    """Initial and per-step noise of a few samples, each with a generator of its own.

    Sample ``i`` draws from ``default_rng([seed, i])``: its noise does not depend on the batch it runs in.

    Args:
        seed: 0 to 2^64 - 1.
        indices: the indices of the samples.
        shape: the shape of one latent.

    Raises:
        UsageError: the seed is no integer, negative or too large.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        check_seed(seed)
        self._generators = [np.random.default_rng([seed, index]) for index in indices]
        self._shape = shape

    def initial(self) -> Array:
        """The latents that sampling starts from, f32[B,*shape]; call it first, and once."""
        return self.next()

    def next(self) -> Array:
        """The noise of the next stochastic update, f32[B,*shape]."""
        draws = [generator.standard_normal(self._shape, dtype=np.float32) for generator in self._generators]
        return np.stack(draws)


def check_seed(seed: int) -> None:
    """Refuse a seed that is no integer of 64 bits.

    Raises:
        UsageError: says in what way.
    """
    hint = "a seed is 0 or larger, and smaller than 2^64"
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise UsageError(f"seed {seed!r:.60} is no integer", hint=hint)
    if seed < 0:
        raise UsageError(f"seed {seed} is negative" if seed > -MOST_SEEDS else "the seed is negative", hint=hint)
    if seed >= MOST_SEEDS:
        raise UsageError("the seed is too large", hint=hint)
