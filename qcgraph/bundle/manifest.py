"""The manifest of a bundle: every file with its size and sha256, and what wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qcgraph.errors import BundleError, QcgraphError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.lock.toml"
PLAN = "plan.json"
REQUIRED = (PLAN, RECIPE)
PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")  # what decides what a compilation gives

AGAIN = "copy or compile the bundle again"
_Value = TypeVar("_Value")


class FileEntry(BaseModel):
    """One file of a bundle: its content's sha256 and its size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What is in a bundle, and what made it.

    Attributes:
        schema_version: the layout of the bundle.
        qcgraph: the version of qcgraph that wrote it.
        model: the name of the model.
        target: the name of the target.
        precision: the floating-point type of what is not quantized.
        packages: the versions of the libraries that it was compiled with.
        files: every other file, by its path with ``/``.
        overrides: what was let through on demand although a check of the compilation refuses it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    qcgraph: str
    model: str
    target: str
    precision: str = "f32"
    packages: dict[str, str]
    files: dict[str, FileEntry]
    overrides: tuple[str, ...] = ()


def entry_of(path: Path) -> FileEntry:
    """The entry of a file as it is now."""
    return FileEntry(sha256=_sha256(path), bytes=path.stat().st_size)


def write_manifest(
    folder: Path, model: str, target: str, precision: str = "f32", overrides: tuple[str, ...] = ()
) -> None:
    """Write the manifest of a folder that holds all other files.

    Raises:
        BundleError: a file that every bundle has is missing.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {path.relative_to(folder).as_posix(): entry_of(path) for path in files}
    if missing := set(REQUIRED) - set(entries):
        raise BundleError(f"the bundle has no {' and no '.join(sorted(missing))}", hint="this is a bug of qcgraph")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        qcgraph=metadata.version("qcgraph"),
        model=model,
        target=target,
        precision=precision,
        packages=_package_versions(),
        files=entries,
        overrides=overrides,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        BundleError: there is none, it is malformed, or it has another schema version.
    """
    where = str(path / MANIFEST)
    if not path.is_dir():
        raise BundleError(
            "is a file, not a bundle" if path.exists() else "there is no such bundle",
            where=str(path),
            hint="give the folder that qcgraph compile wrote",
        )
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"is not a bundle: it has no {MANIFEST}", where=str(path), hint="give the folder that qcgraph compile wrote"
        )
    try:
        text = (path / MANIFEST).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot be read: {error}", where=where, hint=AGAIN) from None
    parsed(where, text, lambda data: _check_schema(data["schema_version"], where))
    manifest = parsed(where, text, Manifest.model_validate)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"names {name!r}, which is outside the bundle", where=where, hint=AGAIN)
    return manifest


def has_manifest(folder: Path) -> bool:
    """Whether a folder is a bundle, of any schema version and in whatever state."""
    try:
        data = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"schema_version", "qcgraph"} <= set(data) and isinstance(data.get("files"), dict)


def file_problem(path: Path, entry: FileEntry) -> str:
    """In what way a file is not as it was written; empty when it is."""
    return size_problem(path, entry) or content_problem(path, entry)


def size_problem(path: Path, entry: FileEntry) -> str:
    """Whether a file is missing or of another size; empty when neither."""
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"the file is truncated: {size} of {entry.bytes} bytes"
    return f"the file was changed: {size} bytes instead of {entry.bytes}" if size != entry.bytes else ""


def content_problem(path: Path, entry: FileEntry) -> str:
    """Whether a file of the right size was changed; empty when it was not."""
    return "the file was changed after it was written" if _sha256(path) != entry.sha256 else ""


def parsed(where: str, text: str, build: Callable[[Any], _Value]) -> _Value:
    """What ``build`` makes of JSON text.

    Raises:
        BundleError: the text is no JSON, or not of the shape that ``build`` expects.
    """
    try:
        return build(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{place}: {first['msg']}", where=where, hint=AGAIN) from None
    except BundleError:
        raise
    except QcgraphError as error:
        raise BundleError(error.message, where=where, hint=AGAIN) from None
    except json.JSONDecodeError as error:
        raise BundleError(f"is not valid JSON: {error}", where=where, hint=AGAIN) from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"is not of the expected form ({error!r})", where=where, hint=AGAIN) from None


def _package_versions() -> dict[str, str]:
    installed = {name for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}
    return {name: metadata.version(name) for name in sorted(installed)}


def _check_schema(version: int, where: str) -> None:
    if version == SCHEMA_VERSION:
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    raise BundleError(
        f"has schema version {version}; this qcgraph reads version {SCHEMA_VERSION}",
        where=where,
        hint="upgrade qcgraph" if newer else "compile again with this version",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
