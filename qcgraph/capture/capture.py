"""Capture of a PyTorch denoiser as a Program, with `torch.export` and a symbolic batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qcgraph.capture.contractions import contract_by_linears
from qcgraph.capture.identities import SPELLED, UNDEFINED, is_identity, simplify
from qcgraph.capture.obstacles import refuse_module, refuse_operator, refuse_trace
from qcgraph.capture.wrappers import unwrapped
from qcgraph.errors import CaptureError, ContractError
from qcgraph.facts import Facts
from qcgraph.ir import legality
from qcgraph.ir.graph import DTYPE_NAMES, DTYPES, Variant, copy_graph, is_name, returned_nodes, spec_of
from qcgraph.ir.legal_operators import is_quiet
from qcgraph.ir.program import Program, used_constants
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import BATCH, PREDICTION_NAME, Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import CAPTURED

MAX_BATCH = 4096
REPORT = "if the model is sound without it, report the operator and this message to the authors of qcgraph"

aten = torch.ops.aten


def capture(module: nn.Module, spec: ModelSpec, input_names: tuple[str, ...]) -> Program:
    """Capture a denoiser as a program with a single variant.

    `torch.export` functionalizes writes in place, and every contraction with a constant becomes a linear layer, however
    it is written; a model that has neither is captured unchanged.

    Args:
        module: the denoiser, in eval mode; it takes latent, timestep and the conditions of the spec, and returns one
            tensor [B, C_out, H, W].
        spec: the model's name, inputs, conditions and noise schedule.
        input_names: the names its ``forward`` gives to the inputs of the spec, in their order.

    Returns:
        A program whose inputs are those of the spec, and whose output is the prediction f32[B,C_out,H,W].

    Raises:
        CaptureError: `torch.export` cannot trace the model, or its trace holds an operator that a program may not hold;
            names the reason.
    """
    module = unwrapped(module)
    refuse_module(module, spec)
    with torch.inference_mode(mode=False), torch.no_grad():
        exported = _exported(module, spec, input_names)
        _refuse_state(exported, spec)
        graph, constants = _own_graph(exported, spec, input_names)
        variant = Variant(graph, _interface(graph, spec))
        program = Program({CAPTURED: variant}, used_constants([variant], constants, Facts()), Facts([spec]))
        program = contract_by_linears(program)
    try:
        legality.verify(program)
    except ContractError as error:
        raise CaptureError(error.message, where=error.where, hint=REPORT) from error
    return program


def _exported(module: nn.Module, spec: ModelSpec, input_names: tuple[str, ...]) -> torch.export.ExportedProgram:
    """Return the exported program that `torch.export` makes of a module.

    The result is functionalized where the module writes in place, or calls an operator that a program may not call:
    many of these, such as `mT`, are short for operators that a program may call.
    """
    batch = torch.export.Dim("B", min=1, max=MAX_BATCH)
    named = dict(zip(input_names, example_inputs(spec, 3).values(), strict=True))
    axes = {name: tensor.batch_axis for name, tensor in zip(input_names, spec.inputs, strict=True)}
    dynamic = {name: {axis: batch} for name, axis in axes.items()}
    try:
        exported = torch.export.export(module, (), named, dynamic_shapes=dynamic, strict=False)
        if _writes(exported.graph):
            return exported.run_decompositions({})
        return exported if _is_taken(exported.graph) else _spelled_out(exported)
    except Exception as error:  # torch.export raises many types; each means that this model cannot be captured
        refuse_trace(module, named, spec, error)
        raise


def example_inputs(spec: ModelSpec, batch: int) -> dict[str, torch.Tensor]:
    """Return inputs of a batch by name: a latent and conditions of zeros, at timestep 1."""
    return {tensor.name: _example(tensor, batch) for tensor in spec.inputs}


def _example(tensor: TensorSpec, batch: int) -> torch.Tensor:
    shape = [batch if dim == BATCH else int(dim) for dim in tensor.shape]
    fill = 1 if tensor.role is TensorRole.STEP else 0
    return torch.full(shape, fill, dtype=DTYPES[tensor.dtype])


def _writes(graph: fx.Graph) -> bool:
    """Tell whether a trace writes in place, or holds nested graphs, which might write."""
    return any(node.op == "get_attr" or _is_writing(node) for node in graph.nodes)


def _is_taken(graph: fx.Graph) -> bool:
    """Tell whether a program takes each call of a trace: unchanged, by another name, or dropped."""
    return all(
        node.op != "call_function"
        or legality.illegal_target(node.target) is None
        or is_identity(node)
        or node.target in UNDEFINED
        or node.target in SPELLED
        or node.target is aten._assert_tensor_metadata.default
        for node in graph.nodes
    )


def _spelled_out(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return a trace with its composite operators decomposed, unless a program does not take the result either."""
    decomposed = exported.run_decompositions({})
    return decomposed if _is_taken(decomposed.graph) else exported


def _refuse_state(exported: torch.export.ExportedProgram, spec: ModelSpec) -> None:
    """Refuse a module that writes to its own parameters or buffers."""
    signature = exported.graph_signature
    written = [*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()]
    if written:
        raise CaptureError(
            f"the model keeps state between calls: its forward writes to {written[0]!r}",
            where=spec.name,
            hint="a denoiser is a function of latent, timestep and conditions: compute the value anew",
        )


def _own_graph(
    exported: torch.export.ExportedProgram, spec: ModelSpec, input_names: tuple[str, ...]
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Return the exported graph with lifted parameters as constants again, canonical input names, and no identities."""
    lifted = _lifted_constants(exported)
    prefix = _common_prefix(target for target, _ in lifted.values())
    renamed = dict(zip(input_names, (tensor.name for tensor in spec.inputs), strict=True))
    graph = copy_graph(exported.graph)
    _keep_results(graph, exported)
    constants: dict[str, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in lifted:
            target, value = lifted[node.name]
            name = _constant_name(target.removeprefix(prefix))
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
        elif node.op == "call_function" and is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op not in ("call_function", "output"):
            raise CaptureError(f"the trace holds a {node.op} ({node.target}), which a program cannot", where=node.name)
        _strip_path(node, prefix)
    simplify(graph)
    _refuse_operators(graph)
    graph.lint()
    return graph, constants


def _keep_results(graph: fx.Graph, exported: torch.export.ExportedProgram) -> None:
    """Drop the results that a functionalized trace returns for arguments it writes to; a program writes to none."""
    (output,) = graph.find_nodes(op="output")
    kinds = [spec.kind for spec in exported.graph_signature.output_specs]
    if any(kind is not torch.export.graph_signature.OutputKind.USER_OUTPUT for kind in kinds):
        results = [
            node
            for node, kind in zip(output.args[0], kinds, strict=True)
            if kind is torch.export.graph_signature.OutputKind.USER_OUTPUT
        ]
        output.args = (tuple(results),)


def _refuse_operators(graph: fx.Graph) -> None:
    """Refuse operators that a program may not call, among them any call that writes in place, used or not.

    Raises:
        CaptureError: names the operator, the module and the line of the model.
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _is_writing(node))
    for node in graph.nodes:
        reason = legality.illegal_target(node.target) if node.op == "call_function" else None
        if reason is None and not is_quiet(node):
            reason = f"calls {node.target} so that it draws random numbers or keeps state"
        if reason is not None:
            refuse_operator(node, reason)


def _lifted_constants(exported: torch.export.ExportedProgram) -> dict[str, tuple[str, torch.Tensor]]:
    """Return placeholder name -> (qualified name, detached value) for every parameter, buffer and constant."""
    signature = exported.graph_signature
    named = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    named |= dict(signature.inputs_to_lifted_tensor_constants)
    values: dict[str, Any] = dict(exported.constants) | dict(exported.state_dict)
    # Digests are remembered by a tensor's count of writes. Tensors made in inference mode have none, and are copied.
    plain = {
        name: value.clone() if value.is_inference() else value.detach()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    return {placeholder: (name, plain[name]) for placeholder, name in named.items()}


def _constant_name(name: str) -> str:
    """Return the name of a constant if the code of a program can hold it.

    Raises:
        CaptureError: the name has characters that such code cannot hold.
    """
    if not is_name(name):
        raise CaptureError(f"the parameter {name!r} has quotes or line breaks in its name", hint="rename its module")
    return name


def _common_prefix(names: Any) -> str:
    """Return ``model.`` when every constant lives under one wrapping module ``model``, else nothing."""
    heads = {name.split(".")[0] if "." in name else "" for name in names}
    return f"{heads.pop()}." if len(heads) == 1 and "" not in heads else ""


def _strip_path(node: fx.Node, prefix: str) -> None:
    """Remove the wrapping module's name from the module path of a node."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1]
        real = path if path != "_empty_nn_module_stack_from_metadata_hook" else ""
        short = real.removeprefix(prefix) if real + "." != prefix else ""
        node.meta["nn_module_stack"] = {short: (short, kind)}


def _is_writing(node: fx.Node) -> bool:
    """Tell whether a call writes to its arguments. Detaching in place changes no value and does not count."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False)) and (
        node.target is not aten.detach_.default
    )


def _interface(graph: fx.Graph, spec: ModelSpec) -> Interface:
    roles = {tensor.name: tensor.role for tensor in spec.inputs}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = tuple(spec_of(node.name, node.meta["val"], roles[node.name]) for node in placeholders)
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
    return Interface(inputs, (spec_of(PREDICTION_NAME, value, TensorRole.PREDICTION),))
