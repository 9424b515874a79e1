"""Accept or refuse a compilation before it is written, by its cached edges and by its gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qcgraph.bundle.report import EdgeReport
from qcgraph.errors import RefusedError
from qcgraph.evaluation.edges import LEAST_SNR, CachedEdge, measure_edges
from qcgraph.evaluation.evaluate import Options, evaluate
from qcgraph.evaluation.metrics import check_installed, choose_metrics
from qcgraph.evaluation.settings import Subject
from qcgraph.export.run.open import open_runner
from qcgraph.export.run.runtimes import Exported
from qcgraph.export.targets import Target
from qcgraph.facts import SolverPlan
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress
from qcgraph.recipe.gate import Gate, Verdict, require

UNSAFE = "unsafe-cache"  # the override that the manifest of such a bundle records


def check_conditions(gate: Gate, model: LoadedModel) -> None:
    """Refuse a gate that cannot be measured, before any work begins.

    Raises:
        UsageError: a condition needs a judge that the model does not have, or a library that is not installed.
    """
    check_installed(choose_metrics(gate.metrics, judged=model.judge is not None, model=model.spec.name))


def admit_edges(
    program: Program, origin: Program, seed: int, *, allow_unsafe: bool, progress: Progress
) -> tuple[EdgeReport, ...]:
    """Measure the cached edges of a program, and refuse a cache whose noise exceeds the change that reuse leaves out.

    A cache that came with the steps of a fitted solver is measured, but not refused: its reusing steps stand for steps
    that would be left out, not for computing ones, and they were chosen by the error of final latents.

    Args:
        program: the compiled program.
        origin: the captured model.
        seed: the seed of the calibration.
        allow_unsafe: whether an unsafe cache is accepted.
        progress: reports the measurement.

    Returns:
        The measurement of every cached edge, for the report.

    Raises:
        RefusedError: an edge is unsafe, and ``allow_unsafe`` is not set.
    """
    edges = measure_edges(program, origin, seed, progress)
    unsafe = [] if _is_of_solver(program) else [edge for edge in edges if not edge.is_safe]
    if unsafe and not allow_unsafe:
        raise RefusedError(
            f"quantization and cache do not go together: {_measured(unsafe[0])}",
            where=f"cached edge {unsafe[0].name}",
            hint="use more bits or --cache off; --allow-unsafe compiles it all the same, and the manifest says so",
        )
    return tuple(EdgeReport(**asdict(edge), snr=edge.snr) for edge in edges)


def _measured(edge: CachedEdge) -> str:
    return (
        f"quantization noise is {edge.noise:.1%} of the cached value, which changes by {edge.change:.1%} from step to "
        f"step, {edge.snr:.1f} dB where {LEAST_SNR:g} dB is the least"
    )


def _is_of_solver(program: Program) -> bool:
    """Whether the cache came with the steps of a fitted solver."""
    solver = program.facts.get(SolverPlan)
    return solver is not None and solver.half_steps > 0


def overrides(edges: Sequence[EdgeReport], program: Program) -> tuple[str, ...]:
    """Return the overrides for the manifest: the names of unsafe things that were accepted."""
    unsafe = any(edge.snr is not None and edge.snr < LEAST_SNR for edge in edges)
    return (UNSAFE,) if unsafe and not _is_of_solver(program) else ()


def admit_quality(
    gate: Gate, model: LoadedModel, origin: Program, program: Program, folder: Path, target: Target, progress: Progress
) -> tuple[Verdict, ...]:
    """Sample from the exported program, and refuse it when the gate is not met.

    Args:
        gate: the conditions.
        model: the model.
        origin: the model, captured.
        program: the compiled program.
        folder: the folder of the exported program.
        target: the target that it was exported for.
        progress: reports the samples.

    Raises:
        UsageError: a condition does not apply to the model.
        RefusedError: the gate is not met; the message names the failed conditions.
    """
    runner = open_runner(target, Exported(program, folder, program.interfaces))
    subject = Subject(model, origin, program, program.facts[StepPlan], runner, folder, target)
    progress.note(f"measuring the gate {gate.text}")
    evaluation = evaluate(subject, Options(metrics=gate.metrics, attribution=False, gate=gate), progress)
    require(evaluation.verdicts, hint="nothing was written; qcgraph eval without a gate shows which part costs it")
    return evaluation.verdicts
