"""hoist-adaln: compute values that depend on timestep and conditions alone outside of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import getitem
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.graph import Variant, dimension_text, output_node, returned_nodes, spec_of
from qcgraph.ir.program import Program, used_constants
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.roles import TensorRole, prepares
from qcgraph.plan.spec import BATCH, MODULATION_NAME
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
CONDITIONING = (TensorRole.STEP, TensorRole.REQUEST)
VIEWS = (
    aten.alias.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)


@dataclass(frozen=True)
class HoistAdaln(Pass):
    """Compute values that depend on timestep and conditions alone in a graph of its own, for many steps at a time.

    In a DiT these are the embedders and every adaLN projection. Where such a value meets the latent, the variant takes
    it from ``modulation`` f32[B,M], which holds all these values side by side; the variant ``prepare_<name>`` computes
    it from timestep and conditions. Each variant has its own, so that a step that skips blocks needs no values for
    them. The values are those that the variant would compute itself, up to float rounding.
    """

    name: ClassVar[str] = "hoist-adaln"
    requires: ClassVar[tuple[type, ...]] = (StepPlan,)

    def run(self, program: Program, context: PassContext) -> Program:
        plan = program.facts[StepPlan]
        if plan.preparing:
            raise ContractError("the modulation is hoisted already", hint="run hoist-adaln once")
        variants, preparing = dict(program.variants), {}
        for name, variant in program.variants.items():
            cut = self._cut(name, variant, context)
            if not cut:
                context.refuse(name, "no value that depends on timestep and conditions alone meets the latent")
                continue
            preparing[name] = self._prepare(variant, program, cut)
            variants[name] = self._hoisted(variant, program, cut, preparing[name])
        variants |= {f"prepare_{name}": variant for name, variant in preparing.items()}
        constants = used_constants(variants.values(), program.constants, program.facts)
        facts = program.facts.with_(
            replace(plan, roles=plan.roles | {f"prepare_{name}": prepares(name) for name in preparing})
        )
        return Program(variants, constants, facts, program.history)

    def _cut(self, name: str, variant: Variant, context: PassContext) -> list[fx.Node]:
        """Return the values to hoist; a value that cannot be a row of numbers for each sample stays where it is."""
        cut = []
        for node in find_cut(variant):
            if _is_row(node.meta["val"]):
                cut.append(node)
            else:
                reason = f"its value is {spec_of('', node.meta['val'])}, not float32 with the batch first"
                context.refuse(f"{name}, %{node.name}", reason)
        return cut

    def _prepare(self, variant: Variant, program: Program, cut: Sequence[fx.Node]) -> Variant:
        """Return the graph that computes the hoisted values alone."""
        editor = GraphEditor(variant, program.constants, self.name)
        _read_batch_of(editor, TensorRole.STEP)
        output = output_node(editor.graph)
        with editor.before(output):
            values = [editor.node(node.name) for node in cut]
            rows = [_reshaped(editor, value, value, [-1, _width(value.meta["val"])]) for value in values]
            joined = editor.call(aten.cat.default, rows, 1, source=rows[0], name=MODULATION_NAME, top_level=True)
        editor.set_outputs([joined], [spec_of(MODULATION_NAME, joined.meta["val"], TensorRole.MODULATION)])
        editor.drop_unused_inputs()
        return editor.finish()

    def _hoisted(self, variant: Variant, program: Program, cut: Sequence[fx.Node], preparing: Variant) -> Variant:
        """Return the variant with the hoisted values as an input."""
        editor = GraphEditor(variant, program.constants, self.name)
        first, widths = editor.node(cut[0].name), [_width(node.meta["val"]) for node in cut]
        (made,), (spec,) = returned_nodes(preparing.graph), preparing.interface.outputs
        _read_batch_of(editor, TensorRole.STATE)
        modulation = editor.input(spec, like=made.meta["val"], source=first)
        with editor.before(editor.first_call):
            parts = editor.call(aten.split_with_sizes.default, modulation, widths, 1, source=first, top_level=True)
            for index, node in enumerate(cut):
                original = editor.node(node.name)
                row = editor.call(getitem, parts, index, source=original)
                shape = [-1, *(int(dim) for dim in node.meta["val"].shape[1:])]
                original.replace_all_uses_with(_reshaped(editor, row, original, shape))
        editor.drop_unused_inputs(*CONDITIONING)
        return editor.finish()


def find_cut(variant: Variant) -> list[fx.Node]:
    """Return where a graph is cut: the values that depend on timestep and conditions alone and meet other inputs.

    Where such a value is a mere view of a value that is no larger, that value is taken instead, so that a value that is
    expanded over the tokens is kept once. Sizes do not count as a dependence.
    """
    hoisted = {spec.name for spec in variant.interface.taken(*CONDITIONING)}
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in variant.graph.nodes:
        if node.op == "placeholder":
            sources[node] = frozenset({str(node.target)})
        elif isinstance(node.meta.get("val"), (int, torch.SymInt)):
            sources[node] = frozenset()
        else:
            sources[node] = frozenset().union(*(sources[source] for source in node.all_input_nodes))
    conditional = [node for node, names in sources.items() if names and names <= hoisted]
    frontier = [node for node in conditional if any(sources[user] - hoisted for user in node.users)]
    found = dict.fromkeys(map(_compact, frontier))
    return [node for node in variant.graph.nodes if node in found and node.op == "call_function"]


def _reshaped(editor: GraphEditor, value: fx.Node, source: fx.Node, shape: list[int]) -> fx.Node:
    """Reshape a value with the batch first."""
    if value.meta["val"].dim() == len(shape) == 2:
        return value
    return editor.call(aten.reshape.default, value, shape, source=source)


def _compact(node: fx.Node) -> fx.Node:
    """Return the value that a view shows, as long as it is no larger than the view."""
    while node.target in VIEWS:
        source = node.args[0]
        if not isinstance(source, fx.Node) or _width(source.meta["val"]) > _width(node.meta["val"]):
            break
        node = source
    return node


def _width(value: torch.Tensor) -> int:
    """Return the number of elements for each sample."""
    return prod(dim for dim in value.shape if isinstance(dim, int))


def _is_row(value: torch.Tensor) -> bool:
    sizes = [dimension_text(dim) for dim in value.shape]
    return value.dtype == torch.float32 and sizes[:1] == [BATCH] and all(isinstance(dim, int) for dim in sizes[1:])


def _read_batch_of(editor: GraphEditor, role: TensorRole) -> None:
    """Read the size of the batch from the input of this role everywhere, because other inputs may be dropped."""
    chosen = editor.input_of(role)
    for node in editor.graph.nodes:
        source = node.args[0] if node.target is aten.sym_size.int else None
        if isinstance(source, fx.Node) and source.op == "placeholder" and node.args[1] == 0:
            node.args = (chosen, 0)
