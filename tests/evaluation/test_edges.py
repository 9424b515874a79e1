"""Cached edges: what quantization puts into a cache, against what happens between two steps."""

from __future__ import annotations

import math

import pytest

from qcgraph.compiler.default_pipeline import default_pipeline
from qcgraph.evaluation.edges import CachedEdge, measure_edges
from qcgraph.export.targets import TARGETS
from qcgraph.ir.program import Program
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe


def measured(captured: Program, recipe: Recipe, **options: str) -> tuple[CachedEdge, ...]:
    program = default_pipeline(recipe.override(**options), TARGETS["torch"]).run(captured)
    return measure_edges(program, captured, 0, Progress())


@pytest.mark.slow
def test_fewer_bits_are_noisier_and_change_nothing_else(captured: Program, recipe: Recipe) -> None:
    calibration = recipe.calibration.model_copy(
        update={"trajectories": 16}
    )  # with fewer, values beyond the ranges are all the noise
    recipe = recipe.model_copy(update={"calibration": calibration})
    edges = [measured(captured, recipe, bits=bits, compensate="off")[0] for bits in ("w8a8", "w6a6", "w3a3")]
    assert [edge.name for edge in edges] == ["cache_0"] * 3
    assert edges[0].noise < edges[1].noise < edges[2].noise
    assert edges[1].change == pytest.approx(edges[0].change, rel=1e-5)  # of full precision
    assert edges[2].change == pytest.approx(edges[0].change, rel=1e-5)
    assert edges[0].noise * 2 < edges[1].noise  # two bits are a factor of four in the error


@pytest.mark.slow
def test_there_is_no_edge_without_both(captured: Program, recipe: Recipe) -> None:
    assert measured(captured, recipe, bits="off") == ()
    assert measured(captured, recipe, cache="off") == ()


@pytest.mark.parametrize(("noise", "change", "snr", "safe"), [(0.01, 0.1, 20, True), (0.2, 0.1, -6.02, False)])
def test_an_edge_is_safe_when_it_changes_more_than_its_noise(
    noise: float, change: float, snr: float, safe: bool
) -> None:
    edge = CachedEdge("cache_0", noise, change)
    assert math.isclose(edge.snr, snr, abs_tol=0.01)
    assert edge.is_safe is safe
