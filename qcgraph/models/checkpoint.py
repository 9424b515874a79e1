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
from torch import Tensor

from qcgraph.errors import UsageError
from qcgraph.models.dit import DiT
from qcgraph.models.geometry import DiTConfig

_NESTED = ("ema", "model")  # where the original's training keeps weights; the average is what it samples from
_NAMED = 3  # keys that an error names before it counts the rest


def load_dit(config: DiTConfig, path: Path) -> DiT:
    """Builds a DiT and fills it from a file, converted to float32.

    Args:
        config: the geometry that the file must have.
        path: a ``.safetensors`` file, or a file of ``torch.save``; weights may be nested under ``ema`` or ``model``.

    Raises:
        UsageError: the file is missing, unreadable, needs code to be read, or holds other weights.
    """
    weights = read_weights(path)
    # On "meta" nothing is allocated or initialised, so that the file's tensors are the only copy in memory.
    with torch.device("meta"):
        model = DiT(config)
    _check_fit(model.state_dict(), weights, path)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model


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


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights that the geometry does not have, lacks, or shapes differently."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        complaints = [
            f"{kind} {_first(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise UsageError(
            f"the parameters are not those of this geometry: {'; '.join(complaints)}",
            where=str(path),
            hint="weights must carry the original DiT's names; `qcgraph models` lists the geometries",
        )
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    if misshapen:
        raise UsageError(
            f"the shapes are not those of this geometry: {_first(misshapen)}",
            where=str(path),
            hint="another geometry may fit; `qcgraph models` lists them",
        )


def _first(items: list[str]) -> str:
    """The first few of many, and how many more there are."""
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
