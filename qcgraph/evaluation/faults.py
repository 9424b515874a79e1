"""Find faults: findings that no sound compilation shows, whatever its settings, each with its measurement."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcgraph.evaluation.bootstrap import Bootstrap, BootstrapEstimate
from qcgraph.evaluation.scales import ScaleFit
from qcgraph.evaluation.settings import Subject
from qcgraph.evaluation.sites import SiteEffect
from qcgraph.evaluation.tally import Tally, Values
from qcgraph.plan.schedulers import make_step_plan
from qcgraph.plan.steps import Step, StepPlan

LOST_DECIBELS = 6.0  # a scale twice too wide, or one that clips as much; sound scales lose 0 to 3
LOSING_DECIBELS = 1.0  # smaller increases of an error may be chance
LOOSE_DRIFT = 1.5  # compensation may leave at most this multiple of the variance drift without it
SMALLEST_DRIFT = 0.002  # the sampling noise of the evaluation explains drifts below it
COEFFICIENT = 1e-6  # relative tolerance; another version of diffusers may round differently


@dataclass(frozen=True)
class Fault:
    """A defect of a compilation.

    Attributes:
        kind: ``plan``, ``samples``, ``scale``, ``weight``, ``schedule`` or ``compensation``.
        where: the site, step or table.
        message: the finding, with its figures.
    """

    kind: str
    where: str
    message: str


def find_faults(
    subject: Subject,
    tallies: Mapping[str, Tally],
    errors: Mapping[str, Values],
    bootstrap: Bootstrap,
    fits: Sequence[ScaleFit],
    sites: Sequence[SiteEffect],
) -> tuple[Fault, ...]:
    """Find every fault that the measurements show.

    Args:
        subject: the compilation.
        tallies: the samples, by the keys of the settings.
        errors: the squared errors of the images of these settings, f64[S,N].
        bootstrap: computes intervals.
        fits: the fit of every activation scale; empty if it was not measured.
        sites: the cost of every site; empty if it was not measured.
    """
    return (
        *_plan_faults(subject),
        *_sample_faults(tallies),
        *_scale_faults(fits),
        *_weight_faults(sites),
        *_schedule_faults(tallies, errors, bootstrap),
        *(_compensation_faults(tallies, errors, bootstrap) if subject.is_compensated else ()),
    )


def _plan_faults(subject: Subject) -> Iterator[Fault]:
    """Check that the plan is the program's, and that its coefficients are those of the scheduler."""
    plan, mark = subject.plan, subject.plan.fingerprint
    compiled = subject.program.facts.get(StepPlan)
    if compiled is not None and compiled != plan:
        yield Fault("plan", "plan.json", "it is not the plan that the program was compiled with")
    expected = make_step_plan(mark.scheduler, mark.steps, mark.guidance, subject.spec.noise_schedule, mark.model)
    if plan.is_fitted:  # its coefficients are its own
        if not set(plan.timesteps) <= set(expected.timesteps):
            yield Fault("plan", "plan.json", f"a timestep is none of the {len(expected)} of {mark.scheduler}")
        return
    if len(expected) != len(plan):
        yield Fault("plan", "plan.json", f"{mark.scheduler} makes {len(expected)} steps, the plan has {len(plan)}")
        return
    for index, (found, wanted) in enumerate(zip(plan.steps, expected.steps, strict=True)):
        if not _agree(_coefficients(found), _coefficients(wanted)):
            yield Fault(
                "plan",
                f"step {index}",
                f"timestep and update are {_text(found)}, those of {mark.scheduler} are {_text(wanted)}",
            )
            return


def _coefficients(step: Step) -> tuple[float, ...]:
    """Return the timestep, the three coefficients of the update, and two more for every earlier step that it uses."""
    history = (value for term in step.update.history for value in (term.latent, term.noise_prediction))
    return (step.timestep, step.update.latent, step.update.noise_prediction, step.update.noise, *history)


def _agree(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and np.allclose(found, wanted, rtol=COEFFICIENT, atol=COEFFICIENT)


def _text(step: Step) -> str:
    return ", ".join(f"{value:.6g}" for value in _coefficients(step))


def _sample_faults(tallies: Mapping[str, Tally]) -> Iterator[Fault]:
    for tally in tallies.values():
        if not tally.is_finite:
            yield Fault("samples", tally.setting.title, "it draws latents that are not finite")


def _scale_faults(fits: Sequence[ScaleFit]) -> Iterator[Fault]:
    """Check that no activation scale is much worse than the scale from the observed range."""
    for fit in fits:
        lost = fit.attainable - fit.snr
        if lost > LOST_DECIBELS:
            yield Fault(
                "scale",
                f"{fit.site}, group {fit.group}",
                f"signal to quantization noise is {fit.snr:.1f} dB where the range that was seen allows "
                f"{fit.attainable:.1f} dB; {fit.clipped:.2%} of the values are clipped",
            )


def _weight_faults(sites: Sequence[SiteEffect]) -> Iterator[Fault]:
    for site in sites:
        if site.weight_attainable - site.weight_snr > LOST_DECIBELS:
            yield Fault(
                "weight",
                site.site,
                f"signal to quantization noise of the weight is {site.weight_snr:.1f} dB where as many codes allow "
                f"{site.weight_attainable:.1f} dB",
            )


def _schedule_faults(
    tallies: Mapping[str, Tally], errors: Mapping[str, Values], bootstrap: Bootstrap
) -> Iterator[Fault]:
    """Check that reusing at some steps is not worse than leaving these steps out; both cost the same."""
    if not {"cache", "fewer_steps"} <= set(tallies):
        return
    loss = error_ratio(bootstrap, errors["cache"], errors["fewer_steps"])
    if loss.low > 0 and loss.value > LOSING_DECIBELS:
        yield Fault(
            "schedule",
            "step plan",
            f"the cache alone is {loss.value:.1f} dB worse than {tallies['fewer_steps'].setting.title}, which cost as "
            f"much ({loss.low:.1f} .. {loss.high:.1f})",
        )


def uncompensated(keys: Collection[str]) -> str | None:
    """Return the setting that compensation is compared with: the same graphs with neutral compensation.

    It is None if it was not drawn: a quick evaluation leaves out both parts together.
    """
    if {"quantization", "cache"} <= set(keys) and "both" not in keys:
        return None
    return next((key for key in ("both", "cache", "quantization") if key in keys), None)


def _compensation_faults(
    tallies: Mapping[str, Tally], errors: Mapping[str, Values], bootstrap: Bootstrap
) -> Iterator[Fault]:
    """Check that compensation raises neither the error nor, beyond a tolerance, the variance drift."""
    bare = uncompensated(tallies)
    if bare is None:
        return
    loss = error_ratio(bootstrap, errors["compiled"], errors[bare])
    if loss.low > 0 and loss.value > LOSING_DECIBELS:
        yield Fault(
            "compensation",
            "final latent",
            f"compensation raises the error by {loss.value:.1f} dB ({loss.low:.1f} .. {loss.high:.1f})",
        )
    exact = tallies["full_precision"]
    before, after = (largest_drift(tallies[key], exact) for key in (bare, "compiled"))
    if after > LOOSE_DRIFT * before + SMALLEST_DRIFT:
        yield Fault(
            "compensation",
            "variance",
            f"the standard deviation of the latents drifts by up to {after:.2%} with compensation, by {before:.2%} "
            "without",
        )


def error_ratio(bootstrap: Bootstrap, one: Values, other: Values) -> BootstrapEstimate:
    """Return how much larger the first squared errors [S,N] are than the second, in dB; 0 where an error is zero."""

    def decibels(first: Values, second: Values) -> Values:
        ratio = np.divide(first, second, out=np.ones_like(first * 1.0), where=(second > 0) & (first > 0))
        return np.asarray(10 * np.log10(ratio))

    return bootstrap.estimate(decibels, one, other)


def largest_drift(tally: Tally, full_precision: Tally) -> float:
    """Return the largest relative deviation of the latents' standard deviation from that of full precision."""
    ratio = tally.deviations / full_precision.deviations
    return float(np.abs(ratio - 1).max()) if np.isfinite(ratio).all() else math.inf
