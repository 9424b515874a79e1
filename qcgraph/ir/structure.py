"""Blocks and quantizable sites of a captured graph, found from its structure; plain values, nothing is changed.

A *block* is one element of a module list whose elements run one after the other on the same residual stream: the value
that leaves one enters the next. A *site* is a linear layer (or another multiply-accumulate op) with its cost, and the
reason why it is not quantizable when it is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from qcgraph.facts import CachedValue
from qcgraph.ir.graph import Variant, dimension_text, module_path, returned_nodes

aten = torch.ops.aten
PAIR = 2  # samples: both halves of guidance
_BLOCK_PATH = re.compile(r"(?:(?P<list>.+?)\.)?(?P<index>\d+)(?:\.|$)")
MATMULS = {
    aten.linear.default: "linear",
    aten.conv2d.default: "conv2d",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.mm.default: "matmul",
    aten.addmm.default: "linear",
    aten.scaled_dot_product_attention.default: "attention",
}


@dataclass(frozen=True)
class Block:
    """One block: its module path, the node whose value enters it, and the node whose value leaves it."""

    path: str
    entering: str
    leaving: str


@dataclass(frozen=True)
class Site:
    """One multiply-accumulate op.

    Attributes:
        name: the module path; ``#2`` is appended to the second use of a module.
        node: the node's name.
        kind: ``linear``, ``conv2d``, ``matmul`` or ``attention``.
        input_shape: shape of the activation, the batch as ``B``.
        weight_shape: shape of the weight, empty when there is none.
        macs: multiply-accumulates for each sample of the batch; of what runs for half of them, half as many.
        refusal: why it is not quantized, empty when it can be.
    """

    name: str
    node: str
    kind: str
    input_shape: tuple[int | str, ...]
    weight_shape: tuple[int, ...]
    macs: int
    refusal: str = ""


def latent_dependent(variant: Variant) -> set[fx.Node]:
    """The nodes whose value depends on the latent, not on timestep and class alone; none without a latent.

    Sizes do not count: a value that uses only the batch size of the latent does not depend on it.
    """
    dependent = {node for node in variant.graph.nodes if node.op == "placeholder" and node.target == "latent"}
    for node in variant.graph.nodes:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return dependent


def find_blocks(variant: Variant) -> tuple[Block, ...]:
    """The transformer blocks in order; empty when there is no chain of blocks.

    Of all module lists whose elements chain, the longest wins.
    """
    dependent = latent_dependent(variant)
    lists: dict[str, dict[int, list[fx.Node]]] = {}
    for node in variant.graph.nodes:
        match = _BLOCK_PATH.match(module_path(node))
        if match and node in dependent and node.op == "call_function":
            lists.setdefault(match["list"] or "", {}).setdefault(int(match["index"]), []).append(node)
    chains = [_chain(name, members) for name, members in lists.items()]
    return max(chains, key=len, default=())


def _chain(name: str, members: Mapping[int, list[fx.Node]]) -> tuple[Block, ...]:
    """Blocks of one module list, or nothing when a member does not pass on exactly one residual stream."""
    blocks: list[Block] = []
    for index in sorted(members):
        nodes = set(members[index])
        leaving = [node for node in members[index] if any(user not in nodes for user in node.users)]
        if len(leaving) != 1:
            return ()
        value = leaving[0].meta["val"]
        entering = {
            source
            for node in members[index]
            for source in node.all_input_nodes
            if source not in nodes and _same_type(source.meta.get("val"), value)
        }
        chained = {source for source in entering if blocks and source.name == blocks[-1].leaving}
        entering = chained or entering
        if len(entering) != 1:
            return ()
        path = f"{name}.{index}" if name else str(index)
        blocks.append(Block(path, entering.pop().name, leaving[0].name))
    return tuple(blocks)


def _same_type(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    shapes = [tuple(map(dimension_text, value.shape)) for value in (one, other)]
    return shapes[0] == shapes[1] and one.dtype == other.dtype


def find_branches(variant: Variant, block: Block) -> tuple[str, ...]:
    """The nodes of a block's branches before their gates, first to last: what is added to the residual stream.

    A branch is the other operand of an addition on the way of the stream through the block; where that is a product of
    a gate that does not depend on the latent, its other factor. Empty when the block is not made of such additions.
    """
    nodes = {node.name: node for node in variant.graph.nodes}
    dependent = latent_dependent(variant)
    return tuple(reversed([node.name for node in _added(nodes[block.leaving], nodes[block.entering], dependent)]))


def _added(leaving: fx.Node, entering: fx.Node, dependent: set[fx.Node]) -> list[fx.Node]:
    """The branches between two points of the stream, last to first; nothing when additions do not lead there."""
    branches: list[fx.Node] = []
    node = leaving
    while node is not entering:
        operands = [source for source in node.args if isinstance(source, fx.Node)]
        if node.target is not aten.add.Tensor or len(operands) != 2:
            return []
        streams = [source for source in operands if source is entering or source.target is aten.add.Tensor]
        if len(streams) != 1:
            return []
        (other,) = (source for source in operands if source is not streams[0])
        branches.append(_ungated(other, dependent))
        node = streams[0]
    return branches


def _ungated(node: fx.Node, dependent: set[fx.Node]) -> fx.Node:
    """The factor of a product that depends on the latent, when only one does; else the node."""
    factors = [source for source in node.args if isinstance(source, fx.Node) and source in dependent]
    return factors[0] if node.target is aten.mul.Tensor and len(factors) == 1 and len(node.args) == 2 else node


def cached_node(variant: Variant, blocks: Sequence[Block], value: CachedValue) -> str:
    """The node that reusing a cached value replaces: the output of a branch, or the stream that leaves a range.

    With the difference of the halves of guidance, it is the noise prediction.

    Args:
        variant: the whole denoiser.
        blocks: its blocks.
        value: what is cached.
    """
    if value.is_guidance:
        return returned_nodes(variant.graph)[0].name
    if value.branch < 0:
        return blocks[value.last_block].leaving
    return find_branches(variant, blocks[value.first_block])[value.branch]


def find_sites(variant: Variant) -> tuple[Site, ...]:
    """Every multiply-accumulate op of a graph in order, each with the reason why it is not quantizable, if any."""
    dependent = latent_dependent(variant)
    blocks = find_blocks(variant)
    sites: list[Site] = []
    uses: dict[str, int] = {}
    for node in variant.graph.nodes:
        kind = MATMULS.get(node.target)
        if kind is None:
            continue
        path = module_path(node) or node.name
        name = f"{path}.attention" if kind == "attention" else path
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            name = f"{name}#{uses[name]}"
        activation, weight = node.args[0].meta["val"], _weight(node)
        sites.append(
            Site(
                name=name,
                node=node.name,
                kind=kind,
                input_shape=tuple(dimension_text(dim) for dim in activation.shape),
                weight_shape=tuple(int(dim) for dim in weight.shape) if weight is not None else (),
                macs=_macs(node, kind),
                refusal=_refusal(node, kind, node in dependent, any(_inside(path, block.path) for block in blocks)),
            )
        )
    return tuple(sites)


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _weight(node: fx.Node) -> torch.Tensor | None:
    if node.target in (aten.linear.default, aten.conv2d.default):
        source = node.args[1]
        assert isinstance(source, fx.Node)
        value = source.meta["val"]
        assert isinstance(value, torch.Tensor)
        return value
    return None


def _refusal(node: fx.Node, kind: str, on_latent: bool, in_block: bool) -> str:
    """Why a site stays in floating point, in the words of the report."""
    if kind == "attention":
        return "attention is not a linear layer (quantization.attention = true quantizes its products)"
    if kind != "linear" or node.target is not aten.linear.default:
        return f"{kind} is not a linear layer"
    if not on_latent:
        return "depends on timestep and class only (embedder or adaLN modulation)"
    if not in_block:
        return "outside the blocks (embedder or final layer)"
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op != "get_attr":
        return "its weight is computed"
    return ""


def _macs(node: fx.Node, kind: str) -> int:
    output = prod(map(_size, node.meta["val"].shape))
    operand = [_size(dim) for dim in node.args[0].meta["val"].shape]  # type: ignore[union-attr]
    if kind == "conv2d":
        weight = _weight(node)
        assert weight is not None
        macs = output * prod(int(dim) for dim in weight.shape[1:])
    elif kind == "attention":
        macs = 2 * prod(operand) * _size(node.args[1].meta["val"].shape[-2])  # type: ignore[union-attr]
    else:
        macs = output * operand[-1]
    return macs // PAIR


def _size(dim: int | torch.SymInt) -> int:
    """A dimension, for a batch of two."""
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, PAIR)))


def weight_names(variant: Variant, sites: Iterable[Site]) -> dict[str, str]:
    """The constant that each of these linear layers multiplies with, by site."""
    nodes = {node.name: node for node in variant.graph.nodes}
    return {site.name: str(nodes[site.node].all_input_nodes[1].target) for site in sites}


def macs_by_variant(variants: Mapping[str, Variant]) -> dict[str, int]:
    """Multiply-accumulates of every variant, for each sample of the batch."""
    return {name: total_macs(find_sites(variant)) for name, variant in variants.items()}


def total_macs(sites: Iterable[Site]) -> int:
    """Multiply-accumulates of all sites for a batch of one."""
    return sum(site.macs for site in sites)
