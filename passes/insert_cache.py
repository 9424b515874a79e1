"""insert-cache: split the program into a variant that computes and one that reuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcgraph.errors import ContractError
from qcgraph.facts import CachePlan
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.graph import Variant, output_node, returned_nodes, spec_of
from qcgraph.ir.program import Program, used_constants
from qcgraph.ir.structure import Block, find_blocks
from qcgraph.pipeline import Pass, PassContext
from qcgraph.steps import StepPlan

aten = torch.ops.aten
CACHE = "cache_0"


@dataclass(frozen=True)
class InsertCache(Pass):
    """Split ``main`` into ``full``, which gives the cache as an output, and ``reuse``, which takes it as an input.

    What is cached is the change of the residual stream over the block range: D = x_leaving - x_entering at the last
    computing step; a reusing step skips the range and continues with x_entering(now) + D. The host carries D from
    one call to the next; nothing is hidden in the graph.
    """

    name: ClassVar[str] = "insert-cache"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, StepPlan)

    def run(self, program: Program, context: PassContext) -> Program:
        if set(program.variants) != {"main"}:
            raise ContractError("the program is split already", hint="run insert-cache once, on the captured program")
        plan = program.facts[CachePlan]
        if all(plan.computes):
            context.refuse("main", "every step computes, so there is nothing to cache")
            return program
        main = program.variants["main"]
        blocks = find_blocks(main)
        first, last = blocks[plan.first_block], blocks[plan.last_block]
        variants = {
            "full": self._full(main, program, first, last),
            "reuse": self._reuse(main, program, first, last),
        }
        steps = program.facts[StepPlan].with_variants(["full" if computes else "reuse" for computes in plan.computes])
        constants = used_constants(variants.values(), program.constants)
        return Program(variants, constants, program.facts.with_(steps), program.history)

    def _full(self, main: Variant, program: Program, first: Block, last: Block) -> Variant:
        """The whole denoiser, and the change over the range as a second output."""
        editor = GraphEditor(main, program.constants, self.name)
        leaving, entering = editor.node(last.leaving), editor.node(first.entering)
        output = output_node(editor.graph)
        with editor.before(output):
            change = editor.call(
                aten.sub.Tensor, leaving, entering, source=leaving, name=f"{CACHE}_new", top_level=True
            )
        (prediction,) = returned_nodes(editor.graph)
        editor.set_outputs([prediction, change], [*main.interface.output_names, CACHE])
        return editor.finish()

    def _reuse(self, main: Variant, program: Program, first: Block, last: Block) -> Variant:
        """The denoiser without the range; the cached change is added to what enters it."""
        editor = GraphEditor(main, program.constants, self.name)
        leaving, entering = editor.node(last.leaving), editor.node(first.entering)
        cache = editor.input(spec_of(CACHE, leaving.meta["val"]), like=leaving.meta["val"], source=leaving)
        with editor.before(leaving):
            name = f"{last.leaving}_reused"
            resumed = editor.call(aten.add.Tensor, entering, cache, source=leaving, name=name, top_level=True)
        leaving.replace_all_uses_with(resumed)
        return editor.finish()
