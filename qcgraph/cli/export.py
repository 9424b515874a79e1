"""qcgraph export: a bundle in another form, for other software. Imports neither torch nor diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcgraph.cli.output import JsonOption, print_json, print_table, size_text


def export_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="onnx-single: one ONNX model with all variants, chosen by an input. triton: the same as a model of "
            "Triton Inference Server, which keeps the caches.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FOLDER", help="The folder to write; for triton, one in a model repository."
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Export a bundle to one ONNX model, or to Triton.

    All step variants become branches of one model, with weights stored once. An input selects the variant of a step,
    caches are inputs and outputs, and the model's metadata lists the values that a host must send at every step. For
    Triton Inference Server there is also a configuration, with which the server keeps the caches.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.export.package.formats import export_bundle

    record = export_bundle(Bundle.open(bundle), output, form, force=force)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    files = [(str(output / name), size_text(entry.bytes)) for name, entry in record.files.items()]
    print_table(("file", "size"), files, right=("size",))
