"""From a PyTorch denoiser to a Program, with `torch.export` and a symbolic batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qcgraph.errors import CaptureError
from qcgraph.facts import Facts
from qcgraph.ir import legality
from qcgraph.ir.graph import DTYPE_NAMES, Variant, copy_graph, eliminate_dead_code, returned_nodes, spec_of
from qcgraph.ir.program import Program, used_constants
from qcgraph.spec import OUTPUT, Interface, ModelSpec

INPUTS = ("latent", "timestep", "class_label")
MAX_BATCH = 4096

aten = torch.ops.aten


def capture(module: nn.Module, spec: ModelSpec, input_names: tuple[str, str, str]) -> Program:
    """Capture a denoiser as a program with the single variant ``main``.

    Args:
        module: the denoiser, in eval mode; called as ``module(latent, timestep, class_label)`` and returning one
            tensor [B, C_out, H, W].
        spec: what it is.
        input_names: the names its ``forward`` gives to latent, timestep and class label.

    Returns:
        A program whose inputs are ``latent`` f32[B,C,H,W], ``timestep`` f32[B] and ``class_label`` i64[B], and whose
        output is ``noise_prediction`` f32[B,C_out,H,W].

    Raises:
        CaptureError: `torch.export` cannot trace it, or the trace holds something a program may not hold; says what.
    """
    if module.training:
        raise CaptureError("the model is in training mode", hint="call model.eval() first")
    batch = torch.export.Dim("B", min=1, max=MAX_BATCH)
    latent = torch.zeros(3, *spec.latent_shape)
    arguments = (latent, torch.ones(3), torch.zeros(3, dtype=torch.int64))
    dynamic = {name: {0: batch} for name in input_names}
    try:
        exported = torch.export.export(
            module, (), dict(zip(input_names, arguments, strict=True)), dynamic_shapes=dynamic, strict=False
        )
    except Exception as error:  # torch.export raises many types; each means that this model cannot be captured
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"torch.export cannot capture the model: {reason}",
            where=spec.name,
            hint="control flow on tensor values, or a batch that is not symbolic; see the torch.export documentation",
        ) from error
    graph, constants = _own_graph(exported, input_names)
    variant = Variant(graph, _interface(graph, spec))
    program = Program({"main": variant}, used_constants([variant], constants, Facts()), Facts([spec]))
    legality.verify(program)
    return program


def _own_graph(
    exported: torch.export.ExportedProgram, input_names: tuple[str, str, str]
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The exported graph with lifted parameters as constants again, canonical input names, and no identities."""
    lifted = _lifted_constants(exported)
    prefix = _common_prefix(target for target, _ in lifted.values())
    renamed = dict(zip(input_names, INPUTS, strict=True))
    graph = copy_graph(exported.graph)
    constants: dict[str, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in lifted:
            target, value = lifted[node.name]
            name = target.removeprefix(prefix)
            constants[name] = value
            with graph.inserting_before(node):
                constant = graph.create_node("get_attr", name, name=name.replace(".", "_"))
            constant.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        elif node.op == "placeholder":
            if node.target not in renamed:
                raise CaptureError(f"unexpected input {node.target!r}", hint=f"give defaults to all but {input_names}")
            node.name = node.target = renamed[node.target]
        elif node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op not in ("call_function", "output"):
            raise CaptureError(f"the trace holds a {node.op} ({node.target}), which a program cannot", where=node.name)
        _strip_path(node, prefix)
    eliminate_dead_code(graph)
    graph.lint()
    return graph, constants


def _lifted_constants(exported: torch.export.ExportedProgram) -> dict[str, tuple[str, torch.Tensor]]:
    """Placeholder name -> (qualified name, detached value) of every parameter, buffer and constant."""
    signature = exported.graph_signature
    named = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    named |= dict(signature.inputs_to_lifted_tensor_constants)
    values: dict[str, Any] = dict(exported.constants) | dict(exported.state_dict)
    return {placeholder: (name, values[name].detach()) for placeholder, name in named.items()}


def _common_prefix(names: Any) -> str:
    """``model.`` when every constant lives under one wrapping module ``model``, else nothing."""
    heads = {name.split(".")[0] if "." in name else "" for name in names}
    return f"{heads.pop()}." if len(heads) == 1 and "" not in heads else ""


def _strip_path(node: fx.Node, prefix: str) -> None:
    """Take the wrapping module's name off the module path of a node."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1]
        real = path if path != "_empty_nn_module_stack_from_metadata_hook" else ""
        short = real.removeprefix(prefix) if real + "." != prefix else ""
        node.meta["nn_module_stack"] = {short: (short, kind)}


def _is_identity(node: fx.Node) -> bool:
    """Inactive dropout, and conversions to the dtype a value already has: exact no-ops."""
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target in (aten.to.dtype, aten.alias.default, aten.detach.default, aten.contiguous.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return bool(node.meta["val"].dtype == source.meta["val"].dtype) and node.target is not aten.contiguous.default
    return False


def _interface(graph: fx.Graph, spec: ModelSpec) -> Interface:
    inputs = tuple(spec_of(node.name, node.meta["val"]) for node in graph.nodes if node.op == "placeholder")
    outputs = returned_nodes(graph)
    if len(outputs) != 1:
        raise CaptureError(
            "the model returns more than one tensor", hint="wrap it to return the noise prediction alone"
        )
    value = outputs[0].meta["val"]
    expected = (spec.output_channels, *spec.latent_shape[1:])
    if value.dtype != torch.float32 or tuple(value.shape[1:]) != expected:
        shown = f"{DTYPE_NAMES.get(value.dtype, value.dtype)} {tuple(value.shape)}"
        raise CaptureError(f"the model returns {shown}, its spec says f32 (B, {', '.join(map(str, expected))})")
    return Interface(inputs, (spec_of(OUTPUT, value),))
