"""Draw an evaluation: samples of every setting, and errors over the steps."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np

from qcgraph.errors import UsageError
from qcgraph.evaluation.evaluate import Evaluation
from qcgraph.evaluation.images import save_grid
from qcgraph.plan.steps import StepPlan

SIZE = (8.0, 6.0)  # inches


def check_drawing() -> None:
    """Refuse to begin if curves cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("curves are drawn with matplotlib, which is not installed", hint="pip install 'qcgraph[eval]'")


def save_samples(evaluation: Evaluation, path: Path, *, is_image: bool) -> None:
    """Save the first samples of every setting, one row for each, in the order of the table."""
    rows = list(evaluation.pictures.values())
    save_grid(np.concatenate(rows), path, len(rows[0]), is_image=is_image)


def draw_curves(evaluation: Evaluation, plan: StepPlan) -> bytes:
    """Draw two curves over the steps for every part: the error of the latent, and the drift of its standard deviation.

    If the bundle is quantized and cached, a dotted line shows the sum of both errors, as if they did not interact.

    Returns:
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    errors, spread = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(plan) + 1)
    drawn = {row.key: row for row in evaluation.rows if row.latent_errors}
    for row in drawn.values():
        errors.plot(steps, row.latent_errors, label=row.title)
        spread.plot(steps, np.array(row.deviations) - 1, label=row.title)
    if {"quantization", "cache"} <= set(drawn):
        alone = [np.array(drawn[key].latent_errors) for key in ("quantization", "cache")]
        errors.plot(steps, np.hypot(*alone), ":", color="gray", label="both, without interaction")
    computing = [index + 1 for index in range(len(plan)) if plan.computes(index)]
    if len(computing) < len(plan):
        errors.plot(computing, np.zeros(len(computing)), "|", color="black", label="steps that compute")
    errors.set_ylabel("relative L2 error of the latent")
    errors.legend(fontsize="small")
    spread.axhline(0, color="gray", linewidth=0.5)
    spread.set_ylabel("drift of the standard deviation")
    spread.set_xlabel(f"step ({plan.describe()})")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
