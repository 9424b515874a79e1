"""The schema and the reader of ``report.json``, the report of a compilation. docs/report.md lists its fields."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qcgraph.errors import BundleError
from qcgraph.recipe import Recipe
from qcgraph.recipe.gate import Verdict

REPORT = "report.json"
REPORT_VERSION: Final = 1
FITTED_RIVAL = "fitted solver"  # the name of the rival that no scheduler is


def _number(value: Any) -> Any:
    """Return a value, or None for infinity and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_number)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VariantReport(_Part):
    """The number of runs of a graph, and the work of each."""

    steps: int = Field(description="sampling steps that run it")
    macs: int = Field(description="multiply-accumulates a sample and step")


class PlannedSchedule(_Part):
    """The measurements that decided a cache schedule."""

    strategy: str = Field(description="`joint` or `dps`")
    spent: float = Field(description="its cost relative to computing every step")
    measured_on: str = Field(
        description="the runtime on which milliseconds were measured; empty where costs are multiply-accumulates"
    )
    expected_error: Figure = Field(
        description="mean squared error of the final latent that the errors of skipped steps add up to"
    )
    rehearsed_error: Figure = Field(description="the same error, of trajectories sampled under the cache schedule")


class ForecastReport(_Part):
    """The relative errors of forecasts, over steps and cached values."""

    kind: str = Field(description="`affine`, `taylor`, `dec` or `reuse`")
    error: float = Field(description="root mean square of the errors of the forecasts")
    reuse_error: float = Field(description="root mean square of the errors of plain reuse")
    largest_error: float = Field(description="the largest error of a forecast")


class CacheReport(_Part):
    """The cached values, the cache schedule, and the errors of reusing steps."""

    schedule: str = Field(description="the variant of every step, a letter each")
    values: dict[str, str] = Field(description="per cached tensor, what it is")
    modes: dict[str, tuple[str, ...]] = Field(description="per variant that reuses, the cached tensors it takes")
    history: int = Field(description="computed values of each tensor that are kept")
    planned: PlannedSchedule | None = Field(
        description="how the cache schedule was found; null where it is even or given"
    )
    forecast: ForecastReport | None = Field(description="how well values are forecast; null where none is")


class SolverReport(_Part):
    """The steps of a fitted solver, and the error of its fit."""

    target: Literal["converged", "run"] = Field(description="the run that it is fitted to")
    steps: int = Field(description="steps of the bundle")
    halves: int = Field(description="steps of the bundle that compute the conditional half of guidance alone")
    run_steps: int = Field(description="steps of the run that it stands for")
    trajectories: int = Field(description="trajectories that it was fitted to")
    last_error: Figure = Field(
        description="root mean square of the final latents less their targets, on trajectories that were left out of "
        "the fit; null where the compiled program was not fitted"
    )


class RangeChange(_Part):
    """The site whose activation range caching changes most."""

    site: str = Field(description="its name")
    relative: float = Field(description="the change, relative to the range in full precision")


class RefusalReport(_Part):
    """A site or node that a pass left alone."""

    where: str = Field(description="the site or node")
    reason: str = Field(description="why")


class PassReport(_Part):
    """The result of a pass."""

    text: str = Field(description="the pass and its options, as pipeline text")
    changed: bool = Field(description="whether it changed the program")
    refusals: tuple[RefusalReport, ...] = Field(description="what it left alone, and why")
    seconds: float = Field(description="wall time, in seconds")


class GivenPlan(_Part):
    """The outcome of a given cache schedule."""

    source: str = Field(description="the bundle or plan that it was taken from")
    schedule: str = Field(description="the schedule, as text")
    is_retargeted: bool = Field(description="whether it was given for other timesteps")
    other_guidance: bool = Field(description="whether it was given for another guidance")
    computing: int = Field(description="steps that compute")
    error: Figure = Field(description="mean squared error of the final latents")
    even_error: Figure = Field(description="the same error under as many evenly spaced computing steps")


class EstimateReport(_Part):
    """The estimated time, memory and disk space of a compilation."""

    seconds: float = Field(description="wall time, in seconds")
    memory_bytes: int = Field(description="largest resident size of the process, in bytes")
    bundle_bytes: int = Field(description="size of the bundle, in bytes")


class EdgeReport(_Part):
    """A value that is cached in a quantized program."""

    name: str = Field(description="the cached tensor")
    noise: float = Field(description="relative L2 error that quantization makes in it")
    change: float = Field(description="its relative L2 change from one step to the next, in full precision")
    snr: Figure = Field(description="change over noise, dB; null where there is no noise")


class CheckReport(_Part):
    """One check of the exported graphs."""

    name: str = Field(description="what was checked")
    variant: str = Field(description="the variant it was checked on")
    passed: bool | None = Field(description="whether it holds; null where it was not looked at")
    value: Figure = Field(description="the figure that was found; null where it is no number")
    limit: Figure = Field(description="what the figure must not exceed; null where nothing limits it")
    detail: str = Field(description="the figure in words")


class RivalReport(_Part):
    """A solver that takes as much time as the bundle, in full precision."""

    name: str = Field(description="the scheduler, or `fitted solver`")
    steps: int = Field(description="steps that it takes")
    seconds: float = Field(description="milliseconds of a step, measured, times the steps, in seconds")
    psnr: Figure = Field(description="PSNR of its images to the converged run, dB")


class ComparisonReport(_Part):
    """The distance of the bundle and of its rivals to the converged run, in the same measured time."""

    trajectories: int = Field(description="trajectories that were compared")
    seconds: float = Field(description="measured time of sampling one image with the bundle, in seconds")
    psnr: Figure = Field(description="PSNR of its images to the converged run, dB")
    rivals: tuple[RivalReport, ...] = Field(description="the rivals")
    stand_in: str = Field(
        "",
        description="the runtime that the seconds were measured on, where it stands in for that of the target; empty "
        "where it is the target's own",
    )

    @property
    def best(self) -> RivalReport | None:
        """The rival that is closest to the converged run, or None without rivals."""
        return max(self.rivals, key=lambda rival: -math.inf if rival.psnr is None else rival.psnr, default=None)


class CompileReport(_Part):
    """The summary of a compilation."""

    schema_version: Literal[1] = Field(REPORT_VERSION, description="the version of this schema")
    model: str = Field(description="the name of the model")
    source: str | None = Field(None, description="the model as it was named to the compiler; null for an object")
    target: str = Field(description="the name of the target")
    recipe: Recipe = Field(description="the resolved recipe, as in `recipe.lock.toml`")
    plan: str = Field(description="scheduler, steps and guidance")
    pipeline: str = Field(description="the pipeline, as text")
    variants: dict[str, VariantReport] = Field(description="per variant, how often it runs and what it computes")
    mac_ratio: float = Field(
        description="multiply-accumulates of sampling, relative to those of the model over all steps of the run"
    )
    cache: CacheReport | None = Field(description="what is cached; null where nothing is cached")
    solver: SolverReport | None = Field(
        None, description="the fitted solver; null where the updates are those of the scheduler"
    )
    timestep_groups: int = Field(description="number of timestep groups")
    planned_sites: int = Field(description="linear layers that the graph lets quantize")
    quantized_sites: int = Field(description="linear layers that are quantized")
    quantized_attentions: int = Field(description="attentions whose products are quantized")
    linear_sites: int = Field(description="linear layers of the model")
    cached_range_change: RangeChange | None = Field(
        description="the site whose range caching changes most; null where no range was observed"
    )
    largest_variance_drift: Figure = Field(
        description="largest relative drift of a standard deviation that compensation corrects; null without it"
    )
    passes: tuple[PassReport, ...] = Field(description="the passes that ran, in order")
    given_plan: GivenPlan | None = Field(None, description="what became of a given cache schedule; null without one")
    notes: tuple[str, ...] = Field((), description="the notes that were printed for the user")
    estimate: EstimateReport | None = Field(None, description="what compiling will take; null but for a dry run")
    cached_edges: tuple[EdgeReport, ...] = Field((), description="change and noise of every cached tensor")
    checks: tuple[CheckReport, ...] = Field((), description="the checks of the exported graphs")
    gate: tuple[Verdict, ...] = Field((), description="conditions of the gate, each with `term`, `value` and `passed`")
    comparison: ComparisonReport | None = Field(
        None, description="the bundle beside plain and fitted solvers; null where that was not measured"
    )
    seconds: Figure = Field(
        None, description="wall time of the compilation, in seconds; null where no bundle was written"
    )
    stages: dict[str, float] = Field({}, description="seconds of every stage around the passes, by name")

    def with_fields(self, **fields: Any) -> CompileReport:
        """Return this report with new values of these fields, which are validated."""
        return CompileReport(**{name: getattr(self, name) for name in type(self).model_fields} | fields)


def parse_report(data: Any) -> CompileReport:
    """Return the report in JSON data.

    Raises:
        BundleError: the report has another schema version.
        ValidationError: the report has another shape.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != REPORT_VERSION:
        found = "no schema version" if version is None else f"schema version {version!r:.40}"
        newer = isinstance(version, int) and version > REPORT_VERSION
        raise BundleError(
            f"has {found}; this qcgraph reads version {REPORT_VERSION}",
            where=REPORT,
            hint="upgrade qcgraph" if newer else "compile again with this version",
        )
    return CompileReport.model_validate(data)
