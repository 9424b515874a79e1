"""Attention in a graph as two products with a softmax between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcgraph.ir.graph import Variant, module_path

aten = torch.ops.aten
PROBABILITIES = "probabilities"  # the operand that the softmax computes


@dataclass(frozen=True)
class AttentionProducts:
    """The nodes of an attention that multiply.

    Attributes:
        name: its module path, with ``.attention``; ``#2`` is appended to the second in a module.
        logits: the node that multiplies queries and keys.
        probabilities: the node of the softmax.
        mixed: the node that multiplies probabilities and values.
    """

    name: str
    logits: fx.Node
    probabilities: fx.Node
    mixed: fx.Node

    @property
    def operands(self) -> dict[str, fx.Node]:
        """The multiplied values: ``query``, ``key`` (transposed), ``probabilities`` and ``value``."""
        query, key, value = self.logits.args[0], self.logits.args[1], self.mixed.args[1]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        return {"query": query, "key": key, PROBABILITIES: self.probabilities, "value": value}


def find_attention(variant: Variant) -> tuple[AttentionProducts, ...]:
    """Find every matmul(softmax(matmul(q, k), last axis), v) of floating-point values, in order."""
    found = []
    uses: dict[str, int] = {}
    for mixed in variant.graph.nodes:
        probabilities = mixed.args[0] if mixed.target is aten.matmul.default else None
        if not isinstance(probabilities, fx.Node) or probabilities.target is not aten.softmax.int:
            continue
        logits, axis = probabilities.args[:2]
        assert isinstance(logits, fx.Node)
        if logits.target is not aten.matmul.default or axis not in (-1, logits.meta["val"].dim() - 1):
            continue
        name = f"{module_path(mixed) or mixed.name}.attention"
        uses[name] = uses.get(name, 0) + 1
        name = name if uses[name] == 1 else f"{name}#{uses[name]}"
        found.append(AttentionProducts(name, logits, probabilities, mixed))
    return tuple(found)
