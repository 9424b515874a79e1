"""Summarize a compilation for report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from qcgraph.bundle.report import CompileReport, PassReport, RangeChange, VariantReport
from qcgraph.compiler.cache_report import cache_report
from qcgraph.compiler.solver_report import solver_report
from qcgraph.export.targets import Target
from qcgraph.facts import AttentionPlan, Compensation, QuantPlan, Ranges
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, macs_by_variant, total_macs
from qcgraph.pipeline import Pipeline
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.recipe import Recipe


def compile_report(
    sites: Sequence[Site],
    program: Program,
    recipe: Recipe,
    target: Target,
    pipeline: Pipeline,
    seconds: Sequence[float],
) -> CompileReport:
    """Return the summary of a compilation that its program and pipeline determine.

    Args:
        sites: the sites of the model.
        program: the compiled program.
        recipe: the resolved recipe.
        target: the target of the compilation.
        pipeline: the passes of the recipe.
        seconds: the seconds of every pass that ran.
    """
    plan, spec = program.facts[StepPlan], program.facts[ModelSpec]
    macs = macs_by_variant(program.variants)
    quantized, attention = program.facts.get(QuantPlan), program.facts.get(AttentionPlan)
    compensation = program.facts.get(Compensation)
    return CompileReport(
        model=spec.name,
        target=target.name,
        recipe=recipe,
        plan=plan.describe(),
        pipeline=pipeline.text,
        variants={name: VariantReport(steps=plan.uses(name), macs=macs[name]) for name in program.variants},
        mac_ratio=plan.work_ratio(macs, total_macs(sites)),
        cache=cache_report(program.facts),
        solver=solver_report(program.facts),
        timestep_groups=plan.group_count,
        planned_sites=len(quantizable(sites)) if pipeline.provides(QuantPlan) else 0,
        quantized_sites=len(quantized.sites) if quantized else 0,
        quantized_attentions=len(attention.sites) if attention else 0,
        linear_sites=sum(site.kind == "linear" for site in sites),
        cached_range_change=_range_change(program),
        largest_variance_drift=round(compensation.largest_drift, 5) if compensation else None,
        passes=tuple(
            PassReport(**asdict(record), seconds=round(taken, 3))
            for record, taken in zip(program.history, seconds, strict=True)
        ),
    )


def _range_change(program: Program) -> RangeChange | None:
    """Return the site whose range changes most through caching, at computing steps."""
    ranges = program.facts.get(Ranges)
    sites = [site for site, found in ranges.planned.items() if found.is_finite] if ranges else []
    if ranges is None or not sites:
        return None
    site = max(sites, key=ranges.change)
    return RangeChange(site=site, relative=round(ranges.change(site), 4))


def quantizable(sites: Sequence[Site]) -> list[Site]:
    """Return the sites that a quantized compilation plans to quantize, judged by the graph alone."""
    return [site for site in sites if not site.refusal]
