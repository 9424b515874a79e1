"""Types of a graph that was read: what its operations cannot take is raised, and nothing is printed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx

from qcgraph.ir.infer import infer_types
from qcgraph.spec import Interface, TensorSpec


def test_shapes_that_do_not_fit_are_raised_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    graph = fx.Graph()
    value = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.mm.default, (value, value)))
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError):
            infer_types(graph, Interface((TensorSpec("x", "f32", (2, 3)),), ()), {})
        assert caplog.messages == []
        logger.error("heard again")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == ["heard again"]
