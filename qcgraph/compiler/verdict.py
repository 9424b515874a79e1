"""Compare a compilation with the best that its time buys for nothing: fewer steps of a plain or of a fitted solver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qcgraph.bundle.report import FITTED_RIVAL, ComparisonReport, RivalReport
from qcgraph.compiler.costs import measure_costs, run_milliseconds
from qcgraph.compiler.running import running_for
from qcgraph.errors import UsageError
from qcgraph.evaluation.fitted_rival import fitted_rival
from qcgraph.evaluation.metrics import peak, psnr, shown
from qcgraph.evaluation.settings import RIVAL
from qcgraph.evaluation.tally import mean_squares
from qcgraph.export.run.open import open_runner
from qcgraph.export.run.runtimes import Exported, runtime_for
from qcgraph.export.targets import Target
from qcgraph.facts import SolverFit, SolverPlan, precision_of
from qcgraph.ir.program import Program
from qcgraph.pipeline.calibration_budget import affordable, trajectory_macs
from qcgraph.plan.schedulers import first_order, make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.calibration import FIRST_INDEX
from qcgraph.sampling.conditions import in_turn
from qcgraph.sampling.loop import sample
from qcgraph.sampling.noise import Noise
from qcgraph.sampling.reference import COARSE_STEPS, FINE_STEPS, RunStore, extrapolated, first_order_plan, walk
from qcgraph.sampling.runner import Array, Runner

TRAJECTORIES = (2, 8)  # fewest and most trajectories of a comparison
MACS = 4e12  # multiply-accumulates of their converged run: a minute on two cores. A model that needs more has none.
FITTING_MACS = 6e11  # multiply-accumulates that recording runs for a fitted rival may take, where none are recorded
FIRST = 2 * FIRST_INDEX  # index of the first sample, whose noise neither calibration nor a user's samples share
FEWEST_FITTED = 16  # trajectories that a fit takes at least


def comparable(program: Program) -> int:
    """Return on how many trajectories a compilation can be compared; 0 where it adds noise, or it takes too long."""
    if any(step.update.noise for step in program.facts[StepPlan].steps):
        return 0
    macs = trajectory_macs(program, COARSE_STEPS + FINE_STEPS)
    return affordable(macs, MACS, TRAJECTORIES) if macs * TRAJECTORIES[0] <= MACS else 0


@dataclass(frozen=True)
class Contest:
    """A compilation, and the model that it was made from.

    Attributes:
        origin: the captured model, with the plan of the scheduler's run.
        program: the compiled program.
        folder: the folder of its exported graphs.
        target: the target of the compilation.
        seed: the seed of the noise.
        runs: the runs of the model that passes recorded.
        progress: reports the samples.
    """

    origin: Program
    program: Program
    folder: Path
    target: Target
    seed: int
    runs: RunStore
    progress: Progress

    @property
    def plan(self) -> StepPlan:
        """The step plan of the compilation."""
        return self.program.facts[StepPlan]

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model."""
        return self.program.facts[ModelSpec]


def compare(contest: Contest, count: int) -> ComparisonReport:
    """Return how close the compilation and its rivals come to the converged run in the same time.

    Time is measured: the median of one run of every variant on the runtime of the target, or on its stand-in. A rival
    takes as many steps of the model in full precision as fit into the time of the compilation, one at least.

    Args:
        contest: the compilation.
        count: the number of trajectories.
    """
    contest.progress.note(f"comparing with plain solvers on {count} trajectories")
    exported = Exported(contest.program, contest.folder, contest.program.interfaces)
    runner = open_runner(contest.target, exported)
    spent = contest.plan.work(run_milliseconds(runner, contest.program))
    step = measure_costs(contest.origin, contest.target, contest.progress)[contest.origin.computing]
    steps = max(1, min(int(spent / step), len(contest.origin.facts[StepPlan])))
    told = in_turn(count, contest.spec)
    with running_for(contest.target)(contest.origin) as model:
        goal = shown(_converged(contest, model, count), contest.spec)

        def drawn(taken: Runner, plan: StepPlan) -> float:
            finals = sample(taken, plan, contest.spec, told, contest.seed, batch=count, first_index=FIRST)
            return float(psnr(mean_squares(shown(finals, contest.spec), goal).mean(), peak(goal, contest.spec)))

        rivals = tuple(
            RivalReport(name=name, steps=len(plan), seconds=len(plan) * step / 1000, psnr=drawn(model, plan))
            for name, plan in _rivals(contest, steps)
        )
    return ComparisonReport(
        trajectories=count,
        seconds=spent / 1000,
        psnr=drawn(runner, contest.plan),
        rivals=rivals,
        stand_in=stand_in_of(contest),
    )


def stand_in_of(contest: Contest) -> str:
    """Return the runtimes that measured instead of the target's own; an empty text where that one measured."""
    bundle, model = (
        runtime_for(contest.target, precision_of(program.facts)) for program in (contest.program, contest.origin)
    )
    if contest.target.runtime == bundle.name == model.name:
        return ""
    return bundle.title if bundle == model else f"{bundle.title} for the bundle, {model.title} for its rivals"


def _converged(contest: Contest, runner: Runner, count: int) -> Array:
    """Return the final latents of the converged run."""
    told, run = in_turn(count, contest.spec), contest.origin.facts[StepPlan]
    initial = Noise(contest.seed, range(FIRST, FIRST + count), contest.spec.latent_shape).initial()
    coarse, fine = (
        walk(runner, plan, contest.spec, told, initial, contest.progress)
        for plan in (first_order_plan(steps, run, contest.spec.noise_schedule) for steps in (COARSE_STEPS, FINE_STEPS))
    )
    return extrapolated(coarse.ends, fine.ends).latents[-1]


def _rivals(contest: Contest, steps: int) -> Iterator[tuple[str, StepPlan]]:
    """Yield the plans of solvers that take a number of steps, each with a name."""
    run, schedule = contest.origin.facts[StepPlan], contest.spec.noise_schedule
    mark = run.fingerprint
    for name in dict.fromkeys((first_order(schedule), RIVAL, mark.scheduler)):
        try:
            yield name, make_step_plan(name, steps, mark.guidance, schedule, mark.model)
        except UsageError:
            continue  # it cannot make so few steps, or does not solve the process of the model
    solver, fit = contest.program.facts.get(SolverPlan), contest.program.facts.get(SolverFit)
    recorded = fit.trajectories if solver and fit and solver.target == "converged" else None
    if recorded is None and trajectory_macs(contest.origin, COARSE_STEPS + FINE_STEPS) * FEWEST_FITTED > FITTING_MACS:
        return
    yield (
        FITTED_RIVAL,
        fitted_rival(
            contest.origin,
            steps,
            contest.progress,
            seed=contest.seed,
            trajectories=recorded,
            runs=contest.runs,
            running=running_for(contest.target),
        ),
    )
