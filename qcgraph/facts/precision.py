"""The type of what is not quantized."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """The plan of the floating-point type of what is not quantized.

    Attributes:
        dtype: ``f16``, ``bf16`` or ``f32``.
        largest: the largest magnitude that was seen on calibration trajectories.
        wide: per variant, the names of the nodes that stay in float32, in the order of the graph.
    """

    dtype: str
    largest: float
    wide: dict[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """Return the lines that the text of a program has of it."""
        return [f"computed in {self.dtype}, values up to {self.largest:.3g}"]


@dataclass(frozen=True)
class ComputeType:
    """The floating-point type that the graphs compute in what is not quantized.

    Attributes:
        dtype: ``f16``, ``bf16`` or ``f32``.
    """

    dtype: str

    def lines(self) -> list[str]:
        """Return no line: the type stands at every value of the graphs."""
        return []
