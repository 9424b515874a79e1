"""Conformance of graphs to a target, as far as it can be checked without the target's hardware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcgraph.errors import BundleError, UsageError
from qcgraph.export.check.check import Check
from qcgraph.export.check.engine_checks import Library, check_engine
from qcgraph.export.check.verify import verify_export
from qcgraph.export.onnx.valid import load_graph, problem_of
from qcgraph.export.targets import TARGETS, Target
from qcgraph.export.tensorrt.provider import LIBRARIES
from qcgraph.ir.program import Program
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.progress import Progress

if TYPE_CHECKING:
    from onnxscript import ir

STANDARD = ("", "ai.onnx")  # both mean the operators of ONNX itself
MADE = (TensorRole.CACHE, TensorRole.MODULATION)  # roles of inputs that other variants compute


def check_conformance(
    program: Program, folder: Path, target: Target, interfaces: Mapping[str, Interface], progress: Progress
) -> tuple[Check, ...]:
    """Check that exported graphs fit a target, which may be another one than they were exported for.

    Every graph must be valid ONNX, tensors that one variant leaves to another must be the same on both sides, and all
    of `verify_export` must hold: constant positive scales and zero points of 0 where the target requires them, and
    parity with the program. Portable targets take operators of ONNX alone, up to their opset; targets of TensorRT have
    the gates of `qcgraph.export.check.engine_checks`.

    Args:
        program: the exported program, which holds a step plan.
        folder: the folder of the graphs and their weights.
        target: the target to check for.
        interfaces: inputs and outputs by variant.
        progress: reports progress of slow checks.

    Returns:
        Every check that was made, passed or failed.

    Raises:
        UsageError: the target takes no graphs, or TensorRT, which has to judge them, is not installed.
    """
    library = judge_of(target)
    paths = {variant: folder / f"{variant}.onnx" for variant in program.variants}
    checks = [_check_valid(variant, path) for variant, path in paths.items()]
    if not all(check.passed for check in checks):
        return tuple(checks)  # the checks below read the graphs
    checks.append(check_cache_tensors(program.facts[StepPlan], interfaces, paths))
    if target.is_portable:
        checks += (_check_operators(variant, path, target) for variant, path in paths.items())
    if library is not None:
        for variant, path in paths.items():
            checks += check_engine(library, program, variant, path, interfaces[variant], progress)
    try:
        checks += verify_export(program, folder, target, interfaces, progress)
    except BundleError as error:
        checks.append(Check("loads in ONNX Runtime", "", passed=False, value=1, limit=0, detail=error.message))
    return tuple(checks)


def judge_of(target: Target) -> Library | None:
    """Return the library that decides whether graphs fit a target, or None for a target without one.

    Raises:
        UsageError: the target takes no graphs, or the library is not installed.
    """
    if not target.emits_onnx:
        names = ", ".join(name for name, known in TARGETS.items() if known.emits_onnx)
        raise UsageError(f"{target.name} takes no graphs", where="--target", hint=f"these do: {names}")
    return Library.load(target.runtime) if target.runtime in LIBRARIES else None


def check_cache_tensors(plan: StepPlan, interfaces: Mapping[str, Interface], paths: Mapping[str, Path]) -> Check:
    """Check that every tensor one variant takes is the one another leaves: name, type and shape, in plan and graphs.

    Args:
        plan: the plan, which gives the preparing variant of each variant.
        interfaces: inputs and outputs by variant, as the plan has them.
        paths: the graphs by variant, which are valid ONNX.
    """
    wrong = [problem for variant, path in paths.items() for problem in _differences(interfaces[variant], path)]
    left: dict[str, tuple[str, TensorSpec]] = {}  # cached value -> the first variant that computes it, and the spec
    for variant, interface in interfaces.items():
        for spec in interface.caches:
            maker, known = left.setdefault(spec.value, (variant, spec))
            if str(spec) != str(known):
                wrong.append(f"{spec.name} is {known} from {maker}, {spec} from {variant}")
    for variant, interface in interfaces.items():
        preparing = plan.preparing.get(variant)
        for spec in interface.taken(*MADE):
            made = left.get(spec.value)
            if spec.role is TensorRole.MODULATION:
                made = (preparing, interfaces[preparing].result) if preparing and preparing in interfaces else None
            if made is None:
                wrong.append(f"no variant computes {spec.name}, which {variant} takes")
            elif str(spec) != str(made[1]):
                wrong.append(f"{spec.name} is {made[1]} from {made[0]}, {variant} takes {spec}")
    names = {spec.name for interface in interfaces.values() for spec in interface.taken(*MADE)}
    detail = "; ".join(wrong) or f"taken as they are left: {', '.join(sorted(names)) or 'none'}"
    return Check("cache tensors", "", passed=not wrong, value=len(wrong), limit=0, detail=detail)


def _differences(interface: Interface, path: Path) -> Iterator[str]:
    """Yield the differences between the inputs and outputs of a graph and those in the plan."""
    graph = load_graph(path).graph
    for kind, values, specs in (
        ("takes", graph.inputs, interface.inputs),
        ("leaves", graph.outputs, interface.outputs),
    ):
        found, planned = _texts(values), {spec.name: str(spec) for spec in specs}
        for name in dict.fromkeys((*planned, *found)):
            if found.get(name) != planned.get(name):
                yield (
                    f"{path.name} {kind} {name} as {found.get(name, 'nothing')}, the plan says "
                    f"{planned.get(name, 'nothing')}"
                )


def _texts(values: Sequence[ir.Value]) -> dict[str, str]:
    """Return the types of the inputs or outputs of a graph, written as in the plan."""
    return {str(value.name): f"{value.dtype.short_name() if value.dtype else '?'}{value.shape}" for value in values}


def _check_valid(variant: str, path: Path) -> Check:
    problem = " ".join((problem_of(path) or "").split())
    detail = problem or "passes the full check of onnx"
    return Check("valid ONNX", variant, passed=not problem, value=int(bool(problem)), limit=0, detail=detail)


def _check_operators(variant: str, path: Path, target: Target) -> Check:

    model = load_graph(path)
    foreign = [
        f"{node.domain}.{node.op_type} ({node.name})" for node in model.graph.all_nodes() if node.domain not in STANDARD
    ]
    opset = max(model.opset_imports.get(domain, 0) for domain in STANDARD)
    if opset > target.opset:
        foreign.append(f"the opset is {opset}, and {target.name} takes up to {target.opset}")
    detail = ", ".join(foreign) or f"operators of ONNX alone, opset {opset}"
    return Check("operators", variant, passed=not foreign, value=len(foreign), limit=0, detail=detail)
