"""insert-compensation: make the variance compensation a node at the denoiser's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from qcgraph.errors import ContractError
from qcgraph.facts import Compensation, Precision
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.graph import output_node, returned_nodes
from qcgraph.ir.program import Program
from qcgraph.passes.compensation._tables import prediction_tables
from qcgraph.pipeline import Pass, PassContext
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import ROW
from qcgraph.plan.steps import StepPlan

ops = torch.ops.qcgraph


@dataclass(frozen=True)
class InsertCompensation(Pass):
    """Fold the variance compensation into the noise prediction of every variant.

    To correct the latent after the update x' = c1 * x + c2 * eps to a * x' + b, with a = K and b = (1 - K) * mu, is the
    same update with a compensated prediction: eps' = a * eps + ((a - 1) * c1 / c2) * x + b / c2. Hence one affine node
    per graph, with three tables [steps, channels] that the ``row`` input selects from. It commutes with guidance, whose
    weights sum to one. Of an update that also uses earlier steps, the part c1 * x + c2 * eps is corrected so, and the
    corrected prediction is what later updates look back to.
    """

    name: ClassVar[str] = "insert-compensation"
    requires: ClassVar[tuple[type, ...]] = (Compensation, StepPlan)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)

    def run(self, program: Program, context: PassContext) -> Program:
        fact, updates = program.facts[Compensation], [step.update for step in program.facts[StepPlan].steps]
        arrays = prediction_tables(np.array(fact.gains), np.array(fact.means), updates)
        tables = {name: torch.from_numpy(array) for name, array in arrays.items()}
        edits: dict[str, GraphEditor] = {}
        for name, variant in program.variants.items():
            if not variant.interface.given(TensorRole.PREDICTION):
                continue
            editor = edits[name] = GraphEditor(variant, program.constants, self.name)
            output = output_node(editor.graph)
            prediction, *others = returned_nodes(editor.graph)
            if prediction.target is ops.compensate.default:
                raise ContractError(
                    "its prediction is compensated already", where=name, hint="run insert-compensation once"
                )
            latent = editor.input_of(TensorRole.STATE)
            row = editor.scalar_input(ROW, prediction)
            with editor.before(output):
                selected = [
                    editor.call(
                        ops.select.default,
                        editor.constant(f"compensation.{key}", table, prediction),
                        row,
                        source=prediction,
                    )
                    for key, table in tables.items()
                ]
                fixed = editor.call(ops.compensate.default, prediction, latent, *selected, source=prediction)
            editor.set_outputs([fixed, *others], variant.interface.outputs)
        return with_edits(program, edits)
