"""Report the measurements of tools/selection_coverage.py as tables and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcgraph.passes.calibration._selection import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = dict[str, Any]

COLUMNS = {
    "steps": "share of steps sampled",
    "evenness": "evenness over steps",
    "mean_distance": "mean distance",
    "worst_distance": "worst distance",
}
TITLES = {"tap": "TAP", "kmeans": "k-means of latents", "uniform": "uniform in time", "random": "random"}
STYLES = {"tap": ("black", "o"), "kmeans": ("C1", "s"), "uniform": ("C0", "D"), "random": ("C2", "^")}
ASIDE = 1.03  # separates level curves, which would hide each other; falling ones would look different
SIZE = (11.0, 7.0)  # inches


def markdown(document: Document) -> str:
    """Return a row for every count and method."""
    lines = [
        f"{introduction(document)}, {document['seeds']} seeds of each selection: mean and standard deviation.",
        "",
        f"| samples | selection | {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * (len(COLUMNS) + 2)}",
    ]
    for cell in document["cells"]:
        values = [f"{cell[key]['mean']:.3f} ± {cell[key]['deviation']:.3f}" for key in COLUMNS]
        lines.append(f"| {cell['count']} | {TITLES[cell['method']]} | {' | '.join(values)} |")
    return "\n".join(lines)


def scaling_markdown(document: Document) -> str:
    """Return a row for every size of the pool."""
    rows = document["rows"]
    lines = [
        f"{introduction(document)} and their doublings; {rows[0]['count']} samples.",
        "",
        f"| items | {' | '.join(f'{TITLES[method]}: s | MB | KB an item' for method in METHODS)} |",
        f"|{'---|' * (3 * len(METHODS) + 1)}",
    ]
    for items in dict.fromkeys(row["items"] for row in rows):
        found = {row["method"]: row for row in rows if row["items"] == items}
        values = [
            f"{found[method]['seconds']:.3f} | {found[method]['megabytes']:.1f} | "
            f"{1000 * found[method]['megabytes'] / items:.2f}"
            for method in METHODS
        ]
        lines.append(f"| {items} | {' | '.join(values)} |")
    return "\n".join(lines)


def introduction(document: Document) -> str:
    """Describe the pool."""
    return (
        f"{document['model']}, {document['scheduler']}, guidance {document['guidance']:g}: latents of "
        f"{document['trajectories']} trajectories at {document['steps']} steps"
    )


def save_figure(document: Document, path: Path) -> None:
    """Draw the coverage error against the count, also relative to random samples, and the steps of the samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    distance, ratio = left.subplots(2, 1)
    counts = list(dict.fromkeys(cell["count"] for cell in document["cells"]))
    errors = {(cell["method"], cell["count"]): cell["mean_distance"] for cell in document["cells"]}
    _draw_errors(distance, counts, errors, [1.0] * len(counts), aside=1.0)
    distance.set_title(f"{document['model']}: mean distance of the pool to its samples", fontsize="medium")
    distance.legend(fontsize="small")
    # 0 if all of the pool was chosen
    _draw_errors(ratio, counts, errors, [errors["random", count]["mean"] or 1.0 for count in counts], aside=ASIDE)
    ratio.set_title("over the mean one of random samples", fontsize="medium")
    ratio.set_xlabel("samples chosen")
    _draw_steps(list(right.subplots(len(METHODS), 1, sharex=True, sharey=True)), document, counts[len(counts) // 2])
    figure.savefig(path, dpi=110)


def _draw_errors(
    panel: Axes,
    counts: Sequence[int],
    errors: Mapping[tuple[str, int], Mapping[str, float]],
    scales: Sequence[float],
    *,
    aside: float,
) -> None:
    """Draw mean distances over a scale for each count, with deviations; a factor separates the methods sideways."""
    for number, (method, (color, marker)) in enumerate(STYLES.items()):
        own = [errors[method, count] for count in counts]
        panel.errorbar(
            [count * aside ** (number - 1.5) for count in counts],
            [error["mean"] / scale for error, scale in zip(own, scales, strict=True)],
            yerr=[error["deviation"] / scale for error, scale in zip(own, scales, strict=True)],
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1,
            capsize=3,
            label=TITLES[method],
        )
    panel.set_xscale("log")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _draw_steps(panels: Sequence[Axes], document: Document, count: int) -> None:
    """Draw the number of samples at each step, in one selection of every method."""
    from matplotlib.ticker import MaxNLocator

    taken = {cell["method"]: cell["first_seed_steps"] for cell in document["cells"] if cell["count"] == count}
    for method, panel in zip(METHODS, panels, strict=True):
        panel.bar(range(document["steps"]), taken[method], width=0.9, color=STYLES[method][0])
        panel.set_title(f"{TITLES[method]}: samples at each step, {count} chosen", fontsize="medium")
        panel.grid(alpha=0.3, axis="y")
    panels[-1].set_xlabel("step")
    panels[-1].yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
