"""Capture: exactness, a symbolic batch, and refusals with their reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture import capture
from qcgraph.errors import CaptureError
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.spec import ModelSpec

SPEC = ModelSpec("toy", (2, 4, 4), 3, 3, output_channels=2)
NAMES = ("x", "t", "y")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_program_is_the_module_bit_for_bit(captured: Program, tiny_model: LoadedModel, batch: int) -> None:
    latent = torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(batch))
    timestep, label = torch.full((batch,), 321.0), torch.arange(batch) % 6
    with torch.no_grad():
        expected = tiny_model.module(latent, timestep, label)
    inputs = {"latent": latent, "timestep": timestep, "class_label": label}
    assert torch.equal(captured.run("main", inputs)["noise_prediction"], expected)


def test_weights_are_shared_with_the_module(captured: Program, tiny_model: LoadedModel) -> None:
    weight = tiny_model.module.get_parameter("blocks.0.attn.qkv.weight")
    assert captured.constants["blocks.0.attn.qkv.weight"].data_ptr() == weight.data_ptr()


def test_the_fingerprint_is_that_of_the_weights(captured: Program, tiny_model: LoadedModel) -> None:
    again = capture(tiny_model.module, tiny_model.spec, tiny_model.input_names)
    assert again.constants_digest == captured.constants_digest


def toy(forward: Callable[..., Tensor]) -> nn.Module:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return forward(self, x, t, y)

    return Toy().eval().requires_grad_(False)


def data_dependent(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def fixed_batch(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x + torch.ones(3, 1, 1, 1) + t[:, None, None, None]


def two_outputs(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def wrong_shape(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x[:, :1] * self.scale


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (data_dependent, "torch.export cannot capture the model"),
        (fixed_batch, "torch.export cannot capture the model"),
        (two_outputs, "more than one tensor"),
        (wrong_shape, r"returns f32 .*its spec says f32 \(B, 2, 4, 4\)"),
    ],
)
def test_what_cannot_be_captured(forward: Callable[..., Tensor], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(toy(forward), SPEC, NAMES)


def test_training_mode_is_refused() -> None:
    module = toy(lambda self, x, t, y: x * self.scale).train()
    with pytest.raises(CaptureError, match="training mode"):
        capture(module, SPEC, NAMES)
