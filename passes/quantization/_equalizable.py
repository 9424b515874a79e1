"""Activations whose channels can be shifted and divided at no cost: the layers that read them, the rows that make them.

The pass that plans equalization and the pass that carries it out read them here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from qcgraph.errors import UsageError
from qcgraph.ir.channels import NotLinearError, OutputChannels, makers
from qcgraph.ir.graph import Variant
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites

Refuse = Callable[[str, str], None]


@dataclass(frozen=True)
class EqualizableActivation:
    """An activation that can be shifted and divided at no cost.

    Attributes:
        name: the name of its node.
        sites: the linear layers that read it.
        nodes: the nodes of these layers.
        readers: the names of the weight and the bias of each of these layers.
        makers: the rows of weights that make it.
    """

    name: str
    sites: tuple[str, ...]
    nodes: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    makers: tuple[OutputChannels, ...]


def only_graph(program: Program, asked_by: str) -> Variant:
    """Return the only graph of a model that is not split into variants yet.

    Raises:
        UsageError: the program has several variants, which would all need the same change.
    """
    if len(program.variants) > 1:
        raise UsageError(f"{asked_by} takes the one graph of the model", hint="run it before insert-cache")
    (variant,) = program.variants.values()
    return variant


def equalizable_activations(variant: Variant, refuse: Refuse) -> Iterator[EqualizableActivation]:
    """Yield every activation that quantizable layers read and that can be shifted and divided, in order of the graph.

    Args:
        variant: the graph, which stays unchanged.
        refuse: called for every activation that cannot be, with the first site that reads it and the reason.
    """
    nodes = {node.name: node for node in variant.graph.nodes}
    reading: dict[str, list[tuple[str, fx.Node]]] = defaultdict(list)
    for site in find_sites(variant):
        if not site.refusal:
            reading[nodes[site.node].all_input_nodes[0].name].append((site.name, nodes[site.node]))
    for name, readers in reading.items():
        layers = [layer for _, layer in readers]
        try:
            if set(nodes[name].users) - set(layers):
                raise NotLinearError("something else reads its activation")
            yield EqualizableActivation(
                name,
                sites=tuple(site for site, _ in readers),
                nodes=tuple(layer.name for layer in layers),
                readers=tuple(_own_constants(layer) for layer in layers),
                makers=makers(variant, name),
            )
        except NotLinearError as reason:
            refuse(readers[0][0], str(reason))


def _own_constants(layer: fx.Node) -> tuple[str, str]:
    """Return the names of the weight and the bias of a linear layer.

    Raises:
        NotLinearError: the layer has no bias, or shares one of the two.
    """
    constants = layer.all_input_nodes[1:]
    if len(constants) < 2 or any(len(constant.users) > 1 for constant in constants):
        raise NotLinearError("it has no bias to take an offset, or shares its weight")
    return str(constants[0].target), str(constants[1].target)
