"""Turn the corrections of latents into tables of a corrected noise prediction. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcgraph.plan.steps import Update

Table = npt.NDArray[np.float64]


def prediction_tables(gains: Table, means: Table, updates: Sequence[Update]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the coefficients of the noise prediction that corrects what a step adds to the next latent.

    To make a * u + b of u = c1 * x + c2 * eps, with a = K and b = (1 - K) * mu, is the same update of a corrected
    prediction: eps' = a * eps + ((a - 1) * c1 / c2) * x + b / c2.

    Args:
        gains: K by step and channel, f64[S,C].
        means: mu by step and channel, f64[S,C].
        updates: the S updates.

    Returns:
        ``gain``, ``slope`` and ``offset``, each f32[S,C]; exactly 1, 0 and 0 where K = 1.
    """
    latent = np.array([update.latent for update in updates])[:, None]
    weight = np.array([update.noise_prediction for update in updates])[:, None]
    active = gains != 1
    safe = np.where(active, weight, 1.0)
    tables = {
        "gain": gains,
        "slope": np.where(active, (gains - 1) * latent / safe, 0.0),
        "offset": np.where(active, (1 - gains) * means / safe, 0.0),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}
