"""The pictures of the documents are what their tools draw."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
CHARACTER = 0.62  # width of a character of DejaVu Sans, relative to its size; few are wider


def test_the_drawing_of_the_concepts_is_what_the_tool_draws(run_tool: Any, tmp_path: Path) -> None:
    run_tool("draw_concepts.py", "drawn.svg", folder=tmp_path)
    assert (tmp_path / "drawn.svg").read_text("utf-8") == (ROOT / "docs" / "concepts.svg").read_text("utf-8")


def test_words_of_the_drawing_lie_inside_and_apart() -> None:
    root = ElementTree.parse(ROOT / "docs" / "concepts.svg").getroot()
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    places = []
    for words in root.iter(f"{SVG}text"):
        size = float(words.get("font-size", "13"))
        length = CHARACTER * size * len(str(words.text))
        left = (
            float(words.attrib["x"]) - length * {"start": 0.0, "middle": 0.5, "end": 1.0}[words.attrib["text-anchor"]]
        )
        bottom = float(words.attrib["y"])
        places.append((left, left + length, bottom - size, bottom))
        assert left >= 0
        assert left + length <= width
        assert 0 <= bottom - size < bottom <= height
    assert len(places) > 50
    for index, (left, right, top, bottom) in enumerate(places):
        for other in places[index + 1 :]:
            assert right <= other[0] or other[1] <= left or bottom <= other[2] or other[3] <= top


def test_every_row_of_samples_gets_its_label(run_tool: Any, tmp_path: Path) -> None:
    samples = np.full((128, 60), 7, np.uint8)
    Image.fromarray(samples).save(tmp_path / "samples.png")
    rows = [
        {"title": "full precision", "cost": 50.0, "metrics": {"accuracy": {"value": 1.0}}},
        {"title": "compiled", "cost": 17.16, "metrics": {"psnr": {"value": 48.71}}},
    ]
    near = {**rows[1], "converged_psnr": 41.24}
    (tmp_path / "eval.json").write_text(json.dumps({"rows": rows}), "utf-8")
    run_tool("label_samples.py", tmp_path, "labelled.png", folder=tmp_path)
    tool = importlib.import_module("label_samples")
    assert [tool.describe(row) for row in rows] == ["50.0 steps of work", "17.2 steps of work, 48.7 dB"]
    assert tool.describe(near) == "17.2 steps of work, 41.2 dB"
    assert [tool.heading(found).rpartition(" to ")[2] for found in (rows, [near])] == [
        "full precision",
        "the converged run",
    ]
    drawn = np.asarray(Image.open(tmp_path / "labelled.png").convert("L"))
    assert (drawn[tool.TOP : tool.TOP + 128, tool.LEFT : tool.LEFT + 60] == samples).all()
    labels = drawn[tool.TOP : tool.TOP + 128, : tool.LEFT]
    assert (labels[:64] < 128).any()
    assert (labels[64:] < 128).any()


@pytest.mark.parametrize("setting", ["full precision", "compiled", "13 steps of dpmsolver++"])
def test_the_labels_in_the_readme_are_the_measured_ones(setting: str) -> None:
    """The table beside the picture has the figures that are written into it."""
    stored = json.loads((ROOT / "docs" / "benchmarks" / "eval-cifar10-balanced.json").read_text("utf-8"))
    (row,) = (row for row in stored["result"]["rows"] if row["title"] == setting)
    (line,) = re.findall(rf"^\| {re.escape(setting)}[^,|]*\|.*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    cells = [f"{row['cost']:.1f}", f"{row['converged_psnr']:.1f}"]
    cells.append("{:.1f}, {:.1f}".format(*row["converged_spread"]))
    if "psnr" in row.get("metrics", {}):
        cells.append(f"{row['metrics']['psnr']['value']:.1f}")
    assert all(f"| {cell} |" in line for cell in cells)
