"""The rules of legal programs in one table, checked after every pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.ir.graph import Variant, module_path, returned_nodes, spec_of
from qcgraph.ir.legal_operators import is_legal_operator, is_quiet
from qcgraph.ir.ops import OPS
from qcgraph.ir.program import Program
from qcgraph.ir.site_rules import find_wrong_sites
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import GROUP, ROW
from qcgraph.plan.steps import StepPlan

NAMESPACES = ("aten", "qcgraph")
INTEGER_FUNCTIONS = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)
SCALED = tuple(getattr(torch.ops.qcgraph, name).default for name in ("quantize", "quantize_regions", "dequantize"))
OP_RULES = {op.target: op.verify for op in OPS}

Finding = tuple[str, str]  # (place, reason)


def verify(program: Program) -> None:
    """Check every rule of the table.

    Raises:
        ContractError: names the first finding, with its graph, node and module path, and the number of further
            findings.
    """
    findings = list(find(program))
    if not findings:
        return
    where, what = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    raise ContractError(
        f"illegal program: {what}{more}", where=where, hint="print it with --print-after and look there"
    )


def find(program: Program) -> Iterator[Finding]:
    """Yield every place where the program is illegal, with the reason."""
    for rule in PROGRAM_RULES:
        for what in rule(program):
            yield "program", what
    for name, variant in program.variants.items():
        for variant_rule in VARIANT_RULES:
            for what in variant_rule(variant):
                yield f"graph {name}", what
        for node in variant.graph.nodes:
            for node_rule in NODE_RULES:
                if reason := node_rule(node, program):
                    yield f"graph {name}, %{node.name} ({module_path(node) or 'top level'})", reason


def _plan_names_variants(program: Program) -> Iterator[str]:
    plan = program.facts.get(StepPlan)
    for name in plan.variants if plan else ():
        if name not in program.variants:
            yield f"the step plan uses variant {name!r}, which does not exist"


def _every_variant_has_a_role(program: Program) -> Iterator[str]:
    plan = program.facts.get(StepPlan)
    if plan is None:
        return
    for name in sorted(plan.roles.keys() ^ program.variants.keys()):
        yield f"variant {name!r} " + ("has no role" if name in program.variants else "has a role, and does not exist")
    taking = {name for name, variant in program.variants.items() if variant.interface.taken(TensorRole.MODULATION)}
    if taking != plan.preparing.keys():
        yield f"a modulation is taken by {sorted(taking)}, and prepared for {sorted(plan.preparing)}"


def _cached_values_are_computed(program: Program) -> Iterator[str]:
    made = {spec.value for interface in program.interfaces.values() for spec in interface.caches}
    for name, interface in program.interfaces.items():
        for spec in interface.taken(TensorRole.CACHE):
            if spec.value not in made:
                yield f"variant {name!r} takes {spec.name!r}, and no variant computes the cached value {spec.value!r}"


def _facts_hold_constants(program: Program) -> Iterator[str]:
    for name in sorted(program.facts.held_constants - set(program.constants)):
        yield f"a fact holds constant {name!r}, which the program does not"


def _inputs_match(variant: Variant) -> Iterator[str]:
    actual = [str(node.target) for node in variant.graph.nodes if node.op == "placeholder"]
    if actual != list(variant.interface.input_names):
        yield f"placeholders {actual} are not the inputs {list(variant.interface.input_names)} of the interface"


def _outputs_match(variant: Variant) -> Iterator[str]:
    actual = [str(spec_of("", node.meta["val"])) for node in returned_nodes(variant.graph) if "val" in node.meta]
    expected = [str(spec) for spec in variant.interface.outputs]
    if actual != expected:
        yield f"returns {actual}, the interface says {expected}"


def _typed(node: fx.Node, program: Program) -> str | None:
    return "has no type" if node.op != "output" and "val" not in node.meta else None


def _constant_exists(node: fx.Node, program: Program) -> str | None:
    if node.op != "get_attr" or node.target in program.constants:
        return None
    return f"refers to constant {node.target!r}, which the program does not hold"


def _op_is_legal(node: fx.Node, program: Program) -> str | None:
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.op != "call_function":
        return f"is a {node.op}; only function calls are legal"
    return illegal_target(node.target)


def illegal_target(target: Any) -> str | None:
    """Return why a call target may not stand in a program, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None if target in INTEGER_FUNCTIONS else f"calls {target}, which is not an op"
    if target.namespace not in NAMESPACES:
        return f"calls {target}; only the namespaces {', '.join(NAMESPACES)} are legal"
    if target._schema.is_mutable:
        return f"calls {target}, which writes to its input"
    if target.namespace == "aten" and not is_legal_operator(target):
        return f"calls {target}, which is not among the operators that a program may call"
    return None


def _op_is_quiet(node: fx.Node, program: Program) -> str | None:
    return None if is_quiet(node) else f"calls {node.target} so that it draws random numbers or keeps state"


def _op_rule(node: fx.Node, program: Program) -> str | None:
    rule = OP_RULES.get(node.target)
    return rule(node) if rule else None


def _scale_is_positive(node: fx.Node, program: Program) -> str | None:
    if node.target not in SCALED:
        return None
    scale = node.args[1]
    source = scale.args[0] if isinstance(scale, fx.Node) and scale.op == "call_function" else scale
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return "its scale is computed; a scale must be a constant or selected from a table"
    values = program.constants.get(str(source.target))
    if values is None or bool(torch.all(torch.isfinite(values) & (values > 0))):
        return None
    return f"scale {source.target} holds a value that is not positive and finite"


def _table_covers_plan(node: fx.Node, program: Program) -> str | None:
    plan = program.facts.get(StepPlan)
    if node.target is not torch.ops.qcgraph.select.default or plan is None:
        return None
    table, index = node.args
    assert isinstance(table, fx.Node) and isinstance(index, fx.Node)
    needed = {GROUP.name: plan.group_count, ROW.name: 1 + max(step.row for step in plan.steps)}.get(str(index.target))
    if needed is None:
        return "its index is neither the group nor the row input"
    rows = table.meta["val"].shape[0]
    return f"table {table.target} has {rows} rows, the plan needs {needed}" if rows < needed else None


PROGRAM_RULES: tuple[Callable[[Program], Iterator[str]], ...] = (
    _plan_names_variants,
    _every_variant_has_a_role,
    _cached_values_are_computed,
    _facts_hold_constants,
    find_wrong_sites,
)
VARIANT_RULES: tuple[Callable[[Variant], Iterator[str]], ...] = (_inputs_match, _outputs_match)
NODE_RULES: tuple[Callable[[fx.Node, Program], str | None], ...] = (
    _typed,
    _constant_exists,
    _op_is_legal,
    _op_is_quiet,
    _op_rule,
    _scale_is_positive,
    _table_covers_plan,
)
