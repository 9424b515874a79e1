"""Compile a model by a recipe: from the model's name to a verified bundle."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch

from qcgraph.bundle import Bundle, check_output, write_plan, write_scheduler, writing
from qcgraph.bundle.plan_file import PlanFile
from qcgraph.bundle.report import (
    REPORT,
    CheckReport,
    ComparisonReport,
    CompileReport,
    EdgeReport,
    EstimateReport,
    GivenPlan,
)
from qcgraph.capture.capture import capture
from qcgraph.capture.meaning import check_meaning
from qcgraph.compiler.acceptance import admit_edges, admit_quality, check_conditions, overrides
from qcgraph.compiler.costs import costs_for
from qcgraph.compiler.default_pipeline import default_pipeline, target_notes
from qcgraph.compiler.estimate import estimate
from qcgraph.compiler.least_bits import compile_with_least, is_asked_for, most_bits
from qcgraph.compiler.rejection import forget_rejected, reject
from qcgraph.compiler.report import compile_report, quantizable
from qcgraph.compiler.running import running_for
from qcgraph.compiler.verdict import Contest, comparable, compare
from qcgraph.errors import QcgraphError, UsageError, closest
from qcgraph.evaluation.ablation import is_quantized
from qcgraph.evaluation.fitted_rival import keep_rival
from qcgraph.export.check.check import Check
from qcgraph.export.check.verify import verify_export
from qcgraph.export.targets import Target, record_of, target_named, target_of
from qcgraph.facts import QuantPlan, Rehearsed, precision_of
from qcgraph.ir.memory import release_memory
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program, save_program
from qcgraph.ir.structure import find_sites
from qcgraph.models import LoadedModel, check_loaded, lasting_name, load_model
from qcgraph.passes.quantization.plan_quant import why_nothing
from qcgraph.pipeline import Instrument, Pass, Pipeline
from qcgraph.pipeline.instruments import Dump, PrintAfter, Reproduce, Timer, VerifyEach
from qcgraph.plan.schedule import TimedSchedule
from qcgraph.plan.schedulers import check_name, make_step_plan
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.recipe import Recipe
from qcgraph.recipe.gate import Verdict
from qcgraph.sampling.reference import RunStore

HELD_BYTES = 2**28  # bytes of weights that stay in memory with their capture; a larger model is loaded again


@dataclass(frozen=True)
class CompileResult:
    """The result of a compilation.

    Attributes:
        bundle: the bundle, or None when none was to be written.
        report: the summary.
        program_text: the program as text after the last pass that ran.
    """

    bundle: Bundle | None
    report: CompileReport
    program_text: str


class _ReleaseMemory(Instrument):
    """Return the memory that a pass freed to the system, after every pass."""

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        release_memory()


class _KeepRival(Instrument):
    """Keep a solver that is fitted in full precision, so that evaluations of the bundle need not fit their rival."""

    def after(self, pass_: Pass, before: Program, after: Program) -> None:
        keep_rival(before, after)


def compile_model(
    model: str | LoadedModel,
    recipe: Recipe,
    output: Path | None,
    *,
    plan: PlanFile | None = None,
    force: bool = False,
    stop_after: str | None = None,
    verify_each: bool = False,
    print_after: tuple[str, ...] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
    out: TextIO | None = None,
) -> CompileResult:
    """Compile a denoiser.

    Args:
        model: a model's name, or a loaded model.
        recipe: the settings of the compilation.
        output: the folder of the bundle; not needed when no bundle is written.
        plan: a schedule that replaces the one of the recipe; the recipe in the bundle records it.
        force: whether an existing bundle at ``output`` is replaced.
        stop_after: the pass to stop after; no bundle is written then.
        verify_each: run and check the program after every pass.
        print_after: passes after which the program is printed to ``out``, or ``all``.
        dry_run: whether to resolve all settings, but run no pass that samples and write no bundle.
        progress: receives progress messages.
        out: the stream for printed programs, standard output by default.

    Raises:
        UsageError: the input is wrong; nothing was written.
        VerificationError: the exported graphs differ from the program (the export is kept beside the output), a cache
            is unsafe, or the gate of the recipe is not met; nothing was written to the output.
    """
    compilation = _Compilation(
        model=model,
        output=output,
        plan=plan,
        force=force,
        stop_after=stop_after,
        verify_each=verify_each,
        print_after=print_after,
        dry_run=dry_run,
        progress=progress or Progress(),
        out=out or sys.stdout,
    )
    with torch.inference_mode(mode=False):  # tensors made in inference mode count no writes and allow no gradients
        if not is_asked_for(recipe):
            return compilation.run(recipe)
        if dry_run:
            return compilation.run(recipe.override(bits=most_bits()))
        return compile_with_least(
            recipe, lambda fixed, again: replace(compilation, force=force or again).run(fixed), compilation.progress
        )


@dataclass(frozen=True)
class _Compilation:
    """The arguments of `compile_model` except the recipe, whose bits may have to be searched."""

    model: str | LoadedModel
    output: Path | None
    plan: PlanFile | None
    force: bool
    stop_after: str | None
    verify_each: bool
    print_after: tuple[str, ...]
    dry_run: bool
    progress: Progress
    out: TextIO

    def run(self, recipe: Recipe) -> CompileResult:
        """Compile by a recipe whose bits are known."""
        recipe = with_given_plan(recipe, self.plan)
        target = target_named(recipe.target.name)
        pipeline = default_pipeline(recipe, target)
        _check_pass_names(pipeline, (*self.print_after, *([self.stop_after] if self.stop_after else [])))
        output = self._place()
        check_name(recipe.sampling.scheduler)
        notes = self._noted(target_notes(recipe, target))
        started, timer = time.perf_counter(), Timer(self.progress)
        loaded, captured = _captured(self.model, recipe, self.progress, timer)
        notes += self._noted(loaded.notes)
        if self.plan is not None:
            self.plan.check_model(captured.facts[StepPlan].fingerprint.model)
        _check_applicable(recipe, pipeline, loaded, captured)
        sites, dump = find_sites(captured.variants[captured.computing]), Dump(captured)
        instruments = (*self._instruments(captured), timer, dump)
        chosen = _prefix(pipeline, self.stop_after)
        start, kept = [chosen.foreseen(captured)] if self.dry_run else [captured], captured if self.dry_run else None
        held = (loaded, captured) if captured.constant_bytes <= HELD_BYTES else None
        elapsed = time.perf_counter() - started
        del loaded, captured  # large weights are not held while the passes run, once passes have replaced them
        ran, runs = chosen.without_sampling() if self.dry_run else chosen, RunStore()
        program = self._transformed(start, ran, instruments, target, runs)
        report = compile_report(sites, program, recipe, target, pipeline, timer.seconds)
        if chosen.provides(QuantPlan) and not (report.planned_sites if self.dry_run else report.quantized_sites):
            notes += self._noted([f"{recipe.quantization.bits} was asked for, but {why_nothing(program, sites)}"])
        found = None if kept is None else estimate(kept, program, pipeline, quantizable(sites), target, elapsed)
        report = report.with_fields(
            source=lasting_name(self.model) if isinstance(self.model, str) else None,
            given_plan=_given_plan(recipe, self.plan, program),
            notes=notes,
            estimate=found and EstimateReport(**asdict(found)),
        )
        if output is not None:
            report = self._write(output, program, held, recipe, target, report, dump, timer, started, runs)
            forget_rejected(output)
            return CompileResult(Bundle.open(output, check=False), report, program.text)
        return CompileResult(None, report, program.text)

    def _place(self) -> Path | None:
        """Return the folder for the bundle, or None when no bundle is written.

        Raises:
            UsageError: no folder was given, or it cannot be written.
        """
        if self.dry_run or self.stop_after is not None:
            return None
        if self.output is None:
            raise UsageError("no output folder", hint="say where the bundle goes: -o FOLDER")
        check_output(self.output, force=self.force)
        return self.output

    def _instruments(self, captured: Program) -> Iterator[Instrument]:
        """Yield the instruments that watch the passes, except those for time and text."""
        yield Reproduce(lambda: _reproducer_folder(self.output), self.progress)
        yield _ReleaseMemory()
        yield _KeepRival()
        if self.verify_each:
            yield VerifyEach(captured, self.progress)
        if self.print_after:
            yield PrintAfter(self.print_after, self.out)

    def _transformed(
        self,
        start: list[Program],
        pipeline: Pipeline,
        instruments: Sequence[Instrument],
        target: Target,
        runs: RunStore,
    ) -> Program:
        """Return the program after all passes; take it out of ``start``, so that nothing else keeps it in memory."""
        program = start.pop()
        for part in _parts(pipeline):
            costs = costs_for(target, self.progress)
            running = running_for(target)
            program = part.run(program, instruments, self.progress, costs, origin=program, runs=runs, running=running)
            if program.constant_bytes > HELD_BYTES:
                gc.collect()  # graphs and modules refer to each other; this frees the weights that were replaced
                release_memory()
        return program

    def _noted(self, notes: Iterable[str]) -> tuple[str, ...]:
        """Print notes, and return them for the report."""
        printed = tuple(notes)
        for note in printed:
            self.progress.note(f"note: {note}")
        return printed

    def _write(
        self,
        output: Path,
        program: Program,
        held: tuple[LoadedModel, Program] | None,
        recipe: Recipe,
        target: Target,
        report: CompileReport,
        dump: Dump,
        timer: Timer,
        started: float,
        runs: RunStore,
    ) -> CompileReport:
        """Export, check and judge the program, write the bundle, and return its report.

        Raises:
            VerificationError: see `compile_model`.
        """

        def origin() -> tuple[LoadedModel, Program]:
            """Return the model and its capture."""
            return held or _loaded_again(self.model, recipe, program, self.progress, timer)

        edges, original = _admitted_edges(origin, recipe, program, self.progress, timer)
        if held is None:
            gc.collect()  # frees the model that the measurement used

        def fill(folder: Path) -> CompileReport:
            """Write everything in a bundle except its graphs and weights, and return its report."""
            self.progress.stage("write")
            whole = report.with_fields(
                cached_edges=edges,
                checks=tuple(CheckReport(**asdict(check)) for check in checks),
                gate=verdicts,
                comparison=comparison,
                seconds=round(time.perf_counter() - started, 2),
                stages={name: round(seconds, 3) for name, seconds in timer.stages.items()},
            )
            _write(folder, program, recipe, whole, dump)
            return whole

        name, precision = program.facts[ModelSpec].name, precision_of(program.facts)
        with writing(
            output,
            model=name,
            target=target.name,
            target_record=record_of(target),
            precision=precision,
            overrides=overrides(edges, program),
            force=self.force,
        ) as folder:
            checks = _export(program, folder, target, self.progress, timer)
            verdicts: tuple[Verdict, ...] = ()
            comparison: ComparisonReport | None = None
            if any(check.failed for check in checks):
                raise reject(checks, folder, output, fill, model=name, target=target, precision=precision)
            if recipe.conditions is not None and original is not None:
                with timer.stage("gate"):
                    verdicts = admit_quality(recipe.conditions, *original, program, folder, target, self.progress)
            if recipe.gate.verdict and (count := comparable(program)):
                with timer.stage("comparison"):
                    contest = Contest(
                        origin()[1], program, folder, target, recipe.calibration.seed, runs, self.progress
                    )
                    try:
                        comparison = compare(contest, count)
                    except QcgraphError as error:  # the bundle is complete without it
                        self._noted([f"not compared with plain solvers: {error.message}"])
            return fill(folder)


def with_given_plan(recipe: Recipe, plan: PlanFile | None) -> Recipe:
    """Return a recipe that contains the schedule of a plan, so that the bundle can be compiled again from it alone.

    Raises:
        UsageError: the recipe has its own pipeline.
    """
    if plan is None:
        return recipe
    schedule = f"plan={plan.schedule.text}"
    if recipe.pipeline.passes:
        raise UsageError(
            "the recipe has a pipeline of its own, which decides the steps",
            where=plan.where,
            hint=f"put apply-plan{{{schedule}}} into it, after insert-cache",
        )
    return recipe.override(cache=schedule)


def _given_plan(recipe: Recipe, plan: PlanFile | None, program: Program) -> GivenPlan | None:
    """Report how a given schedule was applied, and its effect on the final latents (see `Rehearsed`)."""
    if recipe.given_plan is None:
        return None
    schedule, steps = TimedSchedule.parse(recipe.given_plan), program.facts[StepPlan]
    rehearsed = program.facts.get(Rehearsed)
    return GivenPlan(
        source=plan.describe() if plan else f"{len(schedule.timesteps)} steps",
        schedule=schedule.text,
        is_retargeted=schedule.timesteps != steps.timesteps,
        other_guidance=plan is not None and plan.guidance not in (None, steps.fingerprint.guidance),
        computing=steps.modes.count(None),
        error=rehearsed.error if rehearsed else None,
        even_error=rehearsed.even_error if rehearsed else None,
    )


def _write(folder: Path, program: Program, recipe: Recipe, report: CompileReport, dump: Dump) -> None:
    """Write everything in a bundle except its graphs and weights."""
    dump.write(folder / "ir")
    spec, plan = program.facts[ModelSpec], program.facts[StepPlan]
    write_plan(folder, spec, plan, program.interfaces)
    write_scheduler(folder, spec, plan)
    (folder / "recipe.lock.toml").write_text(recipe.to_toml(), "utf-8")
    (folder / REPORT).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")


def verify_bundle(bundle: Bundle, progress: Progress | None = None, target: str | None = None) -> tuple[Check, ...]:
    """Check legality and parity of every exported variant of a bundle against its program in PyTorch.

    Args:
        bundle: the bundle.
        progress: receives progress messages.
        target: a target that the graphs must also conform to (see `qcgraph.export.check.conformance`).

    Raises:
        BundleError: a file of the bundle is missing or was changed, or the bundle has no graphs to check.
        UsageError: the target does not exist or takes no graphs, or the library that checks it is not installed.
    """
    progress, compiled_for = progress or Progress(), target_of(bundle)
    if target is None:
        return verify_export(load_program(bundle.path), bundle.path, compiled_for, bundle.interfaces, progress)
    from qcgraph.export.check.conformance import check_conformance, judge_of

    asked = target_named(target)
    judge_of(asked)  # refuses early: loading the program may take long
    for variant in bundle.interfaces:
        bundle.file(f"{variant}.onnx")
    return check_conformance(load_program(bundle.path), bundle.path, asked, bundle.interfaces, progress)


def _captured(
    model: str | LoadedModel, recipe: Recipe, progress: Progress, timer: Timer, *, again: bool = False
) -> tuple[LoadedModel, Program]:
    """Return the model, and its captured program with the step plan."""
    suffix = " again" if again else ""
    progress.note(f"loading {model}" if isinstance(model, str) else f"taking {model.spec.name}")
    with timer.stage(f"load{suffix}"):
        loaded = load_model(model) if isinstance(model, str) else check_loaded(model)
    sampling = recipe.sampling
    _check_guidance(loaded.spec, sampling.guidance)
    progress.note("capturing with torch.export")
    with timer.stage(f"capture{suffix}"):
        program = capture(loaded.module, loaded.spec, loaded.input_names)
        plan = make_step_plan(
            sampling.scheduler, sampling.steps, sampling.guidance, loaded.spec.noise_schedule, program.constants_digest
        )
        if not again:
            check_meaning(program, loaded.module, loaded.input_names, plan)
    return loaded, program.with_facts(plan)


def _check_guidance(spec: ModelSpec, weight: float) -> None:
    """Refuse guidance for a model without an unconditional half.

    Raises:
        UsageError: no condition of the model has a null value.
    """
    if weight != 1.0 and not spec.is_guided:
        raise UsageError(
            f"guidance {weight:g} needs an unconditional half, and no condition of {spec.name} has a null value",
            where="sampling.guidance",
            hint="compile with --guidance 1; or give a condition of the spec its null value",
        )


def _loaded_again(
    model: str | LoadedModel, recipe: Recipe, program: Program, progress: Progress, timer: Timer
) -> tuple[LoadedModel, Program]:
    """Load and capture the model of a program again, because neither was held while the passes ran.

    Raises:
        UsageError: the weights of the model have changed.
    """
    loaded, captured = _captured(model, recipe, progress, timer, again=True)
    found, expected = (of.facts[StepPlan].fingerprint.model for of in (captured, program))
    if found != expected:
        raise UsageError(
            f"the model has other weights than when it was loaded first: their digest is {found}, it was {expected}",
            where=loaded.spec.name,
            hint="its file was written to meanwhile, or its factory draws weights without a seed",
        )
    return loaded, captured


def _admitted_edges(
    origin: Callable[[], tuple[LoadedModel, Program]],
    recipe: Recipe,
    program: Program,
    progress: Progress,
    timer: Timer,
) -> tuple[tuple[EdgeReport, ...], tuple[LoadedModel, Program] | None]:
    """Return the edges that `admit_edges` measured, and the model with its capture if a gate needs them."""
    judges = recipe.conditions is not None
    has_edges = is_quantized(program) and len(program.facts[StepPlan].variants) > 1
    if not judges and not has_edges:
        return (), None
    loaded, captured = origin()
    with timer.stage("cached edges"):
        edges = admit_edges(
            program, captured, recipe.calibration.seed, allow_unsafe=recipe.gate.allow_unsafe, progress=progress
        )
    return edges, (loaded, captured) if judges else None


def _export(program: Program, folder: Path, target: Target, progress: Progress, timer: Timer) -> tuple[Check, ...]:
    """Write the program and its graphs for the target, and return the checks of the graphs."""
    if not target.emits_onnx:
        with timer.stage("export"):
            save_program(program, folder)
        return ()
    from qcgraph.export.onnx.emit import emit_onnx

    with timer.stage("export"):
        emit_onnx(program, folder, target.opset, progress, **target.forms)
    progress.note("verifying the exported graphs")
    with timer.stage("verify"):
        return verify_export(program, folder, target, program.interfaces, progress)


def _check_pass_names(pipeline: Pipeline, names: tuple[str, ...]) -> None:
    known = [pass_.name for pass_ in pipeline]
    for name in names:
        if name not in known and name != "all":
            raise UsageError(f"no pass {name!r} in this pipeline", hint=closest(name, known))


def _check_applicable(recipe: Recipe, pipeline: Pipeline, loaded: LoadedModel, captured: Program) -> None:
    """Refuse a recipe that does not fit the model or its steps, before anything is sampled."""
    pipeline.check(captured)
    if recipe.conditions is not None:
        check_conditions(recipe.conditions, loaded)


def _prefix(pipeline: Pipeline, stop_after: str | None) -> Pipeline:
    """Return the passes up to ``stop_after``, or all of them."""
    names = [pass_.name for pass_ in pipeline]
    return Pipeline(pipeline.passes[: names.index(stop_after) + 1] if stop_after else pipeline.passes)


def _parts(pipeline: Pipeline) -> tuple[Pipeline, ...]:
    """Return a pipeline in parts, each with an origin of its own (see `qcgraph.pipeline.Pass.restarts`)."""
    ends = (index + 1 for index, pass_ in enumerate(pipeline) if pass_.restarts)
    end = next(ends, len(pipeline.passes))
    return tuple(Pipeline(part) for part in (pipeline.passes[:end], pipeline.passes[end:]) if part)


def _reproducer_folder(output: Path | None) -> Path:
    if output is None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        return Path(tempfile.gettempdir()) / f"qcgraph-{user}.reproducer"  # one for each user: they are large
    return output.with_name(f"{output.name}.reproducer")
