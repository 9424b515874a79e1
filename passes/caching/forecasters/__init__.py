"""The forecasters, by name: how cached values are forecast at reusing steps.

A forecast is an affine function of the last computed values of a cached tensor (see passes/caching/insert_forecast),
with gains on D_r, D_r', D_r'' and an offset. A new forecaster is a file beside this one and an entry in `FORECASTERS`;
forecasters of other distributions are entry points of the group ``qcgraph.forecasters``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcgraph.errors import UsageError, closest
from qcgraph.extensions import Extensions
from qcgraph.passes.caching.forecasters.affine import AFFINE
from qcgraph.passes.caching.forecasters.dec import DEC
from qcgraph.passes.caching.forecasters.forecaster import Chosen, Fit, Forecaster, Samples, fit
from qcgraph.passes.caching.forecasters.moments import Moments, gains_of
from qcgraph.passes.caching.forecasters.reuse import REUSE
from qcgraph.passes.caching.forecasters.taylor import TAYLOR

FORECASTERS: Mapping[str, Forecaster] = {forecaster.name: forecaster for forecaster in (AFFINE, TAYLOR, DEC, REUSE)}


def _problem_of(name: str, found: Any) -> str:
    if not isinstance(found, Forecaster):
        return f"is a {type(found).__name__}, not a qcgraph.passes.caching.forecasters.Forecaster"
    return "" if found.name == name else f"is called {found.name!r}"


EXTENSIONS = Extensions("qcgraph.forecasters", "forecaster", lambda: FORECASTERS, _problem_of)


def known_forecasters() -> dict[str, str]:
    """Return a description of every forecaster, by name, without an import of other distributions."""
    own = {name: forecaster.description for name, forecaster in FORECASTERS.items()}
    return own | {name: f"of {offer.distribution}" for name, offer in EXTENSIONS.offers().items()}


def forecaster_named(name: str) -> Forecaster:
    """Return a forecaster by its name.

    Raises:
        UsageError: no forecaster has this name, or the forecaster of another distribution is broken.
    """
    found = FORECASTERS.get(name) or EXTENSIONS.load(name)
    if found is None:
        raise UsageError(f"unknown forecaster {name!r}", hint=closest(name, known_forecasters()))
    return found


__all__ = [
    "FORECASTERS",
    "Chosen",
    "Fit",
    "Forecaster",
    "Moments",
    "Samples",
    "fit",
    "forecaster_named",
    "gains_of",
    "known_forecasters",
]
