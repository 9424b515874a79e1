"""Blocks and sites are found from structure, for our DiT and for one that is built differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcgraph.capture.capture import capture
from qcgraph.facts import CachedValue
from qcgraph.ir.graph import module_path
from qcgraph.ir.program import Program
from qcgraph.ir.structure import (
    Site,
    cached_node,
    einsum_letters,
    find_blocks,
    find_branches,
    find_sites,
    total_macs,
)
from qcgraph.plan.spec import ModelSpec


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
        ("t_embedder.mlp.0", "timestep and conditions only"),
        ("blocks.0.adaLN_modulation.1", "timestep and conditions only"),
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
    spec = ModelSpec.class_conditional("other", (4, 4, 4), 3, 3, output_channels=4)
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


@pytest.mark.slow
def test_branches_of_diffusers_blocks() -> None:
    """Its attention divides its output by 1, which is part of the branch."""
    spec = ModelSpec.class_conditional("folder", (4, 8, 8), 10, 10, output_channels=8)
    program = capture(DiffusersDiT().eval(), spec, ("hidden_states", "timestep", "class_labels"))
    names = [f"transformer_blocks.{index}" for index in range(2)]
    assert branch_paths(program) == [[f"{name}.attn1", f"{name}.ff.net.2"] for name in names]


def test_branches_without_gates_are_what_is_added() -> None:
    spec = ModelSpec.class_conditional("other", (4, 4, 4), 3, 3, output_channels=4)
    program = capture(Other().eval().requires_grad_(False), spec, ("latent", "timestep", "label"))
    assert branch_paths(program) == [[f"trunk.layers.{index}.output"] for index in range(3)]


def test_cached_nodes(captured: Program) -> None:
    variant = captured.variants["main"]
    blocks = find_blocks(variant)
    assert cached_node(variant, blocks, CachedValue("", 0, 1)) == blocks[1].leaving
    assert cached_node(variant, blocks, CachedValue("", 1, 1, 1)) == find_branches(variant, blocks[1])[1]


class WithPositions(nn.Module):
    """A list of blocks that read a table of the stream's shape, made from the batch, besides the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.table = nn.Parameter(torch.randn(1, 16, 16))
        self.layers = nn.ModuleList(TwoLinears() for _ in range(3))

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2))
        positions = torch.cos(self.table * timestep[:, None, None])
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x).transpose(1, 2).unflatten(2, (4, 4))


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x * positions)))


SMALL = ModelSpec.class_conditional("small", (4, 4, 4), 3, 3, output_channels=4)
SMALL_NAMES = ("latent", "timestep", "label")


def quantizable(module: nn.Module) -> tuple[list[str], int]:
    """The sites that can be quantized, and how many blocks there are."""
    variant = capture(module.eval().requires_grad_(False), SMALL, SMALL_NAMES).variants["main"]
    return [site.name for site in find_sites(variant) if not site.refusal], len(find_blocks(variant))


def test_a_table_of_the_shape_of_the_stream_is_no_stream() -> None:
    names, blocks = quantizable(WithPositions())
    assert blocks == 3
    assert names == [f"layers.{index}.{layer}" for index in range(3) for layer in ("one", "two")]


class TwoStreams(nn.Module):
    """Two streams that every block mixes, over two lists with a long skip: no chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.context, self.head = nn.Linear(4, 16), nn.Embedding(4, 16), nn.Linear(16, 4)
        self.first = nn.ModuleList(MixingBlock() for _ in range(2))
        self.second = nn.ModuleList(MixingBlock() for _ in range(2))
        self.skip = nn.Linear(32, 16)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x, c = self.embed(latent.flatten(2).transpose(1, 2)), self.context(label)[:, None] + timestep[:, None, None]
        for block in self.first:
            x, c = block(x, c)
        x = self.skip(torch.cat([x, latent.flatten(2).transpose(1, 2).repeat(1, 1, 4)], dim=-1))
        for block in self.second:
            x, c = block(x, c)
        return self.head(x + c).transpose(1, 2).unflatten(2, (4, 4))


class MixingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (x + c).tanh()
        return x + self.image(mixed), c + self.text(mixed.mean(dim=1, keepdim=True))


def test_layers_are_quantizable_without_a_chain_of_blocks() -> None:
    """What is between the repeated parts counts too; embedders and the final layer do not."""
    names, blocks = quantizable(TwoStreams())
    assert blocks == 0
    inner = [
        f"{part}.{index}.{layer}" for part in ("first", "second") for index in range(2) for layer in ("image", "text")
    ]
    assert names == [*inner[:4], "skip", *inner[4:]]


class Plain(nn.Module):
    """Layers under names of their own, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = torch.relu(self.one(latent.flatten(2).transpose(1, 2)) + timestep[:, None, None])
        return self.three(torch.relu(self.two(x))).transpose(1, 2).unflatten(2, (4, 4))


def test_without_lists_the_first_and_the_last_layer_are_left_alone() -> None:
    assert quantizable(Plain()) == (["two"], 0)


class OnlyTwo(Plain):
    def forward(self, latent: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        x = torch.relu(self.one(latent.flatten(2).transpose(1, 2)) + timestep[:, None, None])
        return self.three(x).transpose(1, 2).unflatten(2, (4, 4))


def test_a_network_of_first_and_last_layers_alone_is_not_left_alone() -> None:
    assert quantizable(OnlyTwo()) == (["one", "three"], 0)


def test_reusing_steps_run_no_quantizable_layer(cached: Program) -> None:
    """Its blocks being skipped, the embedder and the final layer are no inner layers for that."""
    assert [site.name for site in find_sites(cached.variants["reuse"]) if not site.refusal] == []


@pytest.mark.parametrize(
    ("equation", "ranks", "axes", "result"),
    [
        ("bc,co->bo", (2, 2), [["b", "c"], ["c", "o"]], ["b", "o"]),
        ("...c, co -> ...o", (3, 2), [[".0", ".1", "c"], ["c", "o"]], [".0", ".1", "o"]),
        ("ba,ac", (2, 2), [["b", "a"], ["a", "c"]], ["b", "c"]),
        ("...i,...i", (3, 2), [[".0", ".1", "i"], [".1", "i"]], [".0", ".1"]),
    ],
)
def test_axes_of_an_einsum(equation: str, ranks: tuple[int, ...], axes: list[list[str]], result: list[str]) -> None:
    assert einsum_letters(equation, ranks) == (axes, result)
