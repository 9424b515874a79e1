"""Translation of one variant to an ONNX model in memory, by PyTorch's exporter."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_structure

from qcgraph.capture.capture import MAX_BATCH
from qcgraph.errors import QcgraphError
from qcgraph.export.onnx.annotate import place_nodes
from qcgraph.ir.graph import DTYPES, returned_nodes
from qcgraph.ir.ops import HALVES, OPS
from qcgraph.ir.program import Program
from qcgraph.plan.roles import VariantKind
from qcgraph.plan.spec import BATCH
from qcgraph.plan.steps import StepPlan
from qcgraph.quiet import quiet

if TYPE_CHECKING:
    from onnxscript import ir

EXAMPLE_BATCH = 4  # even, and neither the batch nor its half is 1, which torch.export takes for a constant
_SOURCE = "qcgraph_source"  # metadata of a copied node: the name of the node in the program
_NODE = re.compile(r"%(\w+) :")


def to_onnx(program: Program, variant: str, opset: int) -> tuple[ir.Model, dict[str, str]]:
    """Translate a variant to an ONNX model.

    Args:
        program: the exported program.
        variant: the name of one of its variants.
        opset: the ONNX opset.

    Returns:
        The model, whose initializers are the tensors of the program, and the names of the program's nodes by the names
        of their values in the model.

    Raises:
        QcgraphError: the variant cannot be exported; names the node and the reason.
    """
    from onnxscript.optimizer import fold_constants_ir, optimize_ir, remove_unused_nodes

    interface = program.variants[variant].interface
    try:
        # The libraries warn about operators that are missing and about changes that they will make.
        with quiet("torch.onnx", "onnxscript", "onnx_ir"):
            exported = _exported(program, variant)
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                custom_translation_table={op.target: op.to_onnx for op in OPS},
                input_names=list(interface.input_names),
                output_names=list(interface.output_names),
                optimize=False,  # optimized below, without the folding of weights
                verbose=False,
            )
            assert result is not None
            decomposed = result.exported_program
            assert decomposed is not None
            model: ir.Model = result.model
            folds = partial(_folds, program.constants)
            # Rules leave identities, which folding takes away. A second round of all rules would take twice the time.
            optimize_ir(model, num_iterations=1, onnx_shape_inference=False, should_fold=folds)
            fold_constants_ir(model, onnx_shape_inference=False, should_fold=folds)
            remove_unused_nodes(model)
    except Exception as error:  # the exporter raises many types; each means that this variant cannot be exported
        raise _refusal(variant, error) from error
    place_nodes(model, program.variants[variant], {node.name: _source(node) for node in decomposed.graph.nodes})
    return model, _names(decomposed.graph, program.variants[variant].graph)


def _exported(program: Program, variant: str) -> torch.export.ExportedProgram:
    """Return the exported program for PyTorch's exporter, traced only where an op has to be decomposed."""
    targets = {node.target for node in program.variants[variant].graph.nodes if node.op == "call_function"}
    names = {
        target.name() if isinstance(target, torch._ops.OpOverload) else "" for target in targets - {operator.getitem}
    }
    return _as_it_is(program, variant) if names <= _with_onnx_form() else _traced(program, variant)


def _traced(program: Program, variant: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    plan = program.facts.get(StepPlan)
    if plan and plan.roles[variant].kind is VariantKind.HALF:
        batch = HALVES * torch.export.Dim(f"half_{BATCH}", min=1, max=MAX_BATCH // HALVES)
    inputs = program.variants[variant].interface.inputs
    shapes = [[EXAMPLE_BATCH if dim == BATCH else int(dim) for dim in spec.shape] for spec in inputs]
    arguments = tuple(torch.zeros(shape, dtype=DTYPES[spec.dtype]) for shape, spec in zip(shapes, inputs, strict=True))
    dynamic = tuple({index: batch for index, dim in enumerate(spec.shape) if dim == BATCH} for spec in inputs)
    return torch.export.export(program.module(variant), arguments, dynamic_shapes=dynamic, strict=False)


def _as_it_is(program: Program, variant: str) -> torch.export.ExportedProgram:
    """Wrap a graph whose ops all have a form in ONNX: it is functional and typed, and tracing would copy it.

    The constants become inputs, as `torch.export` makes them. The exporter asks for decompositions, which would trace
    the graph again; they return the wrapped graph unchanged.
    """
    module, interface = program.module(variant), program.variants[variant].interface
    source, graph = module.graph, fx.Graph()
    reads = {str(node.target): node for node in source.nodes if node.op == "get_attr"}
    copies: dict[str, fx.Node] = {}
    for name in (name for name, _ in module.named_buffers() if name in reads):
        copy = copies[name] = graph.placeholder("b_" + re.sub(r"\W", "_", name).lower())
        copy.target = copy.name  # FX makes names unique where only such characters differ, not targets
        copy.meta = dict(reads[name].meta)
    inputs = [InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True) for name, node in copies.items()]
    mapping: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op == "get_attr":
            mapping[node] = copies[str(node.target)]
            continue
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[node].meta[_SOURCE] = node.name
        if node.op == "placeholder":
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(mapping[node].name), None))
    results = [mapping[node] for node in returned_nodes(source)]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    taken: tuple[tuple[Any, ...], dict[str, Any]] = (interface.input_names, {})
    forms = tree_structure(taken), tree_structure(tuple(results))
    signature = ModuleCallSignature([], [], *forms, [*interface.input_names])
    exported = torch.export.ExportedProgram(
        torch.nn.Module(),
        graph,
        ExportGraphSignature(inputs, outputs),
        {name: program.constants[name] for name in copies},
        {},
        [ModuleCallEntry("", signature)],
        constants={},
    )
    exported.run_decompositions = lambda *table, **options: exported
    return exported


@cache
def _with_onnx_form() -> frozenset[str]:
    """Return the names of ops that are translated without decomposition."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return frozenset({*map(str, ONNXRegistry.from_torchlib().functions), *(op.target.name() for op in OPS)})


def _refusal(variant: str, error: Exception) -> QcgraphError:
    """Return an error with the innermost reason of an exporter's error, and the node that it is about."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    nodes = [match[1] for item in chain if (match := _NODE.search(str(item)))]
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    return QcgraphError(
        f"cannot be exported to ONNX: {lines[0] if lines else type(chain[-1]).__name__}",
        where=f"graph {variant}" + (f", %{nodes[-1]}" if nodes else ""),
        hint="the target torch runs any program",
    )


def _folds(constants: Mapping[str, torch.Tensor], node: ir.Node) -> bool | None:
    """Forbid folding of nodes that read a tensor of the program: the result would be a second copy of it on disk.

    Numbers may be folded. The limits of codes are then constants where the scale is constant. Some consumers could not
    compute them: TensorRT cannot convert a zero point to floating point.
    """
    read = (constants.get(value.name) for value in node.inputs if value is not None and value.name is not None)
    return False if any(tensor is not None and tensor.dim() > 0 for tensor in read) else None


def _names(decomposed: fx.Graph, graph: fx.Graph) -> dict[str, str]:
    """Return name of a decomposed node -> name of the program's node whose value it computes."""
    own = {node.name for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    last: dict[str, str] = {}  # a decomposed op has the value of the last of its parts
    for node in decomposed.nodes:
        source = _source(node)
        if node.op == "call_function" and source in own and isinstance(node.meta.get("val"), torch.Tensor):
            last[source] = node.name
    return {name: source for source, name in last.items()}


def _source(node: fx.Node) -> str:
    """Return the name of the program's node that a node was made from, by torch.export's record or ours."""
    if _SOURCE in node.meta:
        return str(node.meta[_SOURCE])
    sources: Any = node.meta.get("from_node")
    name = ""
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return name
