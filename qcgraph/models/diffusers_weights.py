"""Find the weight files of a diffusers model, and check them against each other before they are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcgraph.errors import UsageError
from qcgraph.models.checkpoint import first_of, read_names, wrapper_prefix
from qcgraph.models.json_file import read_json

_STEM = "diffusion_pytorch_model"  # the name that diffusers gives to weight files
# One file, or the index of several files; a variant (fp16, ema ..) stands between two dots.
_SINGLE = re.compile(rf"{_STEM}(?:\.(?P<variant>[\w-]+?))?\.(?P<form>safetensors|bin)")
_INDEX = re.compile(rf"{_STEM}\.(?P<form>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json")
_FORMS = ("safetensors", "bin")  # file formats, the preferred one first
_HALVES = ("fp16", "bf16", "fp32", "fp64")  # variants that store the same weights in another precision


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model folder.

    Attributes:
        variant: the variant by its name in diffusers, or None.
        is_safetensors: whether the files are safetensors; otherwise torch.save wrote them.
        names: the names of all tensors.
    """

    variant: str | None
    is_safetensors: bool
    names: tuple[str, ...]


def find_weights(folder: Path) -> WeightFiles:
    """Find the weights that diffusers would load, and read the names of their tensors.

    If a folder has a single variant, it is accepted when it stores the same weights in another precision.

    Args:
        folder: the folder of the model.

    Raises:
        UsageError: there are no weights, they are damaged or not floating point, shards are missing, or the names in
            the shards differ from the index.
    """
    found = [
        (match["variant"] or "", _FORMS.index(match["form"]), path)
        for path in sorted(folder.iterdir())
        if (match := _INDEX.fullmatch(path.name) or _SINGLE.fullmatch(path.name))
    ]
    variants = sorted({variant for variant, *_ in found})
    if not variants:
        raise UsageError(
            f"the folder has no weights: neither {_STEM}.safetensors nor {_STEM}.bin",
            where=str(folder),
            hint="is the download complete?",
        )
    variant = variants[0]  # files without a variant come first
    if variant and (len(variants) > 1 or variant not in _HALVES):
        raise UsageError(
            f"the folder has only variants of the weights: {', '.join(variants)}",
            where=str(folder),
            hint=f"rename the one that you mean to {_STEM}.safetensors",
        )
    form = min(form for of, form, _ in found if of == variant)
    paths = [path for of, its_form, path in found if (of, its_form) == (variant, form)]
    index = next((path for path in paths if path.suffix == ".json"), None)
    names = read_names(paths[0]) if index is None else _shard_names(index)
    return WeightFiles(variant or None, _FORMS[form] == "safetensors", names)


def check_prefix(files: WeightFiles, folder: Path) -> None:
    """Refuse weights whose names all have the prefix of a wrapper, which diffusers does not remove."""
    prefix = wrapper_prefix(files.names)
    if prefix:
        raise UsageError(
            f"all names in the weights begin with {prefix!r}, which a wrapper of the model added",
            where=str(folder),
            hint="unwrap the model before save_pretrained, or save the weights without that prefix",
        )


def _shard_names(index: Path) -> tuple[str, ...]:
    """Return the names of the tensors in the shards of an index; they must be the names in the index."""
    content: Any = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()) or not content:
        raise UsageError("has no weight_map of names to files", where=str(index), hint="is the download complete?")
    for file in sorted(set(content.values())):
        path = index.parent / file
        if Path(file).name != file or not path.is_file():
            raise UsageError(
                f"names {file}, which is not in the folder", where=str(index), hint="is the download complete?"
            )
        expected, stored = {name for name in content if content[name] == file}, set(read_names(path))
        if expected != stored:
            lost, extra = sorted(expected - stored), sorted(stored - expected)
            complaints = [f"lacks {first_of(lost)}"] * bool(lost) + [f"also has {first_of(extra)}"] * bool(extra)
            raise UsageError(
                f"is not the file that {index.name} describes: it {'; it '.join(complaints)}",
                where=str(path),
                hint="are all files of one download?",
            )
    return tuple(content)
