"""The formats that a bundle can be exported to, and the export in one piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qcgraph.bundle import Bundle
from qcgraph.bundle.exports import EXPORT_FOLDER, ExportManifest, write_record
from qcgraph.bundle.watch import reading
from qcgraph.errors import UsageError, closest
from qcgraph.export.package.single_file import write_single_file
from qcgraph.export.package.single_model import SingleModel
from qcgraph.export.package.triton import write_triton


@dataclass(frozen=True)
class Format:
    """A format that other software reads.

    Attributes:
        name: the format's name on the command line.
        description: a description in one line.
        write: fills an existing folder.
    """

    name: str
    description: str
    write: Callable[[Bundle, Path], SingleModel]


FORMATS: Mapping[str, Format] = {
    kind.name: kind
    for kind in (
        Format("onnx-single", "one ONNX model with all variants, chosen by an input", write_single_file),
        Format("triton", "the same as a model of Triton Inference Server, which keeps the caches", write_triton),
    )
}


def export_bundle(bundle: Bundle, output: Path, name: str, *, force: bool = False) -> ExportManifest:
    """Write a bundle in another form, in one piece.

    Args:
        bundle: a bundle with ONNX graphs.
        output: the folder to write.
        name: a name in `FORMATS`.
        force: whether an existing export is replaced.

    Returns:
        The record of the export.

    Raises:
        UsageError: there is no such format, or the folder cannot be written.
        BundleError: the bundle has no ONNX graphs.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", where="--format", hint=closest(name, FORMATS))
    for variant in bundle.interfaces:
        bundle.file(f"{variant}.onnx")
    with EXPORT_FOLDER.writing(output, force=force) as folder, reading(bundle, done="exported"):
        FORMATS[name].write(bundle, folder)
        return write_record(folder, name, bundle)
