"""Define the settings that are sampled to judge a compilation: model, compilation, its parts, and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError
from qcgraph.evaluation.ablation import (
    compensation_tables,
    is_quantized,
    without_compensation,
    without_quantization,
)
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
from qcgraph.sampling.runner import Array, Runner

Observe = Callable[[TakenStep], None]
Draw = Callable[[Conditions, int, Observe | None], Array]

CONVERGED_STEPS = 250  # steps of the reference that both rivals converge to
RIVAL = "dpmsolver++"


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
        planned: whether it takes the steps of the plan, so that its latents compare with full precision step by step.
        absent: the reason why it is not sampled, or empty.
    """

    key: str
    title: str
    cost: float = 0.0
    draw: Draw | None = None
    planned: bool = True
    absent: str = ""


def full_precision(subject: Subject) -> Setting:
    """Return the setting of the model itself, in PyTorch eager, with the steps of the plan."""
    draw = _drawing(subject, EagerRunner(subject.model), subject.plan.all_computing)
    return Setting("full_precision", "full precision", len(subject.plan), draw)


def compiled(subject: Subject) -> Setting:
    """Return the setting of the compilation as it is deployed."""
    return Setting("compiled", "compiled", subject.cost(subject.plan), _drawing(subject, subject.runner, subject.plan))


def parts(subject: Subject, folder: Path, progress: Progress) -> tuple[Setting, ...]:
    """Return quantization only, caching only, and both without compensation: the compiled program without some parts.

    Args:
        subject: the compilation.
        folder: an empty folder for graphs that are exported; it must outlive the settings.
        progress: receives progress messages.
    """
    program, plan = subject.program, subject.plan
    quantized, cached = is_quantized(program), len(plan.variants) > 1
    every = plan.all_computing
    runner = subject.runner
    if subject.is_compensated and (quantized or cached):
        runner = _uncompensated(subject)
    no_quantization, no_cache = "it is not quantized", "no step reuses"
    settings = []
    if quantized:
        settings.append(_part("quantization", "quantization only", subject, runner, every))
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
    return tuple(settings)


def rivals(subject: Subject) -> tuple[Setting, ...]:
    """Return fewer steps at equal cost in full precision, the cheapest alternative to a compilation.

    Equal cost means that the steps have as many multiply-accumulates as the plan. The rivals are not quantized,
    which is in their favour.
    """
    steps = max(1, round(subject.cost(subject.plan)))
    name, guidance = subject.plan.fingerprint.scheduler, subject.plan.fingerprint.guidance
    if not subject.is_deterministic:
        reason = f"{name} adds noise at every step, so other steps draw other images"
    elif steps >= len(subject.plan):
        reason = "every step computes, so fewer steps are not equal cost"
    else:
        plan = make_step_plan(name, steps, guidance, subject.spec.noise_schedule, subject.plan.fingerprint.model)
        draw = _drawing(subject, EagerRunner(subject.model), plan)
        fewer = Setting("fewer_steps", f"{steps} steps of {name}", steps, draw, planned=False)
        if name == RIVAL:
            return fewer, Setting("solver", f"fewer steps of {RIVAL}", absent="it is the scheduler of the plan")
        solving = _solving(subject, RIVAL, steps)
        return fewer, Setting("solver", f"{steps} steps of {RIVAL}", steps, solving, planned=False)
    return (
        Setting("fewer_steps", f"fewer steps of {name}", absent=reason),
        Setting("solver", f"fewer steps of {RIVAL}", absent=reason),
    )


def converged(subject: Subject) -> tuple[Setting, Setting]:
    """Return the trajectory that every deterministic sampler approximates, and the same with half the steps."""
    name, steps = subject.converging, CONVERGED_STEPS
    return (
        Setting("converged", f"{steps} steps of {name}", steps, _solving(subject, name, steps), planned=False),
        Setting("half", f"{steps // 2} steps of {name}", steps // 2, _solving(subject, name, steps // 2), False),
    )


def _part(key: str, title: str, subject: Subject, runner: Runner, plan: StepPlan) -> Setting:
    return Setting(key, title, subject.cost(plan), _drawing(subject, runner, plan))


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
