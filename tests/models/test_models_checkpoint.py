"""Checkpoints of the original load unchanged, and no code that a file carries is run."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcgraph.errors import UsageError
from qcgraph.models.checkpoint import load_dit, read_weights
from qcgraph.models.dit import DiT, initialize_random
from qcgraph.models.geometry import DiTConfig

SMALL = DiTConfig(input_size=8, patch_size=2, channels=4, width=32, depth=2, heads=4, class_count=10)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    model = DiT(SMALL)
    initialize_random(model, torch.Generator().manual_seed(0))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        # what the original's train.py writes; the average is what it samples from
        lambda weights: {
            "model": {name: tensor + 1 for name, tensor in weights.items()},
            "ema": weights,
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="DiT-S/2", epochs=3),
        },
    ],
    ids=["plain", "model", "ema"],
)
def test_round_trip(wrap: Callable[[Any], Any], weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save(wrap(weights), path)
    loaded = load_dit(SMALL, path).state_dict()
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_half_precision_safetensors_become_float32(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    model = load_dit(SMALL, path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).isfinite().all()


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("plain_pickle", [False, True], ids=["torch.save", "pickle"])
def test_pickled_code_is_refused_and_not_run(plain_pickle: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "dit.pt", tmp_path / "executed"
    content = {"ema": {}, "extra": Malicious(marker)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))  # the one that torch writes
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match="would run code") as refusal:
        read_weights(path)
    assert refusal.value.hint
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))  # the file was dangerous: another reader does run it
    assert marker.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint file") as refusal:
        read_weights(tmp_path / "none.pt")
    assert refusal.value.hint


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"words, not weights"], ids=["empty", "cut", "text"])
def test_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_weights(path)
    assert refusal.value.hint
    assert refusal.value.where == str(path)


def test_truncated_checkpoint(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"cannot read the checkpoint|would run code"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3}, torch.zeros(3)], ids=["list", "numbers", "tensor"])
def test_other_content(content: object, tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save(content, path)
    with pytest.raises(UsageError, match="not a checkpoint"):
        read_weights(path)


def test_missing_and_unexpected_keys_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    del weights["blocks.1.mlp.fc1.bias"]
    torch.save(weights | {f"extra.{index}": torch.zeros(1) for index in range(5)}, path)
    with pytest.raises(UsageError) as refusal:
        load_dit(SMALL, path)
    assert "missing blocks.1.mlp.fc1.bias;" in refusal.value.message
    assert "unexpected extra.0, extra.1, extra.2 and 2 more" in refusal.value.message
    assert refusal.value.hint


def test_wrong_shapes_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save(weights | {"pos_embed": torch.zeros(1, 64, 32)}, path)
    with pytest.raises(UsageError, match=r"pos_embed is \[1, 64, 32\], expected \[1, 16, 32\]") as refusal:
        load_dit(SMALL, path)
    assert refusal.value.hint
