"""Programs as deterministic text: the type of every value, and the pass that made each node.

`--print-after`, `inspect`, `diff` and the golden tests show this text, so it is made for reading::

    graph full(%latent: f32[B,1,8,8], %timestep: f32[B], %class_label: i64[B], %group: i64[]) {
      ; blocks.0.attn.qkv
      %select: f32[] = qcgraph.select(@blocks.0.attn.qkv.input_scale: f32[8], %group)   ; insert-qdq, from linear_3
      ...
      return noise_prediction = %view_9, cache = %sub
    }
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qcgraph.facts import Facts
from qcgraph.ir.graph import DTYPE_NAMES, Provenance, Variant, module_path, returned_nodes, spec_of


def print_program(facts: Facts, variants: Mapping[str, Variant]) -> str:
    """Return the text of a whole program: a header with its facts, then every variant."""
    return "\n".join([print_facts(facts), *(print_variant(name, variant) for name, variant in variants.items())])


def print_facts(facts: Facts) -> str:
    """Return the text of facts, a few lines for each: see `qcgraph.facts.Fact`."""
    return "\n".join([*(line for fact in facts for line in fact.lines()), ""])


def print_variant(name: str, variant: Variant) -> str:
    """Return the text of one graph."""
    inputs = ", ".join(f"%{spec.name}: {spec}" for spec in variant.interface.inputs)
    lines = [f"graph {name}({inputs}) {{"]
    path: str | None = None
    for node in variant.graph.nodes:
        if node.op != "call_function":
            continue
        if module_path(node) != path:
            path = module_path(node)
            lines.append(f"  ; {path or 'top level'}")
        lines.append(f"  {print_node(node)}")
    returned = returned_nodes(variant.graph)
    outputs = ", ".join(
        f"{spec.name} = {_argument(node)}" for spec, node in zip(variant.interface.outputs, returned, strict=True)
    )
    return "\n".join([*lines, f"  return {outputs}", "}", ""])


def print_node(node: fx.Node) -> str:
    """Return the text of one node: ``%name: type = op(arguments)`` and, unless it was captured, its origin."""
    arguments = [_argument(argument) for argument in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    text = f"%{node.name}: {_type(node.meta.get('val'))} = {target_name(node.target)}({', '.join(arguments)})"
    provenance = node.meta.get("provenance")
    return f"{text}   ; {provenance.made_by}, from {provenance.source}" if isinstance(provenance, Provenance) else text


def target_name(target: Any) -> str:
    """Return ``linear`` for a default overload of aten, ``add.Tensor`` for another, ``qcgraph.quantize`` for ours."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target.namespace, target._schema.name.split("::")[-1]
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{name}{overload}" if namespace == "aten" else f"{namespace}.{name}{overload}"
    return str(getattr(target, "__name__", target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return f"@{value.target}: {_type(value.meta.get('val'))}"
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    return str(value)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(spec_of("", value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type(item) for item in value)})"
    return "int" if isinstance(value, (int, torch.SymInt)) else type(value).__name__
