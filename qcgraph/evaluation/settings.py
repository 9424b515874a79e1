"""Define the settings that are sampled to judge a compilation: model, compilation, its parts, and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from qcgraph.bundle import Bundle
from qcgraph.bundle.report import FITTED_RIVAL
from qcgraph.errors import BundleError, UsageError
from qcgraph.evaluation.ablation import (
    compensation_tables,
    is_quantized,
    without_compensation,
    without_quantization,
)
from qcgraph.evaluation.fitted_rival import fitted_rival
from qcgraph.evaluation.solvers import sample_with
from qcgraph.export.run.open import export_to, open_runner, runner_of
from qcgraph.export.run.runtimes import Exported, Runtime, runtime_for
from qcgraph.export.targets import Target, target_of
from qcgraph.facts import precision_of
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program
from qcgraph.ir.structure import find_sites, macs_by_variant, total_macs
from qcgraph.models import LoadedModel
from qcgraph.models.eager import EagerRunner
from qcgraph.models.source import captured_origin, find_model
from qcgraph.plan.schedulers import first_order, make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import TakenStep, sample
from qcgraph.sampling.reference import CONVERGED_STEPS
from qcgraph.sampling.runner import Array, Runner

Observe = Callable[[TakenStep], None]
Draw = Callable[[Conditions, int, Observe | None], Array]

RIVAL = "dpmsolver++"
RIVALS = ("fewer_steps", "solver", "fitted_solver")  # the keys of the settings of equal cost


@dataclass(frozen=True)
class Subject:
    """The compilation under evaluation.

    Attributes:
        model: the model that it was compiled from.
        origin: the captured model.
        program: the compiled program.
        plan: the step plan of the samples.
        runner: runs the compilation as it is deployed.
        folder: the folder of its exported graphs.
        target: the target that it was compiled for.
        threads: the number of threads of runners; None for all cores.
    """

    model: LoadedModel
    origin: Program
    program: Program
    plan: StepPlan
    runner: Runner
    folder: Path
    target: Target
    threads: int | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle, model: str | None = None, threads: int | None = None) -> Subject:
        """Return a bundle as a subject, with the model that it was compiled from.

        Args:
            bundle: the bundle.
            model: the name of the model, if it is not where the bundle recorded it.
            threads: the number of threads of runners; None for all cores.

        Raises:
            UsageError: the model is not found, or is another one.
            BundleError: the bundle cannot be read.
        """
        runner = runner_of(bundle, threads=threads)
        loaded = find_model(bundle, model)
        origin = captured_origin(bundle, loaded)
        target = target_of(bundle)
        # Reading a program again takes longer than most uses of it, because the type of every value is inferred again.
        program = runner.program if isinstance(runner, TorchRunner) else load_program(bundle.path)
        return cls(loaded, origin, program, bundle.plan, runner, bundle.path, target, threads)

    @property
    def runtime(self) -> Runtime:
        """The runtime that runs the compilation during the evaluation."""
        return runtime_for(self.target, precision_of(self.program.facts))

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model."""
        return self.model.spec

    @property
    def is_deterministic(self) -> bool:
        """Whether no update adds fresh noise, so that other step counts and solvers follow the same trajectory."""
        return not any(step.update.noise for step in self.plan.steps)

    @property
    def converging(self) -> str:
        """The first-order solver, which converges to the trajectory that faster samplers approximate."""
        return first_order(self.spec.noise_schedule)

    @cached_property
    def scheduler_run(self) -> StepPlan:
        """The scheduler's own run of the captured model."""
        mark = self.plan.fingerprint
        return make_step_plan(mark.scheduler, mark.steps, mark.guidance, self.spec.noise_schedule, mark.model)

    @cached_property
    def run_plan(self) -> StepPlan:
        """The scheduler's own run, on which every step computes; a fitted plan stands for it with fewer steps.

        A step that the fitted plan leaves out has the group and the row of the planned step nearest in time.
        """
        plan = self.plan
        if not plan.is_fitted:
            return plan.all_computing
        made = self.scheduler_run
        near = [min(plan.steps, key=lambda planned: abs(planned.timestep - step.timestep)) for step in made.steps]
        steps = (
            replace(step, variant=plan.computing, group=planned.group, row=planned.row)
            for step, planned in zip(made.steps, near, strict=True)
        )
        return StepPlan(made.fingerprint, tuple(steps), plan.roles)

    @property
    def moments(self) -> tuple[int, ...]:
        """The steps of the scheduler's run after which its latents are those that the steps of the plan lead to."""
        run = self.run_plan
        return (*(run.index_of(timestep) - 1 for timestep in self.plan.timesteps[1:]), len(run) - 1)

    @property
    def is_compensated(self) -> bool:
        """Whether the noise prediction is compensated."""
        return bool(compensation_tables(self.program))

    def macs(self, steps: int) -> int:
        """Return the multiply-accumulates of a number of steps of the model, with both halves of guidance."""
        return total_macs(find_sites(self.origin.variants[self.origin.computing])) * steps * self.plan.halves

    def cost(self, plan: StepPlan) -> float:
        """Return the multiply-accumulates of sampling with a plan, in steps of the model."""
        macs = macs_by_variant(self.program.variants)
        whole = total_macs(find_sites(self.origin.variants[self.origin.computing]))
        unknown = [step.variant for step in plan.steps if step.variant not in macs]
        if unknown:
            raise BundleError(f"the plan names variant {unknown[0]!r}, which the program has not", where="plan.json")
        return plan.work(macs) / whole if whole else float(len(plan))


@dataclass(frozen=True)
class Setting:
    """A way to draw samples.

    Attributes:
        key: the name in the JSON.
        title: the heading in tables.
        cost: multiply-accumulates of a sample, in steps of the model.
        draw: conditions, seed and a callback for every step -> final latents f32[N,C,H,W].
        moments: the steps after which its latents compare with those of full precision, one for each step of the plan;
            empty where only the final latents do.
        absent: the reason why it is not sampled, or empty.
    """

    key: str
    title: str
    cost: float = 0.0
    draw: Draw | None = None
    moments: tuple[int, ...] = ()
    absent: str = ""


def full_precision(subject: Subject) -> Setting:
    """Return the setting of the model itself, in PyTorch eager, with the steps of the scheduler's run."""
    run = subject.run_plan
    draw = _drawing(subject, EagerRunner(subject.model), run)
    return Setting("full_precision", "full precision", len(run), draw, subject.moments)


def compiled(subject: Subject) -> Setting:
    """Return the setting of the compilation as it is deployed."""
    return _part("compiled", "compiled", subject, subject.runner, subject.plan)


def parts(subject: Subject, folder: Path, progress: Progress) -> tuple[Setting, ...]:
    """Return the parts of the compiled program alone: quantization, cache, both without compensation, fitted steps.

    Quantization alone takes all steps of the scheduler's run.

    Args:
        subject: the compilation.
        folder: an empty folder for graphs that are exported; it must outlive the settings.
        progress: receives progress messages.
    """
    program, plan = subject.program, subject.plan
    quantized, cached = is_quantized(program), len(plan.variants) > 1
    runner = subject.runner
    if subject.is_compensated and (quantized or cached):
        runner = _uncompensated(subject)
    no_quantization, no_cache = "it is not quantized", "no step reuses"
    settings = []
    if quantized:
        settings.append(_part("quantization", "quantization only", subject, runner, subject.run_plan))
    else:
        settings.append(Setting("quantization", "quantization only", absent=no_quantization))
    if cached:
        bare = without_compensation(without_quantization(program, subject.origin)) if quantized else None
        alone = runner if bare is None else _exported(subject, bare, folder, progress)
        settings.append(_part("cache", "cache only", subject, alone, plan))
    else:
        settings.append(Setting("cache", "cache only", absent=no_cache))
    if quantized and cached:
        settings.append(_part("both", "both", subject, runner, plan))
    else:
        settings.append(Setting("both", "both", absent=no_cache if quantized else no_quantization))
    if plan.is_fitted:
        fitted = _part(
            "fitted", f"{len(plan)} fitted steps only", subject, EagerRunner(subject.model), plan.all_computing
        )
        settings.append(fitted)
    return tuple(settings)


def rivals(subject: Subject, progress: Progress) -> tuple[Setting, ...]:
    """Return steps at equal cost in full precision, of plain solvers and of a fitted one: the free alternatives.

    Equal cost means that the steps have as many multiply-accumulates as the plan. The rivals are not quantized,
    which is in their favour.

    Args:
        subject: the compilation.
        progress: reports the fit of a solver that was not fitted before.
    """
    return *_fewer_steps(subject), _fitted_solver(subject, progress)


def _fewer_steps(subject: Subject) -> tuple[Setting, Setting]:
    """Return fewer steps of the scheduler, and of the best plain solver."""
    steps = _equal_steps(subject)
    name, guidance = subject.plan.fingerprint.scheduler, subject.plan.fingerprint.guidance
    if not subject.is_deterministic:
        reason = _other_images(subject)
    elif steps >= len(subject.run_plan):
        reason = "every step computes, so fewer steps are not equal cost"
    else:
        plan = make_step_plan(name, steps, guidance, subject.spec.noise_schedule, subject.plan.fingerprint.model)
        draw = _drawing(subject, EagerRunner(subject.model), plan)
        fewer = Setting("fewer_steps", f"{steps} steps of {name}", steps, draw)
        if name == RIVAL:
            return fewer, Setting("solver", f"fewer steps of {RIVAL}", absent="it is the scheduler of the plan")
        solving = _solving(subject, RIVAL, steps)
        return fewer, Setting("solver", f"{steps} steps of {RIVAL}", steps, solving)
    return (
        Setting("fewer_steps", f"fewer steps of {name}", absent=reason),
        Setting("solver", f"fewer steps of {RIVAL}", absent=reason),
    )


def _fitted_solver(subject: Subject, progress: Progress) -> Setting:
    """Return the steps of a solver that is fitted in full precision; all steps of the run where every step computes."""
    key, title = "fitted_solver", FITTED_RIVAL
    if not subject.is_deterministic:
        return Setting(key, title, absent=_other_images(subject))
    steps = min(_equal_steps(subject), len(subject.scheduler_run))
    progress.note(f"  fitted solver of {steps} steps in full precision, fitted once and kept")
    try:
        plan = fitted_rival(subject.origin.with_facts(subject.scheduler_run), steps, progress)
    except UsageError as error:
        return Setting(key, title, absent=error.message)
    draw = _drawing(subject, EagerRunner(subject.model), plan)
    return Setting(key, f"{title}, {steps} steps", steps, draw)


def _equal_steps(subject: Subject) -> int:
    """Return how many steps of the model have as many multiply-accumulates as the plan, one at least."""
    return max(1, round(subject.cost(subject.plan)))


def _other_images(subject: Subject) -> str:
    """Return why a compilation that adds noise has no rivals."""
    return f"{subject.plan.fingerprint.scheduler} adds noise at every step, so other steps draw other images"


def converged(subject: Subject) -> tuple[Setting, Setting]:
    """Return the trajectory that every deterministic sampler approximates, and the same with half the steps."""
    name, steps = subject.converging, CONVERGED_STEPS
    return (
        Setting("converged", f"{steps} steps of {name}", steps, _solving(subject, name, steps)),
        Setting("half", f"{steps // 2} steps of {name}", steps // 2, _solving(subject, name, steps // 2)),
    )


def _part(key: str, title: str, subject: Subject, runner: Runner, plan: StepPlan) -> Setting:
    moments = tuple(range(len(plan))) if len(plan) == len(subject.plan) else subject.moments
    return Setting(key, title, subject.cost(plan), _drawing(subject, runner, plan), moments)


def _drawing(subject: Subject, runner: Runner, plan: StepPlan) -> Draw:
    def draw(conditions: Conditions, seed: int, observe: Observe | None) -> Array:
        return sample(runner, plan, subject.spec, conditions, seed, batch=len(conditions), observe=observe)

    return draw


def _solving(subject: Subject, scheduler: str, steps: int) -> Draw:
    def draw(conditions: Conditions, seed: int, observe: Observe | None) -> Array:
        guidance = subject.plan.fingerprint.guidance
        return sample_with(scheduler, steps, guidance, EagerRunner(subject.model), subject.spec, conditions, seed)

    return draw


def _uncompensated(subject: Subject) -> Runner:
    """Return the compilation with neutral compensation: the same graphs with other tables."""
    program = without_compensation(subject.program)
    tables = {name: program.constants[name].numpy() for name in compensation_tables(program)}
    exported = Exported(program, subject.folder, program.interfaces, tables)
    return open_runner(subject.target, exported, subject.runtime.name, subject.threads)


def _exported(subject: Subject, program: Program, folder: Path, progress: Progress) -> Runner:
    """Return a runner of another program on the runtime that the subject is judged on."""
    return export_to(subject.runtime, subject.target, program, folder, progress, subject.threads)


def pin_threads(threads: int | None) -> None:
    """Set the number of threads of PyTorch, if one is given."""
    if threads is not None:
        torch.set_num_threads(threads)
