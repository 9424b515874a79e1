"""Export of a program to ONNX: one graph for each variant, all with the one weights file of the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcgraph.errors import QcgraphError
from qcgraph.export.onnx.annotate import NAMESPACE, SCOPES, name_nodes, record_types, value_specs
from qcgraph.export.onnx.attention import expand_masks, keep_heads_in_place
from qcgraph.export.onnx.integer_products import multiply_integers
from qcgraph.export.onnx.to_onnx import to_onnx
from qcgraph.export.onnx.valid import problem_of
from qcgraph.ir.program import Program, tensor_digest
from qcgraph.ir.serialize import EXPORTED, WEIGHTS, save_program
from qcgraph.plan.spec import TensorSpec
from qcgraph.progress import Progress

if TYPE_CHECKING:
    import onnx
    from onnxscript import ir

INLINE_BYTES = 1024  # larger tensors of the exporter go into the weights file
PRECISION_OPSET = 23  # first opset in which QuantizeLinear has the attribute ``precision``


def emit_onnx(
    program: Program,
    folder: Path,
    opset: int,
    progress: Progress,
    *,
    integer_products: bool,
    heads_in_place: bool = True,
    quantizers_apart: bool = False,
) -> tuple[str, ...]:
    """Write the program, its weights, and an ONNX graph of every variant into an existing folder.

    The graphs hold no weights of their own: they refer to ``weights.safetensors``, which holds each tensor of the
    program once. Inputs and outputs have the names of the interface. A value that a node of the program computes has
    this node's name.

    Args:
        program: the program to export.
        folder: the folder for ``program.json``, ``weights.safetensors`` and ``<variant>.onnx``.
        opset: the ONNX opset.
        progress: reports the variants.
        integer_products: whether quantized products multiply integers (see `qcgraph.export.targets.Target`).
        heads_in_place: whether attention takes its heads where the projection puts them (see `Target`).
        quantizers_apart: whether every product has its own quantizer (see `part_quantizers`).

    Returns:
        The names of the graph files.

    Raises:
        QcgraphError: a variant cannot be exported; names the node and the reason.
    """
    models = {}
    for variant in program.variants:
        progress.note(f"exporting {variant} to ONNX")
        models[variant] = _translate(
            program, variant, opset, integer_products=integer_products, heads_in_place=heads_in_place
        )
        if quantizers_apart:
            part_quantizers(models[variant])
    tensors = _Tensors(program)
    names = {variant: tensors.place(model, variant) for variant, model in models.items()}
    save_program(program, folder, tensors.exported)
    places = tensor_places(folder / WEIGHTS)
    for variant, model in models.items():
        _refer(model, names[variant], places)
        _write(model, folder / f"{variant}.onnx", value_specs(program.variants[variant]))
    return tuple(f"{variant}.onnx" for variant in models)


def tensor_places(path: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length in bytes of every tensor in a safetensors file.

    The file consists of the length of a JSON header (8 bytes, little-endian), the header, and the raw tensors. The
    offsets in the header count from the header's end.
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
    """Return one variant as an ONNX model whose initializers are, in memory, the tensors of the program."""
    from onnxscript import ir

    interface = program.variants[variant].interface
    model, names = to_onnx(program, variant, opset)
    _rename(model, names, program.constants)
    expand_masks(model)
    if heads_in_place:
        keep_heads_in_place(model)
    if integer_products:
        multiply_integers(model)
    else:
        _part_zero_points(model)
    _divide_in_float32(model)
    name_nodes(model)
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, spec in zip(values, (*interface.inputs, *interface.outputs), strict=True):
        value.shape = ir.Shape(spec.shape)
    model.graph.name = variant
    return model


def _part_zero_points(model: ir.Model) -> None:
    """Make sure that no two weights share a zero point, since ONNX Runtime cannot convert a shared one exactly.

    In float32 zero points of 0 are left out, as they are the default. In 16 bits ONNX Runtime has no integer kernel and
    dequantizes converted weights, which requires a zero point for every channel: each weight gets its own (see
    `qcgraph.export.run.onnxruntime.session_options`).
    """
    from onnxscript import ir
    from onnxscript.optimizer import remove_unused_nodes

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        codes, scale, zero_point = node.inputs
        zeros = ir.convenience.get_const_tensor(zero_point) if zero_point is not None else None
        if codes is None or not codes.is_initializer() or zeros is None or zeros.numpy().any():
            continue
        if scale is not None and scale.dtype == ir.DataType.FLOAT:
            node.resize_inputs(2)
            continue
        name = f"{codes.name}_zero_point"
        own = ir.Value(name=name, const_value=ir.tensor(zeros.numpy(), name=name))
        model.graph.register_initializer(own)
        node.replace_input_with(2, own)
    remove_unused_nodes(model)


def part_quantizers(model: ir.Model) -> None:
    """Give every product that shares a quantized activation with other products its own quantizer.

    ONNX Runtime computes int8 activations as uint8, but only where one node reads the codes; where several nodes do, it
    multiplies them in floating point. Loading a graph merges equal nodes, so the copies differ in the attribute
    ``axis``, which has no effect on a scale of one number.
    """
    from onnxscript import ir

    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        dequantize = next((node for node, _ in quantize.outputs[0].uses()), None)
        scale, value = quantize.inputs[1], quantize.outputs[0]
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(value.uses()) != 1:
            continue
        if scale is None or scale.shape is None or scale.shape.rank() != 0 or value.shape is None:
            continue
        readers = list(dequantize.outputs[0].uses())[1:]
        own = quantize.attributes.get_int("axis", 1)
        axes = [axis for axis in range(-value.shape.rank(), value.shape.rank()) if axis != own]
        for number, ((reader, place), axis) in enumerate(zip(readers, axes, strict=False), 1):
            source = dequantize.outputs[0]
            for node in (quantize, dequantize):
                given = quantize.inputs[0] if node is quantize else source
                copied = ir.node(
                    node.op_type,
                    [given, *node.inputs[1:]],
                    attributes=dict(node.attributes) | ({"axis": axis} if node is quantize else {}),
                    name=f"{node.name}_{number}",
                )
                source = copied.outputs[0]
                source.name = f"{node.outputs[0].name}_{number}"
                source.type, source.shape = node.outputs[0].type, node.outputs[0].shape
                model.graph.insert_before(reader, copied)
            reader.replace_input_with(place, source)


def _divide_in_float32(model: ir.Model) -> None:
    """Make quantizers of 16 bits divide in float32, as in the program, where the opset can express this.

    By default the quotient has the type of the scale, whose spacing in 16 bits is up to a sixteenth of a step of 8
    bits. Runtimes that follow the default (ONNX Runtime from 1.32 on) then make other codes of up to one value in a
    hundred.
    """
    from onnxscript import ir

    if model.graph.opset_imports.get("", 0) < PRECISION_OPSET:
        return
    for node in model.graph:
        scale = node.inputs[1] if node.op_type == "QuantizeLinear" else None
        if scale is not None and scale.dtype != ir.DataType.FLOAT:
            node.attributes["precision"] = ir.AttrInt64("precision", int(ir.DataType.FLOAT))


def _rename(model: ir.Model, names: Mapping[str, str], constants: Mapping[str, torch.Tensor]) -> None:
    """Give values the names of the program's nodes, and nodes the names of their values until they are placed."""
    made = [value for name, value in model.graph.initializers.items() if name not in constants]
    values = [*made, *(value for node in model.graph for value in node.outputs if not value.is_graph_output())]
    taken = {*names.values(), *(value.name for value in (*model.graph.inputs, *model.graph.outputs))}
    for value in values:
        name = str(value.name)
        value.name = names.get(name) or (f"{EXPORTED}{name}" if name in taken else name)
    for node in model.graph:
        node.name = node.outputs[0].name


class _Tensors:
    """The choice of the initializers that go into the weights file, and of their names there."""

    def __init__(self, program: Program) -> None:
        self.exported: dict[str, torch.Tensor] = {}
        self._constants = program.constants
        self._by_digest: dict[str, str] = {}

    def place(self, model: ir.Model, variant: str) -> dict[str, str]:
        """Return initializer -> its name in the weights file; initializers without a name there stay in the graph."""
        names = {}
        for name, value in model.graph.initializers.items():
            content = value.const_value
            assert content is not None
            if name in self._constants:
                names[name] = name
            elif content.nbytes > INLINE_BYTES:
                names[name] = self._add(_as_torch(content), f"{EXPORTED}{variant}/{name}")
        return names

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        """Return the name of an equal tensor that is stored already, else the given name."""
        known = self._by_digest.setdefault(tensor_digest(tensor), name)
        self.exported.setdefault(known, tensor)
        return known


def _as_torch(content: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy as a torch tensor, also of types that NumPy itself does not have."""
    from onnxscript import ir

    array = content.numpy().copy()
    own = {ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn}.get(content.dtype)
    return torch.from_numpy(array) if own is None else torch.from_numpy(array.view(f"u{array.itemsize}")).view(own)


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


def _write(model: ir.Model, path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write a graph and check it.

    Raises:
        QcgraphError: the graph is not valid ONNX.
    """
    import onnx
    from onnxscript import ir

    proto = ir.to_proto(model)
    _tidy(proto)
    record_types(proto, specs)
    onnx.save(proto, str(path))
    if problem := problem_of(path):
        reason = problem.splitlines()[0]
        raise QcgraphError(
            f"the exported graph is not valid ONNX: {reason}", where=path.name, hint="this is a bug of qcgraph"
        )


def _tidy(proto: onnx.ModelProto) -> None:
    """Drop the exporter's records, such as paths of source files, except those of the modules of nodes."""
    proto.producer_name, proto.producer_version = "qcgraph", metadata.version("qcgraph")
    proto.ClearField("doc_string")
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.ClearField("doc_string")
        kept = [entry for entry in item.metadata_props if entry.key in (NAMESPACE, SCOPES)]
        del item.metadata_props[:]
        item.metadata_props.extend(kept)
