"""Programs on disk: graphs and facts as JSON, constants as safetensors. Never pickle, never code.

Reading resolves every op by name against the legal namespaces, so a file can only name ops that the legality table
admits. PyTorch turns a graph into code and runs it, so every text that becomes part of this code (names of inputs,
constants and arguments) is checked here. Types are not stored: reading infers them anew from the interface, and the
program is then as legal as one that passes made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qcgraph.errors import BundleError, UsageError
from qcgraph.facts import Facts, decode
from qcgraph.files.folder import parsed, path_problem, read_file, text_of
from qcgraph.ir.graph import DTYPE_NAMES, DTYPES, Provenance, Variant, is_name, module_path
from qcgraph.ir.infer import check_arguments, infer_types
from qcgraph.ir.legality import INTEGER_FUNCTIONS, NAMESPACES, find, illegal_target
from qcgraph.ir.program import HistoryEntry, Program
from qcgraph.plan.spec import Interface, TensorSpec

_AGAIN = "compile again with this version"
_STRANGE = "this file was not written by qcgraph"
INTEGERS = {function.__name__: function for function in INTEGER_FUNCTIONS}
# The errors of ops and decoders for wrong arguments; PyTorch's own errors are RuntimeErrors, pydantic's ValueErrors.
READING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FORMAT = 2
PROGRAM = "program.json"
WEIGHTS = "weights.safetensors"
LARGEST_PROGRAM = 2**30  # bytes
EXPORTED = "onnx/"  # name prefix of tensors in the weights file that belong to exported graphs, not to the program


def program_to_json(program: Program) -> dict[str, Any]:
    """Return all of a program but the values of its constants, as JSON data."""
    return {
        "format": FORMAT,
        "variants": {name: _variant_to_json(variant) for name, variant in program.variants.items()},
        "facts": program.facts.encode(),
        "history": [asdict(record) for record in program.history],
    }


def program_from_json(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> Program:
    """Return the program of JSON data from `program_to_json`.

    Raises:
        BundleError: the format is another version, an op is not legal, a constant is missing, or another version of
            qcgraph wrote the data.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BundleError(f"has format {str(found)[:40]}, not {FORMAT}", where=PROGRAM, hint=_AGAIN)
    try:
        variants = {name: _variant_from_json(entry, constants) for name, entry in data["variants"].items()}
        history = tuple(decode(HistoryEntry, record) for record in data["history"])
        program = Program(variants, dict(constants), Facts.decode(data["facts"]), history)
    except UsageError as error:  # raised for a step plan that contradicts itself
        raise BundleError(error.message, where=PROGRAM, hint=_AGAIN) from error
    except READING_ERRORS as error:
        raise BundleError(
            f"was written by another version of qcgraph: {_reason(error)}", where=PROGRAM, hint=_AGAIN
        ) from error
    finding = next(find(program), None)
    if finding is not None:
        raise BundleError(f"{finding[0]}: {finding[1]}", where=PROGRAM, hint=_STRANGE)
    return program


def _reason(error: Exception) -> str:
    """Return an error's type and message in one line of bounded length."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def save_program(program: Program, folder: Path, exported: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write ``program.json`` and ``weights.safetensors`` into a folder that exists.

    Args:
        program: the program to write.
        folder: the folder to write into.
        exported: tensors of exported graphs for the same weights file, by names that begin with ``onnx/``.
    """
    from safetensors.torch import save_file

    (folder / PROGRAM).write_text(json.dumps(program_to_json(program)))
    tensors = dict(program.constants) | dict(exported or {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / PROGRAM).stat().st_mode)  # safetensors lets only the owner read its files


def load_program(folder: Path) -> Program:
    """Read a program that `save_program` wrote.

    Raises:
        BundleError: a file is missing or damaged; see also `program_from_json`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    text = text_of(read_file(folder, PROGRAM, largest=LARGEST_PROGRAM), str(folder / PROGRAM))
    if problem := path_problem(folder, WEIGHTS):
        raise BundleError(problem, where=str(folder / WEIGHTS), hint=_AGAIN)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"cannot be read: {error}", where=str(folder / WEIGHTS), hint=_AGAIN) from error
    constants = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPORTED)}
    where = str(folder / PROGRAM)
    return parsed(where, text, lambda data: program_from_json(data, constants), finite=False)  # masks hold -inf


def _variant_to_json(variant: Variant) -> dict[str, Any]:
    return {
        "inputs": [asdict(spec) for spec in variant.interface.inputs],
        "outputs": [asdict(spec) for spec in variant.interface.outputs],
        "nodes": [_node_to_json(node) for node in variant.graph.nodes],
    }


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    provenance = node.meta.get("provenance")
    return {
        "op": node.op,
        "name": node.name,
        "target": node.target if isinstance(node.target, str) else _target_to_text(node.target),
        "args": _argument_to_json(node.args),
        "kwargs": {key: _argument_to_json(value) for key, value in node.kwargs.items()},
        "path": module_path(node),
        **({"provenance": asdict(provenance)} if isinstance(provenance, Provenance) else {}),
    }


def _variant_from_json(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> Variant:
    interface = Interface(
        tuple(decode(TensorSpec, spec) for spec in data["inputs"]),
        tuple(decode(TensorSpec, spec) for spec in data["outputs"]),
    )
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        node = _node_from_json(entry, graph, nodes, interface, constants)
        if node.name != entry["name"] or node.name in nodes:
            raise ValueError(f"node {entry['name']!r} cannot have that name")
        nodes[node.name] = node
    if [node.op for node in nodes.values()].index("output") != len(nodes) - 1:
        raise ValueError("nodes follow the output")
    infer_types(graph, interface, constants)
    return Variant(graph, interface)


def _node_from_json(
    entry: Mapping[str, Any],
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    interface: Interface,
    constants: Mapping[str, torch.Tensor],
) -> fx.Node:
    """Add a node to a graph; it can refer only to nodes before it."""
    kind, target = entry["op"], entry["target"]
    if kind == "get_attr" and target not in constants:
        raise BundleError(f"constant {str(target)[:200]!r} is missing", where=WEIGHTS, hint="compile again")
    is_known = {
        "placeholder": target in interface.input_names and str(target).isidentifier(),
        "get_attr": is_name(target),
        "call_function": True,
        "output": target == "output",
    }.get(kind, False)
    if not is_known:
        raise BundleError(
            f"node {str(entry['name'])[:80]!r} is a {str(kind)[:40]} of {str(target)[:80]!r}",
            where=PROGRAM,
            hint=_STRANGE,
        )
    if kind == "call_function":
        target = _target_from_text(target)
    args = tuple(_argument_from_json(argument, nodes) for argument in entry["args"]["list"])
    kwargs = {key: _argument_from_json(value, nodes) for key, value in entry["kwargs"].items()}
    if kind == "call_function":
        check_arguments(target, args, kwargs)
    elif kwargs or (args and kind != "output"):
        raise ValueError(f"a {kind} takes no arguments")
    node = graph.create_node(kind, target, args, kwargs, name=entry["name"])
    if entry["path"]:
        path = str(entry["path"])
        node.meta["nn_module_stack"] = {path: (path, "")}
    if "provenance" in entry:
        node.meta["provenance"] = decode(Provenance, entry["provenance"])
    return node


def _target_to_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}.{target._overloadname}"
    return f"operator.{target.__name__}"


def _target_from_text(text: str) -> Any:
    import qcgraph.ir.ops  # noqa: F401 - registers torch.ops.qcgraph

    namespace, _, name = text.partition(".")
    try:
        if namespace not in ("operator", *NAMESPACES):
            raise ValueError(namespace)
        if namespace == "operator":
            target = INTEGERS[name]
        else:
            packet, overload = name.rsplit(".", 1)
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except (AttributeError, KeyError, RuntimeError, ValueError):
        raise BundleError(f"unknown op {text[:200]!r}", where=PROGRAM, hint=_AGAIN) from None
    if reason := illegal_target(target):
        raise BundleError(f"the program {reason}", where=PROGRAM, hint=_STRANGE)
    return target


def _argument_to_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"list": [_argument_to_json(item) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot store an argument of type {type(value).__name__}")


def _argument_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"an argument is a {type(value).__name__}")
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "list":
        return tuple(_argument_from_json(item, nodes) for item in content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "device" and content == "cpu":
        return torch.device(content)
    constant = getattr(torch, content, None) if kind == "torch" else None
    if not isinstance(constant, (torch.layout, torch.memory_format)):
        raise BundleError(f"unknown argument {str(kind)[:40]} {str(content)[:80]!r}", where=PROGRAM, hint=_STRANGE)
    return constant
