"""Reads the JSON files of model folders: an object, or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcgraph.errors import UsageError

_LARGEST = 2**24  # bytes; the largest that is known, the index of a sharded checkpoint, has a hundredth of that


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that names no key twice.

    Args:
        path: the file.

    Raises:
        UsageError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError("too large for a configuration", where=str(path), hint="save it with diffusers")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path), hint="name a readable file") from None
    except RecursionError:
        raise UsageError(
            "not a configuration: nested too deeply", where=str(path), hint="save it with diffusers"
        ) from None
    except ValueError as error:
        raise UsageError(f"not JSON: {error}", where=str(path), hint="is the download complete?") from error
    if not isinstance(content, dict):
        raise UsageError("not a configuration: expected a JSON object", where=str(path), hint="save it with diffusers")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration as diffusers does, which takes the defaults of settings that ``_use_default_values`` lists.

    Raises:
        UsageError: see `read_json`, or the list is none of names.
    """
    config = read_json(path)
    unused = config.get("_use_default_values", [])
    if not isinstance(unused, list) or not all(isinstance(key, str) for key in unused):
        raise UsageError("_use_default_values is no list of names", where=str(path), hint="take it out")
    return {key: value for key, value in config.items() if key not in unused}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must differ: readers disagree on which of two values counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found
