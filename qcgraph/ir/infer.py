"""The types of a graph, inferred by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcgraph.ir.graph import DTYPES, fake_value, size_of
from qcgraph.plan.spec import BATCH, Interface, TensorSpec
from qcgraph.quiet import without_log

BATCH_HINT = 97  # batch size that is unlikely to equal another dimension of a denoiser, so that sizes are not confused


LARGEST = 2**40  # number of elements of a value, or an integer: far more than any machine holds
LONGEST = 200  # number of terms of a symbolic size; sizes in models have a few

_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int, fx.Node),
    "SymInt": (int, fx.Node),
    "float": (int, float, fx.Node),
    "bool": (bool,),
    "str": (str,),
    "Tensor": (bool, int, float, fx.Node),  # PyTorch makes a tensor of a number
    "number": (bool, int, float, fx.Node),
    "Scalar": (bool, int, float, fx.Node),
    "ScalarType": (torch.dtype,),
    "Device": (torch.device,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
}


def check_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the number, the names and the simple types of the arguments of a call.

    Raises:
        TypeError: the op does not take these arguments.
    """
    schema = getattr(target, "_schema", None)
    if schema is None:
        if kwargs or len(args) != 2 or not all(isinstance(argument, (int, fx.Node)) for argument in args):
            raise TypeError(f"{target.__name__} takes two integers")
        return
    by_position = [argument for argument in schema.arguments if not argument.kwarg_only]
    by_name = {argument.name: argument for argument in schema.arguments}
    if len(args) > len(by_position) or not set(kwargs) <= set(by_name):
        raise TypeError(f"{schema.name} does not take these arguments")
    given = dict(zip((argument.name for argument in by_position), args, strict=False))
    if set(given) & set(kwargs):
        raise TypeError(f"{schema.name} is given an argument twice")
    for name, value in (given | dict(kwargs)).items():
        if not _fits(value, str(by_name[name].real_type)):
            raise TypeError(f"{schema.name} does not take {str(value)[:80]!r} as {name}")


def _fits(value: Any, kind: str) -> bool:
    """Tell whether a value may be an argument of this type, as an op's schema names it."""
    while kind.startswith("Optional["):
        if value is None:
            return True
        kind = kind[len("Optional[") : -1]
    if kind.startswith("List["):
        element = kind[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(_fits(item, element) for item in value)
        return isinstance(value, fx.Node) or (element in ("int", "SymInt") and _fits(value, element))
    return isinstance(value, _PLAIN.get(kind, (object,)))


def _check_size(value: Any) -> None:
    """Refuse values that no machine holds, and sizes whose formulas are longer than those of models.

    Raises:
        ValueError: says which size or value is refused.
    """
    if isinstance(value, (tuple, list)):
        for item in value:
            _check_size(item)
    elif isinstance(value, torch.Tensor):
        for dim in value.shape:
            _check_size(dim)
        if size_of(value.numel(), BATCH_HINT) > LARGEST:
            raise ValueError(f"a value of {size_of(value.numel(), BATCH_HINT):.3g} elements")
    elif isinstance(value, torch.SymInt):
        if value.node.expr.count_ops() > LONGEST:
            raise ValueError("a size is a formula of more terms than any model has")
        if size_of(value, BATCH_HINT) > LARGEST:
            raise ValueError("a size is larger than any machine holds")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("an integer is larger than any machine holds")


@without_log("torch._subclasses.fake_tensor")  # PyTorch logs a traceback of shapes that do not fit, and raises it too
def infer_types(graph: fx.Graph, interface: Interface, constants: Mapping[str, torch.Tensor]) -> None:
    """Give every node its type by running the graph on fake inputs with a symbolic batch.

    Calls of an op on arguments of the same types share one value, because blocks repeat and nothing but types is
    needed.

    Raises:
        ValueError: a value is larger than any machine holds. An op raises its own errors for arguments that do not fit.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # it looks for equal calls as ``known`` does, and takes longer than the calls
    values: dict[fx.Node, Any] = {}
    known: dict[object, Any] = {}
    inputs = iter(interface.inputs)

    def value_of(argument: fx.Node) -> Any:
        return values[argument]

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = _fake_input(mode, next(inputs))
        elif node.op == "get_attr":
            values[node] = mode.from_tensor(constants[str(node.target)], static_shapes=True)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
            call = (node.target, _type_of(args), _type_of(kwargs))
            if call not in known:
                known[call] = fake_value(mode, node.target, *args, **kwargs)
            values[node] = known[call]
        if node in values:
            _check_size(values[node])
            node.meta["val"] = values[node]


def _type_of(value: Any) -> object:
    """Return the part of an argument that decides the result's type: the type of a tensor, anything else whole."""
    if isinstance(value, torch.Tensor):
        layout = (*value.shape, *value.stride(), value.storage_offset())
        return "tensor", value.dtype, value.dim(), tuple(_type_of(size) for size in layout)
    if isinstance(value, torch.SymInt):
        return "size", value.node.expr
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_type_of(item) for item in value)
    if isinstance(value, dict):
        return "named", tuple((name, _type_of(item)) for name, item in value.items())
    return type(value), value  # the type tells True from 1, and 1 from 1.0


def _fake_input(mode: FakeTensorMode, spec: TensorSpec) -> torch.Tensor:
    example = torch.empty([BATCH_HINT if dim == BATCH else int(dim) for dim in spec.shape], dtype=DTYPES[spec.dtype])
    dynamic = [DimDynamic.DUCK if dim == BATCH else DimDynamic.STATIC for dim in spec.shape]
    return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
