"""qcgraph compile: from a model to a bundle."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcgraph.cli.cache_view import cache_fields
from qcgraph.cli.output import (
    JsonOption,
    duration_text,
    print_fields,
    print_heading,
    print_json,
    print_table,
    size_text,
)
from qcgraph.cli.verdict_view import verdict_text
from qcgraph.errors import UsageError

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle
    from qcgraph.bundle.report import CacheReport, CompileReport, EstimateReport, GivenPlan
    from qcgraph.compiler.compilation import CompileResult


def compile_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The name of a model; see qcgraph models.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the bundle.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="A TOML file, or careful, balanced or fast.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="NAME", help="Scheduler, such as ddim or ddpm.")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="W", help="Weight of classifier-free guidance; 1 means none.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="wNaM|fp8|auto=B|auto|off",
            help="Bits of weights and activations, such as w8a8; on average; or the fewest that meet the gate.",
        ),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(metavar="G", help="Timestep groups with activation scales of their own.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="auto|budget=F|interval=N|dps=N|off",
            help="What the steps of a fitted solver reuse, the best cache schedule at a fraction of the cost, or every "
            "N-th step computes and the others reuse.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE|FILE", help="Take the cache schedule of another bundle, or one that you wrote."),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            metavar="fitted[=K]|as-is", help="Fit the updates of fewer steps, K of them; or take the scheduler's own."
        ),
    ] = None,
    solver_target: Annotated[
        str | None,
        typer.Option(metavar="converged|run", help="What a fitted solver follows: the converged run, or your own."),
    ] = None,
    forecast: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="How cached values are forecast, such as affine; see qcgraph passes fit-forecast."
        ),
    ] = None,
    cache_budget: Annotated[
        int | None, typer.Option(metavar="BYTES", help="What cached tensors may take for one image.")
    ] = None,
    hoist_adaln: Annotated[
        bool | None,
        typer.Option("--hoist-adaln/--no-hoist-adaln", help="Compute adaLN modulation ahead of the steps."),
    ] = None,
    compensate: Annotated[str | None, typer.Option(metavar="vc|off", help="Variance compensation.")] = None,
    target: Annotated[str | None, typer.Option(metavar="NAME", help="What to export for; see qcgraph targets.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="Type of what is not quantized; the target decides."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed of the calibration.")] = None,
    gate: Annotated[
        str | None,
        typer.Option(metavar="TERMS", help='Write it only if this holds, for example "psnr>=28,accuracy_drop<=0.01".'),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Switch components off: tgq, mrq, ho, tap, vc, dec, equalize, feedback."),
    ] = None,
    allow_unsafe: Annotated[
        bool, typer.Option("--allow-unsafe", help="Allow a cache that carries more quantization noise than change.")
    ] = False,
    verdict: Annotated[
        bool | None,
        typer.Option("--verdict/--no-verdict", help="Compare the bundle with plain solvers of equal time at the end."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; sample nothing, write nothing.")
    ] = False,
    print_after: Annotated[
        list[str] | None, typer.Option(metavar="PASS|all", help="Print the program after this pass; can be repeated.")
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Stop after this pass, print the program, write nothing.")
    ] = None,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Run the program after every pass.")] = False,
    json: JsonOption = False,
) -> None:
    """Compile a model into a bundle.

    The model is quantized, cached, compensated for both, and exported. Options override the recipe.
    """
    from qcgraph.recipe import Recipe

    if plan is not None and cache is not None:
        raise UsageError("--cache and --plan both decide which steps compute", hint="give one of them")
    resolved = (Recipe.load(recipe) if recipe else Recipe()).override(
        steps=steps,
        scheduler=scheduler,
        guidance=guidance,
        solver=solver,
        solver_target=solver_target,
        bits=bits,
        groups=groups,
        cache=cache,
        forecast=forecast,
        cache_budget=cache_budget,
        hoist_adaln=hoist_adaln,
        compensate=compensate,
        target=target,
        precision=precision,
        seed=seed,
        gate=gate,
        allow_unsafe=allow_unsafe or None,
        verdict=verdict,
    )
    if ablate is not None:
        resolved = resolved.ablated([name.strip() for name in ablate.split(",")])
    from qcgraph.bundle.plan_file import read_plan
    from qcgraph.compiler.compilation import compile_model
    from qcgraph.progress import progress_for

    result = compile_model(
        model,
        resolved,
        output,
        plan=None if plan is None else read_plan(plan),
        force=force,
        stop_after=stop_after,
        verify_each=verify_each,
        print_after=tuple(print_after or ()),
        dry_run=dry_run,
        progress=progress_for(sys.stderr),
        out=sys.stderr if json else sys.stdout,
    )
    if json:
        print_json(result.report.model_dump(mode="json") | {"bundle": str(output) if result.bundle else None})
    elif stop_after:
        if not print_after:
            print(result.program_text)
    else:
        _print_summary(result)


def _print_summary(result: CompileResult) -> None:
    report, bundle = result.report, result.bundle
    print_fields(_summary(report, bundle))
    if bundle is None:
        print_heading("pipeline (a dry run: nothing was sampled, nothing was written)")
        _print_pipeline(report)
        return
    print_heading("passes")
    rows = [
        (row.text, "yes" if row.changed else "no", len(set(row.refusals)), f"{row.seconds:.1f}")
        for row in report.passes
    ]
    print_table(("pass", "changed", "refused", "seconds"), rows, right=("refused", "seconds"))
    if line := verdict_text(report):
        print(f"\n{line}")
    place = shlex.quote(str(bundle.path))
    print(f"\nnext: qcgraph sample {place} -o grid.png")


def _print_pipeline(report: CompileReport) -> None:
    """Print every pass of the pipeline, and whether the dry run ran it."""
    from qcgraph.pipeline import Pipeline

    ran = {row.text for row in report.passes}
    rows = [(pass_.text, "ran" if pass_.text in ran else "needs samples") for pass_ in Pipeline.parse(report.pipeline)]
    print_table(("pass", "in this dry run"), rows)


def _summary(report: CompileReport, bundle: Bundle | None) -> list[tuple[str, str]]:
    variants = ", ".join(f"{name} {entry.steps}" for name, entry in report.variants.items())
    fields = [
        ("model", report.model),
        ("target", report.target),
        ("sampling", report.plan),
        *_solver(report),
        *([("schedule", _schedule(report, report.cache, bundle))] if report.cache else []),
        ("variants", f"{variants} (steps each)"),
        *cache_fields(report.cache, report.cached_edges),
        ("quantized", _quantized(report) if bundle else f"{_sites_text(report, report.planned_sites)} planned"),
        *_scales(report, bundle),
        _work(report),
    ]
    if report.given_plan is not None:
        fields.append(("plan", _given_text(report.given_plan, report.plan)))
    if report.estimate is not None:
        fields += [(name, f"about {text}") for name, text in _estimate(report.estimate)]
    if bundle is not None:
        fields += [
            ("checks", f"{len(report.checks)} passed" if report.checks else "none: nothing was exported"),
            ("size", size_text(bundle.size)),
            ("time", f"{report.seconds or 0:.1f} s"),
            ("bundle", str(bundle.path)),
        ]
    return fields


def _solver(report: CompileReport) -> list[tuple[str, str]]:
    """Return the steps of a fitted solver with their name; of a dry run, that sampling will choose them."""
    from qcgraph.cli.solver_view import solver_text
    from qcgraph.facts import SolverPlan

    if report.solver:
        return [("solver", solver_text(report.solver))]
    return [("solver", "fitted; its timesteps follow from samples")] if _provides(report.pipeline, SolverPlan) else []


def _work(report: CompileReport) -> tuple[str, str]:
    """Return the work with its name."""
    from qcgraph.facts import SolverPlan

    is_fitted = report.solver is not None or _provides(report.pipeline, SolverPlan)
    whole = f"{report.recipe.sampling.steps} steps of the model" if is_fitted else "the model"
    return "work", f"{report.mac_ratio:.1%} of the multiply-accumulates of {whole}"


def _schedule(report: CompileReport, cache: CacheReport, bundle: Bundle | None) -> str:
    """Return the schedule as text, marked as a draft if sampling will replace it."""
    from qcgraph.facts import SchedulePlan

    text = cache.schedule
    is_draft = bundle is None and _provides(report.pipeline, SchedulePlan)
    return f"{text}; a draft, the one that is compiled follows from samples" if is_draft else text


def _provides(pipeline: str, fact: type) -> bool:
    """Return whether a pass of a pipeline provides a fact."""
    from qcgraph.pipeline import Pipeline

    return Pipeline.parse(pipeline).provides(fact)


def _estimate(estimate: EstimateReport) -> list[tuple[str, str]]:
    """Return the estimated time, memory and size, each with its name."""
    return [
        ("time", duration_text(estimate.seconds)),
        ("memory", size_text(estimate.memory_bytes)),
        ("size", size_text(estimate.bundle_bytes)),
    ]


def _scales(report: CompileReport, bundle: Bundle | None) -> list[tuple[str, str]]:
    """Return the number of timestep groups; for a dry run, the number that the recipe asks for, if it decides it."""
    if bundle is None and report.recipe.pipeline.passes:
        return []
    planned = report.recipe.quantization.groups if report.planned_sites else 1
    return [("scales", f"{report.timestep_groups if bundle else planned} timestep groups")]


def _sites_text(report: CompileReport, count: int) -> str:
    return f"{count} of {report.linear_sites} linear layers"


def _quantized(report: CompileReport) -> str:
    text = _sites_text(report, report.quantized_sites)
    return f"{text}, {report.quantized_attentions} attentions" if report.quantized_attentions else text


def _given_text(given: GivenPlan, plan: str) -> str:
    """Return where a given schedule comes from, and its effect on the images, as text."""
    text = f"of {given.source}{', carried over' if given.is_retargeted else ''}"
    if given.other_guidance:
        text += f" (made at another guidance than here: {plan})"
    if given.error is None:
        return f"{text}; {given.computing} steps compute"
    return (
        f"{text}; {given.computing} steps compute, and the final latents have a mean squared error of "
        f"{given.error:.3g}, with as many even steps {given.even_error:.3g}"
    )
