"""Samples and fitted solvers that are kept: made once, and made again where the file is not what was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcgraph.evaluation import kept
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update

SHAPE = (2, 4, 4)


class Drawing:
    """Draws samples, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> np.ndarray:
        self.count += 1
        return np.full((3, *SHAPE), self.count, np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept, "kept_folder", lambda: tmp_path / "deep" / "kept")
    return tmp_path / "deep" / "kept"


def test_equal_keys_are_drawn_once(folder: Path) -> None:
    draw = Drawing()
    first, again = (kept.kept(["model", 1.5], draw, SHAPE) for _ in range(2))
    assert draw.count == 1
    assert np.array_equal(first, again)
    assert (kept.kept(["model", 4.0], draw, SHAPE) == 2).all()
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_damaged_file_is_drawn_again(folder: Path, content: bytes | None) -> None:
    draw = Drawing()
    kept.kept("key", draw, SHAPE)
    (file,) = folder.iterdir()
    if content is None:
        np.save(file.open("wb"), np.full((3, *SHAPE), np.nan, np.float32))
    else:
        file.write_bytes(content)
    assert (kept.kept("key", draw, SHAPE) == 2).all()
    assert (kept.kept("key", draw, SHAPE) == 2).all()
    assert draw.count == 2


def test_another_shape_is_another_file_s(folder: Path) -> None:
    draw = Drawing()
    kept.kept("key", draw, SHAPE)
    kept.kept("key", draw, (1, 4, 4))
    assert draw.count == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    draw = Drawing()
    for count in (1, 2):
        assert (kept.kept("key", draw, SHAPE) == count).all()


def test_what_is_not_finite_is_not_kept(folder: Path) -> None:
    assert np.isnan(kept.kept("key", lambda: np.full((1, *SHAPE), np.nan, np.float32), SHAPE)).all()
    assert not folder.exists()


def plan(latent: float) -> StepPlan:
    updates = (Update(latent, -0.1), Update(1.0, 1 / 3, history=(Earlier(0.0, 1e-17),)))
    steps = tuple(Step(timestep, update) for timestep, update in zip((900.0, 400.5), updates, strict=True))
    return StepPlan(Fingerprint("model", "ddim", 9, 1.5, "fitted"), steps)


def test_a_plan_is_fitted_once(folder: Path) -> None:
    assert kept.kept_plan("key", lambda: plan(0.1)) == plan(0.1)
    assert kept.kept_plan("key", lambda: plan(0.2)) == plan(0.1)
    assert kept.kept_plan("another", lambda: plan(0.2)) == plan(0.2)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"fingerprint": {}}', '{"fingerprint": null, "steps": []}'])
def test_a_damaged_plan_is_fitted_again(folder: Path, content: str) -> None:
    kept.kept_plan("key", lambda: plan(0.1))
    (file,) = folder.iterdir()
    file.write_text(content)
    assert kept.kept_plan("key", lambda: plan(0.2)) == plan(0.2)
    assert kept.kept_plan("key", lambda: plan(0.3)) == plan(0.2)


def test_a_plan_that_is_not_finite_is_not_kept(folder: Path) -> None:
    kept.kept_plan("key", lambda: plan(float("nan")))
    assert kept.kept_plan("key", lambda: plan(0.2)) == plan(0.2)
    assert len(list(folder.iterdir())) == 1
