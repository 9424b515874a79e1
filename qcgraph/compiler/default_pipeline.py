"""Build the default pipeline, on one page: its passes, their order, and the reason for every place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcgraph.errors import UsageError
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import TARGETS, Target
from qcgraph.export.tensorrt.provider import LIBRARIES
from qcgraph.passes.caching.forecasters import Forecaster, forecaster_named
from qcgraph.passes.caching.plan_cache import GUIDANCE
from qcgraph.pipeline import Pass, Pipeline, make_pass
from qcgraph.pipeline.calibration_budget import CALIBRATION_LIMITS
from qcgraph.recipe import Recipe


def default_pipeline(recipe: Recipe, target: Target) -> Pipeline:
    """Return the passes of a recipe, its own or the default ones, and after them the missing passes of its target.

    Raises:
        UsageError: the pipeline text of the recipe is wrong, or the target does not support what the recipe asks for.
    """
    chosen = _own_passes(recipe) if recipe.pipeline.passes else Pipeline(tuple(_passes(recipe, target)))
    return Pipeline((*chosen, *_lacking(chosen, recipe, target)))


def target_notes(recipe: Recipe, target: Target) -> tuple[str, ...]:
    """Return notes for the report on settings of the recipe that the target or a pipeline of its own overrules.

    Raises:
        UsageError: see `default_pipeline`.
    """
    if recipe.pipeline.passes:
        return tuple(_own_pipeline_notes(recipe, target))
    notes = [*_measuring_notes(recipe, target), *_solver_notes(recipe)]
    if not recipe.is_quantized:
        return tuple(notes)
    notes += _calibration_notes(recipe)
    asked = recipe.quantization
    could_have_regions = recipe.has_low_bits or asked.attention
    if asked.regions == "auto" and target.constant_scales and could_have_regions:
        notes.append(f"{target.name} takes constant scales: no activation has two regions")
    if recipe.bit_budget is not None and target.constant_scales:
        notes.append(f"{target.name} takes constant scales: an activation has the same bits in all timestep groups")
    if asked.attention and target.runtime in LIBRARIES:
        notes.append("attention of quantized products is not fused: TensorRT has kernels for all of it in 16 bits only")
    return tuple(notes)


def _own_pipeline_notes(recipe: Recipe, target: Target) -> Iterator[str]:
    """Yield notes on the passes that the target adds to a recipe's pipeline, and on settings that have no effect."""
    if added := ", ".join(pass_.name for pass_ in _lacking(_own_passes(recipe), recipe, target)):
        yield f"after the passes of the recipe come those that {target.name} asks for: {added}"
    if idle := recipe.overruled:
        yield f"pipeline.passes replaces the default passes, which alone read {', '.join(idle)}: without effect here"


def _own_passes(recipe: Recipe) -> Pipeline:
    """Return the pipeline of the text in a recipe.

    Raises:
        UsageError: the text is wrong; the error names the key of the recipe.
    """
    try:
        return Pipeline.parse(recipe.pipeline.passes)
    except UsageError as error:
        where = f"pipeline.passes, {error.where}" if error.where else "pipeline.passes"
        raise UsageError(error.message, where=where, hint=error.hint) from error


def _measuring_notes(recipe: Recipe, target: Target) -> Iterator[str]:
    """Yield a note if the steps are planned by milliseconds of another runtime than the target's own."""
    measuring = runtime_for(target, "f32")
    if recipe.cache_budget is not None and recipe.cache.cost == "latency" and measuring.name != target.runtime:
        yield (
            f"the budget counts milliseconds of {measuring.title}, which are not those of {target.runtime}; "
            "cost = macs counts arithmetic instead"
        )


def _solver_notes(recipe: Recipe) -> Iterator[str]:
    """Yield notes on what the solver takes over, and what it cannot do without guidance."""
    if recipe.is_cached_by_solver and not recipe.is_cached:
        yield "without guidance there is no difference of its halves to reuse: every step computes"
    if recipe.is_fitted and recipe.compensation.mode != "off":
        yield "variance is not compensated apart: the fitted updates correct the scale of the latents of every step"


def _calibration_notes(recipe: Recipe) -> Iterator[str]:
    """Yield a note if fewer trajectories are asked for than ranges of activations need."""
    asked, (least, _) = recipe.calibration.trajectories, CALIBRATION_LIMITS
    if asked != "auto" and asked < least:
        number = "1 calibration trajectory" if asked == 1 else f"{asked} calibration trajectories"
        yield f"{number}: with fewer than {least}, images whose values exceed what these showed lose quality"


def _lacking(chosen: Pipeline, recipe: Recipe, target: Target) -> Iterator[Pass]:
    """Return the passes that the target requires and the pipeline lacks; they come last."""
    names = {pass_.name for pass_ in chosen}
    legalization = Pipeline.parse(target.legalize) if target.legalize else Pipeline(())
    yield from (pass_ for pass_ in (*legalization, *_reduced(recipe, target)) if pass_.name not in names)


def _passes(recipe: Recipe, target: Target) -> Iterator[Pass]:
    quantized = recipe.is_quantized
    compensated = recipe.compensation.mode != "off" and not recipe.is_fitted

    if recipe.is_fitted:
        # First: whatever follows is decided on the few steps that will run.
        yield _plan_solver(recipe)
    if quantized and recipe.quantization.equalize and not recipe.is_float8:
        # Before any variants are made: this pass changes constants that all variants will share.
        yield _pass(
            "plan-equalization",
            weight_bits=round(recipe.bit_budget or recipe.weight_bits),
            activation_bits=round(recipe.bit_budget or recipe.activation_bits),
            pair_high=target.pair_high,
            **_sampling(recipe),
        )
        yield _pass("equalize")
    if recipe.is_cached:
        # Before calibration: ranges and errors should be observed on the steps and in the graphs that will run.
        yield from _caching(recipe, quantized=quantized)
    if quantized or compensated or recipe.forecast != "reuse":
        # Still in full precision: one run gives the reference, another gives the ranges of the cached path.
        yield _calibrate(recipe, quantized=quantized)
    if quantized:
        yield from _quantizing(recipe, target)
    if recipe.is_cached:
        # On the quantized model: a reusing step passes the noise of quantization on.
        yield from _settling(recipe, quantized=quantized)
    if compensated:
        # Last: compensation corrects the drift of quantization and caching together.
        form = "masked" if recipe.compensation.mode == "vc-masked" else "ratio"
        yield _pass("fit-compensation", clamp=recipe.compensation.clamp, form=form)
        yield _pass("insert-compensation")
    if recipe.is_fitted:
        # Last but for what changes no value: the coefficients make up for quantization and cache together.
        yield _pass("fit-solver")
    if recipe.modulation.hoist:
        # After all decisions: this pass changes no value, and passes that observe and fit need not run its variant.
        yield _pass("hoist-adaln")


def _reduced(recipe: Recipe, target: Target) -> Iterator[Pass]:
    """Yield the pass that reduces the type of unquantized values; it is last, so that fits and searches use float32."""
    precision = recipe.target.precision
    if precision != "float32" and target.integer_products:
        if precision != "auto":
            raise UsageError(
                f"{target.name} computes what is not quantized in float32, not in {precision}",
                hint="leave precision out, or choose another target (see qcgraph targets)",
            )
        return
    dtype = target.precision if precision == "auto" else precision
    if dtype != "float32":
        yield _pass("plan-precision", dtype=dtype, **_sampling(recipe))
        yield _pass("reduce-precision")


def _plan_solver(recipe: Recipe) -> Pass:
    steps = {} if recipe.fitted_steps is None else {"steps": recipe.fitted_steps}
    return _pass(
        "plan-solver",
        **steps,
        **_reuse(recipe),
        target=recipe.solver.target,
        history=recipe.solver.history,
        **_sampling(recipe),
    )


def _reuse(recipe: Recipe) -> dict[str, Any]:
    """Return the options for steps of one half of guidance."""
    if not (recipe.is_cached_by_solver and recipe.is_cached):
        return {}
    return {"reuse": "guidance", "measured": recipe.cache.cost == "latency"}


def _calibrate(recipe: Recipe, *, quantized: bool) -> Pass:
    calibration = recipe.calibration
    latents = {} if calibration.samples == "auto" else {"latents": calibration.samples}
    selection = calibration.selection if quantized else "none"
    return _pass("calibrate", selection=selection, **latents, **_sampling(recipe))


def _sampling(recipe: Recipe) -> dict[str, int]:
    """Return the options of every pass that samples: the seed, and the number of trajectories if the recipe sets it."""
    asked = recipe.calibration
    return {"seed": asked.seed} | ({} if asked.trajectories == "auto" else {"trajectories": asked.trajectories})


def _quantizing(recipe: Recipe, target: Target) -> Iterator[Pass]:
    """Yield the passes that plan quantization, then those that insert and fit quantizers."""
    asked, seed = recipe.quantization, recipe.calibration.seed
    if recipe.is_float8:
        yield from _quantizing_to_float8(recipe, target)
        return
    regions = _has_regions(recipe, target)
    # Groups come before scales: every scale belongs to a group.
    yield _pass("group-timesteps", groups=asked.groups, strategy=asked.grouping)
    yield _pass(
        "plan-quant",
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        symmetric=target.activation == "symmetric",
        pair_high=target.pair_high,
    )
    if recipe.bit_budget is not None:
        # Before the search for scales, which depends on the bits.
        yield _pass(
            "allocate-bits",
            budget=recipe.bit_budget,
            rounding=asked.rounding,
            groups=not target.constant_scales,
            seed=seed,
        )
    if recipe.searches_scales or (regions and (recipe.has_low_bits or asked.regions is True)):
        objective = "fisher" if recipe.searches_scales else "range"
        yield _pass("search-scales", objective=objective, regions=regions, seed=seed)
    if asked.rounding != "nearest":
        # After the scales: weights are rounded for the quantized activations.
        yield _pass("round-weights", method=asked.rounding)
    if asked.correction != "off":
        # Before weights are quantized: the fitted correction is the difference that quantizing makes.
        yield _pass("fit-requantization", sites=asked.correction)
    if asked.attention:
        # After all decisions on the original model; before insert-qdq, which drops the calibration set.
        yield _pass("split-attention")
        yield _pass(
            "plan-attention",
            bits=round(recipe.bit_budget or recipe.activation_bits),
            symmetric=target.activation == "symmetric",
            high=target.product_high,
            objective="range" if asked.scales == "range" else "fisher",
            regions=regions,
            seed=seed,
        )
        yield _pass("insert-attention-qdq")
    yield _pass("insert-qdq")


def _quantizing_to_float8(recipe: Recipe, target: Target) -> Iterator[Pass]:
    """Yield fewer passes for fp8: its relative precision gains nothing from scales that clip or that channels share."""
    asked = recipe.quantization
    if not target.multiplies_float8 or (target.emits_onnx and recipe.target.precision == "float32"):
        takers = ", ".join(name for name, known in TARGETS.items() if known.multiplies_float8)
        raise UsageError(f"{target.name} does not multiply fp8", hint=f"targets that do, in 16 bits: {takers}")
    if asked.attention:
        raise UsageError("products of attention are not quantized to fp8", hint="leave quantization.attention out")
    yield _pass("group-timesteps", groups=asked.groups, strategy=asked.grouping)
    yield _pass("plan-quant", format="fp8")
    if asked.correction != "off":
        yield _pass("fit-requantization", sites=asked.correction)
    yield _pass("insert-qdq")


def _has_regions(recipe: Recipe, target: Target) -> bool:
    """Return whether activations may have two regions: as the recipe says, by default if the target supports them."""
    asked = recipe.quantization.regions
    if asked is True and target.constant_scales:
        raise UsageError(
            f"{target.name} takes constant scales, and an activation with two regions has none",
            where="quantization.regions",
            hint="leave regions out, or choose another target (see qcgraph targets)",
        )
    return not target.constant_scales if asked == "auto" else asked


def _caching(recipe: Recipe, *, quantized: bool) -> Iterator[Pass]:
    """Yield the passes that plan and insert the cache, with a draft of the schedule if quantization follows.

    Raises:
        UsageError: the schedule is left to a fitted solver, and there is none.
    """
    if recipe.is_cached_by_solver and not recipe.is_fitted:
        raise UsageError(
            "auto is planned with the steps of a fitted solver, and the solver is as-is",
            where="cache.schedule",
            hint="add --solver fitted; or take --cache off, or budget=0.3: the best schedule for the steps of the run",
        )
    yield _pass(
        "plan-cache",
        **_spacing(recipe),
        blocks=GUIDANCE if recipe.is_cached_by_solver else recipe.cache.blocks,
        what=recipe.cache.what,
        history=_forecaster(recipe).history,
        memory=recipe.cache.memory,
    )
    yield _pass("insert-cache")
    if recipe.given_plan:
        yield _pass("apply-plan", plan=recipe.given_plan)
    if recipe.is_searched:
        # With quantization, this schedule is a draft.
        yield _schedule(recipe, final=not quantized)


def _forecaster(recipe: Recipe) -> Forecaster:
    """Return the forecaster that a recipe asks for.

    Raises:
        UsageError: there is no such forecaster.
    """
    try:
        return forecaster_named(recipe.forecast)
    except UsageError as error:
        raise UsageError(error.message, where="cache.forecast", hint=error.hint) from error


def _settling(recipe: Recipe, *, quantized: bool) -> Iterator[Pass]:
    """Yield the passes that fix the final schedule and its forecasts."""
    if recipe.is_searched and quantized:
        # Planned again: quantization changes the errors, and costs can be measured now.
        yield _schedule(recipe, final=True)
    if recipe.given_plan:
        # A given schedule is not searched for, but its effect is measured and reported.
        yield _pass("rehearse-steps", forecast=recipe.forecast, **_sampling(recipe))
    if recipe.is_searched or recipe.given_plan or recipe.is_cached_by_solver or "+" in recipe.cache.blocks:
        # Only now is it known which variants the schedule uses.
        yield _pass("drop-variants")
    if recipe.forecast != "reuse":
        # Closed loop: the fit must see the errors that a forecast amplifies.
        yield _pass("insert-forecast")
        yield _pass("fit-forecast", kind=recipe.forecast)


def _spacing(recipe: Recipe) -> dict[str, Any]:
    """Return the options for a draft of the schedule; a given schedule needs only the variants that a draft creates."""
    if recipe.is_cached_by_solver:
        return {"solver": True}
    if recipe.cache_budget is not None:
        return {"budget": recipe.cache_budget}
    return {"interval": recipe.cache_interval} if recipe.cache_interval else {}


def _schedule(recipe: Recipe, *, final: bool) -> Pass:
    budget = recipe.cache_budget
    if budget is None:
        return _pass("plan-steps", strategy="dps", interval=recipe.cache_interval, **_sampling(recipe))
    return _pass(
        "plan-steps",
        budget=budget,
        forecast=recipe.forecast,
        measured=final and recipe.cache.cost == "latency",
        rounds=recipe.cache.rounds if final else 0,
        **_sampling(recipe),
    )


def _pass(name: str, **options: Any) -> Pass:
    return make_pass(name, options)
