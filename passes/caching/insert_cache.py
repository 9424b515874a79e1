"""insert-cache: split the program into a variant that computes and those that reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import CachedValue, CachePlan
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.graph import Variant, output_node, returned_nodes, spec_of
from qcgraph.ir.infer import infer_types
from qcgraph.ir.program import Program, used_constants
from qcgraph.ir.quantized_sites import facts_in
from qcgraph.ir.structure import Block, cached_node, find_blocks
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.schedule import FULL
from qcgraph.plan.spec import BATCH
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertCache(Pass):
    """Split ``main`` into ``full``, which gives the cached values as outputs, and variants that take them as inputs.

    Over a range of blocks the change of the residual stream is cached: D = x_leaving - x_entering at the last computing
    step; a reusing step skips the range and continues with x_entering(now) + D. Of a branch the output before its gate
    is cached, and gated anew. Of guidance the difference of its halves is cached: a step that reuses it computes the
    conditional half of the batch alone, and the other is that less the difference. The host carries the values from one
    call to the next; nothing is hidden in the graph.
    """

    name: ClassVar[str] = "insert-cache"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, StepPlan)

    def run(self, program: Program, context: PassContext) -> Program:
        if set(program.variants) != {"main"}:
            raise ContractError("the program is split already", hint="run insert-cache once, on the captured program")
        plan = program.facts[CachePlan]
        if all(variant == FULL for variant in plan.draft):
            context.refuse("main", "every step computes, so there is nothing to cache")
            return program
        main = program.variants["main"]
        blocks = find_blocks(main)
        variants, paired = {FULL: self._full(main, program, blocks, plan.values)}, []
        for mode, names in plan.modes.items():
            reused = [value for value in plan.values if value.name in names]
            if any(value.is_guidance for value in reused):
                variants[mode] = self._conditional(main, program, *reused)
                paired.append(mode)
            else:
                variants[mode] = self._reuse(main, program, blocks, reused)
        steps = replace(program.facts[StepPlan].with_variants(plan.draft), paired=tuple(paired))
        constants = used_constants(variants.values(), program.constants, program.facts)
        facts = facts_in(program.facts, dict.fromkeys(variants, "main"), variants)
        return Program(variants, constants, facts.with_(steps), program.history)

    def _full(self, main: Variant, program: Program, blocks: Sequence[Block], values: Sequence[CachedValue]) -> Variant:
        """The whole denoiser, and the cached values as further outputs."""
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
        names = [*main.interface.output_names, *(value.name for value in values)]
        editor.set_outputs([prediction, *found], names)
        return editor.finish()

    def _reuse(
        self, main: Variant, program: Program, blocks: Sequence[Block], values: Sequence[CachedValue]
    ) -> Variant:
        """The denoiser with cached values in the place of what computes them."""
        editor = GraphEditor(main, program.constants, self.name)
        for value in values:
            node = editor.node(cached_node(main, blocks, value))
            fake = node.meta["val"]
            resumed = editor.input(spec_of(value.name, fake), like=fake, source=node)
            if value.branch < 0:
                entering, name = editor.node(blocks[value.first_block].entering), f"{node.name}_reused"
                with editor.before(node):
                    resumed = editor.call(aten.add.Tensor, entering, resumed, source=node, name=name, top_level=True)
            node.replace_all_uses_with(resumed)
        return editor.finish()

    def _conditional(self, main: Variant, program: Program, difference: CachedValue) -> Variant:
        """The denoiser of the conditional half of the batch; the prediction of the other half is restored."""
        editor = GraphEditor(main, program.constants, self.name)
        inputs = {node.target: node for node in editor.graph.nodes if node.op == "placeholder"}
        batched = [inputs[spec.name] for spec in main.interface.inputs if spec.shape[:1] == (BATCH,)]
        with editor.before(editor.first_call):
            for node in batched:
                half = editor.call(ops.conditional_half.default, node, source=node, top_level=True)
                node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
        (prediction,) = returned_nodes(editor.graph)
        fake = prediction.meta["val"].movedim(1, -1)
        cached = editor.input(spec_of(difference.name, fake), like=fake, source=prediction)
        with editor.before(output_node(editor.graph)):
            both = editor.call(ops.restore_half.default, prediction, cached, source=prediction, top_level=True)
        editor.set_outputs([both], main.interface.output_names)
        variant = editor.finish()
        infer_types(variant.graph, variant.interface, program.constants)  # of half the batch
        return variant
