"""Read JSON files of model folders; each must hold an object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcgraph.errors import UsageError
from qcgraph.files import documents

_LARGEST = 2**24  # bytes; the largest known file, the index of a sharded checkpoint, has a hundredth of this size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; numbers may be infinite, because diffusers writes infinite settings.

    Args:
        path: the file.

    Raises:
        UsageError: the file cannot be read, is not JSON, or holds no object.
    """
    hint = "is the download complete? otherwise save the model again with diffusers"
    content = documents.read_json(path, hint=hint, most_bytes=_LARGEST, finite=False)
    if not isinstance(content, dict):
        raise UsageError("not a configuration: expected a JSON object", where=str(path), hint=hint)
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration as diffusers does: settings listed under ``_use_default_values`` keep their defaults.

    Raises:
        UsageError: see `read_json`, or ``_use_default_values`` is not a list of names.
    """
    config = read_json(path)
    unused = config.get("_use_default_values", [])
    if not isinstance(unused, list) or not all(isinstance(key, str) for key in unused):
        raise UsageError("_use_default_values is no list of names", where=str(path), hint="take it out")
    return {key: value for key, value in config.items() if key not in unused}
