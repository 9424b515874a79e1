"""GraphEditor: a copy of a variant's graph to edit, and the only way passes insert nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.ir.graph import (
    Provenance,
    Variant,
    copy_graph,
    eliminate_dead_code,
    fake_mode_of,
    fake_value,
    input_node,
    output_node,
    spec_of,
)
from qcgraph.ir.program import Program, used_constants
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, TensorSpec


class GraphEditor:
    """A copy of a variant's graph to edit, and the only way for passes to insert nodes.

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
        """Return the node of this name in the copy."""
        return next(node for node in self.graph.nodes if node.name == name)

    @property
    def first_call(self) -> fx.Node:
        """The node before which values for all nodes are inserted: the first that computes, or else the output."""
        return next(node for node in self.graph.nodes if node.op in ("call_function", "output"))

    def call(
        self, target: Any, *args: Any, source: fx.Node, name: str | None = None, top_level: bool = False
    ) -> fx.Node:
        """Insert a call at the current insertion point, with ``source`` as the node that it is made from.

        The call belongs to the module of ``source``, or to no module when it is ``top_level``.
        """
        schema = getattr(target, "_schema", None)  # a Python function on numbers or tuples has no schema
        short = schema.name.split("::")[-1] if schema else target.__name__
        node = self.graph.create_node("call_function", target, args, {}, name=name or short)
        fakes = fx.node.map_arg(args, lambda argument: argument.meta["val"])
        value = fake_value(self._fake_mode, target, *fakes)
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
        """Return a reference to a constant; a new constant is added to the program.

        Raises:
            ContractError: the program has another value under this name.
        """
        _check_same(name, value, self._constants)
        _check_same(name, value, self.new_constants)
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        if name not in self._constants:
            self.new_constants[name] = value
        with self.graph.inserting_before(self.first_call):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self._stamp(node, self._fake_mode.from_tensor(value, static_shapes=True), source)
        return node

    def input(self, spec: TensorSpec, like: torch.Tensor, source: fx.Node) -> fx.Node:
        """Return the input of this name; a new one is added last and takes its (fake) value from ``like``."""
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

    def scalar_input(self, spec: TensorSpec, source: fx.Node) -> fx.Node:
        """Return the node of an int64 scalar input, which is added when it is new."""
        return self.input(spec, torch.empty((), dtype=torch.int64), source)

    def input_of(self, role: TensorRole) -> fx.Node:
        """Return the node of the only input of a role.

        Raises:
            ContractError: there is none, or several.
        """
        return input_node(self.graph, self.interface, role)

    @property
    def interface(self) -> Interface:
        """The present inputs and outputs."""
        return Interface(tuple(self.inputs), tuple(self.outputs))

    def drop_unused_inputs(self, *roles: TensorRole) -> None:
        """Drop inputs that no output depends on: those of these roles, or of any role where none is given."""
        eliminate_dead_code(self.graph)
        droppable = {spec.name for spec in self.inputs if not roles or spec.role in roles}
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.target in droppable and not node.users:
                self.graph.erase_node(node)
                self.inputs = [spec for spec in self.inputs if spec.name != node.target]

    def set_outputs(self, nodes: Sequence[fx.Node], specs: Sequence[TensorSpec]) -> None:
        """Make these nodes the outputs, in this order: names and roles come from the specs, types from the nodes."""
        output = output_node(self.graph)
        output.args = (tuple(nodes),)
        types = [spec_of("", node.meta["val"]) for node in nodes]
        self.outputs = [
            replace(spec, dtype=kind.dtype, shape=kind.shape) for spec, kind in zip(specs, types, strict=True)
        ]

    def finish(self) -> Variant:
        """Return the edited variant without dead nodes."""
        eliminate_dead_code(self.graph)
        self.graph.lint()
        return Variant(self.graph, self.interface)

    def _stamp(self, node: fx.Node, value: Any, source: fx.Node, *, top_level: bool = False) -> None:
        node.meta["val"] = value
        node.meta["provenance"] = Provenance(self._made_by, source.name)
        if "nn_module_stack" in source.meta and not top_level:
            node.meta["nn_module_stack"] = source.meta["nn_module_stack"]


def with_edits(program: Program, edits: Mapping[str, GraphEditor]) -> Program:
    """Return the program with edited variants and their new constants, without constants that nothing refers to."""
    variants = dict(program.variants) | {name: editor.finish() for name, editor in edits.items()}
    constants = dict(program.constants)
    for editor in edits.values():
        for name, value in editor.new_constants.items():
            _check_same(name, value, constants)
            constants[name] = value
    return replace(program, variants=variants, constants=used_constants(variants.values(), constants, program.facts))


def _check_same(name: str, value: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> None:
    known = constants.get(name)
    if known is None or known is value or (known.dtype == value.dtype and torch.equal(known, value)):
        return
    raise ContractError(f"constant {name!r} exists with another value", hint="give the new one a name of its own")
