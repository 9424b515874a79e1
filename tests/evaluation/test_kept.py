"""Samples that are kept: drawn once, and drawn again where the file is not what was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcgraph.evaluation import kept

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
