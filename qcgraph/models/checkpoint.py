"""Reads weights of the original DiT from a file, never running code that the file carries."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models.dit import DiT
from qcgraph.models.geometry import DiTConfig

_NESTED = ("ema", "model")  # where the original's training keeps weights; the average is what it samples from
_GEOMETRY_HINT = "weights carry the original DiT's names; another geometry may fit, `qcgraph models` lists them"
_NAMED = 3  # keys that an error names before it counts the rest


def load_dit(config: DiTConfig, path: Path, *, hint: str = _GEOMETRY_HINT) -> DiT:
    """Builds a DiT and fills it from a file, converted to float32.

    Args:
        config: the geometry that the file must have.
        path: a ``.safetensors`` file, or a file of ``torch.save``; weights may be nested under ``ema`` or ``model``.
        hint: what to do where the file holds other weights.

    Raises:
        UsageError: the file is missing, unreadable, needs code to be read, or holds other weights.
    """
    # On "meta" nothing is allocated or initialised, so that the file's tensors are the only copy in memory.
    with torch.device("meta"):
        model = DiT(config)
    load_weights(model, path, hint=hint)
    return model


def load_weights(module: nn.Module, path: Path, *, hint: str) -> None:
    """Fills a module from a file, converted to float32; the module may be on the ``meta`` device.

    Args:
        module: the module, whose parameters and buffers are replaced.
        path: as for :func:`load_dit`.
        hint: what to do where the file holds other weights.

    Raises:
        UsageError: as for :func:`load_dit`.
    """
    weights = read_weights(path)
    complaint = _misfit(module.state_dict(), weights)
    if complaint is not None:
        raise UsageError(complaint, where=str(path), hint=hint)
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads named tensors from a checkpoint.

    Args:
        path: as for :func:`load_dit`.

    Raises:
        UsageError: the file is missing, unreadable, needs code to be read, or is not a checkpoint.
    """
    if not path.is_file():
        raise UsageError("no such checkpoint file", where=str(path), hint="name a .pt or .safetensors file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_torch(path)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(
            "the file is not a checkpoint: weights must be a mapping of names to tensors",
            where=str(path),
            hint=f"save model.state_dict(), alone or under {' or '.join(map(repr, _NESTED))}",
        )
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"cannot read safetensors: {error}", where=str(path), hint="is the file complete?") from error


def _read_torch(path: Path) -> Any:
    # The original's training checkpoints carry their command-line options; a Namespace only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                "the file is damaged or holds more than tensors, and reading the rest would run code from it",
                where=str(path),
                hint="if it is whole and you trust it, save its state_dict alone with safetensors.torch.save_file",
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise UsageError(
                f"cannot read the checkpoint: {error}", where=str(path), hint="is the file a complete .pt file?"
            ) from error


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Which weights the module does not have, lacks, or shapes differently; None where all fit."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        complaints = [
            f"{kind} {_first(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        return f"the parameters are not those of this network: {'; '.join(complaints)}"
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    return f"the shapes are not those of this network: {_first(misshapen)}" if misshapen else None


def _first(items: list[str]) -> str:
    """The first few of many, and how many more there are."""
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
