"""What corrects the noise prediction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compensation:
    """Variance compensation: after each update the latent becomes ``mean + gain * (latent - mean)``.

    Attributes:
        gains: K per step and channel.
        means: mu per step and channel.
        clamped: how many gains were clamped.
        drifts: per step and channel, the standard deviation that the compiled denoiser reached over the one that would
            need no correction, all earlier steps corrected.
    """

    gains: tuple[tuple[float, ...], ...]
    means: tuple[tuple[float, ...], ...]
    clamped: int
    drifts: tuple[tuple[float, ...], ...]

    @property
    def largest_drift(self) -> float:
        """How far a drift is from 1 at most."""
        return max(abs(drift - 1) for row in self.drifts for drift in row)
