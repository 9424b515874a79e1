"""Facts about a fitted solver: its steps, the targets of its fit, and what the fit left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcgraph.plan.steps import Update

TARGET_TITLES = {"converged": "the converged run", "run": "the run itself"}  # the targets of a fit in words


@dataclass(frozen=True)
class SolverPlan:
    """The steps of a fitted solver, which the step plan holds, and where they come from.

    Attributes:
        target: the run that its latents are fitted to: ``converged``, or the user's own ``run``.
        run_steps: the number of steps of the user's run, from whose timesteps the steps were chosen.
        plain: the plain update of each step, which the fit corrects.
        history: the number of earlier predictions that an update may use.
        errors: the mean squared error of the final latents of every set of steps that was tried, in full precision, on
            trajectories that it was not fitted to; the chosen one first.
        refined: the mean squared error of the final latents of the chosen set on all trajectories, before and after all
            its coefficients were refined together; None where that would have taken too long.
        modes: for each step, None where it computes everything, or the variant that it is to take, which plan-cache
            creates.
    """

    target: Literal["converged", "run"]
    run_steps: int
    plain: tuple[Update, ...]
    history: int
    errors: tuple[float, ...]
    refined: tuple[float, float] | None = None
    modes: tuple[str | None, ...] = ()

    @property
    def half_steps(self) -> int:
        """The number of steps that compute one half of guidance alone."""
        return sum(mode is not None for mode in self.modes)

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        kinds = f" ({self.half_steps} of one half of guidance)" if self.half_steps else ""
        line = f"solver: {len(self.plain)} of {self.run_steps} steps{kinds}, fitted to {TARGET_TITLES[self.target]}"
        last = self.refined[-1:] if self.refined else self.errors[:1]
        return [f"{line}, mean squared error {last[0]:.2g}" if last else line]


@dataclass(frozen=True)
class SolverTargets:
    """The latents that a fitted solver aims at, which `SolverPlan` was decided with.

    Attributes:
        seed: the seed of the conditions and of the noise.
        trajectories: the number of trajectories.
        latents: the target after each step, f32[N,C,H,W], little-endian, as base64.
    """

    seed: int
    trajectories: int
    latents: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        return [f"solver targets of {self.trajectories} trajectories"]


@dataclass(frozen=True)
class SolverFit:
    """The fit of the updates in the step plan, on the program as it was then.

    Attributes:
        ridges: the relative ridge of each step; None where the plain update was kept.
        errors: for each step, the root mean square of the next latents less their targets, on trajectories that it was
            not fitted to.
        plain_errors: the same with the plain update, from the same latents.
        trajectories: the number of trajectories.
    """

    ridges: tuple[float | None, ...]
    errors: tuple[float, ...]
    plain_errors: tuple[float, ...]
    trajectories: int

    def lines(self) -> list[str]:
        """Return the lines about this fact in the text of a program."""
        kept = self.ridges.count(None)
        kept_text = f", {kept} plain" if kept else ""
        return [f"solver fit, last error {self.errors[-1]:.3g} rms{kept_text}, {self.trajectories} trajectories"]
