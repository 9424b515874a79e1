"""Blocks and quantizable sites of a captured graph, found from its structure; functions that read and change nothing.

A *block* is one element of a module list whose elements run one after the other on the same residual stream: the value
that leaves one element enters the next. A *site* is a linear layer (or another multiply-accumulate op) with its cost,
and with the reason why it is not quantizable, if any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from qcgraph.facts import CachedValue
from qcgraph.ir.graph import DTYPE_NAMES, Variant, dimension_text, module_path, returned_nodes, size_of
from qcgraph.plan.roles import TensorRole

aten = torch.ops.aten
PAIR = 2  # batch size of two, for both halves of guidance
_BLOCK_PATH = re.compile(r"(?:(?P<list>.+?)\.)?(?P<index>\d+)(?:\.|$)")
MATMULS: dict[Any, str] = {
    aten.linear.default: "linear",
    aten.addmm.default: "linear",
    aten.matmul.default: "matmul",
    aten.mm.default: "matmul",
    aten.bmm.default: "matmul",
    aten.baddbmm.default: "matmul",
    aten.addbmm.default: "matmul",
    aten.mv.default: "matmul",
    aten.addmv.default: "matmul",
    aten.dot.default: "matmul",
    aten.vdot.default: "matmul",
    aten.inner.default: "matmul",
    aten.linalg_matmul.default: "matmul",
    aten.linalg_multi_dot.default: "multi_dot",
    aten.tensordot.default: "tensordot",
    aten.einsum.default: "einsum",
    aten.bilinear.default: "bilinear",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
    aten.scaled_dot_product_attention.default: "attention",
}
# The first argument of these ops is added to the product of the next two.
_ADDING = (aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default)


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
        kind: the kind of op: ``linear``, ``matmul``, ``attention``, ``conv2d`` and so on (see `MATMULS`).
        input_shape: shape of the activation, with the batch as ``B``.
        weight_shape: shape of the weight, empty when there is none.
        macs: multiply-accumulates for each sample of the batch; half of them for an op that runs for half of the batch.
        refusal: why the site is not quantized, empty when it can be.
    """

    name: str
    node: str
    kind: str
    input_shape: tuple[int | str, ...]
    weight_shape: tuple[int, ...]
    macs: int
    refusal: str = ""


def latent_dependent(variant: Variant) -> set[fx.Node]:
    """Return the nodes whose values depend on the latent; there are none in a graph that takes no latent.

    Sizes do not count: a value that uses only the batch size of the latent does not depend on it.
    """
    states = {spec.name for spec in variant.interface.taken(TensorRole.STATE)}
    dependent = {node for node in variant.graph.nodes if node.op == "placeholder" and node.target in states}
    for node in variant.graph.nodes:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            continue
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return dependent


def find_blocks(variant: Variant) -> tuple[Block, ...]:
    """Return the transformer blocks in order; empty when there is no chain of blocks.

    The longest of all module lists whose elements chain is chosen.
    """
    dependent = latent_dependent(variant)
    lists: dict[str, dict[int, list[fx.Node]]] = {}
    for node in variant.graph.nodes:
        match = _BLOCK_PATH.match(module_path(node))
        if match and node in dependent and node.op == "call_function":
            lists.setdefault(match["list"] or "", {}).setdefault(int(match["index"]), []).append(node)
    chains = [_chain(name, members, dependent) for name, members in lists.items()]
    return max(chains, key=len, default=())


def _chain(name: str, members: Mapping[int, list[fx.Node]], dependent: Collection[fx.Node]) -> tuple[Block, ...]:
    """Return the blocks of one module list, or nothing when a member does not pass on exactly one residual stream.

    Only values that depend on the latent can be the stream: tables of positions may have its shape too.
    """
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
            if source not in nodes and source in dependent and _same_type(source.meta.get("val"), value)
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
    """Return the nodes of a block's branches before their gates, first to last: the summands of the residual stream.

    A branch is the other operand of an addition on the way of the stream through the block. Where this operand is a
    product with a gate that does not depend on the latent, the branch is the other factor. The result is empty when the
    block is not made of such additions.
    """
    nodes = {node.name: node for node in variant.graph.nodes}
    dependent = latent_dependent(variant)
    return tuple(reversed([node.name for node in _added(nodes[block.leaving], nodes[block.entering], dependent)]))


def _added(leaving: fx.Node, entering: fx.Node, dependent: set[fx.Node]) -> list[fx.Node]:
    """Return the branches between two points of the stream, last to first; none when additions do not connect them."""
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
    """Return the factor of a product that depends on the latent, if only one does; else the node itself."""
    factors = [source for source in node.args if isinstance(source, fx.Node) and source in dependent]
    return factors[0] if node.target is aten.mul.Tensor and len(factors) == 1 and len(node.args) == 2 else node


def cached_node(variant: Variant, blocks: Sequence[Block], value: CachedValue) -> str:
    """Return the node that a cached value replaces in a reusing step.

    This is the output of a branch, or the stream that leaves a range; for the difference of the halves of guidance, it
    is the noise prediction.

    Args:
        variant: the whole denoiser.
        blocks: its blocks.
        value: the cached value.
    """
    if value.is_guidance:
        return returned_nodes(variant.graph)[0].name
    if value.branch < 0:
        return blocks[value.last_block].leaving
    return find_branches(variant, blocks[value.first_block])[value.branch]


def find_sites(variant: Variant) -> tuple[Site, ...]:
    """Return every multiply-accumulate op of a graph in order, with the reason why it is not quantizable, if any."""
    dependent = latent_dependent(variant)
    outside = outer_layers(variant)
    sites: list[Site] = []
    uses: dict[str, int] = {}
    for node in contractions(variant):
        kind = MATMULS[node.target]
        path = module_path(node) or node.name
        name = f"{path}.attention" if kind == "attention" else path
        uses[name] = uses.get(name, 0) + 1
        if uses[name] > 1:
            name = f"{name}#{uses[name]}"
        activation, weight = factors(node)[0].meta["val"], _weight(node)
        sites.append(
            Site(
                name=name,
                node=node.name,
                kind=kind,
                input_shape=tuple(dimension_text(dim) for dim in activation.shape),
                weight_shape=tuple(int(dim) for dim in weight.shape) if weight is not None else (),
                macs=_macs(node, kind),
                refusal=_refusal(node, kind, node in dependent, node in outside),
            )
        )
    return tuple(sites)


def contractions(variant: Variant) -> tuple[fx.Node, ...]:
    """Return every node that multiplies and adds up, in order; an einsum that only moves or scales values does not."""
    found = (node for node in variant.graph.nodes if node.target in MATMULS)
    return tuple(node for node in found if node.target is not aten.einsum.default or _einsum_adds_up(node))


def factors(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the factors of a multiply-accumulate op, in the order of its arguments."""
    if node.target is aten.einsum.default:
        return tuple(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.linalg_multi_dot.default:
        return tuple(node.args[0])  # type: ignore[arg-type]
    arguments = node.args[1:3] if node.target in _ADDING else node.args[:2]
    return tuple(argument for argument in arguments if isinstance(argument, fx.Node))


def outer_layers(variant: Variant) -> set[fx.Node]:
    """Return the contractions before and after all repeated parts of the network: embedders and final layers.

    A repeated part is an element of a module list that contracts more than once on the way of the latent, whether it is
    a block of a chain or not. In a network without repeated parts, the first and last contractions are outer layers,
    unless all contractions would be.
    """
    dependent = latent_dependent(variant)
    nodes = [node for node in contractions(variant) if node in dependent]
    blocks = [block.path for block in find_blocks(variant)]
    stages = Counter(_element(node) for node in nodes)
    inner = {
        node
        for node in nodes
        if (_element(node) and stages[_element(node)] > 1) or any(_inside(module_path(node), path) for path in blocks)
    }
    if inner:
        after, before = _downstream(variant, inner), _upstream(variant, inner)
        return {node for node in nodes if node not in inner and (node not in after or node not in before)}
    if variant.interface.taken(TensorRole.CACHE):
        return set(nodes)  # a variant that takes cached values skips the blocks, so all that remains is outside them
    after, before = _downstream(variant, nodes), _upstream(variant, nodes)
    outer = {node for node in nodes if node not in after or node not in before}
    return outer if outer != set(nodes) else set()


def _element(node: fx.Node) -> str:
    """Return the path of the outermost element of a module list that a node is in, or nothing."""
    match = _BLOCK_PATH.match(module_path(node))
    return f"{match['list'] or ''}.{match['index']}" if match else ""


def _downstream(variant: Variant, starts: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the value of a node among ``starts``."""
    found: set[fx.Node] = set()
    for node in variant.graph.nodes:
        if any(source in found or source in starts for source in node.all_input_nodes):
            found.add(node)
    return found


def _upstream(variant: Variant, ends: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that the value of a node among ``ends`` depends on."""
    found: set[fx.Node] = set()
    for node in reversed(variant.graph.nodes):
        if any(user in found or user in ends for user in node.users):
            found.add(node)
    return found


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _weight(node: fx.Node) -> torch.Tensor | None:
    if node.target is aten.linear.default or _is_convolution(node):
        source = node.args[1]
        assert isinstance(source, fx.Node)
        value = source.meta["val"]
        assert isinstance(value, torch.Tensor)
        return value
    return None


def _is_convolution(node: fx.Node) -> bool:
    return MATMULS[node.target].startswith("conv")


def _refusal(node: fx.Node, kind: str, on_latent: bool, is_outside: bool) -> str:
    """Return why a site stays in floating point, in the words of the report."""
    if kind == "attention":
        return "attention is not a linear layer (quantization.attention = true quantizes its products)"
    if kind != "linear" or node.target is not aten.linear.default:
        return f"{kind} is not a linear layer"
    if not on_latent:
        return "depends on timestep and conditions only (embedder or adaLN modulation)"
    if is_outside:
        return "outside the blocks (embedder or final layer)"
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op != "get_attr":
        return "its weight is computed"
    if isinstance(weight, fx.Node) and weight.meta["val"].dim() != 2:
        return "its weight is not a matrix"
    if isinstance(weight, fx.Node) and weight.meta["val"].dtype != torch.float32:
        return f"multiplies {DTYPE_NAMES[weight.meta['val'].dtype]}, not f32"
    return ""


def _macs(node: fx.Node, kind: str) -> int:
    output = prod(map(_size, node.meta["val"].shape))
    operands = [[_size(dim) for dim in factor.meta["val"].shape] for factor in factors(node)]
    if kind.startswith("conv_transpose"):
        macs = prod(operands[0]) * prod(operands[1][1:])
    elif kind.startswith("conv"):
        macs = output * prod(operands[1][1:])
    elif kind == "attention":
        query, key = operands
        value = [_size(dim) for dim in node.args[2].meta["val"].shape]  # type: ignore[union-attr]
        macs = prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    elif kind == "einsum":
        macs = _einsum_macs(node, operands)
    elif kind == "tensordot":
        summed: Any = node.args[2]
        macs = output * prod(operands[0][axis] for axis in summed)
    elif kind == "bilinear":
        macs = output * operands[0][-1] * operands[1][-1]
    elif kind == "multi_dot":
        macs = _chain_macs(operands)
    else:
        macs = output * operands[0][-1] * (operands[0][0] if node.target is aten.addbmm.default else 1)
    return macs // PAIR


def _chain_macs(operands: list[list[int]]) -> int:
    """Count the multiply-accumulates of a product of several matrices, multiplied from left to right."""
    rows = operands[0][0] if len(operands[0]) > 1 else 1
    return sum(rows * prod(operand) for operand in operands[1:])


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Name every axis of the operands and of the result of an einsum; axes of an ellipsis are ``.0``, ``.1`` and so on.

    Args:
        equation: the equation as PyTorch takes it, with or without a result.
        ranks: the ranks of the operands.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    spelled = left.split(",")
    widths = [rank - len(text.replace("...", "")) for text, rank in zip(spelled, ranks, strict=True)]
    widest = max((width for text, width in zip(spelled, widths, strict=True) if "..." in text), default=0)

    def axes(text: str, width: int) -> list[str]:
        before, dots, after = text.partition("...")
        return [*before, *([f".{index}" for index in range(widest - width, widest)] if dots else []), *after]

    operands = [axes(text, width) for text, width in zip(spelled, widths, strict=True)]
    if arrow:
        return operands, axes(right, widest)
    counts = Counter(axis for operand in operands for axis in operand)
    return operands, [f".{index}" for index in range(widest)] + sorted(
        axis for axis, count in counts.items() if count == 1 and not axis.startswith(".")
    )


def _axes(node: fx.Node) -> tuple[list[list[str]], list[str]]:
    return einsum_letters(str(node.args[0]), [factor.meta["val"].dim() for factor in factors(node)])


def _einsum_adds_up(node: fx.Node) -> bool:
    operands, result = _axes(node)
    return len(operands) > 1 and any(axis not in result for operand in operands for axis in operand)


def _einsum_macs(node: fx.Node, sizes: Sequence[Sequence[int]]) -> int:
    """Count the multiply-accumulates of products of two operands, from left to right, over all axes of either."""
    operands, result = _axes(node)
    known: dict[str, int] = {}
    for axes, shape in zip(operands, sizes, strict=True):
        for axis, size in zip(axes, shape, strict=True):
            known[axis] = max(size, known.get(axis, 1))
    held, macs = set(operands[0]), 0
    for position, axes in enumerate(operands[1:], start=2):
        macs += prod(known[axis] for axis in held | set(axes))
        later = set(result).union(*operands[position:])
        held = (held | set(axes)) & later
    return macs


def _size(dim: int | torch.SymInt) -> int:
    """Return the size of a dimension for a batch of two."""
    return int(size_of(dim, PAIR))


def weight_names(variant: Variant, sites: Iterable[Site]) -> dict[str, str]:
    """Return the constant that each of these linear layers multiplies with, by site."""
    nodes = {node.name: node for node in variant.graph.nodes}
    return {site.name: str(nodes[site.node].all_input_nodes[1].target) for site in sites}


def macs_by_variant(variants: Mapping[str, Variant]) -> dict[str, int]:
    """Return the multiply-accumulates of every variant, for each sample of the batch."""
    return {name: total_macs(find_sites(variant)) for name, variant in variants.items()}


def total_macs(sites: Iterable[Site]) -> int:
    """Return the multiply-accumulates of all sites for a batch of one."""
    return sum(site.macs for site in sites)
