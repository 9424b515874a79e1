"""By what the channels of activations are divided."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EqualizedActivation:
    """The planned shift and division of the channels of an activation x, which becomes (x - offset) / factor.

    Attributes:
        sites: the sites (by name) that read it.
        offsets: one a channel.
        factors: one a channel.
    """

    sites: tuple[str, ...]
    offsets: tuple[float, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class EqualizationPlan:
    """The activations whose channels are to share a range, in the order of the graph."""

    activations: tuple[EqualizedActivation, ...]

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        factors = [factor for item in self.activations for factor in item.factors]
        sites = sum(len(item.sites) for item in self.activations)
        return [f"equalization planned of {sites} sites, {_bounds(factors)}"] if factors else []


@dataclass(frozen=True)
class Equalization:
    """What the channels of activations were divided by, so that they share a range.

    Attributes:
        inputs: per site (by name), the factors of what enters it, with which its weight was multiplied.
        outputs: the factors by which the rows of a site were divided, where its result makes such an activation.
    """

    inputs: dict[str, tuple[float, ...]]
    outputs: dict[str, tuple[float, ...]]

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        factors = [factor for site in self.inputs.values() for factor in site]
        return [f"equalization of {len(self.inputs)} sites, {_bounds(factors)}"] if factors else []


def _bounds(factors: list[float]) -> str:
    return f"factors {min(factors):.3g} .. {max(factors):.3g}"
