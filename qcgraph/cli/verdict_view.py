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
    best = found.best
    if best is None or best.psnr is None:
        return f"verdict: {own}"
    rival = f"{best.name} with {_steps(best.steps)} in full precision, {_seconds(best.seconds)}, has {best.psnr:.1f} dB"
    measured = f"({found.trajectories} trajectories)"
    if best.psnr <= found.psnr:
        return f"verdict: {own}; the best free rival in that time, {rival} {measured}"
    command = f"qcgraph compile {shlex.quote(report.source or 'MODEL')} {_options(best, report)} -o FOLDER"
    return f"verdict: a free rival is better: {rival}; this bundle has {own} {measured}. Take it: {command}"


def _options(rival: RivalReport, report: CompileReport) -> str:
    """Return the options that compile a rival."""
    from qcgraph.bundle.report import FITTED_RIVAL

    sampling = report.recipe.sampling
    if rival.name == FITTED_RIVAL:
        return f"--steps {sampling.steps} --guidance {sampling.guidance:g} --solver fitted={rival.steps} --bits off"
    return f"--steps {rival.steps} --guidance {sampling.guidance:g} --scheduler {rival.name} --bits off"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
