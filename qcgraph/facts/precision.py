"""The type of what is not quantized."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """The floating-point type of what is not quantized, where it is not float32.

    Attributes:
        dtype: ``f16`` or ``bf16``.
        largest: the largest magnitude that was seen on calibration trajectories.
    """

    dtype: str
    largest: float
