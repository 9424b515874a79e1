"""Show the scales of a bundle: data, and a table made of this data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcgraph.bundle import Bundle
from qcgraph.cli.output import print_table
from qcgraph.facts import ActivationQuant, AttentionPlan, QuantPlan, RegionQuant


def scales(bundle: Bundle) -> list[dict[str, Any]]:
    """Return every quantized activation: the inputs of linear layers, then the operands of attention."""
    linears, attentions = bundle.facts.get(QuantPlan), bundle.facts.get(AttentionPlan)
    rows = [
        _activation(name, site.activation) | {"weight_codes": [-site.weight.high, site.weight.high]}
        for name, site in (linears.sites if linears else {}).items()
    ]
    for name, attention in (attentions.sites if attentions else {}).items():
        rows += [_activation(f"{name}.{operand}", quant) for operand, quant in attention.operands.items()]
    return rows


def _activation(name: str, quant: ActivationQuant | RegionQuant) -> dict[str, Any]:
    if isinstance(quant, RegionQuant):
        return {
            "site": name,
            "dtype": quant.dtype,
            "codes": [0, quant.levels],
            "scales": [split / quant.levels for split in quant.splits],
            "splits": list(quant.splits),
            "planes": quant.planes,
        }
    return {
        "site": name,
        "dtype": quant.dtype,
        "codes": [quant.low, quant.high],
        "shift": quant.shift,
        "scales": list(quant.scales),
        "zero_points": list(quant.zero_points),
    }


def print_scales(rows: list[dict[str, Any]]) -> None:
    """Print the scales as a table."""
    if not rows:
        print("nothing is quantized")
        return
    print_table(
        ("site", "activation", "scale of each timestep group", "zero points", "weight"),
        [
            (
                row["site"],
                f"{row['dtype']} {row['codes'][0]}..{row['codes'][1]}{_two_steps(row)}",
                " ".join(f"{scale:.3g}" for scale in row["scales"]),
                " ".join(map(str, row.get("zero_points", [0]))),
                _weight(row.get("weight_codes")),
            )
            for row in rows
        ],
    )


def _two_steps(row: Mapping[str, Any]) -> str:
    """Describe the coarse step of a quantizer with two step sizes; empty for one with a single step size."""
    if "splits" in row:
        return f" twice, split at {' '.join(f'{split:g}' for split in row['splits'])}"
    return f", x{2 ** row['shift']} > 0" if row["shift"] else ""


def _weight(codes: tuple[int, int] | None) -> str:
    return f"{codes[0]}..{codes[1]}, a scale a channel" if codes else "-"
