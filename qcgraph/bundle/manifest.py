"""The manifest of a bundle: every file with its size and sha256, and the versions of the software that wrote it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from qcgraph.errors import BundleError
from qcgraph.files.atomic import Written, sha256_of
from qcgraph.files.folder import (
    AGAIN,
    name_problem,
    parsed,
    path_problem,
    read_file,
    record_of,
    recorded_hashes,
    text_of,
)

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
RECIPE = "recipe.lock.toml"
PLAN = "plan.json"
SCHEDULER = "scheduler/scheduler_config.json"  # where diffusers looks in a folder for a scheduler
REQUIRED = (PLAN, RECIPE)
PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")  # packages that results depend on

CHANGED = "the file was changed after it was written"
_COMPILED = "give the folder that qcgraph compile wrote"


class FileEntry(BaseModel):
    """One file of a bundle: the sha256 of its content and its size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, lt=2**63)


class Manifest(BaseModel):
    """The files of a bundle, and the origin of the bundle.

    Attributes:
        schema_version: the layout of the bundle.
        qcgraph: the version of qcgraph that wrote it.
        model: the name of the model.
        target: the name of the target.
        target_record: the target as data where another distribution defines it, so that nothing has to be imported.
        precision: the floating-point type of values that are not quantized.
        packages: the versions of the libraries that the bundle was compiled with.
        files: every other file, by its path with ``/``.
        overrides: failed checks of the compilation that the user allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    qcgraph: str
    model: str
    target: str
    target_record: dict[str, str | int | bool] | None = None
    precision: str = "f32"
    packages: dict[str, str]
    files: dict[str, FileEntry]
    overrides: tuple[str, ...] = ()


def entry_of(path: Path) -> FileEntry:
    """Return the manifest's entry for a file in its present state."""
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)


def write_manifest(
    folder: Path,
    model: str,
    target: str,
    precision: str = "f32",
    overrides: tuple[str, ...] = (),
    target_record: dict[str, str | int | bool] | None = None,
) -> None:
    """Write the manifest of a folder that already holds all other files.

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
        target_record=target_record,
        precision=precision,
        packages=_package_versions(),
        files=entries,
        overrides=overrides,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", "utf-8")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a bundle.

    Raises:
        BundleError: the manifest is missing or malformed, or has another schema version.
    """
    where = str(path / MANIFEST)
    if not path.is_dir():
        raise BundleError(
            "is a file, not a bundle" if path.exists() else "there is no such bundle", where=str(path), hint=_COMPILED
        )
    if not (path / MANIFEST).is_file():
        raise BundleError(f"is not a bundle: it has no {MANIFEST}", where=str(path), hint=_COMPILED)
    text = text_of(read_file(path, MANIFEST), where)
    parsed(where, text, lambda data: _check_schema(data["schema_version"], where))
    manifest = parsed(where, text, Manifest.model_validate)
    for name in manifest.files:
        if problem := name_problem(name):
            raise BundleError(f"names {name!r}, which {problem}", where=where, hint=AGAIN)
    if missing := set(REQUIRED) - set(manifest.files):
        raise BundleError(f"names no {' and no '.join(sorted(missing))}", where=where, hint=AGAIN)
    return manifest


def written_files(folder: Path) -> Written | None:
    """Return the files of a bundle of any schema version, in any state, and their sha256; None for any other folder."""
    data = record_of(folder, MANIFEST)
    hashes = recorded_hashes(data)
    return {MANIFEST: None, **hashes} if hashes is not None and isinstance(data.get("schema_version"), int) else None


def has_manifest(folder: Path) -> bool:
    """Tell whether a folder is a bundle, of any schema version and in any state."""
    return written_files(folder) is not None


def size_problem(folder: Path, name: str, entry: FileEntry) -> str:
    """Return why a file is missing, outside the folder or of another size; empty for none of these problems."""
    if problem := path_problem(folder, name):
        return problem
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if size < entry.bytes:
        return f"the file is truncated: {size} of {entry.bytes} bytes"
    return f"the file was changed: {size} bytes instead of {entry.bytes}" if size != entry.bytes else ""


def content_problem(folder: Path, name: str, entry: FileEntry) -> str:
    """Return why the content of a file is not the recorded one; empty when it is."""
    try:
        return "" if sha256_of(folder / name) == entry.sha256 else CHANGED
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _package_versions() -> dict[str, str]:
    installed = {name for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}
    return {name: metadata.version(name) for name in sorted(installed)}


def _check_schema(version: object, where: str) -> None:
    if version == SCHEMA_VERSION:
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    raise BundleError(
        f"has schema version {version!r:.40}; this qcgraph reads version {SCHEMA_VERSION}",
        where=where,
        hint="upgrade qcgraph" if newer else "compile again with this version",
    )
