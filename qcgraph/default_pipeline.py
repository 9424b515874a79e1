"""The default pipeline, on one page: what runs, in which order, and why there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcgraph.export.targets import Target
from qcgraph.pipeline import Pass, Pipeline, make_pass
from qcgraph.recipe import Recipe


def default_pipeline(recipe: Recipe, target: Target) -> Pipeline:
    """The passes a recipe asks for, then the legalization of its target.

    Raises:
        UsageError: the recipe's own pipeline text is wrong.
    """
    if recipe.pipeline.passes:
        return Pipeline.parse(recipe.pipeline.passes)
    legalization = Pipeline.parse(target.legalize) if target.legalize else Pipeline(())
    return Pipeline((*_passes(recipe, target), *legalization))


def _passes(recipe: Recipe, target: Target) -> Iterator[Pass]:
    cached = recipe.cache_interval is not None
    quantized = recipe.weight_bits is not None
    compensated = recipe.compensation.mode == "vc"

    if cached:
        # First of all: ranges and errors are only worth observing on the steps, and in the graphs, that will run.
        yield _pass("plan-cache", interval=recipe.cache_interval, blocks=recipe.cache.blocks)
        yield _pass("insert-cache")
    if quantized or compensated:
        # Still in full precision, so that one run gives the reference and the other the ranges of the cached path.
        count = recipe.calibration.trajectories
        yield _pass("calibrate", trajectories=None if count == "auto" else count, seed=recipe.calibration.seed)
    if quantized:
        # Groups before scales: a scale belongs to a group.
        yield _pass("group-timesteps", groups=recipe.quantization.groups, strategy=recipe.quantization.grouping)
        yield _pass(
            "plan-quant",
            weight_bits=recipe.weight_bits,
            activation_bits=recipe.activation_bits,
            symmetric=target.activation == "symmetric",
            weight_high=target.weight_high,
        )
        yield _pass("insert-qdq")
    if compensated:
        # Last: what is compensated is the drift that quantization and caching leave together.
        yield _pass("fit-compensation", clamp=recipe.compensation.clamp)
        yield _pass("insert-compensation")


def _pass(name: str, **options: Any) -> Pass:
    return make_pass(name, options)
