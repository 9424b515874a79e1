"""split-attention: rewrite attention as its two products and the softmax between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.pipeline import Pass, PassContext

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
QUERY, KEY, VALUE = range(3)
OPTIONS = {  # arguments besides query, key and value: the value that is supported, and why any other one is not
    "attn_mask": (None, "its attention is masked"),
    "dropout_p": (0.0, "its attention drops out"),
    "is_causal": (False, "its attention is causal"),
    "enable_gqa": (False, "its queries share keys"),
}


@dataclass(frozen=True)
class SplitAttention(Pass):
    """Split attention into its two products and the softmax between them, softmax(q k^T / sqrt(d)) v.

    Queries are scaled before the product, because they have fewer values than the logits. The result is the same up to
    the order of float32 arithmetic. Attention that is causal, or has a mask or shared keys, stays as it is.
    """

    name: ClassVar[str] = "split-attention"

    def run(self, program: Program, context: PassContext) -> Program:
        edits: dict[str, GraphEditor] = {}
        for name, variant in program.variants.items():
            sites = [site for site in find_sites(variant) if site.kind == "attention"]
            if sites:
                edits[name] = GraphEditor(variant, program.constants, self.name)
            for site in sites:
                node = edits[name].node(site.node)
                if reason := _reason(node):
                    context.refuse(site.name, reason)
                else:
                    _split(edits[name], node)
        return with_edits(program, edits)


def _reason(node: fx.Node) -> str:
    """Return why an attention cannot be split, or an empty string."""
    found = _options(node)
    return next((reason for key, (plain, reason) in OPTIONS.items() if found.get(key, plain) != plain), "")


def _options(node: fx.Node) -> dict[str, Any]:
    """Return the arguments besides query, key and value, by name."""
    names = [argument.name for argument in ATTENTION._schema.arguments]
    return {**dict(zip(names[VALUE + 1 :], node.args[VALUE + 1 :], strict=False)), **node.kwargs}


def _split(editor: GraphEditor, attention: fx.Node) -> None:
    query, key, value = attention.args[: VALUE + 1]
    assert isinstance(query, fx.Node)
    given = _options(attention).get("scale")
    scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if given is None else given
    with editor.before(attention):
        scaled = editor.call(aten.mul.Tensor, query, scale, source=attention)
        across = editor.call(aten.transpose.int, key, -2, -1, source=attention)
        logits = editor.call(aten.matmul.default, scaled, across, source=attention)
        probabilities = editor.call(aten.softmax.int, logits, -1, source=attention)
        mixed = editor.call(aten.matmul.default, probabilities, value, source=attention)
    attention.replace_all_uses_with(mixed)
