"""Read dense floating-point weights from files, without ever running code that a file carries."""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models.dit import DiT
from qcgraph.models.files import is_there
from qcgraph.models.geometry import DiTConfig
from qcgraph.quiet import quiet

_NESTED = ("ema", "model")  # keys of weights in the original DiT's training files; it samples from ema
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile put before names
_GEOMETRY_HINT = "weights carry the original DiT's names; another geometry may fit, `qcgraph models` lists them"
_NAMED = 3  # keys that an error names; the remaining keys are only counted
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORED_FLOATS = ("F16", "BF16", "F32", "F64")  # the supported floating-point types, as safetensors calls them
_NOT_FLOAT = "not floating point of 16 bits or more: what its numbers stand for is not known"
_FLOAT_HINT = "save weights as float32, float16 or bfloat16 tensors"
# Errors that torch's readers raise on bytes that torch.save did not write; each means an unreadable file.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def _ignore(note: str) -> None:
    """Ignore a note."""


def load_dit(
    config: DiTConfig, path: Path, *, hint: str = _GEOMETRY_HINT, note: Callable[[str], None] = _ignore
) -> DiT:
    """Build a DiT and fill it from a file, converted to float32.

    Args:
        config: the geometry that the file must have.
        path: a ``.safetensors`` file, or a file of ``torch.save``; weights may be nested under ``ema`` or ``model``.
        hint: advice for the user when the file holds other weights.
        note: called with a note on every change to the names.

    Raises:
        UsageError: the file is missing, unreadable, needs code to be read, or holds other weights.
    """
    weights = read_weights(path, note=note)
    if config.depth > len(weights):  # checked before any block is built
        raise UsageError(
            f"a network of {config.depth} blocks has more than the {len(weights)} parameters of the file",
            where=str(path),
            hint=hint,
        )
    # On "meta" nothing is allocated or initialised, so the tensors of the file are the only copy in memory.
    with torch.device("meta"):
        model = DiT(config)
    _fill(model, weights, path, hint)
    return model


def load_weights(module: nn.Module, path: Path, *, hint: str) -> None:
    """Fill a module from a file, converted to float32; the module may be on the ``meta`` device.

    Args:
        module: the module, whose parameters and buffers are replaced.
        path: as for :func:`load_dit`.
        hint: advice for the user when the file holds other weights.

    Raises:
        UsageError: as for :func:`load_dit`.
    """
    _fill(module, read_weights(path), path, hint)


def _fill(module: nn.Module, weights: Mapping[str, Tensor], path: Path, hint: str) -> None:
    complaint = _misfit(module.state_dict(), weights)
    if complaint is not None:
        raise UsageError(complaint, where=str(path), hint=_prefix_hint(module.state_dict(), weights) or hint)
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def read_weights(path: Path, *, note: Callable[[str], None] = _ignore) -> dict[str, Tensor]:
    """Read named tensors from a checkpoint, without the prefixes that wrappers put before every name.

    Args:
        path: as for :func:`load_dit`.
        note: called with a note on the prefix that was removed.

    Raises:
        UsageError: the file is missing, unreadable, needs code to be read, is not a checkpoint, or holds a tensor that
            is not dense floating point.
    """
    if not is_there(path):
        what = "is a folder, not a checkpoint file" if is_there(path, Path.is_dir) else "no such checkpoint file"
        raise UsageError(what, where=str(path), hint="name a .pt or .safetensors file")
    weights = _read_safetensors(path) if path.suffix == ".safetensors" else _unnested(_read_torch(path), path, note)
    for name, tensor in weights.items():
        if reason := unusual(tensor):
            raise UsageError(f"{name} is {reason}", where=str(path), hint=_FLOAT_HINT)
    return _unwrapped(weights, note)


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of the tensors in a checkpoint; a ``.safetensors`` file is read without its tensors.

    Args:
        path: as for :func:`load_dit`.

    Raises:
        UsageError: as for :func:`read_weights`.
    """
    if path.suffix != ".safetensors" or not is_there(path):
        return tuple(read_weights(path))
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, *_UNREADABLE) as error:
        raise UsageError(f"cannot read safetensors: {error}", where=str(path), hint="is the file complete?") from error
    for name, kind in kinds.items():
        if kind not in _STORED_FLOATS:
            raise UsageError(f"{name} is {kind}, and {_NOT_FLOAT}", where=str(path), hint=_FLOAT_HINT)
    return tuple(kinds)


def unusual(tensor: object) -> str | None:
    """Describe a weight that is not a dense floating-point tensor with values; return None for one that is."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}, not a tensor"
    kind = str(tensor.dtype).removeprefix("torch.")
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a {type(tensor).__name__}, which holds its values in a form of its own"
    if tensor.is_meta:
        return "without values (it is on the meta device)"
    if tensor.is_nested:
        return "nested, of rows of differing lengths"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return f"quantized ({kind}), whose scales belong to another runtime"
    if tensor.dtype not in _FLOATS:
        return f"{kind}, and {_NOT_FLOAT}"
    return None


def _unnested(content: Any, path: Path, note: Callable[[str], None]) -> dict[str, Tensor]:
    """Return the mapping of names to tensors from the content of a file of torch.save."""
    found = [name for name in _NESTED if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if found:
        content = content[found[0]]
    if len(found) > 1:
        note(f"{path.name}: the weights are those under {found[0]!r}, not those under {found[1]!r}")
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(
            "the file is not a checkpoint: weights must be a mapping of names to tensors",
            where=str(path),
            hint=f"save model.state_dict(), alone or under {' or '.join(map(repr, _NESTED))}",
        )
    strange = [name for name in content if not isinstance(name, str)]
    if strange:
        raise UsageError(
            f"the file is not a checkpoint: {strange[0]!r} is not the name of a parameter",
            where=str(path),
            hint="save model.state_dict(), whose names are texts",
        )
    return dict(content)


def wrapper_prefix(names: Iterable[str]) -> str:
    """Return the prefix of wrappers that all names share, such as ``module._orig_mod.``; empty if there is none."""
    rest, prefix = list(names), ""
    while rest and (wrapper := next((one for one in _WRAPPERS if all(name.startswith(one) for name in rest)), None)):
        rest = [name.removeprefix(wrapper) for name in rest]
        prefix += wrapper
    return prefix


def _unwrapped(weights: dict[str, Tensor], note: Callable[[str], None]) -> dict[str, Tensor]:
    prefix = wrapper_prefix(weights)
    if not prefix:
        return weights
    note(f"the prefix {prefix!r} of all names in the checkpoint, which a wrapper adds, is taken off")
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, *_UNREADABLE) as error:
        raise UsageError(f"cannot read safetensors: {error}", where=str(path), hint="is the file complete?") from error


def _read_torch(path: Path) -> Any:
    # The original DiT's training checkpoints carry their command-line options; a Namespace only holds values.
    # torch warns of an unknown pickle protocol, and then either fails or reads the file.
    with torch.serialization.safe_globals([argparse.Namespace]), quiet():
        try:
            _check_expansion(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                "the file is damaged or holds more than tensors, and reading the rest would run code from it",
                where=str(path),
                hint="if it is whole and you trust it, save its state_dict alone with safetensors.torch.save_file",
            ) from error
        except _UNREADABLE as error:
            raise UsageError(
                f"cannot read the checkpoint: {_first_line(error)}",
                where=str(path),
                hint="is the file a complete .pt file?",
            ) from error


def _check_expansion(path: Path) -> None:
    """Refuse a zip archive that is larger than its file: torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        expanded = sum(entry.file_size for entry in archive.infolist())
    if expanded > path.stat().st_size:
        raise ValueError(f"it would expand to {expanded} bytes, and torch.save does not compress")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, LookupError):  # the text of a LookupError is no sentence
        return f"{type(error).__name__} {lines[0] if lines else ''}"
    return lines[0] if lines else type(error).__name__


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Describe which weights are missing, unexpected or of another shape; return None if all weights fit."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        complaints = [
            f"{kind} {first_of(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        return f"the parameters are not those of this network: {'; '.join(complaints)}"
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape
    ]
    return f"the shapes are not those of this network: {first_of(misshapen)}" if misshapen else None


def _prefix_hint(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Return advice when the names of the weights have an unexpected prefix; None if they have none."""
    anchor = next(iter(expected))
    prefixes = {name.removesuffix(anchor) for name in found if name.endswith(f".{anchor}")} | {*_WRAPPERS}
    for prefix in sorted(prefixes):
        count = sum(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in found)
        if count:
            return f"{count} of {len(found)} names begin with {prefix!r}: save the weights without that prefix"
    return None


def first_of(items: list[str]) -> str:
    """Return the first few items of a list as text, and the number of the remaining ones."""
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
