"""Blocks and sites are found from structure, for our DiT and for one that is built differently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture import capture
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, find_blocks, find_sites, total_macs
from qcgraph.spec import ModelSpec


def sites_of(program: Program) -> dict[str, Site]:
    return {site.name: site for site in find_sites(program.variants["main"])}


def test_blocks_are_a_chain(captured: Program) -> None:
    blocks = find_blocks(captured.variants["main"])
    assert [block.path for block in blocks] == ["blocks.0", "blocks.1"]
    assert blocks[0].leaving == blocks[1].entering


def test_quantizable_sites_are_the_linears_inside_the_blocks(captured: Program) -> None:
    names = [name for name, site in sites_of(captured).items() if not site.refusal]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == [f"blocks.{block}.{layer}" for block in range(2) for layer in layers]


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("x_embedder.proj", "conv2d"),
        ("t_embedder.mlp.0", "timestep and class only"),
        ("blocks.0.adaLN_modulation.1", "timestep and class only"),
        ("blocks.0.attn.attention", "attention"),
        ("final_layer.linear", "outside the blocks"),
    ],
)
def test_every_refusal_says_why(captured: Program, site: str, reason: str) -> None:
    assert reason in sites_of(captured)[site].refusal


def test_macs_are_those_of_the_arithmetic(captured: Program) -> None:
    sites = sites_of(captured)
    assert sites["blocks.0.attn.qkv"].macs == 16 * 32 * 96
    assert sites["blocks.0.attn.attention"].macs == 2 * 2 * 16 * 16 * 16  # heads, queries, keys, width; two products
    assert sites["x_embedder.proj"].macs == 16 * 32 * 2 * 2 * 2
    assert sites["t_embedder.mlp.0"].macs == 256 * 32
    assert sites["blocks.0.attn.qkv"].input_shape == ("B", 16, 32)
    assert total_macs(sites.values()) == sum(site.macs for site in sites.values())


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.output(torch.relu(self.query(x + shift[:, None])))


class Other(nn.Module):
    """A denoiser that shares nothing with DiT but a list of residual layers, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.classes = nn.Embedding(4, 16)
        self.trunk = nn.ModuleDict({"layers": nn.ModuleList(Layer(16) for _ in range(3))})
        self.head = nn.Linear(16, 4)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        shift = self.classes(label) + timestep[:, None]
        x = self.embed(latent.flatten(2).transpose(1, 2))
        for layer in self.trunk["layers"]:
            x = layer(x, shift)
        return self.head(self.head.weight.new_zeros(1, 1, 16) + x).transpose(1, 2).unflatten(2, (4, 4))


def test_another_architecture() -> None:
    spec = ModelSpec("other", (4, 4, 4), 3, 3, output_channels=4)
    program = capture(Other().eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
    blocks = find_blocks(program.variants["main"])
    assert [block.path for block in blocks] == [f"trunk.layers.{index}" for index in range(3)]
    names = [name for name, site in sites_of(program).items() if not site.refusal]
    assert names == [f"trunk.layers.{index}.{layer}" for index in range(3) for layer in ("query", "output")]
