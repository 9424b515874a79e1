"""Variants: FX graphs with an interface, and functions that read a graph and its nodes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from qcgraph.errors import ContractError
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import BATCH, Interface, TensorSpec

if TYPE_CHECKING:
    from sympy import Expr

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_NAME = re.compile(r"[^\s\"\\{}](?:[^\"\\{}\x00-\x1f]*[^\s\"\\{}])?")
EXPRESSIONS = 4096  # number of remembered sizes in terms of the batch; a program has few, and asks for them often
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Variant:
    """One graph of a program, with its interface. The graph must not be edited in place: see `GraphEditor`."""

    graph: fx.Graph
    interface: Interface


@dataclass(frozen=True)
class Provenance:
    """The pass that made a node, and the node that it was made from."""

    made_by: str
    source: str


def is_name(text: object) -> bool:
    """Tell whether a text may name a constant: a graph's code quotes it, so it must not end the quotation."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def spec_of(name: str, value: torch.Tensor, role: TensorRole | None = None) -> TensorSpec:
    """Return the spec of a (possibly fake) tensor; a symbolic dimension is printed as the batch."""
    shape = tuple(dimension_text(dim) for dim in value.shape)
    return TensorSpec(name, DTYPE_NAMES[value.dtype], shape, role)


def cache_spec(name: str, value: torch.Tensor, cached: str, age: int = 0) -> TensorSpec:
    """Return the spec of an input or output that holds a cached value of ``age`` computing steps ago."""
    return replace(spec_of(name, value, TensorRole.CACHE), value=cached, age=age)


def input_node(graph: fx.Graph, interface: Interface, role: TensorRole) -> fx.Node:
    """Return the placeholder of the only input of a role.

    Raises:
        ContractError: the variant takes none or several of this role.
    """
    names = [spec.name for spec in interface.taken(role)]
    if len(names) != 1:
        raise ContractError(f"a variant takes {len(names)} inputs of the role {role}, not one")
    return next(node for node in graph.nodes if node.op == "placeholder" and node.target == names[0])


def dimension_text(dim: int | torch.SymInt) -> int | str:
    """Return an integer, or the expression of a symbolic dimension in terms of the batch ``B``."""
    if isinstance(dim, int):
        return dim
    return _expression_text(dim.node.expr)


@lru_cache(EXPRESSIONS)
def _expression_text(expression: Expr) -> int | str:
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return int(expression)
    return (
        str(expression.subs({symbol: type(symbol)(BATCH) for symbol in symbols}))
        if len(symbols) == 1
        else str(expression)
    )


def size_of(dim: int | torch.SymInt, batch: int) -> float:
    """Return the size of a dimension for a batch of this size."""
    return dim if isinstance(dim, int) else _expression_value(dim.node.expr, batch)


@lru_cache(EXPRESSIONS)
def _expression_value(expression: Expr, batch: int) -> float:
    return float(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module whose code made this node, ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the output node of a graph."""
    return next(iter(reversed(graph.nodes)))


def returned_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Return the nodes whose values a graph returns, in order.

    Raises:
        ContractError: the graph returns anything but a tuple of values.
    """
    returned = output_node(graph).args[0]
    nodes = tuple(node for node in returned if isinstance(node, fx.Node)) if isinstance(returned, tuple) else ()
    if not nodes or nodes != returned:
        raise ContractError("a graph returns a tuple of values", hint="see GraphEditor.set_outputs")
    return nodes


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Drop calls and constants whose values have no users; inputs stay.

    Every op in a program is pure, also those that FX considers random (attention with dropout off).
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy with the same node names and metadata."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda argument: mapping[argument])
    return copy


def fake_value(mode: FakeTensorMode, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run an op on fake tensors.

    With PyTorch's dispatcher in Python, as in `torch.export`, the batch stays a symbol in composite ops. The dispatcher
    in C++ reads sizes as numbers (in PyTorch 2.11 the sizes of a product of two stacks of matrices). From then on the
    batch would be one number in all graphs that share its symbol.
    """
    with enable_python_dispatcher(), mode:
        return target(*args, **kwargs)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode of the values in a graph."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if hasattr(value, "fake_mode"):
            mode = value.fake_mode
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise ContractError("the graph has no typed values", hint="capture the model with qcgraph.capture.capture")
