"""Facts about the factors that divide the channels of activations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EqualizedActivation:
    """The planned shift and division of the channels of an activation x, which becomes (x - offset) / factor.

    Attributes:
        sites: the sites (by name) that read it.
        offsets: the offset of each channel.
        factors: the factor of each channel.
    """

    sites: tuple[str, ...]
    offsets: tuple[float, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class EqualizationPlan:
    """The activations whose channels will be made to share a range, in the order of the graph."""

    activations: tuple[EqualizedActivation, ...]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        factors = [factor for item in self.activations for factor in item.factors]
        sites = sum(len(item.sites) for item in self.activations)
        return [f"equalization planned of {sites} sites, {_bounds(factors)}"] if factors else []


@dataclass(frozen=True)
class Equalization:
    """The factors that the channels of activations were divided by, so that they share a range.

    Attributes:
        inputs: by site, the factors of its input, with which its weight was multiplied.
        outputs: by site, the factors by which its rows were divided, where its result makes such an activation.
    """

    inputs: dict[str, tuple[float, ...]]
    outputs: dict[str, tuple[float, ...]]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        factors = [factor for site in self.inputs.values() for factor in site]
        return [f"equalization of {len(self.inputs)} sites, {_bounds(factors)}"] if factors else []


def _bounds(factors: list[float]) -> str:
    return f"factors {min(factors):.3g} .. {max(factors):.3g}"
