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
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="tensorrt-rtx or tensorrt; by default what the bundle was compiled for."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N.N",
            help="The GPUs to build for, such as 8.9 or 12.0; give it once for each. By default the one that is here.",
        ),
    ] = None,
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
    """Build TensorRT engines of a bundle.

    TensorRT-RTX needs no GPU for this: engines are built ahead of time for the given compute capabilities, one of every
    variant for each capability, and run only there. TensorRT builds for the GPU of this machine. Exits with 2 when
    TensorRT refuses a graph, and names every refused node.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.export.tensorrt.engines import build_engines, parse_batch
    from qcgraph.progress import progress_for

    profile = parse_batch(batch) if batch is not None else None
    opened, progress = Bundle.open(bundle), progress_for(sys.stderr)
    record = build_engines(
        opened, compute_capability or (), output, profile, provider=target, force=force, progress=progress
    )
    if json:
        print_json(record.model_dump(mode="json"))
        return
    print_table(
        ("engine", "size", "seconds", "batch", "layers", "steps", "8-bit GEMMs", "not in 8 bits", "fused attention"),
        [_row(engine) for engine in record.engines],
        right=("size", "seconds", "layers", "steps", "8-bit GEMMs", "not in 8 bits", "fused attention"),
    )


def _row(engine: Engine) -> tuple[object, ...]:
    not_quantized = None if engine.not_quantized is None else len(engine.not_quantized)
    probed = (engine.steps, engine.quantized_gemms, not_quantized, engine.fused_attention)
    return (
        engine.file,
        size_text(engine.bytes),
        f"{engine.seconds:.1f}",
        engine.batch,
        engine.layers,
        *("-" if value is None else value for value in probed),
    )
