"""insert-cache: split the program into a computing variant and reusing variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import CachedValue, CachePlan
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.graph import Variant, cache_spec, output_node, returned_nodes
from qcgraph.ir.infer import infer_types
from qcgraph.ir.program import Program, used_constants
from qcgraph.ir.quantized_sites import facts_in
from qcgraph.ir.structure import Block, cached_node, find_blocks
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.roles import COMPUTES, HALF, REUSES
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
ops = torch.ops.qcgraph
SPLIT = "full"  # name of the computing variant after the split


@dataclass(frozen=True)
class InsertCache(Pass):
    """Split the captured variant into ``full``, which gives the cached values, and variants that take them as inputs.

    For a range of blocks the change of the residual stream is cached: D = x_leaving - x_entering at the last computing
    step; a reusing step skips the range and continues with x_entering(now) + D. For a branch its output before its gate
    is cached, and gated anew. For guidance the difference of its halves is cached: a reusing step computes the
    conditional half of the batch alone, and subtracts the difference for the other half. The host carries the values
    from one call to the next; no state is hidden in the graph.
    """

    name: ClassVar[str] = "insert-cache"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, StepPlan)

    def run(self, program: Program, context: PassContext) -> Program:
        if len(program.variants) > 1:
            raise ContractError("the program is split already", hint="run insert-cache once, on the captured program")
        plan, ((captured, main),) = program.facts[CachePlan], program.variants.items()
        if not any(plan.draft):
            context.refuse(captured, "every step computes, so there is nothing to cache")
            return program
        blocks = find_blocks(main)
        variants, roles = {SPLIT: self._full(main, program, blocks, plan.values)}, {SPLIT: COMPUTES}
        for mode, names in plan.modes.items():
            reused = [value for value in plan.values if value.name in names]
            if any(value.is_guidance for value in reused):
                variants[mode], roles[mode] = self._conditional(main, program, *reused), HALF
            else:
                variants[mode], roles[mode] = self._reuse(main, program, blocks, reused), REUSES
        given = program.facts[StepPlan].steps
        drafted = (replace(step, variant=mode or SPLIT) for step, mode in zip(given, plan.draft, strict=True))
        steps = replace(program.facts[StepPlan], steps=tuple(drafted), roles=roles)
        constants = used_constants(variants.values(), program.constants, program.facts)
        facts = facts_in(program.facts, dict.fromkeys(variants, captured), variants)
        return Program(variants, constants, facts.with_(steps), program.history)

    def _full(self, main: Variant, program: Program, blocks: Sequence[Block], values: Sequence[CachedValue]) -> Variant:
        """Return the whole denoiser, with the cached values as further outputs."""
        editor = GraphEditor(main, program.constants, self.name)
        output = output_node(editor.graph)
        found: list[fx.Node] = []
        for value in values:
            node = editor.node(cached_node(main, blocks, value))
            if value.is_guidance:
                with editor.before(output):
                    node = editor.call(ops.guidance_difference.default, node, source=node, top_level=True)
            elif value.branch < 0:
                entering, name = editor.node(blocks[value.first_block].entering), f"{value.name}_new"
                with editor.before(output):
                    node = editor.call(aten.sub.Tensor, node, entering, source=node, name=name, top_level=True)
            found.append(node)
        (prediction,) = returned_nodes(editor.graph)
        caches = (
            cache_spec(value.name, node.meta["val"], value.name) for value, node in zip(values, found, strict=True)
        )
        editor.set_outputs([prediction, *found], [*main.interface.outputs, *caches])
        return editor.finish()

    def _reuse(
        self, main: Variant, program: Program, blocks: Sequence[Block], values: Sequence[CachedValue]
    ) -> Variant:
        """Return the denoiser with cached values in place of the operations that compute them."""
        editor = GraphEditor(main, program.constants, self.name)
        for value in values:
            node = editor.node(cached_node(main, blocks, value))
            fake = node.meta["val"]
            resumed = editor.input(cache_spec(value.name, fake, value.name), like=fake, source=node)
            if value.branch < 0:
                entering, name = editor.node(blocks[value.first_block].entering), f"{node.name}_reused"
                with editor.before(node):
                    resumed = editor.call(aten.add.Tensor, entering, resumed, source=node, name=name, top_level=True)
            node.replace_all_uses_with(resumed)
        return editor.finish()

    def _conditional(self, main: Variant, program: Program, difference: CachedValue) -> Variant:
        """Return the denoiser of the conditional half of the batch, which restores the prediction of the other half."""
        editor = GraphEditor(main, program.constants, self.name)
        inputs = {node.target: node for node in editor.graph.nodes if node.op == "placeholder"}
        batched = [inputs[spec.name] for spec in main.interface.inputs if spec.batch_axis == 0]
        with editor.before(editor.first_call):
            for node in batched:
                half = editor.call(ops.conditional_half.default, node, source=node, top_level=True)
                node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
        (prediction,) = returned_nodes(editor.graph)
        fake = prediction.meta["val"].movedim(1, -1)
        spec = cache_spec(difference.name, fake, difference.name)
        cached = editor.input(spec, like=fake, source=prediction)
        with editor.before(output_node(editor.graph)):
            both = editor.call(ops.restore_half.default, prediction, cached, source=prediction, top_level=True)
        editor.set_outputs([both], main.interface.outputs)
        variant = editor.finish()
        infer_types(variant.graph, variant.interface, program.constants)  # types of half the batch
        return variant
