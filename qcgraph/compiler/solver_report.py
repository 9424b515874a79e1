"""Report the fitted solver of a compilation."""

from __future__ import annotations

from qcgraph.bundle.report import SolverReport
from qcgraph.facts import Facts, SolverFit, SolverPlan, SolverTargets


def solver_report(facts: Facts) -> SolverReport | None:
    """Return the fitted solver of a compiled program, None where the updates are those of the scheduler."""
    plan, fit = facts.get(SolverPlan), facts.get(SolverFit)
    if plan is None:
        return None
    return SolverReport(
        target=plan.target,
        steps=len(plan.plain),
        halves=plan.half_steps,
        run_steps=plan.run_steps,
        trajectories=(fit or facts[SolverTargets]).trajectories,
        last_error=fit.errors[-1] if fit else None,
    )
