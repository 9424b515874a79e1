"""Pictures of samples, and files that are written in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qcgraph.errors import UsageError
from qcgraph.evaluation.images import GAP, enlarged, grid, save_grid, to_pixels
from qcgraph.files.atomic import writing_file


def test_images_are_not_stretched() -> None:
    latents = np.array([-2.0, -1.0, 0.0, 1.0], dtype=np.float32).reshape(1, 1, 2, 2)
    assert to_pixels(latents, is_image=True).ravel().tolist() == [0, 0, 128, 255]


def test_latents_are_stretched_per_channel() -> None:
    latents = np.zeros((2, 4, 1, 1), dtype=np.float32)
    latents[:, 0, 0, 0] = [5, 9]
    pixels = to_pixels(latents, is_image=False)
    assert pixels.shape == (2, 1, 1, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 255]
    assert pixels[:, 0, 0, 1].tolist() == [0, 0]


def test_two_channels_show_the_first() -> None:
    assert to_pixels(np.zeros((1, 2, 4, 4), dtype=np.float32), is_image=False).shape == (1, 4, 4, 1)


@pytest.mark.parametrize(("size", "expected"), [(8, 64), (24, 72), (64, 64), (256, 256)])
def test_small_images_are_enlarged(size: int, expected: int) -> None:
    assert enlarged(np.zeros((1, size, size, 1), dtype=np.uint8)).shape == (1, expected, expected, 1)


def test_grid_is_filled_row_by_row() -> None:
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    picture = grid(images, columns=2)[:, :, 0]
    assert picture.shape == (2 + GAP, 2 + GAP)
    assert (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]) == (0, 1, 2, 255)


def test_colour_picture(tmp_path: Path) -> None:
    latents = np.zeros((2, 3, 64, 64), dtype=np.float32)
    latents[:, 0] = 1.0
    save_grid(latents, tmp_path / "grid.png", 2, is_image=True)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 64 + GAP, 64)
        assert picture.getpixel((0, 0)) == (255, 128, 128)


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="halfway"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with writing_file(path) as partial:
        partial.write_text("ne")
        raise ValueError("halfway")


def test_file_has_the_usual_mode(tmp_path: Path) -> None:
    with writing_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that root cannot write to either")
def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(UsageError, match="nothing can be written in"):
        write_half(Path("/proc/a.txt"))
