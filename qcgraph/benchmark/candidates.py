"""Prepare the candidates of a comparison: build them, try each alone, open them, and check their predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from qcgraph.benchmark.baselines import Baseline
from qcgraph.benchmark.inputs import RecordingRunner
from qcgraph.benchmark.timing import TimedRunner
from qcgraph.benchmark.turns import Turn, section, single_variant
from qcgraph.benchmark.worker import Alone, TaskError, attempt, build_file, run_alone
from qcgraph.benchmark.workspace import Workspace
from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError
from qcgraph.export.run.open import runner_of
from qcgraph.export.run.runtimes import runtime_for
from qcgraph.export.targets import target_of
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.loop import Request

RUNS_ALONE = 3  # runs in a process of its own; they are compared with the median of the rounds, not paired


@dataclass
class Candidate:
    """A candidate of a comparison, with its state.

    Attributes:
        name: the name of its row.
        description: one line that describes it.
        plan: its step plan.
        baseline: the baseline that it runs, or None for a bundle.
        bundle: the bundle, or None for a baseline.
        status: see `qcgraph.benchmark.report.BenchmarkResult`.
        problem: see `qcgraph.benchmark.report.BenchmarkResult`.
        alone: the figures of its process of its own.
        error: relative L2 error of a noise prediction against eager.
        runner: its runner in this process.
    """

    name: str
    description: str
    plan: StepPlan
    baseline: Baseline | None = None
    bundle: Bundle | None = None
    status: str = "ok"
    problem: str = ""
    alone: Alone | None = None
    error: float | None = None
    runner: TimedRunner | None = field(default=None, repr=False)

    @property
    def runs(self) -> bool:
        """Whether the candidate can still run."""
        return self.status in ("ok", "wrong")

    @property
    def computing(self) -> str:
        """The variant that computes all stages."""
        return self.plan.computing

    def attempt(self, action: Callable[[], object]) -> None:
        """Call an action of the candidate if it still runs; a baseline that fails is excluded, with the reason.

        Raises:
            BundleError: a bundle failed; without it there is no comparison.
        """
        if not self.runs:
            return
        try:
            attempt(action)
        except TaskError as failure:
            if self.bundle is not None:
                raise BundleError(
                    f"does not run: {failure}", where=str(self.bundle.path), hint="check it with qcgraph verify"
                ) from failure
            self.status, self.problem, self.runner = "failed", str(failure), None


def make_candidates(bundles: Mapping[str, Bundle], baselines: Sequence[Baseline]) -> list[Candidate]:
    """Return the baselines, then the bundles; all baselines have the steps of the first bundle."""
    steps = single_variant(next(iter(bundles.values())).plan)
    return [
        *(Candidate(baseline.name, baseline.description, steps, baseline=baseline) for baseline in baselines),
        *(Candidate(name, _description(bundle), bundle.plan, bundle=bundle) for name, bundle in bundles.items()),
    ]


def build(candidates: Sequence[Candidate], workspace: Workspace, progress: Progress) -> None:
    """Build the files of every baseline, each file once."""
    problems: dict[str, str] = {}
    for candidate in candidates:
        baseline = candidate.baseline
        if baseline is None:
            continue
        if missing := baseline.missing():
            candidate.status, candidate.problem = "missing", missing
            continue
        for name in baseline.files:
            if name not in problems:
                progress.note(f"building {name}")
                problems[name] = _problem_of(workspace, name)
            if problems[name]:
                candidate.status, candidate.problem = "failed", problems[name]
                break


def try_alone(
    candidates: Sequence[Candidate],
    workspace: Workspace,
    progress: Progress,
    *,
    samples: int,
    rounds: int,
    forward_only: bool,
) -> None:
    """Run every candidate in a process of its own, so that a crash ends only this process."""

    def run(candidate: Candidate) -> None:
        progress.note(f"running {candidate.name} alone")
        candidate.alone = run_alone(
            workspace,
            candidate.name,
            bundle=candidate.bundle.path if candidate.bundle else None,
            samples=samples,
            runs=min(rounds, RUNS_ALONE),
            forward_only=forward_only,
        )

    for candidate in candidates:
        candidate.attempt(partial(run, candidate))


def open_all(candidates: Sequence[Candidate], workspace: Workspace) -> None:
    """Open a runner of every candidate in this process."""

    def open_one(candidate: Candidate) -> None:
        if candidate.baseline is not None:
            candidate.runner = TimedRunner(candidate.baseline.open(workspace))
        elif candidate.bundle is not None:
            candidate.runner = TimedRunner(runner_of(candidate.bundle, threads=workspace.threads))

    for candidate in candidates:
        candidate.attempt(partial(open_one, candidate))


def check_all(candidates: Sequence[Candidate], workspace: Workspace, samples: int, *, forward_only: bool) -> None:
    """Compare a noise prediction of every candidate with PyTorch eager, in the middle of a trajectory of the model.

    A float32 baseline outside its tolerance is marked as wrong, but timed all the same.
    """
    plan = workspace.bundle.plan
    recorder = _record(workspace, section(plan) if forward_only else plan, samples)
    index = _middle_computing_step(candidates, len(recorder.inputs))
    spec, inputs = workspace.bundle.spec, recorder.inputs[index]
    latent = inputs[spec.latent.name].astype(np.float32)
    conditions = Conditions(len(latent), {item.name: inputs[item.name] for item in spec.conditions})
    expected = recorder.predictions[index][:, : spec.latent_shape[0]]

    def compare(candidate: Candidate) -> None:
        assert candidate.runner is not None
        step = replace(candidate.plan.steps[index], variant=candidate.computing)
        request = Request(candidate.runner, replace(candidate.plan, steps=(step,)), spec)
        found = request.denoise(0, latent, conditions)[:, : expected.shape[1]]
        candidate.runner.take()
        candidate.error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    for candidate in candidates:
        candidate.attempt(partial(compare, candidate))
        limit = candidate.baseline.tolerance if candidate.baseline else None
        if limit is not None and candidate.error is not None and not candidate.error < limit:  # NaN is wrong, too
            candidate.status = "wrong"
            candidate.problem = f"does not compute the model: relative error {candidate.error:.1e}, limit {limit:.0e}"


def _record(workspace: Workspace, plan: StepPlan, samples: int) -> RecordingRunner:
    """Record the inputs and predictions of the model along its own trajectory."""
    from qcgraph.models.eager import EagerRunner

    recorder = RecordingRunner(EagerRunner(workspace.model))
    Turn(plan, workspace.bundle.spec, samples).draw(recorder)
    return recorder


def _middle_computing_step(candidates: Sequence[Candidate], steps: int) -> int:
    """Return the index of the middle one of the steps that every candidate computes."""
    computing = [index for index in range(steps) if all(candidate.plan.computes(index) for candidate in candidates)]
    return computing[len(computing) // 2]


def _problem_of(workspace: Workspace, name: str) -> str:
    """Build a file; return the reason if this fails, and an empty text otherwise."""
    try:
        build_file(workspace, name)
    except TaskError as failure:
        return f"building {name}: {failure}"
    return ""


def _description(bundle: Bundle) -> str:
    recipe = bundle.recipe
    parts = (recipe.quantization.bits, f"cache {recipe.cache.schedule}", f"compensation {recipe.compensation.mode}")
    target = target_of(bundle)
    runtime = runtime_for(target, bundle.manifest.precision)
    # The milliseconds of another runtime are not those of the target.
    where = "" if runtime.name == target.runtime else f" on {runtime.title}, not on {target.runtime}"
    return f"{target.name}{where}: {', '.join(parts)}"
