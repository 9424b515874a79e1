"""The noise of sampling, from NumPy's generator in every backend: equal seeds give equal noise everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcgraph.errors import UsageError

Array = npt.NDArray[np.float32]
MOST_SEEDS = 2**64  # seeds are stored beside the samples, as integers of 64 bits


class Noise:
    """Initial and per-step noise of some samples, each with a generator of its own.

    Sample ``i`` draws from ``default_rng([seed, i])``: its noise does not depend on the batch it runs in.

    Args:
        seed: the seed, 0 to 2^64 - 1.
        indices: the indices of the samples.
        shape: the shape of one latent.

    Raises:
        UsageError: the seed is not an integer, negative or too large.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        check_seed(seed)
        self._generators = [np.random.default_rng([seed, index]) for index in indices]
        self._shape = shape

    def initial(self) -> Array:
        """Return the latents that sampling starts from, f32[B,*shape]; call it first, and once."""
        return self.next()

    def next(self) -> Array:
        """Return the noise of the next stochastic update, f32[B,*shape]."""
        draws = [generator.standard_normal(self._shape, dtype=np.float32) for generator in self._generators]
        return np.stack(draws)


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a 64-bit integer of at least 0.

    Raises:
        UsageError: the seed is refused; the message says why.
    """
    hint = "a seed is 0 or larger, and smaller than 2^64"
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise UsageError(f"seed {seed!r:.60} is no integer", hint=hint)
    if seed < 0:
        raise UsageError(f"seed {seed} is negative" if seed > -MOST_SEEDS else "the seed is negative", hint=hint)
    if seed >= MOST_SEEDS:
        raise UsageError("the seed is too large", hint=hint)
