"""Show a captured model: its blocks, its sites, and which of them can be quantized."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from qcgraph.cli.output import count_text, print_fields, print_heading, print_json, print_table
from qcgraph.cli.program_view import print_program
from qcgraph.errors import UsageError

TABLES = ("sites", "refused")


def inspect_model(name: str, show: str | None, graph: str | None, node: str | None, *, json: bool) -> None:
    """Capture a model and print its overview, one table, or its graph."""
    if show is not None and show not in TABLES:
        raise UsageError(f"a model has no {show}", where="--show", hint="compile it, and inspect the bundle")

    from qcgraph.capture.capture import capture
    from qcgraph.models import load_model
    from qcgraph.progress import progress_for

    progress = progress_for(sys.stderr)
    progress.note(f"loading {name}")
    loaded = load_model(name)
    progress.note("capturing with torch.export")
    program = capture(loaded.module, loaded.spec, loaded.input_names)
    if graph is not None or node is not None:
        print_program(program.text, graph, node, about={"model": name}, json=json)
        return
    data = _model_data(program)
    if json:
        print_json(data if show is None else _rows(data, show))
    elif show is None:
        _print_model(data)
    else:
        _print_sites(_rows(data, show))


def _model_data(program: Any) -> dict[str, Any]:
    from qcgraph.ir.structure import find_blocks, find_sites, total_macs
    from qcgraph.plan.spec import ModelSpec

    variant = program.variants[program.computing]
    sites, blocks = find_sites(variant), find_blocks(variant)
    spec = program.facts[ModelSpec]
    return {
        "model": spec.name,
        "latent_shape": list(spec.latent_shape),
        "conditions": spec.conditions_text,
        "prediction": spec.noise_schedule.prediction,
        "description": spec.describe(),
        "parameters": sum(value.numel() for value in program.constants.values()),
        "nodes": sum(node.op == "call_function" for node in variant.graph.nodes),
        "macs": total_macs(sites),
        "quantizable_macs": total_macs(site for site in sites if not site.refusal),
        "blocks": [
            {"path": block.path, "macs": total_macs(site for site in sites if site.name.startswith(f"{block.path}."))}
            for block in blocks
        ],
        "sites": [asdict(site) for site in sites],
    }


def _rows(data: dict[str, Any], show: str) -> list[dict[str, Any]]:
    return [row for row in data["sites"] if row["refusal"] or show == "sites"]


def _print_model(data: dict[str, Any]) -> None:
    cached = sum(block["macs"] for block in data["blocks"])
    blocks = count_text(len(data["blocks"]), "block")
    print_fields(
        [
            ("model", data["description"]),
            ("size", f"{data['parameters']:,} parameters, {data['nodes']} nodes"),
            ("work", f"{data['macs']:,} multiply-accumulates a sample and step"),
            ("blocks", f"{blocks} with {_share(cached, data)} of the work; a cache can skip them"),
            ("layers", f"linear layers with {_share(data['quantizable_macs'], data)} of the work can be quantized"),
        ]
    )
    print_heading("sites")
    _print_sites(data["sites"])


def _share(macs: int, data: dict[str, Any]) -> str:
    return f"{macs / data['macs']:.1%}" if data["macs"] else "none"


def _print_sites(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("site", "kind", "input", "weight", "MACs", "quantizable"),
        [
            (
                row["name"],
                row["kind"],
                ",".join(map(str, row["input_shape"])),
                ",".join(map(str, row["weight_shape"])) or "-",
                f"{row['macs']:,}",
                f"no: {row['refusal']}" if row["refusal"] else "yes",
            )
            for row in rows
        ],
        right=("MACs",),
    )
