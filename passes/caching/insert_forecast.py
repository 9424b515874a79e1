"""insert-forecast: make reusing variants forecast their cached values from the last computed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.facts import CachePlan, ForecastFit, Precision
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import DTYPES, cache_spec
from qcgraph.ir.ops import HALVES
from qcgraph.ir.program import Program
from qcgraph.passes.caching._forecast import table_name
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import ROW, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertForecast(Pass):
    """Put an affine forecast between each cached value and its users, with coefficients of plain reuse.

    D^ = A * D_r + B * D_r' + E * D_r'' + C per channel, from the values at the last computing steps r, r', r'' (as many
    as the cache plan keeps), with a row of coefficients for every step and both halves of guidance. This pass inserts
    (1, 0, 0, 0), which is reuse to the bit; fit-forecast fits the coefficients.
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
            half = _half(editor, spec)
            for name in names:
                self._forecast(editor, editor.node(name), plan.history, rows, half)
        return with_edits(program, edits)

    def _forecast(self, editor: GraphEditor, cache: fx.Node, history: int, rows: int, half: fx.Node) -> None:
        fake, users = cache.meta["val"], list(cache.users)
        if any(user.target is ops.forecast.default for user in users):
            raise ContractError("is forecast already", where=cache.name, hint="run insert-forecast once")
        ages = [editor.input(_aged(cache.name, fake, age), fake, cache) for age in range(history)]
        table = torch.zeros(rows, history + 1, HALVES, fake.shape[-1])
        table[:, 0] = 1.0
        row = editor.scalar_input(ROW, cache)
        with editor.before(_first(users, editor.graph)):
            constant = editor.constant(table_name(cache.name), table, cache)
            coefficients = editor.call(ops.select.default, constant, row, source=cache)
            value = editor.call(ops.forecast.default, ages, coefficients, half, source=cache)
        for user in users:
            user.replace_input_with(cache, value)


def _aged(name: str, value: torch.Tensor, age: int) -> TensorSpec:
    """Return the input for a cached value from ``age`` computing steps before the last one."""
    return cache_spec(f"{name}_age{age}" if age else name, value, name, age)


def _half(editor: GraphEditor, spec: ModelSpec) -> fx.Node:
    """Return the half of guidance of each sample, i64[B]: 1 where all conditions are null, which is unconditional."""
    latent = editor.input_of(TensorRole.STATE)
    batch = latent.meta["val"].flatten(1)[:, 0]
    nulls = [condition for condition in spec.conditions if condition.null is not None]
    if with_shape := [condition.name for condition in nulls if condition.shape]:
        raise ContractError(f"{with_shape[0]} is no number", hint="forecasts tell halves apart by one number a sample")
    given = [editor.input(item.tensor, batch.to(DTYPES[item.dtype]), latent) for item in nulls]
    with editor.before(editor.first_call):
        if not given:
            size = editor.call(aten.sym_size.int, latent, 0, source=latent, top_level=True)
            conditional = editor.call(aten.zeros.default, [size], source=latent, top_level=True)
            return editor.call(aten.to.dtype, conditional, torch.int64, source=latent, name="half", top_level=True)
        null, *others = (
            editor.call(aten.eq.Scalar, node, condition.null, source=node, top_level=True)
            for node, condition in zip(given, nulls, strict=True)
        )
        for other in others:
            null = editor.call(aten.logical_and.default, null, other, source=other, top_level=True)
        return editor.call(aten.to.dtype, null, torch.int64, source=given[0], name="half", top_level=True)


def _first(nodes: list[fx.Node], graph: fx.Graph) -> fx.Node:
    """Return the node that comes first in the graph."""
    return next(node for node in graph.nodes if node in nodes)
