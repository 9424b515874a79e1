"""Save samples as a picture: a grid of images in a PNG file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from qcgraph.files import atomic

Array = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

GAP = 2  # pixels between two images
VISIBLE = 64  # pixels; smaller images are enlarged by a whole factor to at least this size
BACKGROUND = 255


def save_grid(latents: Array, path: Path, columns: int, *, is_image: bool) -> None:
    """Write a grid of samples, row by row, as a PNG file; an incomplete file never remains.

    Args:
        latents: [N,C,H,W].
        path: the file; its name ends with ``.png``.
        columns: the number of samples in a row.
        is_image: see `to_pixels`.
    """
    from PIL import Image

    picture = grid(enlarged(to_pixels(latents, is_image=is_image)), columns)
    with atomic.writing_file(path) as partial:
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(partial, "PNG")


def to_pixels(latents: Array, *, is_image: bool) -> Pixels:
    """Return samples as pixels, u8[N,H,W,1] (gray) or u8[N,H,W,3] (red, green, blue).

    Args:
        latents: [N,C,H,W].
        is_image: whether latents are images in [-1, 1]; otherwise the first three channels are shown, each
            stretched from its smallest to its largest value over all samples.
    """
    shown = latents[:, : 3 if latents.shape[1] >= 3 else 1]
    if is_image:
        unit = (shown + 1) / 2
    else:
        low = shown.min(axis=(0, 2, 3), keepdims=True)
        span = shown.max(axis=(0, 2, 3), keepdims=True) - low
        unit = (shown - low) / np.where(span > 0, span, 1)
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def enlarged(pixels: Pixels) -> Pixels:
    """Enlarge small images by repeating pixels, so that they are visible."""
    factor = -(-VISIBLE // max(pixels.shape[1:3]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(pixels: Pixels, columns: int) -> Pixels:
    """Arrange images u8[N,H,W,C] row by row, with gaps; return u8[rows*H + gaps, columns*W + gaps, C]."""
    count, height, width, channels = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    picture = np.full(size, BACKGROUND, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        picture[top : top + height, left : left + width] = image
    return picture
