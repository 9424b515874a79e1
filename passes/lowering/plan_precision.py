"""plan-precision: decide the 16-bit type of values that are not quantized, and which nodes stay in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from qcgraph.errors import UsageError
from qcgraph.facts import Precision
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import DTYPE_NAMES, Variant
from qcgraph.ir.program import Program
from qcgraph.passes.lowering._float_types import is_float32
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration
from qcgraph.sampling.runner import Call

aten = torch.ops.aten
ops = torch.ops.qcgraph
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEADROOM = 8.0  # factor from the largest observed value to the largest float16, before float16 is refused
PRODUCTS = (aten.linear.default, aten.matmul.default, aten.addmm.default, aten.mm.default, aten.bmm.default)

WideNodes = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class PlanPrecision(Pass):
    """Decide the floating-point type of values that are not quantized, and which nodes stay in float32.

    The nodes between the timestep and the first linear layer stay in float32, because their sines need the digits, and
    so does the compensation of the prediction. With ``auto``, calibration trajectories are sampled and the largest
    value of any other node decides: float16, which has three more bits, where that value is at most an eighth of the
    largest float16, else bfloat16. `reduce-precision` obeys the plan.

    Attributes:
        dtype: ``float16``, ``bfloat16`` or ``auto``; ``float32`` changes nothing.
        trajectories: the number of trajectories to sample.
        seed: the seed of their conditions and noise.
    """

    name: ClassVar[str] = "plan-precision"
    requires: ClassVar[tuple[type, ...]] = (StepPlan, ModelSpec)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (Precision,)
    samples: ClassVar[bool] = True

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    trajectories: int = option(2, least=1, most=MOST_TRAJECTORIES, hint="no trajectories show no values")
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return self.trajectories * work.trajectory * work.share

    def run(self, program: Program, context: PassContext) -> Program:
        wide = {name: _wide_nodes(variant) for name, variant in program.variants.items()}
        largest = self._largest(program, wide, context)
        return program.with_facts(Precision(DTYPE_NAMES[self._chosen(largest, context)], largest, wide))

    def _chosen(self, largest: float, context: PassContext) -> torch.dtype:
        """Return the type for values up to this magnitude."""
        fits = largest * HEADROOM <= torch.finfo(torch.float16).max
        if self.dtype == "float16" and not fits:
            raise UsageError(
                f"values reach {largest:.3g}, too close to what float16 can hold",
                hint="give bfloat16, or auto",
            )
        if self.dtype != "auto":
            return TYPES[self.dtype]
        if not fits:
            context.refuse("float16", f"values reach {largest:.3g}; computed in bfloat16")
        return torch.float16 if fits else torch.bfloat16

    def _largest(self, program: Program, wide: WideNodes, context: PassContext) -> float:
        """Return the largest magnitude of a constant, or of the first argument of any operator."""
        found = [float(value.abs().max()) for value in program.constants.values() if value.dtype == torch.float32]

        def observe(call: Call, node: fx.Node, value: torch.Tensor) -> None:
            if value.dtype == torch.float32 and node.name not in wide[call.variant]:
                found.append(float(value.abs().max()))

        runner, plan, spec = TorchRunner(program, observe), program.facts[StepPlan], program.facts[ModelSpec]
        sample_calibration(runner, plan, spec, self.trajectories, self.seed, progress=context.progress)
        return max(found)


def _wide_nodes(variant: Variant) -> tuple[str, ...]:
    """Return the nodes that stay in float32, in order (see `PlanPrecision`)."""
    wide: set[fx.Node] = set()
    timesteps = {spec.name for spec in variant.interface.taken(TensorRole.STEP)}
    for node in variant.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        timely = all(source in wide or source.target in timesteps for source in sources)
        timely &= bool(sources) or not node.all_input_nodes  # computed from constants alone, such as weights: reduced
        if node.op == "call_function" and node.target not in PRODUCTS and timely and is_float32(node):
            wide.add(node)
        if node.target is ops.compensate.default:
            coefficients = (source for source in sources if source.target is ops.select.default)
            wide |= {node, *(source for source in coefficients if set(source.users) == {node})}
    return tuple(node.name for node in variant.graph.nodes if node in wide)
