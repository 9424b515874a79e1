"""reduce-precision: compute values that are not quantized in the planned type."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import ComputeType, Precision, QuantizedSites
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import DTYPE_NAMES, DTYPES, output_node, returned_nodes
from qcgraph.ir.infer import infer_types
from qcgraph.ir.program import Program
from qcgraph.passes.lowering._float_types import is_float32
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import TensorSpec

aten = torch.ops.aten
WIDE = (TensorRole.STATE, TensorRole.STEP, TensorRole.REQUEST, TensorRole.PREDICTION)  # roles that stay float32
CASTS = (aten.to.dtype, aten._to_copy.default)
PLAN_AGAIN = "run plan-precision on the program as it is, right before reduce-precision"


@dataclass(frozen=True)
class ReducePrecision(Pass):
    """Compute values that are not quantized in 16 bits, including the residual stream and attention.

    Constants, cached values, modulation and the scales of quantizers become 16 bits. Latent, timestep and prediction
    stay float32, and so do the nodes that the plan names (see `plan-precision`).
    """

    name: ClassVar[str] = "reduce-precision"
    requires: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (ComputeType,)

    def run(self, program: Program, context: PassContext) -> Program:
        if ComputeType in program.facts:
            raise ContractError("the program is reduced already", hint="run reduce-precision once")
        plan = program.facts[Precision]
        _check_fits(plan, program)
        made = ComputeType(plan.dtype)
        dtype = DTYPES[plan.dtype]
        if dtype is torch.float32:
            return program.with_facts(made)
        edits: dict[str, GraphEditor] = {}
        renamed: dict[str, str] = {}
        for name, variant in program.variants.items():
            edits[name] = GraphEditor(variant, program.constants, self.name)
            renamed |= _reduce(edits[name], program, dtype, plan.wide[name])
        reduced = _with_scales(with_edits(program, edits), renamed)
        for variant in reduced.variants.values():
            infer_types(variant.graph, variant.interface, reduced.constants)
        return reduced.with_facts(made)


def _check_fits(plan: Precision, program: Program) -> None:
    """Check that a plan is made for the graphs of a program.

    Raises:
        ContractError: the plan names a variant or a node that the program does not have, or misses a variant.
    """
    for name in sorted(plan.wide.keys() ^ program.variants.keys()):
        problem = "is not in the plan of precision" if name in program.variants else "is planned and not in the program"
        raise ContractError(problem, where=name, hint=PLAN_AGAIN)
    for name, variant in program.variants.items():
        known = {node.name for node in variant.graph.nodes if node.op == "call_function"}
        for node in plan.wide[name]:
            if node not in known:
                raise ContractError(
                    "is planned to stay in float32 and not in the graph", where=f"%{node} of {name}", hint=PLAN_AGAIN
                )


def _with_scales(program: Program, renamed: Mapping[str, str]) -> Program:
    """Return the program with quantized sites that name the scales that replaced their own."""
    sites = program.facts.get(QuantizedSites)
    if sites is None:
        return program
    linears = {
        name: replace(linear, scale=renamed.get(linear.scale, linear.scale)) for name, linear in sites.linears.items()
    }
    return program.with_facts(replace(sites, linears=linears))


def _reduce(editor: GraphEditor, program: Program, dtype: torch.dtype, planned: Collection[str]) -> dict[str, str]:
    """Change the types of a graph, except for the nodes planned to stay in float32; nodes are typed anew afterwards.

    Returns:
        The names of the new constants, by the names of those they replace.
    """
    wide = {node for node in editor.graph.nodes if node.name in planned}
    narrow_inputs = {spec.name for spec in editor.inputs if _is_reduced(spec)}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def is_wide(node: fx.Node) -> bool:
        return node in wide or (node.op == "placeholder" and node.target not in narrow_inputs)

    def as_type(node: fx.Node, wanted: torch.dtype, user: fx.Node) -> fx.Node:
        """Return the value of a node in this type; a cast is inserted before its first user."""
        if not is_float32(node) or (node.op != "get_attr" and is_wide(node) == (wanted is torch.float32)):
            return node
        if (node, wanted) not in casts:
            casts[node, wanted] = _converted(editor, node, wanted, user, program)
        return casts[node, wanted]

    for node in list(editor.graph.nodes):
        if node.op == "call_function":
            wanted = torch.float32 if node in wide else dtype
            for source in node.all_input_nodes:
                node.replace_input_with(source, as_type(source, wanted, node))
            if node.target in CASTS and node not in wide:
                _cast_to(node, dtype)
    outputs = zip(returned_nodes(editor.graph), editor.outputs, strict=True)
    nodes = [
        as_type(node, dtype if _is_reduced(spec) else torch.float32, output_node(editor.graph))
        for node, spec in outputs
    ]
    output_node(editor.graph).args = (tuple(nodes),)
    editor.inputs = list(_reduced(editor.inputs, dtype))
    editor.outputs = list(_reduced(editor.outputs, dtype))
    constants = {node: cast for (node, wanted), cast in casts.items() if wanted is dtype and node.op == "get_attr"}
    return {str(node.target): str(cast.target) for node, cast in constants.items()}


def _converted(editor: GraphEditor, node: fx.Node, dtype: torch.dtype, user: fx.Node, program: Program) -> fx.Node:
    if node.op == "get_attr":
        if dtype is torch.float32:
            return node
        name = str(node.target)
        return editor.constant(f"{name}_{DTYPE_NAMES[dtype]}", program.constants[name].to(dtype), node)
    with editor.before(user):
        return editor.call(aten.to.dtype, node, dtype, source=node)


def _cast_to(node: fx.Node, dtype: torch.dtype) -> None:
    """Turn a cast to float32 into a cast to this type."""
    node.args = tuple(dtype if argument is torch.float32 else argument for argument in node.args)
    node.kwargs = {key: dtype if value is torch.float32 else value for key, value in node.kwargs.items()}


def _is_reduced(spec: TensorSpec) -> bool:
    return spec.dtype == DTYPE_NAMES[torch.float32] and spec.role not in WIDE


def _reduced(specs: Iterable[TensorSpec], dtype: torch.dtype) -> Iterable[TensorSpec]:
    return (replace(spec, dtype=DTYPE_NAMES[dtype]) if _is_reduced(spec) else spec for spec in specs)
