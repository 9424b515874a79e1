"""A folder that was exported from a bundle: ``export.json`` and the files of the format. Plain data, no ONNX."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qcgraph.bundle.engines import Source, source_of
from qcgraph.bundle.manifest import FileEntry, entry_of
from qcgraph.bundle.read import Bundle
from qcgraph.files import atomic
from qcgraph.files.folder import record_of, recorded_hashes

RECORD = "export.json"
RECORD_FORMAT = 1


class ExportManifest(BaseModel):
    """The record of an exported folder, ``export.json``.

    Attributes:
        format: the layout of the record.
        qcgraph: the version of qcgraph that wrote it.
        kind: the format of the export, such as ``onnx-single``.
        source: the bundle that was exported.
        files: every other file, by its path with ``/``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    qcgraph: str
    kind: str
    source: Source
    files: dict[str, FileEntry]


def write_record(folder: Path, kind: str, bundle: Bundle) -> ExportManifest:
    """Write ``export.json`` into a folder that already holds all other files."""
    record = ExportManifest(
        format=RECORD_FORMAT,
        qcgraph=metadata.version("qcgraph"),
        kind=kind,
        source=source_of(bundle),
        files={path.relative_to(folder).as_posix(): entry_of(path) for path in _files(folder)},
    )
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
    return record


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def written_export(folder: Path) -> atomic.Written | None:
    """Return the files of an exported folder and their sha256; None for any other folder."""
    data = record_of(folder, RECORD)
    hashes = recorded_hashes(data)
    return {RECORD: None, **hashes} if hashes is not None and isinstance(data.get("kind"), str) else None


EXPORT_FOLDER = atomic.FolderKind(written_export, "exists and was not written by qcgraph export")
