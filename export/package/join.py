"""Joining the ONNX graphs of a bundle to one: variants are branches, and the graph around them holds each weight once.

onnx-ir keeps a weight as a pointer into the bundle's file, so joining reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from qcgraph.bundle import Bundle
from qcgraph.errors import BundleError
from qcgraph.export.onnx.valid import load_graph, tensor_type
from qcgraph.export.package.single_model import START, VARIANT, HostedCache, SingleModel
from qcgraph.files.folder import AGAIN
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import TensorSpec

if TYPE_CHECKING:
    from onnxscript import ir


def join(bundle: Bundle, single: SingleModel) -> ir.Model:
    """Return the one model, whose weights are still in the files of the bundle.

    Raises:
        BundleError: the bundle has no ONNX graphs.
    """
    return _Joining(bundle, single).model()


class _Joining:
    """The graph around the branches while it is built."""

    def __init__(self, bundle: Bundle, single: SingleModel) -> None:
        self._bundle = bundle
        self._single = single
        self._weights: dict[tuple[object, ...], ir.Value] = {}  # by their place in the bundle
        self._indices: list[ir.Value] = []
        self._ir_version = 0
        self._opsets: dict[str, int] = {}
        self._inputs = [_value(spec) for spec in single.all_inputs]
        self._unpack: list[ir.Node] = []  # nodes that make numbers of tensors with one element
        self._outer: dict[str, ir.Value] = {}  # values that branches take from around them, by name in the bundle
        for value, spec in zip(self._inputs, single.all_inputs, strict=True):
            if spec.name in single.numbers:
                self._unpack.append(_node("Squeeze", [value], [TensorSpec(f"{spec.name}_number", spec.dtype, ())]))
                value = self._unpack[-1].outputs[0]
            self._outer[spec.name] = value
        self._held = {(item.value, item.age): self._outer[item.taken.name] for item in single.cache}

    def model(self) -> ir.Model:
        """Return the whole model."""
        from onnxscript import ir

        graph = self._choice(0)
        graph.name = self._bundle.spec.name
        graph.inputs.extend(self._inputs)
        graph.insert_before(graph[0], self._unpack)
        for value in (*self._indices, *self._weights.values()):
            graph.register_initializer(value)
        for value, spec in zip(graph.outputs, self._single.all_outputs, strict=True):
            value.name = spec.name
        graph.opset_imports.update(self._opsets)
        version = metadata.version("qcgraph")
        return ir.Model(graph, ir_version=self._ir_version, producer_name="qcgraph", producer_version=version)

    def _choice(self, index: int) -> ir.Graph:
        """Return the graph that runs this variant or a later one."""
        from onnxscript import ir

        variant = self._single.variants[index]
        branch = self._branch(variant)
        if index == len(self._single.variants) - 1:
            return branch
        other = self._choice(index + 1)
        number = ir.Value(name=f"index_of_{variant}", const_value=ir.tensor(index, ir.DataType.INT64))
        self._indices.append(number)
        is_it = _node("Equal", [self._outer[VARIANT], number], [TensorSpec(f"is_{variant}", "bool", ())])
        outputs = [TensorSpec(f"{variant}_or/{spec.name}", spec.dtype, spec.shape) for spec in self._single.all_outputs]
        chosen = _if(is_it.outputs[0], branch, other, outputs)
        return ir.Graph([], chosen.outputs, nodes=[is_it, chosen], name=f"{variant}_or")

    def _branch(self, variant: str) -> ir.Graph:
        """Return a variant and its preparing variant as one branch with the outputs of the one model."""
        outer = dict(self._outer)
        preparing: ir.Graph | None = None
        interface, other = self._bundle.interfaces[variant], self._bundle.plan.preparing.get(variant)
        if other is not None:
            preparing = self._adopted(other, outer)
            outer |= {spec.name: preparing.outputs[0] for spec in interface.taken(TensorRole.MODULATION)}
        outer |= {spec.name: self._held[spec.value, spec.age] for spec in interface.taken(TensorRole.CACHE)}
        graph = self._adopted(variant, outer)
        if preparing is not None:
            _prepend(preparing, graph)
        by_name = dict(zip(interface.output_names, graph.outputs, strict=True))
        given = {spec.value: by_name[spec.name] for spec in interface.caches}
        outputs = [
            by_name[interface.result.name],
            *(self._cached(item, given, graph, variant) for item in self._single.cache),
        ]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        return graph

    def _adopted(self, variant: str, outer: Mapping[str, ir.Value]) -> ir.Graph:
        """Return the graph of a variant as a branch: without inputs and weights, and with names of its own."""
        from onnxscript import ir

        model = load_graph(self._bundle.file(f"{variant}.onnx"))
        graph = model.graph
        self._check_interface(variant, graph, outer)
        self._ir_version = max(self._ir_version, model.ir_version)
        self._opsets |= graph.opset_imports
        for value in graph.inputs:
            ir.convenience.replace_all_uses_with(value, outer[str(value.name)])
        graph.inputs.clear()
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            if isinstance(value.const_value, ir.ExternalTensor):
                ir.convenience.replace_all_uses_with(value, self._weight(value, variant))
                continue
            value.name = f"{variant}/{name}"
            graph.register_initializer(value)
        for node in graph:
            node.name = f"{variant}/{node.name}"
            for value in node.outputs:
                value.name = f"{variant}/{value.name}"
                if not value.is_graph_output():
                    # Sessions in qcgraph leave out a fusion that ONNX Runtime makes where it knows shapes, and that
                    # rounds otherwise (see `DISABLED_OPTIMIZERS`). Unknown shapes prevent it in any other session too.
                    value.shape = None
        return graph

    def _check_interface(self, variant: str, graph: ir.Graph, outer: Mapping[str, ir.Value]) -> None:
        """Refuse a graph whose inputs or outputs are not those in the plan."""
        taken, left = ([str(value.name) for value in values] for values in (graph.inputs, graph.outputs))
        if not set(taken) <= set(outer) or left != list(self._bundle.interfaces[variant].output_names):
            where = str(self._bundle.path / f"{variant}.onnx")
            raise BundleError("has other inputs or outputs than the plan says", where=where, hint=AGAIN)

    def _weight(self, value: ir.Value, variant: str) -> ir.Value:
        """Return the one value for a weight, shared by all variants that read it."""
        from onnxscript import ir

        content = value.const_value
        assert isinstance(content, ir.ExternalTensor)
        self._bundle.file(str(content.location))  # weights that the manifest does not name are refused
        place = (content.location, content.offset, content.length, content.dtype, tuple(content.shape))
        if place not in self._weights:
            taken = {known.name for known in self._weights.values()}
            name = f"{variant}/{value.name}" if value.name in taken else value.name
            self._weights[place] = ir.Value(name=name, shape=value.shape, type=value.type, const_value=content)
        return self._weights[place]

    def _cached(self, item: HostedCache, given: Mapping[str, ir.Value], graph: ir.Graph, variant: str) -> ir.Value:
        """Return a cached value after a variant that computes the given ones."""
        if item.value in given and not item.age:
            return given[item.value]
        spec = TensorSpec(f"{variant}/{item.given.name}", item.spec.dtype, item.spec.shape)
        if item.value in given:
            # The first value of a trajectory stands for earlier ones, as in `qcgraph.sampling.cache_state.remember`.
            first = _passing(given[item.value], TensorSpec(f"{spec.name}/first", spec.dtype, spec.shape))
            later = _passing(
                self._held[item.value, item.age - 1], TensorSpec(f"{spec.name}/later", spec.dtype, spec.shape)
            )
            node = _if(self._outer[START], first, later, [spec])
        else:
            node = _node("Identity", [self._held[item.value, item.age]], [spec])
        graph.append(node)
        return node.outputs[0]


def _prepend(preparing: ir.Graph, graph: ir.Graph) -> None:
    """Put the nodes of one branch before those of another."""
    preparing.outputs.clear()
    for name, value in list(preparing.initializers.items()):
        del preparing.initializers[name]
        graph.register_initializer(value)
    nodes = list(preparing)
    preparing.remove(nodes)
    graph.insert_before(graph[0], nodes)


def _passing(value: ir.Value, spec: TensorSpec) -> ir.Graph:
    """Return a branch that passes on a value from around it."""
    from onnxscript import ir

    node = _node("Identity", [value], [spec])
    return ir.Graph([], node.outputs, nodes=[node], name=spec.name)


def _if(condition: ir.Value, then: ir.Graph, other: ir.Graph, outputs: Sequence[TensorSpec]) -> ir.Node:
    from onnxscript import ir

    branches = {"then_branch": then, "else_branch": other}
    return _node("If", [condition], outputs, [ir.AttrGraph(name, graph) for name, graph in branches.items()])


def _node(
    op: str, inputs: Sequence[ir.Value], outputs: Sequence[TensorSpec], attributes: Sequence[ir.Attr] = ()
) -> ir.Node:
    """Return a node that is named like its first output."""
    from onnxscript import ir

    values = [_value(spec) for spec in outputs]
    return ir.Node("", op, inputs, attributes, outputs=values, name=values[0].name)


def _value(spec: TensorSpec) -> ir.Value:
    from onnxscript import ir

    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=tensor_type(spec.dtype))
