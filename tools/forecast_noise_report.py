"""Report the measurements of tools/forecast_noise.py as tables and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"reuse": "reuse", "taylor": "linear Taylor", "affine": "fitted affine"}
COLUMNS = (
    "forecast",
    "error, float",
    "error, quantized",
    "quantization alone",
    "over every step computing",
    "noise of a forecast over that of a value: mean",
    "largest",
    "error of cached values, float",
    "quantized",
)
PANEL = (5.0, 3.8)  # inches
MARKERS = "osD"


def markdown(document: dict[str, Any]) -> str:
    """Return a table for every precision."""
    intro = (
        f"{document['model']}, {document['scheduler']}, {document['steps']} steps, interval {document['interval']}, "
        f"{document['samples']} samples. Errors of the final latent are relative, against full precision; quantization "
        "alone is the distance of the quantized run from the one in floating point with the same forecast."
    )
    parts = [intro]
    for setting in document["settings"]:
        alone = setting["every_step"][-1]
        lines = [f"### {setting['bits']}; every step computing: {alone:.2%}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(texts(each, alone))} |" for each in setting["forecasts"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def texts(found: dict[str, Any], alone: float) -> list[str]:
    """Return a row of the table."""
    factors = [probe["amplification"] for probe in found["noise"]]
    fits = [np.sqrt(np.mean([each["error"] ** 2 for each in found[key]])) for key in ("fit_float", "fit_quantized")]
    return [
        KINDS[found["forecast"]],
        f"{found['float'][-1]:.2%}",
        f"{found['quantized'][-1]:.2%}",
        f"{found['between'][-1]:.2%}",
        f"{found['between'][-1] / alone:.2f}x",
        f"{np.mean(factors):.2f}x",
        f"{max(factors):.2f}x",
        *(f"{fit:.2%}" for fit in fits),
    ]


def save_figure(document: dict[str, Any], path: Path) -> None:
    """Draw a row for every precision: errors of the latent, its change by quantization, and noise of the forecasts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = document["settings"]
    figure = Figure(figsize=(3 * PANEL[0], PANEL[1] * len(settings)), layout="constrained")
    FigureCanvasAgg(figure)
    for setting, row in zip(settings, figure.subplots(len(settings), 3, squeeze=False), strict=True):
        errors, between, noise = row
        steps = range(1, document["steps"] + 1)
        for number, found in enumerate(setting["forecasts"]):
            name, color = KINDS[found["forecast"]], f"C{number}"
            errors.plot(steps, found["quantized"], color=color, label=f"{name}, {setting['bits']}")
            errors.plot(steps, found["float"], "--", color=color, label=f"{name}, float")
            between.plot(steps, found["between"], color=color, label=name)
            places = [probe["step"] + 1 for probe in found["noise"]]
            noise.plot(
                places,
                [probe["amplification"] for probe in found["noise"]],
                MARKERS[number],
                ms=4,
                color=color,
                label=name,
            )
        for panel in (errors, between):
            panel.plot(steps, setting["every_step"], ":", color="gray", label="every step computes")
        noise.axhline(1, linestyle=":", color="gray")
        errors.set_title(f"{setting['bits']}: relative error of the latent")
        between.set_title(f"{setting['bits']}: distance from the run in float")
        noise.set_title(f"{setting['bits']}: noise of a forecast over that of a value")
        for panel in row:
            panel.set_xlabel("step")
            panel.set_yscale("linear" if panel is noise else "log")
            panel.legend(fontsize="x-small")
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
