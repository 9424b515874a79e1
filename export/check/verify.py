"""Checks of exported graphs: their kernels in ONNX Runtime, their parameters, and parity with the program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcgraph.export.check.check import NO_NUMBER, Check
from qcgraph.export.check.exported_sites import Parameters, multiplied_integers, parameters
from qcgraph.export.check.parity import check_outputs, check_sites
from qcgraph.export.run.onnxruntime import OnnxRuntimeRunner, OptimizedGraph
from qcgraph.export.run.open import open_runner
from qcgraph.export.run.runtimes import ONNXRUNTIME, RUNTIMES, Exported
from qcgraph.export.targets import Target
from qcgraph.facts import QuantPlan, precision_of
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite, quantized_products, quantized_sites
from qcgraph.ir.structure import find_sites
from qcgraph.plan.spec import Interface
from qcgraph.progress import Progress

CONSTANT_SCALES = "constant scales"
KERNEL = "MatMulIntegerToFloat"
BIAS = 6  # input of this kernel
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
LARGEST_INT8 = 127
VIEWS = ("Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze")


def verify_export(
    program: Program, folder: Path, target: Target, interfaces: Mapping[str, Interface], progress: Progress
) -> tuple[Check, ...]:
    """Check the exported graphs of a program.

    Args:
        program: the exported program, which holds a step plan; its steps give timesteps, groups and rows.
        folder: the folder of the graphs and their weights.
        target: the target that it was exported for.
        interfaces: inputs and outputs by variant.
        progress: reports the variants.

    Returns:
        Every check that was made, passed or failed; none for a target without ONNX graphs.

    Raises:
        BundleError: ONNX Runtime cannot load a graph.
    """
    if not target.emits_onnx:
        return ()
    precision = precision_of(program.facts)
    runner = open_runner(target, Exported(program, folder, interfaces), ONNXRUNTIME)  # it runs every check
    assert isinstance(runner, OnnxRuntimeRunner)  # only this runner gives all outputs of a variant
    checks: list[Check] = []
    for variant in progress.track(list(program.variants), "verifying"):
        path = folder / f"{variant}.onnx"
        sites = quantized_sites(program, variant)
        if precision == "f32":
            checks.append(_check_kernels(program, variant, sites, path))  # int8 kernels do not exist in 16 bits
        if sites:
            found = list(_check_parameters(variant, parameters(path), target))
            checks += found
            if any(check.name == CONSTANT_SCALES and not check.passed for check in found):
                continue  # ONNX Runtime cannot run int8 activations with selected scales exactly
        if precision not in RUNTIMES[ONNXRUNTIME].types:
            checks.append(_not_run(variant, precision))
            continue
        if sites:
            checks.append(check_sites(program, variant, sites, path, exact=target.may_saturate))
        checks += check_outputs(program, variant, runner)
    return tuple(checks)


def _not_run(variant: str, precision: str) -> Check:
    detail = f"not run: ONNX Runtime has no {precision} kernels on the CPU"
    return Check("parity", variant, passed=None, value=NO_NUMBER, limit=NO_NUMBER, detail=detail)


def _check_kernels(program: Program, variant: str, sites: Sequence[QuantizedSite], path: Path) -> Check:
    """Check that planned linears run in int8, with biases where possible, and no product takes dequantized values."""
    optimized, integers = OptimizedGraph.of(path), multiplied_integers(path)
    plan = program.facts.get(QuantPlan)
    planned = set(plan.sites) if plan else set()
    unquantized = {site.name for site in find_sites(program.variants[variant])} - {site.name for site in sites}
    kernels = [node for node in optimized.nodes if node.op == KERNEL]
    left = []
    for site in sites:
        kernel = next((node for node in kernels if node.inputs[1] == site.codes), None)
        if kernel is None:
            left.append(site.name)
            continue
        kernels.remove(kernel)
        if site.codes in integers and site.has_bias and not any(kernel.inputs[BIAS:]):
            left.append(f"the bias of {site.name}")
    products = quantized_products(program, variant)
    missing = [f"{len(products) - len(kernels)} products of attention"] if len(kernels) < len(products) else []
    offenders = [*sorted(unquantized & planned), *left, *missing, *_dequantized_products(optimized)]
    what = ", ".join(offenders)
    ran = f"{len(sites)} linears" + (f" and {len(products)} products of attention" if products else "")
    return Check(
        name="int8 kernels",
        variant=variant,
        passed=not offenders,
        value=len(offenders),
        limit=0,
        detail=f"not in int8: {what}" if offenders else f"{ran} in int8, none of them left in float",
    )


def _dequantized_products(optimized: OptimizedGraph) -> Iterator[str]:
    """Yield the floating-point products of dequantized values."""
    makers = {name: node for node in optimized.nodes for name in node.outputs}
    for node in optimized.nodes:
        for name in node.inputs if node.op in PRODUCTS else ():
            maker = makers.get(name)
            while maker is not None and maker.op in VIEWS:
                maker = makers.get(maker.inputs[0])
            if maker is not None and maker.op == "DequantizeLinear":
                yield f"{node.op} {node.name}"
                break


def _largest(codes: npt.NDArray[np.int16], *, pairs: bool) -> int:
    """Return the largest magnitude of codes [in, out], or of what two neighbouring inputs add in one sum.

    Activations are unsigned, so that codes of unlike signs add less than the larger one of them alone.
    """
    single = np.abs(codes)
    if not pairs:
        return int(single.max())
    together = np.abs(codes[: len(codes) // 2 * 2].reshape(-1, 2, *codes.shape[1:]).sum(axis=1))
    return max(int(single.max()), int(together.max(initial=0)))


def _check_parameters(variant: str, found: Parameters, target: Target) -> Iterator[Check]:
    """Check that kernels multiply the weight codes exactly, and that scales and zero points are valid."""
    integers = {name: codes.astype(np.int16) for name, codes in found.codes.items() if codes.dtype == np.int8}
    largest = {name: _largest(codes, pairs=target.pair_high is not None) for name, codes in integers.items()}
    limit, what = (LARGEST_INT8, "code") if target.pair_high is None else (target.pair_high, "sum of two codes")
    over = [name for name, value in largest.items() if value > limit]
    value = max(largest.values(), default=0)
    yield Check(
        name="weight codes",
        variant=variant,
        passed=not over,
        value=value,
        limit=limit,
        detail=(f"the largest {what} is {value}" if value else "no integers")
        + (f", in {', '.join(over)}" if over else ""),
    )
    wrong = [name for name, scale in found.scales.items() if not np.all(np.isfinite(scale) & (scale > 0))]
    symmetric = [
        name for name, zeros in found.zero_points.items() if zeros.dtype == np.int8 or target.activation == "symmetric"
    ]
    wrong += [name for name in symmetric if np.any(found.zero_points[name].astype(np.float32))]
    yield Check(
        name="scales and zero points",
        variant=variant,
        passed=not wrong,
        value=len(wrong),
        limit=0,
        detail=f"not finite, positive or symmetric: {', '.join(wrong)}" if wrong else f"{len(found.scales)} scales",
    )
    if target.constant_scales:
        selected = sorted(found.selected)
        yield Check(
            name=CONSTANT_SCALES,
            variant=variant,
            passed=not selected,
            value=len(selected),
            limit=0,
            detail=f"selected or computed at run time: {', '.join(selected)}" if selected else "the same at every step",
        )
