"""Checkpoints of the original load unchanged, and no code that a file carries is run."""

import argparse
import json
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcgraph.errors import UsageError
from qcgraph.models.checkpoint import load_dit, read_names, read_weights
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


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda tensor: tensor.to(torch.int8), "int8, and not floating point"),
        (lambda tensor: tensor > 0, "bool, and not floating point"),
        (lambda tensor: tensor.to(torch.complex64), "complex64, and not floating point"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn, and not floating point"),
        (lambda tensor: tensor.to_sparse(), "sparse (sparse_coo)"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized (qint8)"),
        (lambda tensor: torch.nested.nested_tensor([tensor, tensor[1:]]), "nested"),
        (lambda tensor: tensor.to("meta"), "without values"),
    ],
    ids=["int8", "bool", "complex", "float8", "sparse", "quantized", "nested", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_only_dense_floating_point_is_read(
    convert: Callable[[torch.Tensor], torch.Tensor], reason: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name, path = "blocks.1.mlp.fc1.bias", tmp_path / "dit.pt"
    torch.save(weights | {name: convert(weights[name])}, path)
    with pytest.raises(UsageError) as refusal:
        load_dit(SMALL, path)
    assert f"{name} is {reason}" in refusal.value.message
    assert refusal.value.hint


def test_integers_in_safetensors(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    save_file(weights | {"blocks.1.mlp.fc1.bias": torch.ones(128, dtype=torch.int8)}, path)
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc1\.bias is int8, and not floating point"):
        load_dit(SMALL, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, notes = tmp_path / "dit.pt", []
    torch.save({"model": {f"{prefix}{name}": tensor for name, tensor in weights.items()}}, path)
    loaded = load_dit(SMALL, path, note=notes.append).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert [prefix in note for note in notes] == [True]


@pytest.mark.parametrize(("prefix", "count"), [("net.", 32), ("module.", 31)])
def test_other_prefixes_are_named(prefix: str, count: int, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, names = tmp_path / "dit.pt", list(weights)
    first = names[0] if count < len(names) else None
    torch.save({name if name == first else f"{prefix}{name}": tensor for name, tensor in weights.items()}, path)
    with pytest.raises(UsageError, match="the parameters are not those") as refusal:
        load_dit(SMALL, path)
    assert f"{count} of 32 names begin with '{prefix}'" in str(refusal.value.hint)


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, {"a": torch.zeros(1), (1, 2): torch.zeros(1)}])
def test_names_are_texts(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="is not the name of a parameter"):
        load_dit(SMALL, tmp_path / "dit.pt")


def test_which_of_two_is_read_is_noted(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    notes: list[str] = []
    torch.save({"ema": weights, "model": weights}, tmp_path / "dit.pt")
    load_dit(SMALL, tmp_path / "dit.pt", note=notes.append)
    assert notes == ["dit.pt: the weights are those under 'ema', not those under 'model'"]


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_are_refused_in_words(is_legacy: bool, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, generator = tmp_path / "dit.pt", random.Random(5)
    torch.save(weights, path, _use_new_zipfile_serialization=not is_legacy)
    whole, hints = path.read_bytes(), []
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 3, 20))):
            damaged[generator.randrange(4000)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load_dit(SMALL, path)
        except UsageError as error:
            hints.append(error.hint)
    assert len(hints) > 20
    assert all(hints)


def test_a_file_that_would_expand(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, bomb = tmp_path / "dit.pt", tmp_path / "bomb.pt"
    torch.save(weights, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, bytes(10**6) if entry.filename.endswith("/0") else source.read(entry))
    with pytest.raises(UsageError, match="it would expand to"):
        read_weights(bomb)


def test_headers_that_lie(tmp_path: Path) -> None:
    path, part = tmp_path / "dit.safetensors", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header in (b"[1]", json.dumps({"a": part, "b": part}).encode(), b'{"a": {"dtype": "F32", "shape": [-1]}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        for read in (read_weights, read_names):
            with pytest.raises(UsageError, match="cannot read safetensors"):
                read(path)
    path.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(UsageError, match="cannot read safetensors"):
        read_weights(path)


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such checkpoint file|is a folder"):
        read_weights(tmp_path / name)


def test_an_unknown_pickle_protocol_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"\x80e")
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UsageError, match="the checkpoint") as error:
        read_weights(path)
    assert warned == []
    assert error.value.hint
