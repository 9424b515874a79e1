"""The quantized linears of an exported graph, cut out to run on their own, and its quantization parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcgraph.errors import VerificationError
from qcgraph.export.onnx.annotate import emitted_for
from qcgraph.export.onnx.valid import load_graph, tensor_type
from qcgraph.export.run.onnxruntime import load_session, session_options
from qcgraph.ir.graph import Variant, returned_nodes
from qcgraph.ir.program import Program
from qcgraph.ir.quantized_sites import QuantizedSite
from qcgraph.sampling.runner import Array

if TYPE_CHECKING:
    from onnxscript import ir


class CutSites:
    """Some quantized sites of an exported graph, each cut out and fed on its own, in one session.

    A node of the graph records the node of the program that it was emitted for, and a value has the name of the
    program's node for it (see `qcgraph.export.onnx.emit`), so the nodes of a site tell where to cut.

    Args:
        program: the exported program.
        variant: the name of one of its variants.
        path: the exported graph of this variant.
        sites: the sites to cut out.
        exact: see `qcgraph.export.run.onnxruntime.session_options`.

    Attributes:
        sites: the sites.
        nodes: the nodes of the program whose values enter or leave these sites.

    Raises:
        VerificationError: a site is not in the graph in its emitted form.
    """

    def __init__(
        self, program: Program, variant: str, path: Path, sites: Sequence[QuantizedSite], *, exact: bool = False
    ) -> None:
        from onnxscript import ir

        model = load_graph(path)
        self.sites = tuple(sites)
        self.nodes = frozenset(name for site in sites for name in (site.entering, site.leaving))
        self._leaving: dict[str, str] = {}  # site -> output of the cut graph
        self._entering: dict[str, str] = {}  # input of the cut graph -> node of the program
        results, emitted = _results(program.variants[variant], model.graph), emitted_for(model.graph)
        multiplied = _multiplied_codes(model.graph)
        entered = [_entering(emitted.get(site.divides, ())) for site in sites]
        inputs: dict[ir.Value, ir.Value] = {}
        outputs: list[ir.Value] = []
        for index, (site, entering) in enumerate(zip(sites, entered, strict=True)):
            leaving = results.get(site.leaving)
            if site.codes not in multiplied or entering is None or leaving is None:
                raise VerificationError(
                    "the exported graph has no product of a quantized activation with its weight codes",
                    where=f"{path.name}, {site.name}",
                )
            if entering not in inputs:
                inputs[entering] = ir.Value(name=f"entering_{index}", type=tensor_type(site.dtype))
                for node, position in tuple(entering.uses()):
                    node.replace_input_with(position, inputs[entering])
            self._entering[str(inputs[entering].name)] = site.entering
            leaving.type = tensor_type(site.dtype)
            outputs.append(leaving)
            self._leaving[site.name] = str(leaving.name)
        self._session = _cut_session(
            model, list(inputs.values()), outputs, path.parent, session_options(None, exact=exact)
        )

    def run(self, entering: Mapping[str, Array], selectors: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Array]:
        """Return the result of every site.

        Args:
            entering: the entering values by the name of the program's node; further entries are ignored.
            selectors: the scalar inputs, the timestep group among them.
        """
        feeds: dict[str, npt.NDArray[Any]] = {name: entering[node] for name, node in self._entering.items()}
        wanted = {item.name for item in self._session.get_inputs()}
        feeds |= {name: value for name, value in selectors.items() if name in wanted}
        values = self._session.run(list(self._leaving.values()), feeds)
        return dict(zip(self._leaving, values, strict=True))


def _entering(made_for: Sequence[ir.Node]) -> ir.Value | None:
    """Return the activation that enters the nodes emitted for the first node of a site; None without one.

    The first node is a quantizer, or the division before it. All other inputs of its nodes are made by these nodes,
    except scales and zero points, which are single numbers.
    """
    made = {value for node in made_for for value in node.outputs}
    read = {value for node in made_for for value in node.inputs if value is not None and value not in made}
    found = [value for value in read if not value.is_initializer() and (value.shape is None or value.shape.rank())]
    return found[0] if len(found) == 1 else None


def _results(variant: Variant, graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the values of an exported graph by the names of the program's nodes that they belong to."""
    returned = zip(returned_nodes(variant.graph), graph.outputs, strict=True)
    values = {str(value.name): value for node in graph for value in node.outputs}
    return values | {node.name: value for node, value in returned}


def _multiplied_codes(graph: ir.Graph) -> frozenset[str]:
    """Return the weight codes multiplied with a quantized activation, as dequantized values or as integers."""
    found = []
    for node in graph:
        makers = [_maker(value) for value in node.inputs[:2]]
        if node.op_type == "MatMul" and all(maker and maker.op_type == "DequantizeLinear" for maker in makers):
            found.append(makers[1].inputs[0] if makers[1] else None)
        elif node.op_type == "MatMulInteger":
            found.append(node.inputs[1])
    return frozenset(str(value.name) for value in found if value is not None)


def _scaled(integers: ir.Node) -> ir.Node | None:
    """Return the node that scales a product of integers, in Mul(Cast(product), Mul(scale, scale))."""
    cast = _only_user(integers.outputs[0])
    scaled = _only_user(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    scales = _maker(scaled.inputs[1]) if scaled is not None and scaled.op_type == "Mul" else None
    return scaled if scales is not None and scales.op_type == "Mul" else None


def _maker(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def multiplied_integers(path: Path) -> frozenset[str]:
    """Return the weight codes that an exported graph multiplies as integers, in kernels that add the bias too."""
    nodes = [node for node in load_graph(path).graph if node.op_type == "MatMulInteger"]
    return frozenset(str(codes.name) for node in nodes if (codes := node.inputs[1]) is not None)


def _cut_session(model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value], folder: Path, options: Any) -> Any:
    """Return a session of the part that computes these outputs; weights are read from the files of the whole graph."""
    from onnxscript import ir
    from onnxscript.optimizer import remove_unused_nodes

    selectors = [value for value in model.graph.inputs if value.shape is not None and not value.shape.dims]
    model.graph.inputs[:] = [*inputs, *selectors]
    model.graph.outputs[:] = outputs
    remove_unused_nodes(model)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return load_session(ir.to_proto(model).SerializeToString(), options)


@dataclass(frozen=True)
class Parameters:
    """The quantization parameters of an exported graph.

    Attributes:
        codes: weight codes by initializer.
        scales: scales by initializer.
        zero_points: zero points by initializer.
        selected: names of scales and zero points that are not constant: tables, by initializer, whose rows are selected
            at run time, and computed values.
    """

    codes: dict[str, npt.NDArray[np.int8]]
    scales: dict[str, npt.NDArray[np.float32]]
    zero_points: dict[str, npt.NDArray[np.generic]]
    selected: frozenset[str]


def parameters(path: Path) -> Parameters:
    """Return codes, scales and zero points of an exported graph from its files."""
    from onnxscript import ir

    found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    selected = set()
    for node in load_graph(path).graph:
        for operand in _operands(node):
            for position, value in enumerate(operand):
                source = _source(value)
                content = ir.convenience.get_const_tensor(source) if source is not None else None
                if source is not None and content is not None:
                    found[position][str(source.name)] = content.numpy()
                if source is not None and (source is not value or (position and content is None)):
                    selected.add(str(source.name))
    return Parameters(*found, frozenset(selected))


def _operands(node: ir.Node) -> Iterator[Sequence[ir.Value | None]]:
    """Yield values, scale and zero point of tensors that a node quantizes, dequantizes or multiplies as integers."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield node.inputs
    elif node.op_type == "MatMulInteger":
        scaled = _scaled(node)
        scales = _maker(scaled.inputs[1]) if scaled is not None else None
        zero_points = (*node.inputs[2:], None, None)
        yield from zip(node.inputs, scales.inputs if scales is not None else (None, None), zero_points, strict=False)


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor itself, or the table that it is selected from."""
    maker = _maker(value)
    return maker.inputs[0] if maker is not None and maker.op_type == "Gather" else value
