"""Annotations of an exported graph for viewers: the module of each node, and the type of every value.

PyTorch's exporter records both, and more: stack traces with paths of this machine, and shapes from before graphs were
rewritten. All of these records are replaced. Modules come from the nodes of the program, and types from these nodes and
from ONNX's own inference over the final graph, so that they always describe this graph.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from qcgraph.ir.graph import DTYPES, Variant, module_path, spec_of
from qcgraph.plan.spec import BATCH, TensorSpec

if TYPE_CHECKING:
    import onnx
    from onnxscript import ir

SCOPES = "pkg.torch.onnx.name_scopes"  # PyTorch's key: the modules around a node from the root on, then its name
NAMESPACE = "namespace"  # the same as folders, for Model Explorer
_INVENTED = "unk__"  # prefix of ONNX's inference for names of unknown dimensions


def place_nodes(model: ir.Model, variant: Variant, sources: Mapping[str, str]) -> None:
    """Replace the exporter's records of where nodes come from by those of the program.

    Args:
        model: the exported model, which is changed in place and holds no stack traces afterwards.
        variant: the exported variant.
        sources: the names of the program's nodes by those of the nodes that the exporter names.
    """
    paths = {node.name: module_path(node) for node in variant.graph.nodes}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        if not scopes:
            continue
        source = sources.get(scopes[-1], scopes[-1])
        path = paths.get(source, scopes[-2] if len(scopes) > 1 else "")
        parts = path.split(".") if path else []
        modules = ["", *(".".join(parts[: index + 1]) for index in range(len(parts)))]
        node.metadata_props[NAMESPACE] = "/".join([*parts, source])
        node.metadata_props[SCOPES] = str([*modules, source])


def keep_place(replaced: ir.Node, *made: ir.Node) -> None:
    """Give nodes that replace a node the module and source of the replaced one."""
    for node in made:
        node.metadata_props.update(replaced.metadata_props)


def emitted_for(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Return the nodes of an exported graph by the program's node that they were emitted for."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph.all_nodes():
        found.setdefault(node.metadata_props.get(NAMESPACE, "").rpartition("/")[2], []).append(node)
    return found


def name_nodes(model: ir.Model) -> None:
    """Name nodes by their module, and then by the program's node or the value that they compute.

    Examples are ``blocks.3.attn.qkv/matmul``, and ``blocks.3.attn.qkv/matmul/MatMulInteger`` for a part of it.
    """
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        value = str(node.outputs[0].name)
        *modules, source = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
        path = modules[-1] if modules else ""
        own = value if not source or value == source or node.outputs[0].is_graph_output() else ""
        name = "/".join(part for part in (path, own or f"{source}/{node.op_type}") if part)
        number = 1
        unique = name
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        node.name = unique


def value_specs(variant: Variant) -> dict[str, TensorSpec]:
    """Return the types of a program's values by name; without symbolic dimensions where its batch is not ``B``."""
    nodes = {node.name: node for node in variant.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    found = {name: spec_of(name, node.meta["val"]) for name, node in nodes.items()}
    inputs = [spec for spec in variant.interface.inputs if spec.name in found]
    if any(BATCH in spec.shape and found[spec.name].shape != spec.shape for spec in inputs):
        found = {name: spec for name, spec in found.items() if all(isinstance(dim, int) for dim in spec.shape)}
    return found


def record_types(proto: onnx.ModelProto, specs: Mapping[str, TensorSpec]) -> None:
    """Write the present type and shape of every intermediate value into a graph.

    Args:
        proto: the final graph, which is changed in place.
        specs: known types of values by name, used only where they agree with the graph.
    """
    import onnx

    graph = proto.graph
    others = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    made = {name for node in graph.node for name in node.output} - others
    del graph.value_info[:]
    try:
        inferred = _inferred(proto)
    except onnx.shape_inference.InferenceError:  # the later check of the file reports the error
        return
    for name in sorted(made & specs.keys()):
        if value := _agreed(specs[name], inferred.get(name)):
            graph.value_info.append(value)
    with suppress(onnx.shape_inference.InferenceError):  # dimensions that depend on one another: keep the first result
        inferred = _inferred(proto)
    del graph.value_info[:]
    for name in dict.fromkeys(name for node in graph.node for name in node.output):
        if name in made and name in inferred:
            graph.value_info.append(inferred[name])


def _inferred(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Return the types that ONNX's inference finds; unknown dimensions have no name."""
    import onnx

    found = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph.value_info
    for value in found:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param.startswith(_INVENTED):
                dim.ClearField("dim_param")
    return {value.name: value for value in found}


def _agreed(spec: TensorSpec, inferred: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto | None:
    """Return the type of a value in the program, unless it contradicts the type in the graph."""
    import onnx
    from onnxscript import ir

    element = ir.tensor(torch.zeros((), dtype=DTYPES[spec.dtype])).dtype
    if inferred is not None:
        tensor = inferred.type.tensor_type
        if tensor.elem_type != element:
            return None
        dims = tensor.shape.dim
        if tensor.HasField("shape") and len(dims) != len(spec.shape):
            return None
        known = [
            (dim.dim_value, size) for dim, size in zip(dims, spec.shape, strict=False) if dim.HasField("dim_value")
        ]
        if any(value != size for value, size in known):
            return None
    return onnx.helper.make_tensor_value_info(spec.name, int(element), list(spec.shape))
