"""Roles of variants and tensors. No other place holds a role: no name is parsed for one, no position is counted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TensorRole(StrEnum):
    """The purpose of an input or output of a variant.

    Attributes:
        STATE: the latent, which every step changes.
        STEP: differs from step to step and is the same for all requests, such as the timestep.
        REQUEST: a condition, which is constant over the steps of a request and differs between requests.
        GROUP: the index of the timestep group, which selects activation scales.
        ROW: the index of the row in tables of coefficients.
        CACHE: a cached value, as an output of the step that computes it and as an input of the steps that reuse it.
        MODULATION: values that depend on STEP and REQUEST inputs alone and are computed ahead of the steps.
        PREDICTION: the noise prediction.
    """

    STATE = "state"
    STEP = "step"
    REQUEST = "request"
    GROUP = "group"
    ROW = "row"
    CACHE = "cache"
    MODULATION = "modulation"
    PREDICTION = "prediction"


class VariantKind(StrEnum):
    """The effect of a variant on a step."""

    COMPUTES = "computes"
    REUSES = "reuses"
    HALF = "half"
    PREPARES = "prepares"


@dataclass(frozen=True)
class VariantRole:
    """The purpose of a variant.

    Attributes:
        kind: COMPUTES runs the whole network and gives the cached values; REUSES takes cached values in place of a part
            of it; HALF computes one half of guidance and restores the other one, so its batch holds both; PREPARES
            computes the modulation of another variant.
        of: the variant whose modulation this variant computes; empty unless it prepares one.
    """

    kind: VariantKind
    of: str = ""


COMPUTES = VariantRole(VariantKind.COMPUTES)
REUSES = VariantRole(VariantKind.REUSES)
HALF = VariantRole(VariantKind.HALF)


def prepares(variant: str) -> VariantRole:
    """Return the role of a variant that computes the modulation of ``variant``."""
    return VariantRole(VariantKind.PREPARES, variant)
