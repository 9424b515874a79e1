"""Capture: exactness, a symbolic batch, and refusals with their reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcgraph.capture.capture import capture
from qcgraph.errors import CaptureError
from qcgraph.ir.program import Program
from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec

SPEC = ModelSpec.class_conditional("toy", (2, 4, 4), 3, 3, output_channels=2)
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
        (data_dependent, "torch.export cannot capture the model: its Python code branches on the value of a tensor"),
        (fixed_batch, "torch.export cannot capture the model: it fixes the batch to 3"),
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


def test_control_flow_on_values_names_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(toy(data_dependent), SPEC, NAMES)
    assert "test_capture.py" in str(caught.value.where)
    assert "x.sum() > 0" in str(caught.value.where)


def halves_apart(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """As the rotary embeddings of several video transformers are written."""
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2]
    out[..., 1::2] = 2 * x[..., 1::2]
    return out


def into_undefined(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, :1], out[:, 1:] = x[:, 1:], x[:, :1]
    return out


def augmented(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    z = x * self.scale
    z += t[:, None, None, None]
    z *= 2
    return z.clamp_(-50, 50)


def through_views(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    first, second = z.chunk(2, dim=-1)
    first.mul_(3)
    second.copy_(first)
    z[:, 0].zero_()
    z.transpose(2, 3)[:, 1].add_(1)
    z.view(-1)[:5].add_(1)
    return z


def by_index_and_mask(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.index_put_((torch.tensor([0]), torch.tensor([1])), torch.ones(4))
    z.masked_fill_(z > 1, 0.5)
    return z


def into_the_arguments(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    x += 1
    t.mul_(2)
    return x * t[:, None, None, None]


def without_gradients(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = x.clone()
        z[:, 0] = 0
    with torch.enable_grad():
        return z + x


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "forward",
    [
        halves_apart,
        into_undefined,
        augmented,
        through_views,
        by_index_and_mask,
        into_the_arguments,
        without_gradients,
    ],
)
def test_writes_in_place_are_values(forward: Callable[..., Tensor], batch: int) -> None:
    module = toy(forward)
    program = capture(module, SPEC, NAMES)
    latent, timestep = torch.randn(batch, 2, 4, 4), torch.full((batch,), 9.0)
    inputs = {"latent": latent, "timestep": timestep, "class_label": torch.zeros(batch, dtype=torch.int64)}
    expected = module(*(value.clone() for value in inputs.values()))
    assert expected.any()
    torch.testing.assert_close(program.run("main", inputs)["noise_prediction"], expected)
    assert torch.equal(latent, inputs["latent"])


def short_for_others(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return (self.scale.reshape(1, 1).mT @ x.mH.mT.reshape(-1, 1, 32)).reshape(-1, 2, 4, 4) + x.adjoint()


def operators_of_python(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    mask = ((x > 0) & (x < 1) | ~(x > -1)) ^ (t > 5)[:, None, None, None]
    number = (y + 5 & 3 | 8 ^ 1) << 2 >> 1
    return torch.where(mask | False, x, x * number[:, None, None, None])


def rotated_as_complex(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    angles = torch.polar(torch.ones(2), torch.arange(2.0))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * angles).flatten(-2)


def in_sixteen_bit_integers(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * x.short()


@pytest.mark.parametrize(
    "forward", [short_for_others, operators_of_python, rotated_as_complex, in_sixteen_bit_integers]
)
def test_other_spellings_and_types_are_captured(forward: Callable[..., Tensor]) -> None:
    module = toy(forward)
    program = capture(module, SPEC, NAMES)
    latent, timestep, labels = torch.randn(3, 2, 4, 4), torch.tensor([1.0, 9, 9]), torch.tensor([0, 1, 2])
    found = program.run("main", {"latent": latent, "timestep": timestep, "class_label": labels})["noise_prediction"]
    torch.testing.assert_close(found, module(latent, timestep, labels))
    assert "noise_prediction" in program.text  # every type has a name


def test_layers_stay_layers_where_something_else_writes_in_place() -> None:
    """Functionalizing takes none of the ops apart that passes and targets know."""

    def forward(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z = F.rms_norm(F.gelu(F.layer_norm(F.linear(x, torch.eye(4) * self.scale), (4,))), (4,))
        z = F.silu(F.scaled_dot_product_attention(z, z, z))
        z[:, 0] = 0
        return z

    program = capture(toy(forward), SPEC, NAMES)
    names = {str(node.target) for node in program.variants["main"].graph.nodes}
    assert names >= {
        f"aten.{name}.default"
        for name in ("linear", "layer_norm", "rms_norm", "gelu", "silu", "scaled_dot_product_attention")
    }


def written_buffer(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    self.count += 1
    return x * self.count


def random_numbers(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def active_dropout(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def attention_dropout(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def python_number(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x * t[0].item()


@pytest.mark.parametrize(
    ("forward", "reason", "hint"),
    [
        (written_buffer, "keeps state between calls: its forward writes to 'count'", "function of latent"),
        (random_numbers, "calls aten.randn_like.default", "switch dropout and noise off"),
        (active_dropout, "calls aten.dropout.default", "switch dropout and noise off"),
        (attention_dropout, "draws random numbers", "switch dropout and noise off"),
        (python_number, "calls aten.item.default", "cannot become Python numbers"),
    ],
)
def test_what_a_program_cannot_hold(forward: Callable[..., Tensor], reason: str, hint: str) -> None:
    module = toy(forward)
    module.register_buffer("count", torch.zeros(()))
    with pytest.raises(CaptureError, match=reason) as caught:
        capture(module, SPEC, NAMES)
    assert hint in str(caught.value.hint)


def test_an_unknown_operator_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"calls aten\.special_bessel_j0\.default") as caught:
        capture(toy(lambda self, x, t, y: torch.special.bessel_j0(x)), SPEC, NAMES)
    assert "test_capture.py" in str(caught.value.where)
    assert "report aten.special_bessel_j0.default" in str(caught.value.hint)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda module: nn.DataParallel(torch.compile(module))]
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = toy(lambda self, x, t, y: x * self.scale)
    program = capture(wrap(module), SPEC, NAMES)
    assert program.text == capture(module, SPEC, NAMES).text


def test_a_part_in_training_mode_is_named() -> None:
    module = toy(lambda self, x, t, y: self.drop(x))
    module.drop = nn.Dropout().train()
    with pytest.raises(CaptureError, match="its part 'drop' is in training mode"):
        capture(module, SPEC, NAMES)


def test_a_latent_of_another_shape_is_said_to_be_that() -> None:
    module = toy(lambda self, x, t, y: x + torch.zeros(2, 4, 5))
    with pytest.raises(CaptureError, match=r"when it is called with x float32\[3, 2, 4, 4\]") as caught:
        capture(module, SPEC, NAMES)
    assert "its spec says that it takes latent f32[B,2,4,4]; timestep f32[B]; class_label i64[B]" in str(
        caught.value.hint
    )


def test_inference_mode_does_not_matter() -> None:
    with torch.inference_mode():
        module = toy(lambda self, x, t, y: x * self.scale)
        program = capture(module, SPEC, NAMES)
    assert program.constants_digest == capture(toy(lambda self, x, t, y: x * self.scale), SPEC, NAMES).constants_digest


def no_change_of_shape(self: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return x.squeeze(1).squeeze((1, 2)).expand(x.shape[0], -1, -1, 4).flatten(1, 1).expand_as(x)


def test_changes_of_shape_that_change_none_are_dropped() -> None:
    """Squeezing an axis that is not 1 is an identity for PyTorch, and invalid in ONNX."""
    program = capture(toy(no_change_of_shape), SPEC, NAMES)
    assert [node.op for node in program.variants["main"].graph.nodes] == ["placeholder"] * 3 + ["output"]
