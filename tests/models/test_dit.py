"""The DiT is the original's: same names, same sizes, same position embedding; and it exports."""

from typing import Any

import numpy as np
import pytest
import torch

from qcgraph.models.dit import DiT, initialize_random, initialize_zero
from qcgraph.models.geometry import GEOMETRIES, DiTConfig

SMALL = DiTConfig(input_size=8, patch_size=2, channels=4, width=32, depth=2, heads=4, class_count=10)

OUTSIDE_BLOCKS = [
    "pos_embed",
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
]
IN_A_BLOCK = [
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "adaLN_modulation.1.weight",
    "adaLN_modulation.1.bias",
]


def random_dit(config: DiTConfig = SMALL, seed: int = 0) -> DiT:
    model = DiT(config)
    initialize_random(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, 8, 8, generator=generator)
    return latent, torch.arange(batch) * 37 + 5, torch.arange(batch) % 11


def test_parameter_names_are_the_originals() -> None:
    expected = OUTSIDE_BLOCKS + [f"blocks.{index}.{name}" for index in range(2) for name in IN_A_BLOCK]
    assert sorted(DiT(SMALL).state_dict()) == sorted(expected)


# the figures of "DiT Parameters" in the original's training log (the paper rounds them to 33, 130, 458 and 675 M)
@pytest.mark.parametrize(
    ("name", "count"),
    [("dit-s-2", 32_963_360), ("dit-b-2", 130_512_416), ("dit-l-2", 458_102_816), ("dit-xl-2", 675_129_632)],
)
def test_parameter_count_is_the_originals(name: str, count: int) -> None:
    with torch.device("meta"):
        model = DiT(GEOMETRIES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_parameter_count_needs_no_model(name: str) -> None:
    with torch.device("meta"):
        model = DiT(GEOMETRIES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == GEOMETRIES[name].parameter_count


def test_position_embedding_is_the_originals() -> None:
    # models.py of the original, written out: meshgrid with the width first, half of the channels for each axis
    width_first = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0))).reshape(2, -1)
    omega = 1.0 / 10000 ** (np.arange(8) / 8.0)
    halves = []
    for axis in width_first:
        angles = np.einsum("m,d->md", axis, omega)
        halves.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    expected = np.concatenate(halves, axis=1)
    np.testing.assert_allclose(DiT(SMALL).pos_embed[0].numpy(), expected, atol=1e-7)


def test_patches_return_to_their_place() -> None:
    config = DiTConfig(input_size=6, patch_size=2, channels=3, width=16, depth=1, heads=1, class_count=2)
    image = torch.arange(2 * 6 * 6 * 6.0).reshape(2, 6, 6, 6)  # learn_sigma doubles the channels
    patches = image.reshape(2, 6, 3, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 9, 24)
    assert torch.equal(DiT(config).unpatchify(patches), image)


def test_start_of_training_is_zero() -> None:
    model = DiT(SMALL)
    initialize_zero(model, torch.Generator().manual_seed(0))
    assert torch.equal(model(*inputs(3)), torch.zeros(3, 8, 8, 8))


def test_random_weights_depend_on_every_input() -> None:
    model = random_dit()
    latent, timestep, label = inputs(4)
    output = model(latent, timestep, label)
    assert 0.3 < output.std() < 3
    for changed in ((latent + 0.1, timestep, label), (latent, timestep + 20, label), (latent, timestep, label.flip(0))):
        difference = (model(*changed) - output).norm() / output.norm()
        assert difference > 0.01


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    first = random_dit(seed=3).state_dict()
    torch.manual_seed(8)
    again, other = random_dit(seed=3).state_dict(), random_dit(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_random_weights_stay_finite_over_a_whole_sampling() -> None:
    from diffusers import DDIMScheduler

    model = random_dit()
    scheduler: Any = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    scheduler.set_timesteps(50)
    latent, _, label = inputs(4)
    for timestep in scheduler.timesteps:
        noise = model(latent, timestep.repeat(4), label)[:, :4]
        latent = scheduler.step(noise, timestep, latent).prev_sample
    assert latent.isfinite().all()


def test_timestep_may_be_integer_or_float() -> None:
    latent, timestep, label = inputs(2)
    model = random_dit()
    assert torch.equal(model(latent, timestep, label), model(latent, timestep.float(), label))


@pytest.mark.slow
@pytest.mark.parametrize("timestep_type", [torch.int64, torch.float32])
def test_exports_with_a_symbolic_batch(timestep_type: torch.dtype) -> None:
    model = random_dit()
    batch = torch.export.Dim("batch")
    latent, timestep, label = inputs(2)
    exported = torch.export.export(
        model,
        (latent, timestep.to(timestep_type), label),
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        strict=False,
    )
    for count in (1, 5):
        latent, timestep, label = inputs(count)
        arguments = (latent, timestep.to(timestep_type), label)
        torch.testing.assert_close(exported.module()(*arguments), model(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"input_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
        ({"width": 36, "heads": 5}, "width 36 is not a multiple of heads 5"),
        ({"width": 18, "heads": 3}, "width 18 is not a multiple of 4"),
        ({"mlp_ratio": 1e-4}, "mlp_ratio 0.0001 of width 1152 leaves the MLP no channel"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DiTConfig(**sizes)
