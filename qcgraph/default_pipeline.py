"""The default pipeline, on one page: what runs, in which order, and why there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcgraph.export.targets import Target
from qcgraph.pipeline import Pass, Pipeline, make_pass
from qcgraph.recipe import Recipe

HISTORY = {"reuse": 1, "dec": 1, "taylor": 2, "affine": 3}  # computed values that each forecast looks back to


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
    quantized = recipe.is_quantized
    compensated = recipe.compensation.mode != "off"

    if quantized and recipe.quantization.equalize:
        # Before there are variants: it changes the constants that all of them will share.
        yield _pass(
            "equalize",
            weight_bits=round(recipe.bit_budget or recipe.weight_bits),
            activation_bits=round(recipe.bit_budget or recipe.activation_bits),
            seed=recipe.calibration.seed,
        )
    if recipe.is_cached:
        # Before calibration: ranges and errors are only worth observing on the steps, and in the graphs, that will run.
        yield from _caching(recipe, quantized=quantized)
    if quantized or compensated or recipe.forecast != "reuse":
        # Still in full precision, so that one run gives the reference and the other the ranges of the cached path.
        yield _calibrate(recipe, quantized=quantized)
    if quantized:
        yield from _quantizing(recipe, target)
    if recipe.is_cached:
        # On the quantized model: a step that reuses carries on the noise of quantization.
        yield from _settling(recipe, quantized=quantized)
    if compensated:
        # Last: what is compensated is the drift that quantization and caching leave together.
        form = "masked" if recipe.compensation.mode == "vc-masked" else "ratio"
        yield _pass("fit-compensation", clamp=recipe.compensation.clamp, form=form)
        yield _pass("insert-compensation")
    if recipe.modulation.hoist:
        # When all is decided: it changes no value, and what observes and fits before need not prepare any.
        yield _pass("hoist-adaln")


def _calibrate(recipe: Recipe, *, quantized: bool) -> Pass:
    calibration = recipe.calibration
    counts = {"trajectories": calibration.trajectories, "samples": calibration.samples}
    return _pass(
        "calibrate",
        seed=calibration.seed,
        selection=calibration.selection if quantized else "none",
        **{name: count for name, count in counts.items() if count != "auto"},
    )


def _quantizing(recipe: Recipe, target: Target) -> Iterator[Pass]:
    """What is quantized and how, then the quantizers."""
    asked, seed = recipe.quantization, recipe.calibration.seed
    regions = asked.regions and not target.constant_scales
    # Groups before scales: a scale belongs to a group.
    yield _pass("group-timesteps", groups=asked.groups, strategy=asked.grouping)
    yield _pass(
        "plan-quant",
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        symmetric=target.activation == "symmetric",
        weight_high=target.weight_high,
    )
    if recipe.bit_budget is not None:
        # Before scales are searched, which depend on the bits.
        yield _pass(
            "allocate-bits",
            budget=recipe.bit_budget,
            rounding=asked.rounding,
            groups=not target.constant_scales,
            seed=seed,
        )
    if asked.scales == "fisher" or regions:
        yield _pass("search-scales", objective=asked.scales, regions=regions, seed=seed)
    if asked.rounding != "nearest":
        # After the scales: weights are rounded for activations as they will be.
        yield _pass("round-weights", method=asked.rounding)
    if asked.correction != "off":
        # While weights are still whole: what is fitted is the difference that quantizing them makes.
        yield _pass("fit-requantization", sites=asked.correction)
    if asked.attention:
        # After what is decided on the model as it is; before insert-qdq, which drops the calibration set.
        yield _pass("split-attention")
        yield _pass(
            "quantize-attention",
            bits=round(recipe.bit_budget or recipe.activation_bits),
            symmetric=target.activation == "symmetric",
            high=target.weight_high,
            objective=asked.scales,
            regions=regions,
            seed=seed,
        )
    yield _pass("insert-qdq")


def _caching(recipe: Recipe, *, quantized: bool) -> Iterator[Pass]:
    """What is cached, and the steps as far as they are known before calibration, which should see about these."""
    yield _pass(
        "plan-cache",
        **_spacing(recipe),
        blocks=recipe.cache.blocks,
        what=recipe.cache.what,
        history=HISTORY[recipe.forecast],
        memory=recipe.cache.memory,
    )
    yield _pass("insert-cache")
    if recipe.followed:
        yield _pass("follow-plan", plan=recipe.followed)
    if recipe.is_searched:
        # With quantization it is a draft.
        yield _schedule(recipe, final=not quantized)


def _settling(recipe: Recipe, *, quantized: bool) -> Iterator[Pass]:
    """The schedule that will run, and the forecasts that go with it."""
    if recipe.is_searched and quantized:
        # Again, because errors are others now, and because costs can be measured.
        yield _schedule(recipe, final=True)
    if recipe.followed:
        # What is given is not looked for; what it does is told all the same.
        yield _pass("rehearse-steps", forecast=recipe.forecast, seed=recipe.calibration.seed)
    if recipe.is_searched or recipe.followed or "+" in recipe.cache.blocks:
        # Only now is it known which of the variants the schedule uses.
        yield _pass("drop-variants")
    if recipe.forecast != "reuse":
        # Closed loop: what a forecast amplifies has to be there when it is fitted.
        yield _pass("insert-forecast")
        yield _pass("fit-forecast", kind=recipe.forecast)


def _spacing(recipe: Recipe) -> dict[str, Any]:
    """The draft of a schedule; one that is given needs none, but the variants that a draft brings about."""
    if recipe.cache_budget is not None:
        return {"budget": recipe.cache_budget}
    return {"interval": recipe.cache_interval} if recipe.cache_interval else {}


def _schedule(recipe: Recipe, *, final: bool) -> Pass:
    seed, budget = recipe.calibration.seed, recipe.cache_budget
    if budget is None:
        return _pass("plan-steps", strategy="dps", interval=recipe.cache_interval, seed=seed)
    return _pass(
        "plan-steps",
        budget=budget,
        forecast=recipe.forecast,
        measured=final and recipe.cache.cost == "latency",
        rounds=recipe.cache.rounds if final else 0,
        seed=seed,
    )


def _pass(name: str, **options: Any) -> Pass:
    return make_pass(name, options)
