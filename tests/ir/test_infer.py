"""Types of a graph that was read: what its operations cannot take is raised, and nothing is printed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx

from qcgraph.ir.infer import infer_types
from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import Interface, TensorSpec


def test_shapes_that_do_not_fit_are_raised_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.mm.default, (value, value)))
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            infer_types(graph, Interface((TensorSpec("x", "f32", (2, 3), TensorRole.STATE),), ()), {})
        assert caplog.messages == []
        logger.error("heard again")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == ["heard again"]


def test_equal_calls_share_a_value_and_others_do_not() -> None:
    """Numbers that are equal but of different types make different results."""
    aten, graph = torch.ops.aten, fx.Graph()
    value = graph.placeholder("x")
    calls = [
        (aten.add.Tensor, (value, 1)),
        (aten.add.Tensor, (value, 1)),
        (aten.add.Tensor, (value, 1.0)),
        (aten.permute.default, (value, [1, 0])),
    ]
    nodes = [graph.call_function(target, arguments) for target, arguments in calls]
    nodes.append(graph.call_function(aten.add.Tensor, (nodes[-1], 1)))  # of the same type but for its strides
    graph.output(tuple(nodes))
    infer_types(graph, Interface((TensorSpec("x", "i64", (2, 2), TensorRole.STATE),), ()), {})
    first, again, real, turned, last = (node.meta["val"] for node in nodes)
    assert first is again
    assert (first.dtype, real.dtype) == (torch.int64, torch.float32)
    assert (turned.stride(), last.stride(), first.stride()) == ((1, 2), (1, 2), (2, 1))
