"""Measuring how quantization grows with samples and sites: the lines are those through what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "calibration_growth.py"
CLEAR_REFS = Path("/proc/self/clear_refs")

LINES = """
from calibration_growth import Line
print(Line.through([1, 2, 4], [5.0, 7.0, 11.0]))
print(Line.through([0, 1, 2], [0.0, 1.0, 0.0]))
print(Line.through([1, 2, 3], [4.0, 4.0, 4.0]).r_squared)
"""


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def numbers(text: str) -> list[float]:
    return [float(part.split("=")[1].rstrip(")")) for part in text.split(",")]


def test_lines() -> None:
    done = run("-c", LINES, folder=TOOL.parent)
    assert done.returncode == 0, done.stderr
    straight, bent, flat = done.stdout.splitlines()
    assert numbers(straight) == pytest.approx([2, 3, 1])
    assert numbers(bent) == pytest.approx([0, 1 / 3, 0], abs=1e-12)
    assert float(flat) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["dit-m-2"], "no geometry 'dit-m-2'"), (["--samples", "8", "8"], "--samples takes two different counts")],
)
def test_what_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(TOOL, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
def test_growth_is_measured(tmp_path: Path) -> None:
    small = ["--samples", 4, 16, "--depths", 1, 2, "--steps", 2, "--threads", 1]
    done = run(TOOL, "dit-s-8", *small, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["format"]) == ("calibration-growth", 1)
    by_samples, by_sites = document["series"]
    assert [(row["samples"], row["depth"]) for row in by_samples["rows"]] == [(4, 2), (16, 2)]
    assert [(row["samples"], row["depth"], row["sites"]) for row in by_sites["rows"]] == [(4, 1, 4), (4, 2, 8)]
    for series in (by_samples, by_sites):
        few, _ = series["rows"]
        assert all(0 < row["seconds"] < row["all_seconds"] for row in series["rows"])  # a part of the whole
        assert few["peak_bytes"] > few["weight_bytes"]
        for name in ("seconds", "peak_bytes"):
            line = series[name]
            assert line["r_squared"] == pytest.approx(1)  # two points are on a line
            assert line["intercept"] + line["slope"] * few[series["by"]] == pytest.approx(few[name])


PRINTED = """
from argparse import Namespace
from calibration_growth import Line, Row, Series, markdown
rows = tuple(Row(samples, 2, 8, 1_000_000, samples / 2, samples, 3_000_000 * samples) for samples in (4, 8))
lines = (Line.through([4, 8], values) for values in ([2.0, 4.0], [12e6, 24e6]))
print(markdown(Series("samples", rows, *lines), Namespace(geometry="g", bits="w6a6", steps=2, guidance=1.0, threads=1)))
"""


def test_growth_is_printed() -> None:
    done = run("-c", PRINTED, folder=TOOL.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### g, by samples"]
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 2
    assert len([line for line in lines if "R^2 = 1.0000" in line]) == 2
