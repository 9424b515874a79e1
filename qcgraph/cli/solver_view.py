"""Show the fitted solver of a bundle: data, and a table made of this data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.bundle.report import SolverReport
from qcgraph.cli.output import print_fields, print_table
from qcgraph.compiler.solver_report import solver_report
from qcgraph.facts import TARGET_TITLES, SolverFit, SolverPlan, decode
from qcgraph.plan.steps import Update


def solver_text(report: SolverReport) -> str:
    """Return the steps of a fitted solver and what it is fitted to, as text."""
    halves = f" ({report.halves} of one half of guidance)" if report.halves else ""
    return f"{report.steps} of {report.run_steps} steps{halves}, fitted to {TARGET_TITLES[report.target]}"


def solver(bundle: Bundle) -> dict[str, Any]:
    """Return the update of every step; where a solver is fitted, also the plain updates and the errors of the fit."""
    plan, fit, report = bundle.facts.get(SolverPlan), bundle.facts.get(SolverFit), solver_report(bundle.facts)
    scheduler = bundle.plan.fingerprint.scheduler
    rows = [
        {"step": index, "timestep": step.timestep, "update": asdict(step.update)}
        for index, step in enumerate(bundle.plan.steps)
    ]
    if plan is None or report is None:
        return {"scheduler": scheduler, "fitted": None, "tried_errors": [], "refined_errors": None, "steps": rows}
    for index, row in enumerate(rows):
        row["plain"] = asdict(plan.plain[index])
        if fit:
            row["ridge"], row["error"] = fit.ridges[index], fit.errors[index]
            row["plain_error"] = fit.plain_errors[index]
    return {
        "scheduler": scheduler,
        "fitted": report.model_dump(mode="json"),
        "tried_errors": list(plan.errors),
        "refined_errors": plan.refined,
        "steps": rows,
    }


def print_solver(data: Mapping[str, Any]) -> None:
    """Print the coefficients of every step as a table."""
    rows = data["steps"]
    updates = [decode(Update, row["update"]) for row in rows]
    fields = [("updates", "x' = c0 x + c1 eps + ..; eps-1 is the prediction of one step before")]
    columns = {"step": [row["step"] for row in rows], "timestep": [f"{row['timestep']:g}" for row in rows]}
    columns |= _coefficients(updates)
    if data["fitted"] is None:
        fields = [("solver", f"none is fitted: the updates are those of {data['scheduler']}"), *fields]
    else:
        fields = [*_about(data), *fields]
        if all("ridge" in row for row in rows):
            columns |= {"ridge": [_ridge_text(row["ridge"]) for row in rows], "error": _error_texts(rows, "error")}
        plain = _coefficients([decode(Update, row["plain"]) for row in rows])
        columns |= {f"plain {name}": values for name, values in plain.items()}
        if all("plain_error" in row for row in rows):
            columns |= {"plain error": _error_texts(rows, "plain_error")}
    print_fields(fields)
    print()
    print_table(tuple(columns), zip(*columns.values(), strict=True), right=columns)


def _about(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a solver is fitted to, and the errors of its fit, each with its name."""
    report = SolverReport.model_validate(data["fitted"])
    tried = ", ".join(_decibels(error) for error in data["tried_errors"])
    yield "solver", solver_text(report)
    yield "tried", f"final latents off by {tried} (mean square), for each choice of steps; the first was taken"
    if data["refined_errors"]:
        before, after = (_decibels(error) for error in data["refined_errors"])
        yield "refined", f"final latents off by {after}, by {before} before all coefficients were refined together"
    yield "fit", f"{report.trajectories} trajectories; errors are root mean squares, on those left out of the fit"


def _coefficients(updates: Sequence[Update]) -> dict[str, list[object]]:
    """Return a column of texts for every term that some update has, by the name of the term."""
    rows = [dict(_terms(update)) for update in updates]
    names = [name for name in max(rows, key=len) if name in ("x", "eps") or any(row.get(name) for row in rows)]
    return {name: [f"{row[name]:.4f}" if name in row else "" for row in rows] for name in names}


def _terms(update: Update) -> Iterator[tuple[str, float]]:
    """Yield the coefficients of an update, each with the name of what it multiplies."""
    yield from (("x", update.latent), ("eps", update.noise_prediction), ("z", update.noise))
    for back, term in enumerate(update.history, start=1):
        yield f"eps-{back}", term.noise_prediction
        yield f"x-{back}", term.latent


def _ridge_text(ridge: float | None) -> str:
    return "plain" if ridge is None else f"{ridge:.0e}"


def _error_texts(rows: Sequence[Mapping[str, Any]], name: str) -> list[object]:
    return [f"{row[name]:.3g}" for row in rows]


def _decibels(square: float) -> str:
    return f"{10 * math.log10(square):.1f} dB" if square > 0 else "0"
