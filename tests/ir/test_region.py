"""The regions of a tensor, here and in ONNX Runtime, and the rules of the op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from qcgraph.errors import ContractError
from qcgraph.ir import legality
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.ops import OPS
from qcgraph.ir.program import Program

aten = torch.ops.aten
ops = torch.ops.qcgraph
SPLIT = torch.tensor(0.25)
VALUES = torch.cat(
    [
        torch.rand(500, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.25, 0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf")]),
        torch.nextafter(SPLIT, torch.tensor([0.0, 1.0])),
    ]
)


def test_the_regions_have_nothing_in_common_and_add_up() -> None:
    """The trap of an implementation that adds both roundings of every value."""
    below, above = (ops.region(VALUES, SPLIT, upper) for upper in (False, True))
    assert not ((below != 0) & (above != 0)).any()
    assert torch.equal(below + above, VALUES)


def test_by_hand() -> None:
    values = torch.tensor([0.1, 0.25, 0.3])
    assert ops.region(values, SPLIT, False).tolist() == [values[0].item(), 0.0, 0.0]
    assert ops.region(values, SPLIT, True).tolist() == [0.0, 0.25, values[2].item()]


class Both(nn.Module):
    def forward(self, x: Tensor, split: Tensor) -> tuple[Tensor, Tensor]:
        return ops.region(x, split, False), ops.region(x, split, True)


def test_onnx_runtime_gives_the_same_values() -> None:
    import onnxruntime

    exported: Any = torch.onnx.export(
        torch.export.export(Both(), (VALUES, SPLIT)),
        dynamo=True,
        opset_version=23,
        custom_translation_table={op.target: op.to_onnx for op in OPS},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    values = torch.cat([VALUES[:-1], torch.tensor([float("nan")])])
    for found, expected in zip(
        session.run(None, {"x": values.numpy(), "split": SPLIT.numpy()}), Both()(values, SPLIT), strict=True
    ):
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("upper", [False, True])
def test_the_fake_rule_agrees_with_the_kernel(upper: bool) -> None:
    torch.library.opcheck(
        ops.region.default,
        (torch.rand(2, 3), SPLIT, upper),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def with_region(program: Program, split: Tensor) -> Program:
    """The program with the upper region of what enters its first linear layer on tokens."""
    editor = GraphEditor(program.variants["main"], program.constants, "test")
    linear: fx.Node = next(
        node for node in editor.graph.nodes if node.target is aten.linear.default and node.meta["val"].dim() == 3
    )
    with editor.before(linear):
        arguments = (linear.args[0], editor.constant("split", split, linear), True)
        region = editor.graph.create_node("call_function", ops.region.default, arguments, name="region")
    region.meta |= {key: linear.args[0].meta[key] for key in ("val", "nn_module_stack")}  # type: ignore[union-attr]
    linear.args = (region, *linear.args[1:])
    return with_edits(program, {"main": editor})


def test_a_scalar_split_is_legal(captured: Program) -> None:
    legality.verify(with_region(captured, SPLIT))


@pytest.mark.parametrize(
    ("split", "reason"),
    [(torch.tensor([0.25]), r"splits at \(1,\) values"), (torch.tensor(1), "splits torch.float32 at torch.int64")],
)
def test_what_is_illegal(captured: Program, split: Tensor, reason: str) -> None:
    with pytest.raises(ContractError, match=reason):
        legality.verify(with_region(captured, split))
