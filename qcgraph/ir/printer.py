"""Programs as text: deterministic, a type on every value, and who made each node.

The text is what `--print-after`, `inspect`, `diff` and the golden tests show, so it is made for reading::

    graph full(%latent: f32[B,1,8,8], %timestep: f32[B], %class_label: i64[B], %group: i64[]) {
      ; blocks.0.attn.qkv
      %select: f32[] = qcgraph.select(@blocks.0.attn.qkv.input_scale: f32[8], %group)   ; insert-qdq, from linear_3
      ...
      return noise_prediction = %view_9, cache = %sub
    }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from qcgraph.facts import (
    ActivationQuant,
    AttentionPlan,
    AttentionQuant,
    CachePlan,
    CalibrationSet,
    Compensation,
    Equalization,
    Facts,
    ForecastFit,
    Precision,
    QuantPlan,
    Ranges,
    Reference,
    RegionQuant,
    Rehearsed,
    Requantization,
    SchedulePlan,
    SiteQuant,
    TimestepGroups,
)
from qcgraph.ir.graph import DTYPE_NAMES, Origin, Variant, module_path, returned_nodes, spec_of
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan


def print_program(facts: Facts, variants: Mapping[str, Variant]) -> str:
    """A whole program: a header with its facts, then every variant."""
    return "\n".join([print_facts(facts), *(print_variant(name, variant) for name, variant in variants.items())])


def print_facts(facts: Facts) -> str:
    """Facts, a few lines each; those of other distributions as they print themselves."""
    lines = [line for kind, show in _FACT_LINES for line in _lines_of(facts, kind, show)]
    lines += [line for fact in facts.foreign for line in fact.lines()]
    return "\n".join([*lines, ""])


def print_variant(name: str, variant: Variant) -> str:
    """One graph as text."""
    inputs = ", ".join(f"%{spec.name}: {spec}" for spec in variant.interface.inputs)
    lines = [f"graph {name}({inputs}) {{"]
    path: str | None = None
    for node in variant.graph.nodes:
        if node.op != "call_function":
            continue
        if module_path(node) != path:
            path = module_path(node)
            lines.append(f"  ; {path or 'top level'}")
        lines.append(f"  {print_node(node)}")
    returned = returned_nodes(variant.graph)
    outputs = ", ".join(
        f"{spec.name} = {_argument(node)}" for spec, node in zip(variant.interface.outputs, returned, strict=True)
    )
    return "\n".join([*lines, f"  return {outputs}", "}", ""])


def print_node(node: fx.Node) -> str:
    """One node: ``%name: type = op(arguments)`` and, unless it was captured, who made it."""
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    text = f"%{node.name}: {_type(node.meta.get('val'))} = {target_name(node.target)}({', '.join(arguments)})"
    origin = node.meta.get("origin")
    return f"{text}   ; {origin.made_by}, from {origin.source}" if isinstance(origin, Origin) else text


def target_name(target: Any) -> str:
    """``linear`` for the default overload of an aten op, ``add.Tensor`` for others, ``qcgraph.quantize`` for ours."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target.namespace, target._schema.name.split("::")[-1]
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{name}{overload}" if namespace == "aten" else f"{namespace}.{name}{overload}"
    return str(getattr(target, "__name__", target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return f"@{value.target}: {_type(value.meta.get('val'))}"
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    return str(value)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(spec_of("", value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(item) for item in value)})"
    return "int" if isinstance(value, (int, torch.SymInt)) else type(value).__name__


def _lines_of(facts: Facts, kind: type, show: Callable[[Any], list[str]]) -> list[str]:
    fact = facts.get(kind)
    return [] if fact is None else show(fact)


def _model(spec: ModelSpec) -> list[str]:
    shape = "x".join(map(str, spec.latent_shape))
    return [f"model {spec.name}: latent {shape}, {spec.class_count} classes, predicts {spec.schedule.prediction}"]


def _steps(plan: StepPlan) -> list[str]:
    lines = [f"steps {plan.describe()}, timesteps {plan.timesteps[0]:g} .. {plan.timesteps[-1]:g}"]
    if len(plan.variants) > 1:
        lines.append(f"  variants {plan.schedule()}")
    if plan.group_count > 1:
        lines.append(f"  groups   {' '.join(str(step.group) for step in plan.steps)}")
    return lines


def _cache(plan: CachePlan) -> list[str]:
    lines = [f"cache {value.name}: {value}" for value in plan.values]
    lines += [f"mode {name}: reuses {', '.join(values)}" for name, values in plan.modes.items()]
    if plan.values and plan.history > 1:
        lines.append(f"  of each the last {plan.history} computed are kept")
    return lines


def _schedule(plan: SchedulePlan) -> list[str]:
    unit = f"measured on {plan.measured_on}" if plan.measured_on else "multiply-accumulates"
    line = f"schedule {plan.strategy}: {plan.spent:.1%} of computing every step ({unit})"
    return [line if plan.rehearsed_error is None else f"{line}, mean squared error {plan.rehearsed_error:.2g}"]


def _rehearsed(fact: Rehearsed) -> list[str]:
    errors = f"mean squared error {fact.error:.3g}, of even steps {fact.even_error:.3g}"
    return [f"rehearsal {errors}, {fact.trajectories} trajectories"]


def _ranges(ranges: Ranges) -> list[str]:
    return [f"ranges of {len(ranges.planned)} sites at {len(ranges.steps)} steps, {ranges.trajectories} trajectories"]


def _reference(reference: Reference) -> list[str]:
    return [f"reference latent statistics at {len(reference.means)} steps, {reference.trajectories} trajectories"]


def _equalization(fact: Equalization) -> list[str]:
    factors = [factor for site in fact.inputs.values() for factor in site]
    return (
        [f"equalization of {len(fact.inputs)} sites, factors {min(factors):.3g} .. {max(factors):.3g}"]
        if factors
        else []
    )


def _calibration_set(fact: CalibrationSet) -> list[str]:
    return [f"calibration set {len(fact.steps)} of {fact.pool} latents, selected by {fact.method}"]


def _groups(groups: TimestepGroups) -> list[str]:
    bounds = ", ".join(f"{value:g}" for value in groups.lower_timesteps)
    return [f"timestep groups {len(groups.lower_timesteps)}, down to timestep {bounds}"]


def _quant(plan: QuantPlan) -> list[str]:
    return [f"quant {name}: {describe_site(site)}" for name, site in plan.sites.items()]


def describe_site(site: SiteQuant) -> str:
    """One line: the codes and scales of a site."""
    return f"activation {_codes(site.activation)}; weight codes -{site.weight.high}..{site.weight.high} per channel"


def _codes(activation: ActivationQuant) -> str:
    low, high = min(activation.scales), max(activation.scales)
    scales = (
        f"scale {low:.4g}" if low == high else f"scales {low:.4g} .. {high:.4g} over {len(activation.scales)} groups"
    )
    codes = f"{activation.dtype} codes {activation.low}..{activation.high}"
    if activation.shift:
        codes += f" in two regions, above zero steps of {2**activation.shift}"
    if activation.bits:
        codes += f", bits {' '.join(map(str, activation.bits))}"
    return f"{codes}, {scales}"


def _attention(plan: AttentionPlan) -> list[str]:
    return [f"quant {name}: {describe_attention(site)}" for name, site in plan.sites.items()]


def describe_attention(site: AttentionQuant) -> str:
    """One line: the codes and scales of the products of an attention."""
    texts = (
        f"{name} {_regions(quant) if isinstance(quant, RegionQuant) else _codes(quant)}"
        for name, quant in site.operands.items()
    )
    return "; ".join(texts)


def _regions(quant: RegionQuant) -> str:
    splits = " ".join(f"{split:g}" for split in quant.splits)
    products = "two products" if quant.planes > 1 else "one tensor"
    return f"{quant.dtype} codes 0..{quant.levels} in two regions, split at {splits}, {products}"


def _requantization(fact: Requantization) -> list[str]:
    gains = [gain for site in fact.sites.values() for gain in site.gains]
    return [f"requantization of {len(fact.sites)} sites, gains {min(gains):.4f} .. {max(gains):.4f}"] if gains else []


def _forecast(fact: ForecastFit) -> list[str]:
    if not fact.steps:
        return [f"forecast {fact.kind} at no step"]
    reuse, errors = ([getattr(step, name) for step in fact.steps] for name in ("reuse", "forecast"))
    worst = f"error up to {max(errors):.1%} where reuse has {max(reuse):.1%}"
    return [f"forecast {fact.kind} at {len({step.step for step in fact.steps})} steps, {worst}"]


def _compensation(fact: Compensation) -> list[str]:
    gains = [gain for row in fact.gains for gain in row]
    return [
        f"compensation gains {min(gains):.4f} .. {max(gains):.4f} over {len(fact.gains)} steps, {fact.clamped} clamped"
    ]


def _precision(fact: Precision) -> list[str]:
    return [f"computed in {fact.dtype}, values up to {fact.largest:.3g}"]


_FACT_LINES: tuple[tuple[type, Callable[[Any], list[str]]], ...] = (
    (ModelSpec, _model),
    (StepPlan, _steps),
    (CachePlan, _cache),
    (SchedulePlan, _schedule),
    (Rehearsed, _rehearsed),
    (Equalization, _equalization),
    (Ranges, _ranges),
    (Reference, _reference),
    (CalibrationSet, _calibration_set),
    (TimestepGroups, _groups),
    (QuantPlan, _quant),
    (Requantization, _requantization),
    (AttentionPlan, _attention),
    (ForecastFit, _forecast),
    (Compensation, _compensation),
    (Precision, _precision),
)
