"""Say in one line what a bundle gives and costs beside the best free rival."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcgraph.bundle.report import CompileReport, RivalReport


def verdict_text(report: CompileReport) -> str:
    """Return the verdict of a report, or an empty text where nothing was compared."""
    found = report.comparison
    if found is None or found.psnr is None:
        return ""
    own = f"{found.psnr:.1f} dB to the converged run in {_seconds(found.seconds)} an image"
    best, place = found.best, _place(report, found.stand_in)
    if best is None or best.psnr is None:
        return f"verdict: {own}{place}"
    rival = f"{best.name} with {_steps(best.steps)} in full precision, {_seconds(best.seconds)}, has {best.psnr:.1f} dB"
    measured = f"({found.trajectories} trajectories)"
    if best.psnr <= found.psnr:
        return f"verdict: {own}; the best free rival in that time, {rival} {measured}{place}"
    command = f"qcgraph compile {shlex.quote(report.source or 'MODEL')} {_options(best, report)} -o FOLDER"
    return f"verdict: a free rival is better: {rival}; this bundle has {own} {measured}{place}. Take it: {command}"


def _place(report: CompileReport, stand_in: str) -> str:
    """Return where the seconds were measured, if that is not the runtime of the target."""
    return f"; seconds were measured on {stand_in}, not on {report.target}" if stand_in else ""


def _options(rival: RivalReport, report: CompileReport) -> str:
    """Return the options that compile a rival."""
    from qcgraph.bundle.report import FITTED_RIVAL
    from qcgraph.recipe import Recipe

    sampling = report.recipe.sampling
    default = Recipe()
    if rival.name == FITTED_RIVAL:
        steps, how = sampling.steps, f"--solver fitted={rival.steps}"
        scheduler = "" if sampling.scheduler == default.sampling.scheduler else sampling.scheduler
    else:
        steps, how, scheduler = rival.steps, "", rival.name
    options = {"--scheduler": scheduler, "--target": "" if report.target == default.target.name else report.target}
    given = [f"{name} {shlex.quote(value)}" for name, value in options.items() if value]
    return " ".join(["--steps", str(steps), "--guidance", f"{sampling.guidance:g}", *how.split(), "--bits off", *given])


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
