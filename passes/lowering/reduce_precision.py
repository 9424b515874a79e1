"""reduce-precision: what is not quantized, in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from qcgraph.errors import UsageError
from qcgraph.facts import Precision, QuantizedSites
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.execute import TorchRunner
from qcgraph.ir.graph import DTYPE_NAMES, output_node, returned_nodes
from qcgraph.ir.infer import infer_types
from qcgraph.ir.program import Program
from qcgraph.pipeline import Pass, PassContext
from qcgraph.pipeline.options import MOST_SEED, MOST_TRAJECTORIES, option
from qcgraph.pipeline.workload import Workload
from qcgraph.plan.spec import OUTPUT, ModelSpec, TensorSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.calibration import sample_calibration

aten = torch.ops.aten
ops = torch.ops.qcgraph
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HEADROOM = 8.0  # how much larger values may be than those that were seen, before float16 overflows
WIDE_INPUTS = ("latent", "timestep")
PRODUCTS = (aten.linear.default, aten.matmul.default, aten.addmm.default, aten.mm.default, aten.bmm.default)
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class ReducePrecision(Pass):
    """Compute in 16 bits what is not quantized, the residual stream and attention among it.

    Constants, cached values and modulation become 16 bits, scales of quantizers too. Latent, timestep and prediction
    stay float32, and so does what is computed of the timestep before the first linear layer, whose sines need the
    digits, and the compensation of the prediction.

    With ``auto``, calibration trajectories are sampled and the largest value of any node decides: float16, which has
    three more bits, where it stays eight times below what that can hold, else bfloat16.

    Attributes:
        dtype: ``float16``, ``bfloat16`` or ``auto``.
        samples: how many trajectories are sampled.
        seed: seeds their labels and noise.
    """

    name: ClassVar[str] = "reduce-precision"
    requires: ClassVar[tuple[type, ...]] = (StepPlan, ModelSpec)
    precedes: ClassVar[tuple[type, ...]] = (Precision,)
    provides: ClassVar[tuple[type, ...]] = (Precision,)
    is_sampling: ClassVar[bool] = True

    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    samples: int = option(2, least=1, most=MOST_TRAJECTORIES, hint="no trajectories show no values")
    seed: int = option(0, most=MOST_SEED)

    def forwards(self, work: Workload) -> float:
        return self.samples * work.trajectory * work.share

    def run(self, program: Program, context: PassContext) -> Program:
        largest = self._largest(program, context)
        fits = largest * HEADROOM <= torch.finfo(torch.float16).max
        chosen = TYPES[self.dtype] if self.dtype != "auto" else torch.float16 if fits else torch.bfloat16
        if chosen is torch.float16 and not fits:
            raise UsageError(
                f"values reach {largest:.3g}, too close to what float16 can hold",
                hint="give bfloat16, or auto",
            )
        if not fits:
            context.refuse("float16", f"values reach {largest:.3g}; computed in bfloat16")
        edits: dict[str, GraphEditor] = {}
        renamed: dict[str, str] = {}
        for name, variant in program.variants.items():
            edits[name] = GraphEditor(variant, program.constants, self.name)
            renamed |= _reduce(edits[name], program, chosen)
        reduced = _with_scales(with_edits(program, edits), renamed)
        for variant in reduced.variants.values():
            infer_types(variant.graph, variant.interface, reduced.constants)
        return reduced.with_facts(Precision(DTYPE_NAMES[chosen], largest))

    def _largest(self, program: Program, context: PassContext) -> float:
        """The largest magnitude that enters an operator as its first argument, or that a constant has."""
        found = [float(value.abs().max()) for value in program.constants.values() if value.dtype == torch.float32]
        wide = {name: _wide_nodes(variant.graph) for name, variant in program.variants.items()}

        def observe(variant: str, node: fx.Node, value: torch.Tensor) -> None:
            if value.dtype == torch.float32 and node not in wide[variant]:
                found.append(float(value.abs().max()))

        runner, plan, spec = TorchRunner(program, observe), program.facts[StepPlan], program.facts[ModelSpec]
        sample_calibration(runner, plan, spec, self.samples, self.seed, progress=context.progress)
        return max(found)


def _with_scales(program: Program, renamed: Mapping[str, str]) -> Program:
    """Return the program whose quantized sites name the scales that replaced theirs."""
    sites = program.facts.get(QuantizedSites)
    if sites is None:
        return program
    linears = {
        name: replace(linear, scale=renamed.get(linear.scale, linear.scale)) for name, linear in sites.linears.items()
    }
    return program.with_facts(replace(sites, linears=linears))


def _reduce(editor: GraphEditor, program: Program, dtype: torch.dtype) -> dict[str, str]:
    """Change the types of a graph, whose nodes are typed anew afterwards; return what replaced which constant."""
    wide = _wide_nodes(editor.graph)
    narrow_inputs = {spec.name for spec in editor.inputs if _is_reduced(spec)}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def is_wide(node: fx.Node) -> bool:
        return node in wide or (node.op == "placeholder" and node.target not in narrow_inputs)

    def as_type(node: fx.Node, wanted: torch.dtype, user: fx.Node) -> fx.Node:
        """The value of a node in this type, made where it is first used."""
        if not _is_float(node) or (node.op != "get_attr" and is_wide(node) == (wanted is torch.float32)):
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


def _wide_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that stay as they are: see `ReducePrecision`."""
    wide: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        timely = all(source in wide or source.target == "timestep" for source in sources)
        timely &= bool(sources) or not node.all_input_nodes  # of constants alone, such as weights: reduced
        if node.op == "call_function" and node.target not in PRODUCTS and timely and _is_float(node):
            wide.add(node)
        if node.target is ops.compensate.default:
            coefficients = (source for source in sources if source.target is ops.select.default)
            wide |= {node, *(source for source in coefficients if set(source.users) == {node})}
    return wide


def _converted(editor: GraphEditor, node: fx.Node, dtype: torch.dtype, user: fx.Node, program: Program) -> fx.Node:
    if node.op == "get_attr":
        if dtype is torch.float32:
            return node
        name = str(node.target)
        return editor.constant(f"{name}_{DTYPE_NAMES[dtype]}", program.constants[name].to(dtype), node)
    with editor.before(user):
        return editor.call(aten.to.dtype, node, dtype, source=node)


def _cast_to(node: fx.Node, dtype: torch.dtype) -> None:
    """Let a cast to float32 be one to this type."""
    node.args = tuple(dtype if argument is torch.float32 else argument for argument in node.args)
    node.kwargs = {key: dtype if value is torch.float32 else value for key, value in node.kwargs.items()}


def _is_reduced(spec: TensorSpec) -> bool:
    return spec.dtype == DTYPE_NAMES[torch.float32] and spec.name not in (*WIDE_INPUTS, OUTPUT)


def _reduced(specs: Iterable[TensorSpec], dtype: torch.dtype) -> Iterable[TensorSpec]:
    return (replace(spec, dtype=DTYPE_NAMES[dtype]) if _is_reduced(spec) else spec for spec in specs)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
