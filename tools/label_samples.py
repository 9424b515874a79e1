"""Write the name, the cost and the distance of every setting beside its row of samples from ``qcgraph eval -o FOLDER``.

usage: python tools/label_samples.py out/cifar10-eval docs/cifar10.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

LEFT, TOP, MARGIN = 250, 34, 10  # pixels: left of the samples for labels, above for the heading, margin around all
LEAST_HEIGHT = 60  # pixels of a row: smaller samples are enlarged
INK, FAINT, PAPER = "#1f2328", "#59636e", "#ffffff"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="the folder with samples.png and eval.json")
    parser.add_argument("output", type=Path, help="the picture to write")
    asked = parser.parse_args()
    evaluation = json.loads((asked.evaluation / "eval.json").read_text("utf-8"))
    with Image.open(asked.evaluation / "samples.png") as samples:
        rows = [row for row in evaluation["rows"] if "absent" not in row]
        labelled(samples, rows).save(asked.output, optimize=True)


def labelled(samples: Image.Image, rows: list[dict[str, Any]]) -> Image.Image:
    """Return the samples, one row for each setting, with a label to the left of every row and a heading above."""
    scale = max(1, round(LEAST_HEIGHT * len(rows) / samples.height))
    samples = samples.resize((samples.width * scale, samples.height * scale), Image.Resampling.NEAREST)
    height = samples.height / len(rows)
    picture = Image.new("RGB", (LEFT + samples.width + MARGIN, TOP + samples.height + MARGIN), PAPER)
    picture.paste(samples.convert("RGB"), (LEFT, TOP))
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, MARGIN), heading(rows), INK, ImageFont.load_default(15))
    for index, row in enumerate(rows):
        middle = TOP + height * (index + 0.5)
        draw.text((MARGIN, middle - 19), row["title"], INK, ImageFont.load_default(17))
        draw.text((MARGIN, middle + 3), describe(row), FAINT, ImageFont.load_default(14))
    return picture


def heading(rows: list[dict[str, Any]]) -> str:
    """Return the line above the samples: what the decibels of all rows refer to."""
    goal = "the converged run" if any("converged_psnr" in row for row in rows) else "full precision"
    return f"the same noise in every column; PSNR to {goal}"


def describe(row: dict[str, Any]) -> str:
    """Return the cost of a setting, and its PSNR against the converged run, or else against full precision."""
    psnr = row.get("metrics", {}).get("psnr", {}).get("value")
    near = row.get("converged_psnr", psnr)
    return f"{row['cost']:.1f} steps of work" + (f", {near:.1f} dB" if near is not None else "")


if __name__ == "__main__":
    main()
