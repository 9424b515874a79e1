"""From a program to ONNX: one graph a variant, all of them on the one weights file of the bundle."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qcgraph.capture import MAX_BATCH
from qcgraph.errors import QcgraphError
from qcgraph.export.attention import keep_heads_in_place
from qcgraph.export.integer_products import multiply_integers
from qcgraph.ir.graph import DTYPES
from qcgraph.ir.ops import HALVES, OPS
from qcgraph.ir.program import Program, tensor_digest
from qcgraph.ir.serialize import EXPORTED, WEIGHTS, save_program
from qcgraph.progress import Progress
from qcgraph.spec import BATCH
from qcgraph.steps import StepPlan

if TYPE_CHECKING:
    import onnx
    from onnxscript import ir

INLINE_BYTES = 1024  # what the exporter made and is larger than this goes into the weights file
EXAMPLE_BATCH = 4  # even, and neither it nor its half is 1, which torch.export would take for a constant
_NODE = re.compile(r"%(\w+) :")


def emit_onnx(
    program: Program,
    folder: Path,
    opset: int,
    progress: Progress,
    *,
    integer_products: bool,
    heads_in_place: bool = True,
) -> tuple[str, ...]:
    """Write the program, its weights, and an ONNX graph of every variant into a folder that exists.

    The graphs hold no weights of their own: they refer into ``weights.safetensors``, where each tensor of the program
    stands once. Names of inputs and outputs are those of the interface; a value that is the value of a node of the
    program has that node's name.

    Args:
        program: what to export.
        folder: where ``program.json``, ``weights.safetensors`` and ``<variant>.onnx`` are written.
        opset: the ONNX opset.
        progress: reports the variants.
        integer_products: whether quantized products multiply integers (see `qcgraph.export.targets.Target`).
        heads_in_place: whether attention takes its heads where the projection puts them (see there).

    Returns:
        The names of the graph files.

    Raises:
        QcgraphError: a variant cannot be exported; says which node and why.
    """
    models = {}
    for variant in program.variants:
        progress.note(f"exporting {variant} to ONNX")
        models[variant] = _translate(
            program, variant, opset, integer_products=integer_products, heads_in_place=heads_in_place
        )
    tensors = _Tensors(program)
    names = {variant: tensors.place(model, variant) for variant, model in models.items()}
    save_program(program, folder, tensors.exported)
    places = tensor_places(folder / WEIGHTS)
    for variant, model in models.items():
        _refer(model, names[variant], places)
        _write(model, folder / f"{variant}.onnx")
    return tuple(f"{variant}.onnx" for variant in models)


def tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length in bytes of every tensor in a safetensors file.

    The file is the length of a JSON header (8 bytes, little-endian), the header, and the raw tensors, whose offsets in
    the header count from its end.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _translate(program: Program, variant: str, opset: int, *, integer_products: bool, heads_in_place: bool) -> ir.Model:
    """One variant as an ONNX model whose initializers are, in memory, the tensors of the program."""
    from onnxscript import ir
    from onnxscript.optimizer import optimize_ir

    interface = program.variants[variant].interface
    try:
        with _quiet():
            exported = _export(program, variant)
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                custom_translation_table={op.target: op.to_onnx for op in OPS},
                input_names=list(interface.input_names),
                output_names=list(interface.output_names),
                optimize=False,  # below, without the folding of weights
                verbose=False,
            )
            assert result is not None
            decomposed = result.exported_program
            assert decomposed is not None
            model: ir.Model = result.model
            optimize_ir(model, onnx_shape_inference=False, should_fold=lambda node: _folds(node, program.constants))
    except Exception as error:  # the exporter raises many types; each means that this variant cannot be exported
        raise _refusal(variant, error) from error
    _rename(model, _names(decomposed.graph, program.variants[variant].graph), program.constants)
    if heads_in_place:
        keep_heads_in_place(model)
    if integer_products:
        multiply_integers(model)
    else:
        _omit_zero_points(model)
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, spec in zip(values, (*interface.inputs, *interface.outputs), strict=True):
        value.shape = ir.Shape(spec.shape)
    model.graph.name = variant
    return model


def _omit_zero_points(model: ir.Model) -> None:
    """Leave out zero points of weights that are 0, as they are by default.

    Weights of as many channels would share one, which ONNX Runtime then fails to convert where it has to multiply
    exactly (see `qcgraph.export.run_onnxruntime.session_options`).
    """
    from onnxscript import ir
    from onnxscript.optimizer import remove_unused_nodes

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        codes, _, zero_point = node.inputs
        zeros = ir.convenience.get_const_tensor(zero_point) if zero_point is not None else None
        if codes is not None and codes.is_initializer() and zeros is not None and not zeros.numpy().any():
            node.resize_inputs(2)
    remove_unused_nodes(model)


def _export(program: Program, variant: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    plan = program.facts.get(StepPlan)
    if plan and variant in plan.paired:
        batch = HALVES * torch.export.Dim(f"half_{BATCH}", min=1, max=MAX_BATCH // HALVES)
    inputs = program.variants[variant].interface.inputs
    shapes = [[EXAMPLE_BATCH if dim == BATCH else int(dim) for dim in spec.shape] for spec in inputs]
    arguments = tuple(torch.zeros(shape, dtype=DTYPES[spec.dtype]) for shape, spec in zip(shapes, inputs, strict=True))
    dynamic = tuple({index: batch for index, dim in enumerate(spec.shape) if dim == BATCH} for spec in inputs)
    return torch.export.export(program.module(variant), arguments, dynamic_shapes=dynamic, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from warning about what is not there and what it will change; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refusal(variant: str, error: Exception) -> QcgraphError:
    """The innermost reason of an exporter's error, and the node that it is about."""
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


def _folds(node: ir.Node, constants: Mapping[str, torch.Tensor]) -> bool | None:
    """Never fold what reads a tensor of the program: the result would be a second copy of it on disk.

    Numbers may be folded. Limits of codes then are constants where the scale is, which not all consumers compute: in
    TensorRT a zero point is nothing that can be converted to floating point.
    """
    read = (constants.get(value.name) for value in node.inputs if value is not None and value.name is not None)
    return False if any(tensor is not None and tensor.dim() > 0 for tensor in read) else None


def _names(decomposed: fx.Graph, graph: fx.Graph) -> dict[str, str]:
    """Name of a decomposed node -> name of the program's node whose value it computes."""
    own = {node.name for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    last: dict[str, str] = {}  # an op that was decomposed has the value of the last of its parts
    for node in decomposed.nodes:
        source = _source(node)
        if node.op == "call_function" and source in own and isinstance(node.meta.get("val"), torch.Tensor):
            last[source] = node.name
    return {name: source for source, name in last.items()}


def _source(node: fx.Node) -> str:
    """The name of the program's node that a node was made from, as torch.export remembers it."""
    sources: Any = node.meta.get("from_node")
    name = ""
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return name


def _rename(model: ir.Model, names: Mapping[str, str], constants: Mapping[str, torch.Tensor]) -> None:
    """Give values the names of the program's nodes, and nodes the names of their values."""
    made = [value for name, value in model.graph.initializers.items() if name not in constants]
    values = [*made, *(value for node in model.graph for value in node.outputs if not value.is_graph_output())]
    taken = {*names.values(), *(value.name for value in (*model.graph.inputs, *model.graph.outputs))}
    for value in values:
        name = str(value.name)
        value.name = names.get(name) or (f"{EXPORTED}{name}" if name in taken else name)
    for node in model.graph:
        node.name = node.outputs[0].name


class _Tensors:
    """Decides which initializers go into the weights file, and under which names."""

    def __init__(self, program: Program) -> None:
        self.exported: dict[str, torch.Tensor] = {}
        self._constants = program.constants
        self._by_digest: dict[str, str] = {}

    def place(self, model: ir.Model, variant: str) -> dict[str, str]:
        """Initializer -> its name in the weights file; what is not in it stays in the graph."""
        names = {}
        for name, value in model.graph.initializers.items():
            content = value.const_value
            assert content is not None
            if name in self._constants:
                names[name] = name
            elif content.nbytes > INLINE_BYTES:
                names[name] = self._add(torch.from_numpy(content.numpy().copy()), f"{EXPORTED}{variant}/{name}")
        return names

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        """The name of an equal tensor that is there already, else this one."""
        known = self._by_digest.setdefault(tensor_digest(tensor), name)
        self.exported.setdefault(known, tensor)
        return known


def _refer(model: ir.Model, names: Mapping[str, str], places: Mapping[str, tuple[int, int]]) -> None:
    """Make initializers refer to the weights file beside the graph."""
    from onnxscript import ir

    for name, stored in names.items():
        value = model.graph.initializers[name]
        content = value.const_value
        assert content is not None
        offset, length = places[stored]
        assert length == content.nbytes, name
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, length, content.dtype, shape=ir.Shape(content.shape), name=name
        )


def _write(model: ir.Model, path: Path) -> None:
    """Write a graph and check it.

    Raises:
        QcgraphError: it is not valid ONNX.
    """
    import onnx
    from onnxscript import ir

    proto = ir.to_proto(model)
    _tidy(proto)
    onnx.save(proto, str(path))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise QcgraphError(
            f"the exported graph is not valid ONNX: {reason}", where=path.name, hint="this is a bug of qcgraph"
        ) from error


def _tidy(proto: onnx.ModelProto) -> None:
    """Drop what the exporter remembers, paths of source files among it, and types that may be stale."""
    proto.producer_name, proto.producer_version = "qcgraph", metadata.version("qcgraph")
    proto.ClearField("doc_string")
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.ClearField("doc_string")
        del item.metadata_props[:]
