"""The original DiT in one file (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023).

Parameter names are those of the original code, so that its checkpoints load unchanged. Every size except the batch
comes from the config, so that ``torch.export`` with a symbolic batch does not specialise on any tensor.

Shapes in the comments: B batch, C channels, S input size, P patch size, G = S / P, T = G * G tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcgraph.models.geometry import GEOMETRIES, TIMESTEP_FREQUENCIES, DiTConfig

__all__ = ["GEOMETRIES", "INPUT_NAMES", "DiT", "DiTConfig", "initialize_random", "initialize_zero"]

INPUT_NAMES = ("x", "t", "y")  # the parameters of DiT.forward: latent, timestep, class label


class PatchEmbed(nn.Module):
    """Cut a latent into patches, and project each patch to a token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, S, S] -> [B, D, G, G] -> [B, D, T] -> [B, T, D]


class TimestepEmbedder(nn.Module):
    """Embed a timestep: sinusoidal features, then an MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = TIMESTEP_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        frequencies = torch.exp(-math.log(10000.0) * exponents)  # [128]
        angles = t.float()[:, None] * frequencies[None]  # [B, 128]
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # [B, 256]
        return self.mlp(features)  # [B, D]


class LabelEmbedder(nn.Module):
    """Embed a class label; the last row of the table is the null class of guidance."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        # To draw normal numbers on ``meta`` PyTorch would import its compiler, which takes seconds.
        self.embedding_table = nn.Embedding.from_pretrained(
            torch.zeros(config.class_count + 1, config.width), freeze=False
        )

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # [B] -> [B, D]


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.token_count = config.token_count
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(-1, self.token_count, 3, self.heads, self.head_width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, D / H]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


class Mlp(nn.Module):
    """The token-wise MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # [B, T, D]


class DiTBlock(nn.Module):
    """A transformer block whose normalisations and residual gates come from the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)  # six of [B, D]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # [B, T, D]


class FinalLayer(nn.Module):
    """Map each token to the values of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.output_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [B, T, P * P * C_out]


class DiT(nn.Module):
    """A class-conditional Diffusion Transformer. Its weights are unset until they are initialised or loaded.

    Args:
        config: the sizes of the network.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        # A frozen parameter rather than a buffer, because the original DiT counts and stores it as a parameter.
        self.pos_embed = nn.Parameter(position_embedding(config), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in a latent.

        Args:
            x: noisy latent, [B, C, S, S].
            t: timestep on the training scale, [B], int64 or float32.
            y: class label, [B], int64; ``config.null_class`` is the label of the unconditional half of guidance.

        Returns:
            [B, C_out, S, S]; the first C channels are the noise prediction, the remaining ones a learned variance.
        """
        x = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        condition = self.t_embedder(t) + self.y_embedder(y)  # [B, D]
        for block in self.blocks:
            x = block(x, condition)  # [B, T, D]
        return self.unpatchify(self.final_layer(x, condition))  # [B, C_out, S, S]

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put the patches back in their places: [B, T, P * P * C_out] -> [B, C_out, S, S]."""
        grid, patch, channels = self.config.grid_size, self.config.patch_size, self.config.output_channels
        x = x.reshape(-1, grid, grid, patch, patch, channels)
        x = x.permute(0, 5, 1, 3, 2, 4)  # [B, C_out, G, P, G, P]
        return x.reshape(-1, channels, grid * patch, grid * patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens [B, T, D] per image by [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def position_embedding(config: DiTConfig) -> Tensor:
    """Return the fixed 2-D sin-cos embedding of the grid, [1, T, D]: half of D for the column, half for the row."""
    positions = torch.arange(config.grid_size, dtype=torch.float64, device="cpu")
    quarter = config.width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = positions[:, None] * frequencies[None]  # [G, D / 4]
    axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # [G, D / 2]
    column = axis[None, :, :].expand(config.grid_size, -1, -1)
    row = axis[:, None, :].expand(-1, config.grid_size, -1)
    return torch.cat([column, row], dim=2).reshape(1, config.token_count, config.width).float()


@torch.no_grad()
def initialize_zero(model: DiT, generator: torch.Generator) -> None:
    """Initialise every parameter as the original DiT does: each block is the identity, the output zero (adaLN-Zero).

    Args:
        model: the model, changed in place.
        generator: the source of all randomness.
    """
    _initialize_trunk(model, generator)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02, generator=generator)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(_linear(layer).weight, std=0.02, generator=generator)
    for modulation in _modulations(model):
        nn.init.zeros_(modulation.weight)
    nn.init.zeros_(model.final_layer.linear.weight)


@torch.no_grad()
def initialize_random(model: DiT, generator: torch.Generator) -> None:
    """Initialise every parameter so that an untrained model exercises a compiler as a trained one does.

    Blocks contribute (gates of 0.1 to 0.5), and the output is of order 1 and depends on latent, timestep and class.
    The original initialisation makes a model return zero, which would hide every wrong transformation.

    Args:
        model: the model, changed in place.
        generator: the source of all randomness.
    """
    _initialize_trunk(model, generator)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.5, generator=generator)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.xavier_uniform_(_linear(layer).weight, generator=generator)
    for modulation in _modulations(model):
        nn.init.normal_(modulation.weight, std=0.02, generator=generator)
    for block in _blocks(model):
        bias = _linear(block.adaLN_modulation[1]).bias.view(6, -1)
        for gate in (2, 5):  # the order of the chunks in DiTBlock.forward
            nn.init.uniform_(bias[gate], 0.1, 0.5, generator=generator)
    nn.init.xavier_uniform_(model.final_layer.linear.weight, generator=generator)


def _initialize_trunk(model: DiT, generator: torch.Generator) -> None:
    """Initialise the position embedding, Xavier weights of the blocks, and zero biases, as both initialisations do."""
    model.pos_embed.copy_(position_embedding(model.config))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
    # The original DiT initialises the convolution as the equivalent linear layer on flattened patches.
    projection = model.x_embedder.proj.weight
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1), generator=generator)
    for block in _blocks(model):
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight, generator=generator)


def _blocks(model: DiT) -> list[DiTBlock]:
    """Return the blocks in order, with their type; a ``ModuleList`` only knows modules."""
    return [module for module in model.blocks if isinstance(module, DiTBlock)]


def _modulations(model: DiT) -> list[nn.Linear]:
    """Return every adaLN projection, with the one of the final layer last."""
    inner = [_linear(block.adaLN_modulation[1]) for block in _blocks(model)]
    return [*inner, _linear(model.final_layer.adaLN_modulation[1])]


def _linear(module: nn.Module) -> nn.Linear:
    """Narrow the type of an element of a ``Sequential``."""
    assert isinstance(module, nn.Linear)
    return module
