"""waves: a small diffusion transformer with random weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qcgraph.models import LoadedModel
from qcgraph.plan.spec import ModelSpec

CHANNELS, SIZE, WIDTH, CLASSES = 1, 8, 32, 4


class Block(nn.Module):
    """A residual block whose branch is modulated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the tokens [B, T, WIDTH] after the block; the condition is [B, WIDTH]."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=2)
        branch = self.mix(self.norm(tokens) * (1 + scale) + shift)
        return tokens + self.contract(nn.functional.gelu(self.expand(branch)))


class Waves(nn.Module):
    """Predicts the noise in a latent from its rows, its timestep and its class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS * SIZE, WIDTH), nn.Linear(WIDTH, CHANNELS * SIZE)
        self.classes = nn.Embedding(CLASSES + 1, WIDTH)  # the last one is the null class, for guidance
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Return the predicted noise [B, CHANNELS, SIZE, SIZE]."""
        frequencies = torch.exp(torch.arange(WIDTH // 2) * (-math.log(10_000) / (WIDTH // 2)))
        angles = timestep[:, None] * frequencies  # [B, WIDTH / 2]
        condition = torch.cat([angles.sin(), angles.cos()], dim=1) + self.classes(label)
        tokens = self.embed(latent.permute(0, 2, 1, 3).flatten(2))  # a row is a token: [B, SIZE, WIDTH]
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.head(tokens).unflatten(2, (CHANNELS, SIZE)).permute(0, 2, 1, 3)


def make_model() -> LoadedModel:
    """Return the model, with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Waves()
    spec = ModelSpec.class_conditional(
        "waves",
        (CHANNELS, SIZE, SIZE),
        class_count=CLASSES,
        null_class=CLASSES,
        output_channels=CHANNELS,
        is_image=True,
    )
    return LoadedModel(module.eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
