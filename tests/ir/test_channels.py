"""The rows that make the channels of an activation: found where they are, refused where a change would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qcgraph.capture.capture import capture
from qcgraph.ir.channels import NotLinearError, OutputChannels, makers
from qcgraph.ir.program import Program
from qcgraph.ir.structure import find_sites
from qcgraph.plan.spec import ModelSpec

WIDTH, TOKENS = 8, 16
SPEC = ModelSpec.class_conditional("rows", (2, 8, 8), 5, 5, output_channels=2)
CHANNELS = (0, 1, 17, 31)  # of the tiny denoiser's 32

Form = Callable[["Block", Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A residual block of one form: from the normalised stream, a gain and a shift to what is added."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.making, self.key, self.reading = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.without_bias = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mixing = nn.Linear(TOKENS, TOKENS)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, gain = self.modulation(condition).chunk(2, dim=1)
        return x + self.form(self, F.layer_norm(x, (WIDTH,)), gain.unsqueeze(1), shift.unsqueeze(1))


class Denoiser(nn.Module):
    """A block of a form between a patch embedding and a head."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.classes = nn.Embedding(6, WIDTH)
        self.blocks = nn.ModuleList([Block(form)])
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = self.patches(latent).flatten(2).transpose(1, 2)
        condition = self.classes(label) + torch.sin(timestep)[:, None]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x).reshape(-1, 4, 4, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, 8, 8)


def denoiser(form: Form) -> Program:
    torch.manual_seed(0)
    return capture(Denoiser(form).eval().requires_grad_(False), SPEC, ("latent", "timestep", "label"))


def activation_of(program: Program, site: str) -> str:
    """The name of the node that a site reads."""
    variant = program.variants["main"]
    node = next(found.node for found in find_sites(variant) if found.name == site)
    return next(found for found in variant.graph.nodes if found.name == node).all_input_nodes[0].name


def makers_of(program: Program, site: str) -> tuple[OutputChannels, ...]:
    return makers(program.variants["main"], activation_of(program, site))


class Recording(fx.Interpreter):
    """Keeps the value of one node."""

    def __init__(self, module: fx.GraphModule, name: str) -> None:
        super().__init__(module)
        self.name = name

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name == self.name:
            self.found = value
        return value


def activation(program: Program, name: str, constants: dict[str, Tensor]) -> Tensor:
    """The value of a node, with other constants."""
    shape = program.variants["main"].interface.inputs[0].shape[1:]
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(3, *(int(size) for size in shape), generator=generator)
    recording = Recording(fx.GraphModule(dict(constants), program.variants["main"].graph), name)
    recording.run(latent, torch.tensor([3.0, 400.0, 990.0]), torch.tensor([0, 2, 5]))
    found: Tensor = recording.found
    return found


def check_rows(program: Program, site: str, channels: tuple[int, ...]) -> None:
    """A change of a row's bias reaches its channel alone: as it is, or as a change of the factor."""
    name = activation_of(program, site)
    constants = dict(program.constants)
    before = activation(program, name, constants)
    for rows in makers(program.variants["main"], name):
        assert len(rows.rows) == before.shape[-1]
        for channel in channels:
            bias = constants[rows.bias].clone()
            bias[rows.rows[channel]] += 0.5
            change = activation(program, name, constants | {rows.bias: bias}) - before
            others = [other for other in range(before.shape[-1]) if other != channel]
            torch.testing.assert_close(change[..., others], torch.zeros_like(change[..., others]), rtol=0, atol=1e-5)
            if rows.is_gain:
                assert change[..., channel].abs().max() > 0.1
            else:
                expected = torch.full_like(change[..., channel], 0.5)
                torch.testing.assert_close(change[..., channel], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(("layer", "gain", "shift"), [("attn.qkv", 32, 0), ("mlp.fc1", 128, 96)])
def test_modulated_activations_are_made_by_gain_and_shift_rows(
    captured: Program, block: int, layer: str, gain: int, shift: int
) -> None:
    """In the order of the chunks of adaLN: shift, scale and gate of the attention, then those of the MLP."""
    constants = [f"blocks.{block}.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")]
    assert makers_of(captured, f"blocks.{block}.{layer}") == (
        OutputChannels(*constants, tuple(range(gain, gain + 32)), is_gain=True),
        OutputChannels(*constants, tuple(range(shift, shift + 32)), is_gain=False),
    )


@pytest.mark.parametrize("block", [0, 1])
def test_attention_outputs_are_made_by_the_rows_of_the_values(captured: Program, block: int) -> None:
    constants = [f"blocks.{block}.attn.qkv.{kind}" for kind in ("weight", "bias")]
    expected = (OutputChannels(*constants, tuple(range(64, 96)), is_gain=False),)
    assert makers_of(captured, f"blocks.{block}.attn.proj") == expected


@pytest.mark.parametrize("site", ["blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"])
def test_a_row_reaches_its_channel_alone(captured: Program, site: str) -> None:
    check_rows(captured, site, CHANNELS)


def test_nothing_is_changed(captured: Program) -> None:
    before = captured.compute_digest()
    makers_of(captured, "blocks.0.attn.qkv")
    assert captured.compute_digest() == before


def modulated(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x * (1 + gain) + shift)


def modulated_in_another_order(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(shift + (gain + 1) * x)


def several_readers(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    value = x * (1 + gain) + shift
    return block.reading(value) * block.key(value)


def heads(x: Tensor) -> Tensor:
    """[B, T, D] -> [B, H, T, D / H], the head the faster dimension of the channels."""
    return x.reshape(-1, x.shape[1], WIDTH // 2, 2).permute(0, 3, 1, 2)


def interleaved_heads(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(heads(x), heads(block.key(x)), heads(block.making(x)))
    return block.reading(mixed.permute(0, 2, 1, 3).flatten(2))


def causal(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    operands = (x.unsqueeze(1), block.key(x).unsqueeze(1), block.making(x).unsqueeze(1))
    return block.reading(F.scaled_dot_product_attention(*operands, is_causal=True).squeeze(1))


def directly(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.making(x))


def shaped_by_the_batch(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.making(x).reshape(x.shape[0], 2, TOKENS // 2, WIDTH).flatten(1, 2))


def heads_in_the_batch(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """As attention that joins its heads with the batch."""
    parts = [layer(x).reshape(x.shape[0], TOKENS, 2, -1).transpose(1, 2) for layer in (block.key, block.making)]
    key, value = (part.reshape(x.shape[0] * 2, TOKENS, -1) for part in parts)
    mixed = F.scaled_dot_product_attention(key, key, value)
    return block.reading(mixed.reshape(x.shape[0], 2, TOKENS, -1).transpose(1, 2).reshape(x.shape[0], -1, WIDTH))


FORMS = [
    modulated,
    modulated_in_another_order,
    several_readers,
    causal,
    directly,
    shaped_by_the_batch,
    heads_in_the_batch,
]


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form: Form) -> None:
    check_rows(denoiser(form), "blocks.0.reading", tuple(range(WIDTH)))


def test_rows_are_in_the_order_of_the_channels_not_of_the_layer() -> None:
    program = denoiser(interleaved_heads)
    (rows,) = makers_of(program, "blocks.0.reading")
    assert rows.rows == (0, 2, 4, 6, 1, 3, 5, 7)
    check_rows(program, "blocks.0.reading", tuple(range(WIDTH)))


@pytest.mark.parametrize("site", ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"])
def test_what_a_gelu_gives_is_refused(captured: Program, site: str) -> None:
    with pytest.raises(NotLinearError, match="does not come from a linear layer"):
        makers_of(captured, site)


def used_elsewhere(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    value = block.making(x)
    return block.reading(value.reshape(-1, TOKENS, WIDTH)) + value


def part_used_elsewhere(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    first, second = block.modulation(x).chunk(2, dim=2)
    return block.reading(first.contiguous().reshape(-1, TOKENS, WIDTH)) * first + second


def factor_used_elsewhere(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    factor = 1 + gain
    return block.reading(x * factor + shift) * factor


def product_used_elsewhere(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    product = x * (1 + gain)
    return block.reading(product + shift) * product


def made_without_bias(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.without_bias(x))


def made_by_a_computed_weight(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(F.linear(x, block.making.weight * gain.mean(), block.making.bias))


def made_by_a_shared_layer(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.making(x)) * block.making(x)


def tokens_as_channels(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.mixing(block.making(x).transpose(1, 2)).transpose(1, 2)


def one_row_for_all_channels(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.making(x)[..., :1].expand(-1, -1, WIDTH))


def concatenated(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    first, second = block.making(x).split(WIDTH // 2, dim=2)
    return block.reading(torch.cat([second, first], dim=2))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (used_elsewhere, "used elsewhere too"),
        (part_used_elsewhere, "used elsewhere too"),
        (factor_used_elsewhere, "does not come from a linear layer"),
        (product_used_elsewhere, "does not come from a linear layer"),
        (made_without_bias, "no bias"),
        (made_by_a_computed_weight, "computed weight"),
        (made_by_a_shared_layer, "shares its weight"),
        (one_row_for_all_channels, "does not come from a linear layer"),
        (concatenated, "does not come from a linear layer"),
    ],
)
def test_refusals(form: Form, reason: str) -> None:
    with pytest.raises(NotLinearError, match=reason):
        makers_of(denoiser(form), "blocks.0.reading")


def test_channels_that_are_tokens_are_refused() -> None:
    with pytest.raises(NotLinearError, match="not one output each"):
        makers_of(denoiser(tokens_as_channels), "blocks.0.mixing")


def shared_modulation(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x * (1 + gain) + shift) + block.key(torch.tanh(x) * (1 + gain) + shift)


def shift_used_elsewhere(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x * (1 + gain) + shift) * shift


def gain_as_shift(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x * (1 + gain) + gain)


@pytest.mark.parametrize("form", [shared_modulation, shift_used_elsewhere, gain_as_shift])
def test_a_gain_or_shift_that_is_used_elsewhere_is_refused(form: Form) -> None:
    with pytest.raises(NotLinearError, match="used elsewhere too"):
        makers_of(denoiser(form), "blocks.0.reading")


def values_that_are_keys(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    value = block.making(x).unsqueeze(1)
    return block.reading(F.scaled_dot_product_attention(x.unsqueeze(1), value, value).squeeze(1))


def test_values_that_are_keys_as_well_are_refused() -> None:
    with pytest.raises(NotLinearError, match="keys or queries too"):
        makers_of(denoiser(values_that_are_keys), "blocks.0.reading")


def scaled_shift(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(torch.add(x * (1 + gain), shift, alpha=0.5))


def test_a_shift_with_a_factor_is_refused() -> None:
    with pytest.raises(NotLinearError):
        makers_of(denoiser(scaled_shift), "blocks.0.reading")


def plus_a_number(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x + 0.5)


def plus_itself(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(x + x)


@pytest.mark.parametrize("form", [plus_a_number, plus_itself])
def test_an_addition_of_one_tensor_is_refused(form: Form) -> None:
    with pytest.raises(NotLinearError):
        makers_of(denoiser(form), "blocks.0.reading")


def flattened_tokens(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return block.reading(block.making(x.reshape(-1, WIDTH)).reshape(-1, TOKENS, WIDTH))


def from_few_tokens(block: Block, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    few = x[:, :4]
    mixed = F.scaled_dot_product_attention(heads(x), heads(block.key(few)), heads(block.making(few)))
    return block.reading(mixed.permute(0, 2, 1, 3).reshape(-1, TOKENS, WIDTH))


@pytest.mark.parametrize("form", [flattened_tokens, from_few_tokens])
def test_shapes_that_cannot_be_followed_are_refused_or_followed(form: Form) -> None:
    program = denoiser(form)
    with suppress(NotLinearError):
        check_rows(program, "blocks.0.reading", (0, 5))
