"""insert-forecast: make reusing variants forecast their cached values instead of taking the last one as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import CachePlan, ForecastFit, Precision
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import spec_of
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.passes.caching._forecast import table_name
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.spec import BATCH, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.cache_state import aged

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertForecast(Pass):
    """Put an affine forecast between each cached value and what reuses it, with coefficients of plain reuse.

    D^ = A * D_r + B * D_r' + E * D_r'' + C per channel, from the values at the last computing steps r, r', r'' (as many
    as the cache plan keeps), with a row of coefficients for every step and both halves of guidance. fit-forecast fits
    them; (1, 0, 0, 0), which is inserted here, is reuse to the bit.
    """

    name: ClassVar[str] = "insert-forecast"
    requires: ClassVar[tuple[type, ...]] = (CachePlan, ModelSpec, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (ForecastFit, Precision)

    def run(self, program: Program, context: PassContext) -> Program:
        plan, spec = program.facts[CachePlan], program.facts[ModelSpec]
        rows = 1 + max(step.row for step in program.facts[StepPlan].steps)
        edits: dict[str, GraphEditor] = {}
        for mode, names in plan.modes.items():
            if mode not in program.variants:
                context.refuse(mode, "the program has no such variant, because every step computes")
                continue
            editor = edits[mode] = GraphEditor(program.variants[mode], program.constants, self.name)
            half = _half(editor, spec.null_class)
            for name in names:
                self._forecast(editor, editor.node(name), plan.history, rows, half)
        return with_edits(program, edits)

    def _forecast(self, editor: GraphEditor, cache: fx.Node, history: int, rows: int, half: fx.Node) -> None:
        fake, users = cache.meta["val"], list(cache.users)
        if any(user.target is ops.forecast.default for user in users):
            raise ContractError("is forecast already", where=cache.name, hint="run insert-forecast once")
        ages = [editor.input(spec_of(aged(cache.name, age), fake), fake, cache) for age in range(history)]
        table = torch.zeros(rows, history + 1, HALVES, fake.shape[-1])
        table[:, 0] = 1.0
        row = editor.scalar_input("row", cache)
        with editor.before(_first(users, editor.graph)):
            constant = editor.constant(table_name(cache.name), table, cache)
            coefficients = editor.call(ops.select.default, constant, row, source=cache)
            value = editor.call(ops.forecast.default, ages, coefficients, half, source=cache)
        for user in users:
            user.replace_input_with(cache, value)


def _half(editor: GraphEditor, null_class: int) -> fx.Node:
    """Which half of guidance each sample is, i64[B]: the unconditional one has the null class."""
    latent = next(node for node in editor.graph.nodes if node.op == "placeholder" and node.target == "latent")
    labels = editor.input(TensorSpec("class_label", "i64", (BATCH,)), latent.meta["val"][:, 0, 0, 0].long(), latent)
    with editor.before(editor.first_call):
        null = editor.call(aten.eq.Scalar, labels, null_class, source=labels, top_level=True)
        return editor.call(aten.to.dtype, null, torch.int64, source=labels, name="half", top_level=True)


def _first(nodes: list[fx.Node], graph: fx.Graph) -> fx.Node:
    """The one of some nodes that comes first."""
    return next(node for node in graph.nodes if node in nodes)
