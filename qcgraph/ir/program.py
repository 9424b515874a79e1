"""Program: named FX graphs that share constants, typed facts, and a history. Immutable; passes make new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from qcgraph.errors import ContractError
from qcgraph.facts import Facts
from qcgraph.spec import BATCH, Interface, TensorSpec
from qcgraph.steps import digest, digest_of

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Variant:
    """One graph of a program, with its interface. The graph must not be edited in place: see `GraphEditor`."""

    graph: fx.Graph
    interface: Interface


@dataclass(frozen=True)
class Origin:
    """Who made a node, and from which node."""

    made_by: str
    source: str


@dataclass(frozen=True)
class Refusal:
    """Something a pass left alone: the site or node, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """One entry of a program's history: the pass as pipeline text, and what it did."""

    text: str
    changed: bool
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Program:
    """A denoiser under compilation.

    Attributes:
        variants: the graphs by name; ``main`` alone until a cache splits it into ``full`` and ``reuse``.
        constants: every parameter and table by name, shared by all variants.
        facts: what the passes know, by type.
        history: the passes run so far.
    """

    variants: Mapping[str, Variant]
    constants: Mapping[str, torch.Tensor]
    facts: Facts = Facts()  # noqa: RUF009 - immutable
    history: tuple[PassRecord, ...] = ()

    def with_facts(self, *facts: object) -> Program:
        """This program with these facts added or replaced."""
        return replace(self, facts=self.facts.with_(*facts))

    def module(self, variant: str) -> fx.GraphModule:
        """An executable module of one variant; its constants are the program's, not copies.

        Raises:
            ContractError: there is no such variant.
        """
        if variant not in self.variants:
            raise ContractError(f"no variant {variant!r}; there are: {', '.join(self.variants)}")
        if variant not in self._modules:
            self._modules[variant] = fx.GraphModule(dict(self.constants), self.variants[variant].graph)
        return self._modules[variant]

    def run(self, variant: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one variant in PyTorch.

        Args:
            variant: its name.
            inputs: a tensor for every name of its interface; other entries are ignored.

        Returns:
            the outputs by name.
        """
        interface = self.variants[variant].interface if variant in self.variants else None
        module = self.module(variant)
        assert interface is not None
        with torch.no_grad():
            outputs = module(*(inputs[name] for name in interface.input_names))
        return dict(zip(interface.output_names, outputs, strict=True))

    @cached_property
    def text(self) -> str:
        """The program as text (see `qcgraph.ir.printer`)."""
        from qcgraph.ir.printer import print_program

        return print_program(self)

    @cached_property
    def digest(self) -> str:
        """A digest of all that the program is: its graphs, the values of its constants, its facts."""
        return self.compute_digest()

    def compute_digest(self) -> str:
        """The digest, computed anew (the property remembers it)."""
        from qcgraph.ir.printer import print_program

        values = sorted((name, tensor_digest(tensor)) for name, tensor in self.constants.items())
        return digest(
            [print_program(self).encode(), digest_of(values).encode(), digest_of(self.facts.encode()).encode()]
        )

    @cached_property
    def _modules(self) -> dict[str, fx.GraphModule]:
        return {}


_TENSOR_DIGESTS = WeakTensorKeyDictionary()  # tensor -> (its version when it was read, its digest)


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of a tensor's dtype, shape and bytes; remembered until the tensor is written to or dies."""
    version, known = _TENSOR_DIGESTS.get(tensor, (-1, ""))
    if version != tensor._version:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        known = digest([f"{tensor.dtype}{tuple(tensor.shape)}".encode(), raw.data])
        _TENSOR_DIGESTS[tensor] = (tensor._version, known)
    return str(known)


def spec_of(name: str, value: torch.Tensor) -> TensorSpec:
    """The spec of a (possibly fake) tensor; a symbolic dimension is printed as the batch."""
    shape = tuple(dimension_text(dim) for dim in value.shape)
    return TensorSpec(name, DTYPE_NAMES[value.dtype], shape)


def dimension_text(dim: int | torch.SymInt) -> int | str:
    """An integer, or the expression of a symbolic dimension in terms of the batch ``B``."""
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return int(expression)
    return (
        str(expression.subs({symbol: type(symbol)(BATCH) for symbol in symbols}))
        if len(symbols) == 1
        else str(expression)
    )


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose code made this node, ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


class GraphEditor:
    """A copy of a variant's graph to edit, and the only way passes insert nodes.

    Every inserted node gets its type (by running the op on fake tensors), its origin and its module path, so that the
    program prints and verifies after the edit.
    """

    def __init__(self, variant: Variant, constants: Mapping[str, torch.Tensor], made_by: str) -> None:
        self.graph = copy_graph(variant.graph)
        self.inputs = list(variant.interface.inputs)
        self.outputs = list(variant.interface.outputs)
        self.new_constants: dict[str, torch.Tensor] = {}
        self._constants = constants
        self._made_by = made_by
        self._fake_mode = fake_mode_of(self.graph)

    def node(self, name: str) -> fx.Node:
        """The node of this name in the copy."""
        return next(node for node in self.graph.nodes if node.name == name)

    def call(
        self, target: Any, *args: Any, source: fx.Node, name: str | None = None, top_level: bool = False
    ) -> fx.Node:
        """Insert a call at the current insertion point, made from ``source``.

        It counts as code of the module that ``source`` is in, or of none when it is ``top_level``.
        """
        short = target._schema.name.split("::")[-1]
        node = self.graph.create_node("call_function", target, args, {}, name=name or short)
        fakes = fx.node.map_arg(args, lambda argument: argument.meta["val"])
        with self._fake_mode:
            value = target(*fakes)
        self._stamp(node, value, source, top_level=top_level)
        return node

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert before this node."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert after this node."""
        with self.graph.inserting_after(node):
            yield

    def constant(self, name: str, value: torch.Tensor, source: fx.Node) -> fx.Node:
        """A reference to a constant, which is added to the program when it is new."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        if name not in self._constants:
            self.new_constants[name] = value
        with self.graph.inserting_before(self._first_call()):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self._stamp(node, self._fake_mode.from_tensor(value, static_shapes=True), source)
        return node

    def input(self, spec: TensorSpec, like: torch.Tensor, source: fx.Node) -> fx.Node:
        """An input of this name, added after the others when it is new; ``like`` gives its (fake) value."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == spec.name:
                return node
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.create_node("placeholder", spec.name, name=spec.name)
        with self._fake_mode:
            value = torch.empty(like.shape, dtype=like.dtype)
        self._stamp(node, value, source)
        self.inputs.append(spec)
        return node

    def scalar_input(self, name: str, source: fx.Node) -> fx.Node:
        """An int64 scalar input of this name."""
        return self.input(TensorSpec(name, "i64", ()), torch.empty((), dtype=torch.int64), source)

    def set_outputs(self, nodes: Sequence[fx.Node], names: Sequence[str]) -> None:
        """Make these nodes, in this order, the outputs."""
        output = output_node(self.graph)
        output.args = (tuple(nodes),)
        self.outputs = [spec_of(name, node.meta["val"]) for name, node in zip(names, nodes, strict=True)]

    def finish(self) -> Variant:
        """The edited variant, without dead nodes."""
        eliminate_dead_code(self.graph)
        self.graph.lint()
        return Variant(self.graph, Interface(tuple(self.inputs), tuple(self.outputs)))

    def _stamp(self, node: fx.Node, value: Any, source: fx.Node, *, top_level: bool = False) -> None:
        node.meta["val"] = value
        node.meta["origin"] = Origin(self._made_by, source.name)
        if "nn_module_stack" in source.meta and not top_level:
            node.meta["nn_module_stack"] = source.meta["nn_module_stack"]

    def _first_call(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op in ("call_function", "output"))


def output_node(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(iter(reversed(graph.nodes)))


def returned_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes whose values a graph returns, in order.

    Raises:
        ContractError: it returns something else than a tuple of values.
    """
    returned = output_node(graph).args[0]
    nodes = tuple(node for node in returned if isinstance(node, fx.Node)) if isinstance(returned, tuple) else ()
    if not nodes or nodes != returned:
        raise ContractError("a graph returns a tuple of values", hint="see GraphEditor.set_outputs")
    return nodes


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Drop calls and constants whose value nobody uses; inputs stay.

    Everything a program may call is pure, also the ops that FX takes for random (attention with dropout off).
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and metadata."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda argument: mapping[argument])
    return copy


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the values of a graph live in."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if hasattr(value, "fake_mode"):
            mode = value.fake_mode
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise ContractError("the graph has no typed values", hint="capture the model with qcgraph.capture")


def with_edits(program: Program, edits: Mapping[str, GraphEditor]) -> Program:
    """The program with edited variants and their new constants; constants nobody refers to any more are dropped."""
    variants = dict(program.variants) | {name: editor.finish() for name, editor in edits.items()}
    constants = dict(program.constants)
    for editor in edits.values():
        constants.update(editor.new_constants)
    return replace(program, variants=variants, constants=used_constants(variants.values(), constants))


def used_constants(variants: Iterable[Variant], constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The constants that some graph refers to, in their order."""
    used = {str(node.target) for variant in variants for node in variant.graph.nodes if node.op == "get_attr"}
    return {name: value for name, value in constants.items() if name in used}
