"""Report the measurements of tools/pareto.py as tables and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.evaluation.bootstrap import BootstrapEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = dict[str, Any]  # the measurements of one method at one budget
Document = dict[str, Any]

COLUMNS = ("", "steps of work", "PSNR dB", "behind the best, dB", "FID-small", "accuracy", "PSNR to converged")
TIMED = ("sampling ms", "speed-up")
EVERY = "every"  # the method of cells in which all steps compute
STYLES = {  # by method, so that figures of different methods compare
    "steps": ("C0", "o"),
    "solver": ("C1", "s"),
    "reuse": ("C2", "D"),
    "dps": ("C3", "^"),
    "dec": ("C4", "v"),
    "taylor": ("C5", "<"),
    "affine": ("C6", ">"),
    "planned-taylor": ("C7", "P"),
    "ours": ("black", "X"),
    "ours-vc": ("C9", "*"),
    "ours-guidance": ("black", "*"),
}
PANEL = (5.5, 4.2)  # inches


def merged(documents: Sequence[Document]) -> Document:
    """Merge documents, bare or as tools/benchmarks.py records them; later measurements replace earlier ones."""
    bare = [document.get("result", document) for document in documents]
    cells: dict[tuple[object, ...], Cell] = {}
    for document in bare:
        for cell in document["cells"]:
            cells.setdefault(tuple(cell[key] for key in ("model", "bits", "budget", "method")), {}).update(cell)
    floors = {name: floor for document in bare for name, floor in document["converged_floors"].items()}
    timed = [document for document in bare if any("sampling_ms" in cell for cell in document["cells"])]
    threads = {"threads": timed[-1]["threads"]} if timed else {}
    return bare[0] | threads | {"cells": list(cells.values()), "converged_floors": floors}


def markdown(document: Document) -> str:
    """Return a table for every model, precision and budget, with the best first."""
    judged = any("psnr" in cell for cell in document["cells"])
    timed = any("sampling_ms" in cell for cell in document["cells"])
    columns = [*(COLUMNS if judged else COLUMNS[:2]), *(TIMED if timed else ())]
    parts = [introduction(document, judged=judged, timed=timed)]
    for (model, bits), cells in _groups(document["cells"], "model", "bits"):
        rows = [row for _, budget in _groups(cells, "budget") for row in _section(budget, judged=judged, timed=timed)]
        lines = [f"### {model}, {'full precision' if bits == 'off' else bits}", ""]
        lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts)


def introduction(document: Document, *, judged: bool, timed: bool) -> str:
    """Describe the measurements in a paragraph."""
    whole = f"{document['scheduler']}, {document['steps']} steps"
    lines = [f"The whole run is {whole}, guidance {document['guidance']:g}; at a budget all cost as much."]
    if judged:
        floors = ", ".join(f"{name} {floor:.1f} dB" for name, floor in document["converged_floors"].items())
        lines.append(
            f"PSNR is against that run in full precision from the same noise, {document['samples']} samples of "
            f"{document['seeds']} seeds; the best comes first, and `=` marks what another run may find to be as good. "
            f"The converged reference agrees with half its steps to: {floors}."
        )
    if timed:
        lines.append(
            f"Sampling is one whole image with ONNX Runtime (threads: {document['threads']}), the median of turns; "
            "speed-up is over the whole run in full precision, also with ONNX Runtime."
        )
    return " ".join(lines)


def _section(cells: Sequence[Cell], *, judged: bool, timed: bool) -> Iterator[list[str]]:
    """Yield the rows of a budget."""
    if cells[0]["method"] != EVERY:
        yield [f"**budget {cells[0]['budget']:g}**", *[""] * (judged * (len(COLUMNS) - 2) + 1 + 2 * timed)]
    for cell in sorted(cells, key=_psnr, reverse=True):
        row = [cell["title"], f"{cell['cost']:.1f}"]
        if judged:
            row += [_value(cell.get("psnr"), ".1f"), _behind(cell), _value(cell.get("fid_small"), ".2f")]
            row += [_value(cell.get("accuracy"), ".3f"), _number(cell.get("converged_psnr"), ".1f")]
        if timed:
            milliseconds = cell.get("sampling_ms", {}).get("median")
            row += [_number(milliseconds, ".1f"), _number(cell.get("speedup"), ".2f") + "x"]
        yield row


def _psnr(cell: Cell) -> float:
    return float(cell["psnr"]["value"]) if "psnr" in cell else 0.0


def _behind(cell: Cell) -> str:
    if "behind_db" not in cell or cell["method"] == EVERY:
        return "-"
    behind = BootstrapEstimate(**cell["behind_db"])
    if behind.value == 0:
        return "best"
    return ("" if behind.excludes_zero else "= ") + f"{behind.value:.2f} ({behind.low:.2f} .. {behind.high:.2f})"


def _value(estimate: dict[str, float] | None, form: str) -> str:
    return _number(estimate and estimate["value"], form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _groups(cells: Iterable[Cell], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Cell]]]:
    for values, group in groupby(cells, key=lambda cell: tuple(cell[key] for key in keys)):
        yield values, list(group)


def save_figure(document: Document, path: Path) -> None:
    """Draw quality against multiply-accumulates and, if it was measured, latency: one curve for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = [("cost", "multiply-accumulates, in steps of the model")]
    if any("sampling_ms" in cell for cell in document["cells"]):
        axes.append(("sampling_ms", "milliseconds for one image"))
    groups = list(_groups(document["cells"], "model", "bits"))
    figure = Figure(figsize=(PANEL[0] * len(axes), PANEL[1] * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), len(axes), squeeze=False)
    for ((model, bits), cells), row in zip(groups, panels, strict=True):
        for panel, (key, label) in zip(row, axes, strict=True):
            _draw(panel, cells, key)
            panel.set_title(f"{model}, {'full precision' if bits == 'off' else bits}")
            panel.set_xlabel(label)
            panel.set_ylabel("PSNR dB")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(axes), frameon=False)
    figure.savefig(path, dpi=120)


def _draw(panel: Axes, cells: Sequence[Cell], key: str) -> None:
    """Draw the curves of a model in one precision."""
    drawn = [cell for cell in cells if "psnr" in cell and key in cell]
    for method, (color, marker) in STYLES.items():
        own = sorted((cell for cell in drawn if cell["method"] == method), key=lambda cell: _position(cell, key))
        if own:
            places, values = [_position(cell, key) for cell in own], [_psnr(cell) for cell in own]
            width, title = 2.5 if method == "ours" else 1.2, own[0]["title"]
            panel.plot(places, values, color=color, marker=marker, markersize=5, linewidth=width, label=title)
    for cell in drawn:
        if cell["method"] == EVERY:
            panel.axhline(_psnr(cell), linestyle=":", color="gray", linewidth=1)
            panel.annotate("every step computes", (0.02, _psnr(cell)), xycoords=("axes fraction", "data"), fontsize=8)
    panel.grid(alpha=0.3)


def _position(cell: Cell, key: str) -> float:
    return float(cell[key]["median"] if key == "sampling_ms" else cell[key])
