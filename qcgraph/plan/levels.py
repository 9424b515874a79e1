"""Signal and noise levels of a process at timestep values, and the first-order update between two of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcgraph.plan.schedulers import make_scheduler
from qcgraph.plan.spec import NoiseSchedule
from qcgraph.plan.steps import Update

Levels = npt.NDArray[np.float64]
CLEAN = (1.0, 0.0)  # signal and noise level of a finished image


def levels(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[Levels, Levels]:
    """Return alpha and sigma at timestep values, each f64[n]: a latent there is ``alpha * x0 + sigma * noise``.

    For a diffusion, alpha is the square root of the cumulative product of ``1 - beta``, and sigma that of one less it;
    for a flow, sigma is the timestep over the number of training timesteps, and alpha is one less it.

    Args:
        schedule: the noise schedule of the model.
        timesteps: timestep values; between two training timesteps the cumulative product is interpolated.
    """
    values = np.asarray(timesteps, dtype=np.float64)
    if schedule.is_flow:
        sigma = values / schedule.train_steps
        return 1 - sigma, sigma
    cumulative = np.asarray(make_scheduler("ddim", schedule).alphas_cumprod, dtype=np.float64)
    kept = np.interp(values, np.arange(len(cumulative)), cumulative)
    return np.sqrt(kept), np.sqrt(1 - kept)


def first_order(schedule: NoiseSchedule, here: tuple[float, float], there: tuple[float, float]) -> Update:
    """Return the update that keeps x0 and the noise as they are predicted now: a step of DDIM, or of Euler for a flow.

    With x0 and noise as linear functions of latent and prediction (Salimans and Ho, 2022, arXiv 2202.00512, for v), the
    next latent is ``alpha' * x0 + sigma' * noise`` (Song et al., 2021, arXiv 2010.02502, equation 12, for eta = 0).

    Args:
        schedule: the noise schedule of the model, for the type of its prediction.
        here: alpha and sigma of the latent.
        there: alpha and sigma of the next latent.
    """
    alpha, sigma = here
    clean, noise = {
        "epsilon": ((1 / alpha, -sigma / alpha) if alpha else (0.0, 0.0), (0.0, 1.0)),
        "v_prediction": ((alpha, -sigma), (sigma, alpha)),
    }.get(schedule.prediction, ((1.0, -sigma), (1.0, alpha)))
    signal, left = there
    latent, prediction = (signal * one + left * other for one, other in zip(clean, noise, strict=True))
    return Update(float(latent), float(prediction))
