"""What variants and tensors are for. Nothing else tells it: no name is taken apart, no position is counted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TensorRole(StrEnum):
    """What an input or output of a variant is for.

    Attributes:
        STATE: the latent, which every step changes.
        STEP: differs from step to step and is the same for all requests, such as the timestep.
        REQUEST: a condition, which is constant over the steps of a request and differs between requests.
        GROUP: the index of the timestep group, which selects activation scales.
        ROW: the index of the row in tables of coefficients.
        CACHE: a cached value, as an output of the step that computes it and as an input of those that reuse it.
        MODULATION: what depends on STEP and REQUEST inputs alone and is computed ahead of the steps.
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
    """What running a variant does for a step."""

    COMPUTES = "computes"
    REUSES = "reuses"
    HALF = "half"
    PREPARES = "prepares"


@dataclass(frozen=True)
class VariantRole:
    """What a variant is for.

    Attributes:
        kind: COMPUTES runs the whole network and gives the cached values; REUSES takes cached values in the place of a
            part of it; HALF computes one half of guidance and restores the other one, so its batch holds both;
            PREPARES computes the modulation of another variant.
        of: the variant whose modulation it computes; empty unless it prepares one.
    """

    kind: VariantKind
    of: str = ""


COMPUTES = VariantRole(VariantKind.COMPUTES)
REUSES = VariantRole(VariantKind.REUSES)
HALF = VariantRole(VariantKind.HALF)


def prepares(variant: str) -> VariantRole:
    """Return the role of the variant that computes the modulation of another one."""
    return VariantRole(VariantKind.PREPARES, variant)
