"""qcgraph build: engines of a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcgraph.cli.output import JsonOption, print_json, print_table, size_text

if TYPE_CHECKING:
    from qcgraph.bundle.engines import Engine


def build_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    compute_capability: Annotated[
        list[str],
        typer.Option(metavar="N.N", help="The GPUs to build for, such as 8.9 or 12.0; give it once for each."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write; by default engines in the bundle."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="The batches that the denoiser may see, two a sample under guidance; by default one to eight samples.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace engines that are there.")] = False,
    json: JsonOption = False,
) -> None:
    """Build TensorRT-RTX engines of a bundle.

    No GPU is needed: engines are built ahead of time for the compute capabilities that are given, one of every variant
    for each, and run only there. Exits with 2 when TensorRT cannot hold a graph, and names every node that it refuses.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.export.engines import build_engines, parse_batch
    from qcgraph.progress import progress_for

    profile = parse_batch(batch) if batch is not None else None
    opened, progress = Bundle.open(bundle), progress_for(sys.stderr)
    record = build_engines(opened, compute_capability, output, profile, force=force, progress=progress)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    print_table(
        ("engine", "size", "seconds", "batch", "layers", "steps", "int8 GEMMs", "not int8", "fused attention"),
        [_row(engine) for engine in record.engines],
        right=("size", "seconds", "layers", "steps", "int8 GEMMs", "not int8", "fused attention"),
    )


def _row(engine: Engine) -> tuple[object, ...]:
    not_int8 = None if engine.not_int8 is None else len(engine.not_int8)
    probed = (engine.steps, engine.int8_gemms, not_int8, engine.fused_attention)
    return (
        engine.file,
        size_text(engine.bytes),
        f"{engine.seconds:.1f}",
        engine.batch,
        engine.layers,
        *("-" if value is None else value for value in probed),
    )
