"""Facts about the type of values that are not quantized."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """The plan of the floating-point type of values that are not quantized.

    Attributes:
        dtype: ``f16``, ``bf16`` or ``f32``.
        largest: the largest magnitude on calibration trajectories.
        wide: by variant, the names of the nodes that stay in float32, in the order of the graph.
    """

    dtype: str
    largest: float
    wide: dict[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"computed in {self.dtype}, values up to {self.largest:.3g}"]


@dataclass(frozen=True)
class ComputeType:
    """The floating-point type of values in the graphs that are not quantized.

    Attributes:
        dtype: ``f16``, ``bf16`` or ``f32``.
    """

    dtype: str

    def lines(self) -> list[str]:
        """Return no line, because the text of the graphs shows the type of every value."""
        return []
