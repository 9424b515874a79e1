"""The types of a graph, inferred by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcgraph.ir.graph import DTYPES, fake_value
from qcgraph.spec import BATCH, Interface, TensorSpec

BATCH_HINT = 97  # a batch that no other dimension of a denoiser is likely to equal, so that sizes are not confused


def infer_types(graph: fx.Graph, interface: Interface, constants: Mapping[str, torch.Tensor]) -> None:
    """Give every node its type by running the graph on fake inputs with a symbolic batch."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}
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
            values[node] = fake_value(mode, node.target, *args, **kwargs)
        if node in values:
            node.meta["val"] = values[node]


def _fake_input(mode: FakeTensorMode, spec: TensorSpec) -> torch.Tensor:
    example = torch.empty([BATCH_HINT if dim == BATCH else int(dim) for dim in spec.shape], dtype=DTYPES[spec.dtype])
    dynamic = [DimDynamic.DUCK if dim == BATCH else DimDynamic.STATIC for dim in spec.shape]
    return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
