"""Blocks and sites are found from structure, for our DiT and for one that is built differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture import capture
from qcgraph.facts import CachedValue
from qcgraph.ir.graph import module_path
from qcgraph.ir.program import Program
from qcgraph.ir.structure import Site, cached_node, find_blocks, find_branches, find_sites, total_macs
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


def branch_paths(program: Program) -> list[list[str]]:
    """The modules that the branches of every block come from, the reshaping of their outputs left out."""
    variant = program.variants["main"]
    nodes = {node.name: node for node in variant.graph.nodes}
    return [[module_path(nodes[name]) for name in find_branches(variant, block)] for block in find_blocks(variant)]


def test_branches_of_our_blocks_are_attention_and_mlp(captured: Program) -> None:
    assert branch_paths(captured) == [[f"blocks.{block}.attn.proj", f"blocks.{block}.mlp.fc2"] for block in range(2)]


class DiffusersDiT(nn.Module):
    def __init__(self) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
        classes: dict[str, Any] = {"num_embeds_ada_norm": 10, "norm_num_groups": 4}
        self.module: Any = DiTTransformer2DModel(**sizes, **classes, in_channels=4, out_channels=8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        found = self.module(hidden_states, timestep, class_labels, return_dict=False)[0]
        assert isinstance(found, Tensor)
        return found


def test_branches_of_diffusers_blocks() -> None:
    """Its attention divides its output by 1, which is part of the branch."""
    spec = ModelSpec("folder", (4, 8, 8), 10, 10, output_channels=8)
    program = capture(DiffusersDiT().eval(), spec, ("hidden_states", "timestep", "class_labels"))
    names = [f"transformer_blocks.{index}" for index in range(2)]
    assert branch_paths(program) == [[f"{name}.attn1", f"{name}.ff.net.2"] for name in names]


def test_branches_without_gates_are_what_is_added() -> None:
    spec = ModelSpec("other", (4, 4, 4), 3, 3, output_channels=4)
    program = capture(Other().eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
    assert branch_paths(program) == [[f"trunk.layers.{index}.output"] for index in range(3)]


def test_cached_nodes(captured: Program) -> None:
    variant = captured.variants["main"]
    blocks = find_blocks(variant)
    assert cached_node(variant, blocks, CachedValue("", 0, 1)) == blocks[1].leaving
    assert cached_node(variant, blocks, CachedValue("", 1, 1, 1)) == find_branches(variant, blocks[1])[1]
