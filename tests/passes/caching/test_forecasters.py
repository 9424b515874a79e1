"""The table of forecasters: what it says of each is so, and the table is what options and recipes know."""

from __future__ import annotations

import pytest
import torch

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.errors import UsageError
from qcgraph.export.targets import TARGETS
from qcgraph.passes.caching.forecasters import (
    FORECASTERS,
    Forecaster,
    Moments,
    fit,
    forecaster_named,
    known_forecasters,
)
from qcgraph.pipeline import make_pass
from qcgraph.recipe import Recipe


@pytest.mark.parametrize("forecaster", FORECASTERS.values(), ids=FORECASTERS)
def test_it_looks_back_no_further_than_it_says(forecaster: Forecaster) -> None:
    """Of four values, the gains on those beyond its history are zero, and that on the last within it is not."""
    generator = torch.Generator().manual_seed(0)
    folds = []
    for _ in range(2):
        values = [torch.randn(40, 3, generator=generator) for _ in range(forecaster.history)]
        moments = Moments(forecaster.history, 3)
        moments.add(values, sum(values) + 0.1 * torch.randn(40, 3, generator=generator))
        folds.append(moments)
    found = fit(forecaster, folds, 0.7, values=forecaster.history)
    assert found.gains.shape == (forecaster.history + 1, 3)
    assert found.gains[forecaster.history - 1].all()
    assert forecaster_named(forecaster.name) is forecaster
    assert known_forecasters()[forecaster.name] == forecaster.description


@pytest.mark.parametrize("forecaster", FORECASTERS)
def test_a_recipe_asks_for_it_by_name(forecaster: str) -> None:
    recipe = Recipe().override(bits="off", cache="budget=0.4", forecast=forecaster)
    passes = {pass_.name: pass_ for pass_ in default_pipeline(recipe, TARGETS["torch"])}
    assert passes["plan-cache"].history == FORECASTERS[forecaster].history  # type: ignore[attr-defined]
    assert ("fit-forecast" in passes) == (forecaster != "reuse")


def test_an_unknown_name_is_refused_before_anything_runs() -> None:
    recipe = Recipe().override(cache="interval=3", forecast="afine")
    with pytest.raises(UsageError, match="unknown forecaster 'afine'") as raised:
        default_pipeline(recipe, TARGETS["torch"])
    assert raised.value.where == "cache.forecast"
    assert "did you mean 'affine'" in str(raised.value.hint)
    with pytest.raises(UsageError, match="kind 'afine' is not affine, taylor, dec, reuse") as raised:
        make_pass("fit-forecast", {"kind": "afine"})
    assert "did you mean 'affine'" in str(raised.value.hint)
