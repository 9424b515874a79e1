"""drop-variants: remove the variants and cached values that the schedule does not use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcgraph.facts import CachePlan
from qcgraph.ir.edit import GraphEditor
from qcgraph.ir.graph import returned_nodes
from qcgraph.ir.program import Program, used_constants
from qcgraph.ir.quantized_sites import facts_in
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.steps import StepPlan


@dataclass(frozen=True)
class DropVariants(Pass):
    """Drop the variants that no step runs, and the cached values that no other variant takes.

    A planner may leave a mode unused. Only graphs that run are exported, and these are the graphs that are verified.
    """

    name: ClassVar[str] = "drop-variants"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, StepPlan)

    def run(self, program: Program, context: PassContext) -> Program:
        cache, steps = program.facts[CachePlan], program.facts[StepPlan]
        used = {name for name in steps.roles if steps.uses(name)}
        if set(program.variants) <= used:
            return program
        modes = {name: values for name, values in cache.modes.items() if name in used}
        taken = {value for values in modes.values() for value in values}
        dropped = {value.name for value in cache.values} - taken
        variants = {}
        for name in [name for name in program.variants if name in used]:
            editor = GraphEditor(program.variants[name], program.constants, self.name)
            outputs = zip(program.variants[name].interface.outputs, returned_nodes(editor.graph), strict=True)
            kept = [(output, node) for output, node in outputs if output.value not in dropped]
            editor.set_outputs([node for _, node in kept], [output for output, _ in kept])
            variants[name] = editor.finish()
        plan = replace(cache, values=tuple(value for value in cache.values if value.name in taken), modes=modes)
        steps = replace(steps, roles={name: role for name, role in steps.roles.items() if name in used})
        constants = used_constants(variants.values(), program.constants, program.facts)
        facts = facts_in(program.facts, {name: name for name in variants}, variants)
        return replace(program, variants=variants, constants=constants, facts=facts.with_(plan, steps))
