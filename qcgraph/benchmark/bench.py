"""Compare bundles with baselines, from options to a report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qcgraph.benchmark.baselines import BASELINES, DEFAULT, REFERENCE, Baseline
from qcgraph.benchmark.candidates import Candidate, build, check_all, make_candidates, open_all, try_alone
from qcgraph.benchmark.machine import read_machine, usable_cores, versions
from qcgraph.benchmark.report import BenchmarkResult, BenchReport, Ratio, Throughput, cache_bytes
from qcgraph.benchmark.timing import TimedCall, Timing, paired
from qcgraph.benchmark.turns import FORWARD, Turn, by_variant, counted, denoiser_batch, first_step, section
from qcgraph.benchmark.workspace import Workspace
from qcgraph.bundle import Bundle
from qcgraph.errors import UsageError
from qcgraph.files.atomic import scratch_folder
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

OURS = "qcgraph"
PACKAGES = ("nncf", "numpy", "onnx", "onnxruntime", "openvino", "qcgraph", "torch")
THROUGHPUT_ROUNDS = 3  # rounds of sections; large batches are slow, and no ratio is computed from them


@dataclass(frozen=True)
class BenchOptions:
    """The options of a comparison.

    Attributes:
        baselines: the baselines to compare with.
        samples: the number of samples drawn at once; with guidance the denoiser sees twice as many.
        batches: numbers of samples drawn at once for which the throughput is measured.
        rounds: the number of times that every candidate is timed.
        threads: the number of threads for each candidate; all cores when None.
        forward_only: whether forwards in sections of a trajectory are timed instead of whole sampling.

    Raises:
        UsageError: a number is not positive.
    """

    baselines: tuple[Baseline, ...] = tuple(BASELINES[name] for name in DEFAULT)
    samples: int = 1
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 5
    threads: int | None = None
    forward_only: bool = False

    def __post_init__(self) -> None:
        numbers = {"--samples": (self.samples,), "--rounds": (self.rounds,), "--batches": self.batches}
        numbers["--threads"] = () if self.threads is None else (self.threads,)
        for name, values in numbers.items():
            if any(value < 1 for value in values):
                raise UsageError(f"{min(values)} is not positive", where=name, hint="1 or more")


@dataclass(frozen=True)
class Measured:
    """The turns of one candidate: the seconds of each turn, and the calls of the denoiser in it."""

    seconds: Timing
    calls: tuple[tuple[TimedCall, ...], ...]


def bench(
    bundles: Mapping[str, Bundle],
    options: BenchOptions,
    model: str | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure bundles of one model against baselines.

    Args:
        bundles: the bundles by the names of their rows; they share model, scheduler, steps and guidance.
        options: the options of the comparison.
        model: the name of the model; by default the one that the first bundle recorded.
        progress: receives progress messages.

    Raises:
        UsageError: a bundle was compiled from another model, or the bundles do not belong together.
        BundleError: a bundle does not run.
    """
    progress = progress or Progress()
    machine = read_machine()
    first = _check_together(bundles)
    threads = options.threads or usable_cores()
    with scratch_folder() as folder:
        workspace = Workspace(folder, first.path, model, threads)
        _check_origin(workspace, progress)
        candidates = make_candidates(bundles, options.baselines)
        build(candidates, workspace, progress)
        samples, forward_only = options.samples, options.forward_only
        try_alone(candidates, workspace, progress, samples=samples, rounds=options.rounds, forward_only=forward_only)
        open_all(candidates, workspace)
        progress.note("comparing noise predictions with PyTorch eager")
        check_all(candidates, workspace, samples, forward_only=forward_only)
        measured = _race(candidates, options, first.spec, progress)
        throughput = _throughput(candidates, options, first.spec, progress)
    return BenchReport(
        bundle=str(first.path),
        model=model or (first.report and first.report.source) or first.spec.name,
        plan=first.plan.describe(),
        target=first.manifest.target,
        steps=len(first.plan),
        run_steps=first.plan.fingerprint.steps,
        guidance=first.plan.fingerprint.guidance,
        threads=threads,
        samples=samples,
        rounds=options.rounds,
        forward_only=forward_only,
        machine=machine,
        versions=versions(PACKAGES),
        rows=tuple(_row(candidate, measured, options, len(first.plan)) for candidate in candidates),
        throughput=throughput,
    )


def _check_together(bundles: Mapping[str, Bundle]) -> Bundle:
    """Return the first bundle; refuse bundles that sample another model or in other steps."""
    first, *others = bundles.values()
    for other in others:
        if other.plan.fingerprint != first.plan.fingerprint:
            raise UsageError(
                f"does not belong beside {first.path}: it samples another model, or in other steps",
                where=str(other.path),
                hint="compare bundles that were compiled from one model, for the same scheduler, steps and guidance",
            )
    return first


def _check_origin(workspace: Workspace, progress: Progress) -> None:
    """Load the model, and refuse a model that was not compiled into the bundle."""
    import torch

    from qcgraph.models.source import captured_origin

    torch.set_num_threads(workspace.threads)
    progress.note("loading the model and comparing it with the bundle's")
    captured_origin(workspace.bundle, workspace.model)


def _race(
    candidates: Sequence[Candidate], options: BenchOptions, spec: ModelSpec, progress: Progress
) -> dict[str, Measured]:
    """Time rounds of whole sampling, or of sections of it."""
    what = "forwards" if options.forward_only else "whole sampling"
    progress.note(f"timing {what}, {options.rounds} rounds")
    plans = {candidate.name: candidate.plan for candidate in candidates}
    if options.forward_only:
        plans = {name: section(plan) for name, plan in plans.items()}
    return _take_turns(candidates, plans, spec, options.samples, options.rounds, progress)


def _throughput(
    candidates: Sequence[Candidate], options: BenchOptions, spec: ModelSpec, progress: Progress
) -> tuple[Throughput, ...]:
    """Measure samples per second at every batch size, from sections of the trajectory."""
    rounds = min(options.rounds, THROUGHPUT_ROUNDS)
    sections = {candidate.name: section(candidate.plan) for candidate in candidates}
    found = []
    for batch in options.batches:
        progress.note(f"timing {batch} at once")
        measured = _take_turns(candidates, sections, spec, batch, rounds, progress)
        found += [
            Throughput(candidate.name, batch, batch / sampling_seconds(candidate.plan, measured[candidate.name]))
            for candidate in candidates
            if candidate.name in measured
        ]
    return tuple(found)


def _take_turns(
    candidates: Sequence[Candidate],
    plans: Mapping[str, StepPlan],
    spec: ModelSpec,
    samples: int,
    rounds: int,
    progress: Progress,
) -> dict[str, Measured]:
    """Warm up every candidate with a section, then time turns; a baseline that fails is not in the result."""
    calls: dict[str, list[tuple[TimedCall, ...]]] = {candidate.name: [] for candidate in candidates}

    def draw(candidate: Candidate, plan: StepPlan) -> tuple[TimedCall, ...]:
        runner = candidate.runner
        if runner is None:
            return ()
        candidate.attempt(lambda: Turn(plan, spec, samples).draw(runner))
        return runner.take()

    def take_turn(candidate: Candidate, plan: StepPlan) -> None:
        calls[candidate.name].append(draw(candidate, plan))

    turns: dict[str, Callable[[], object]] = {}
    warm_up: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        plan = plans[candidate.name]
        draw(candidate, section(candidate.plan))
        turns[candidate.name] = partial(take_turn, candidate, plan)
        if plan == candidate.plan:  # a section does not count its first step; a whole trajectory must count it
            warm_up[candidate.name] = partial(draw, candidate, first_step(plan))
    seconds = paired(turns, rounds, warm_up, progress)
    return {
        candidate.name: Measured(seconds[candidate.name], tuple(calls[candidate.name]))
        for candidate in candidates
        if candidate.runs
    }


def sampling_seconds(plan: StepPlan, measured: Measured) -> float:
    """Estimate the seconds of whole sampling from sections: per step, the medians of its variant and of the overhead.

    Args:
        plan: the step plan of whole sampling.
        measured: turns over a section of this plan.
    """
    kept = by_variant([call for turn in measured.calls for call in counted(turn)])
    medians = {variant: statistics.median(seconds) for variant, seconds in kept.items()}
    around = statistics.median(
        (seconds - sum(call.seconds for call in turn)) / len(turn)
        for seconds, turn in zip(measured.seconds.seconds, measured.calls, strict=True)
    )
    return sum(medians[step.variant] + around for step in plan.steps)


def _row(candidate: Candidate, measured: Mapping[str, Measured], options: BenchOptions, steps: int) -> BenchmarkResult:
    """Return the row of a candidate; the reference was timed with a number of steps."""
    bundle = candidate.bundle
    row = BenchmarkResult(
        name=candidate.name,
        description=candidate.description,
        bundle=str(bundle.path) if bundle else None,
        status=candidate.status,
        problem=candidate.problem,
        error=candidate.error,
        mac_ratio=_mac_ratio(bundle),
        cache_bytes=cache_bytes(bundle.interfaces, denoiser_batch(candidate.plan, options.samples)) if bundle else 0,
        alone=candidate.alone,
    )
    own, reference = measured.get(candidate.name), measured.get(REFERENCE)
    if own is None:
        return row
    variants = _variants(own, options)
    forward = variants[candidate.computing]
    row = replace(row, forward=forward, variants=variants if bundle else {})
    if not options.forward_only:
        row = replace(row, sampling=own.seconds)
    if reference is None:
        return row
    eager = _variants(reference, options)[FORWARD]
    row = replace(row, forward_speedup=eager.median / forward.median)
    if options.forward_only:
        return row
    speedup = Ratio.of(reference.seconds, own.seconds)
    # Every step of a baseline takes the same time, so that the whole run takes a multiple of that of the timed steps.
    multiple = 1.0 if bundle is None else bundle.plan.fingerprint.steps / steps
    return replace(row, speedup=speedup, run_speedup=speedup.times(multiple))


def _mac_ratio(bundle: Bundle | None) -> float | None:
    """Return the arithmetic of a bundle relative to the model's; None if its report is missing."""
    if bundle is None:
        return 1.0
    report = bundle.report
    return report.mac_ratio if report else None


def _variants(measured: Measured, options: BenchOptions) -> dict[str, Timing]:
    """Return the seconds of a step by variant, over all rounds; for sections without the uncounted first call."""
    calls = [call for turn in measured.calls for call in (counted(turn) if options.forward_only else turn)]
    return {variant: Timing.of(seconds) for variant, seconds in by_variant(calls).items()}
