"""Facts about the correction of the noise prediction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compensation:
    """Variance compensation: the part u of the next latent that a step determines becomes ``mean + gain * (u - mean)``.

    It is the whole latent, except where the update also has contributions of earlier steps; these are not in u.

    Attributes:
        gains: K by step and channel.
        means: the mean of u, by step and channel: that of the latent in full precision, less that of the contributions
            of earlier steps.
        clamped: the number of clamped gains.
        largest_drift: the largest distance from 1, over steps and channels, of the ratio of two standard deviations:
            that of the compiled denoiser, with all earlier steps corrected, over the one that needs no correction.
    """

    gains: tuple[tuple[float, ...], ...]
    means: tuple[tuple[float, ...], ...]
    clamped: int
    largest_drift: float

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        gains = [gain for row in self.gains for gain in row]
        bounds = f"{min(gains):.4f} .. {max(gains):.4f}"
        return [f"compensation gains {bounds} over {len(self.gains)} steps, {self.clamped} clamped"]
