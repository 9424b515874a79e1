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
        largest_drift: the largest distance from 1, over steps and channels, of the standard deviation that the compiled
            denoiser reached over the one that would need no correction, all earlier steps corrected.
    """

    gains: tuple[tuple[float, ...], ...]
    means: tuple[tuple[float, ...], ...]
    clamped: int
    largest_drift: float

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        gains = [gain for row in self.gains for gain in row]
        bounds = f"{min(gains):.4f} .. {max(gains):.4f}"
        return [f"compensation gains {bounds} over {len(self.gains)} steps, {self.clamped} clamped"]
