"""Read labelled images from an .npz file, or from a folder with a subfolder for each class.

For each of the parts ``train`` and ``test``, the file has ``*_label`` [N] and the images: pixels ``*_images``
u8[N,S,S,C] or u8[N,S,S], or the concatenated bytes of JPEG files ``*_jpeg`` u8[L] with the length of each in ``*_size``
[N]. It may have ``classes``, the names of the classes in the order of the labels.

Images of a folder are scaled by their shorter side to the requested size, and cropped around the middle; every
twentieth image of each class is held out.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcgraph.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT = 20  # one in twenty images of a folder is held out
_KEYS = "a file of images has train_label, test_label, and train_images or train_jpeg with train_size, as test has"


@dataclass(frozen=True)
class ImageData:
    """Images of one size, in a training part and a test part.

    Attributes:
        name: the name of the file or folder.
        images: pixels u8[N,C,S,S] to train on.
        labels: the classes of the training images, i64[N].
        test_images: pixels u8[M,C,S,S] that are not used for training.
        test_labels: the classes of the test images, i64[M].
        classes: the names of the classes.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape C, S, S of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def limited(self, count: int) -> ImageData:
        """Return a limited number of images of each part, chosen at random with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        train, test = (
            torch.randperm(len(each), generator=generator)[:count] for each in (self.labels, self.test_labels)
        )
        return replace(
            self,
            images=self.images[train],
            labels=self.labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def load_images(path: Path, size: int) -> ImageData:
    """Read the images of a file or folder.

    Args:
        path: an .npz file, or a folder.
        size: height and width that images of a folder are scaled to; images of a file keep their size.

    Raises:
        UsageError: there are no images, they have another form, or they are not square, of one size, and grey or RGB.
    """
    if path.is_dir():
        data = _of_folder(path, size)
    elif path.is_file():
        data = _of_file(path)
    else:
        raise UsageError("no such file or folder of images", where=str(path), hint="name an .npz file or a folder")
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        _check(images, labels, data.shape, len(data.classes), path)
    return data


def _check(images: Tensor, labels: Tensor, shape: tuple[int, int, int], class_count: int, path: Path) -> None:
    channels, height, width = shape
    if images.shape[1:] != shape or height != width or channels not in (1, 3):
        found = f"{list(images.shape[1:])} and {list(shape)}" if images.shape[1:] != shape else f"{list(shape)}"
        raise UsageError(f"images are {found}", where=str(path), hint="they must be square, of one size, grey or RGB")
    if not len(images) or len(images) != len(labels):
        raise UsageError(f"{len(images)} images and {len(labels)} labels", where=str(path), hint="each image needs one")
    if int(labels.min()) < 0 or int(labels.max()) >= class_count:
        raise UsageError(
            f"labels {int(labels.min())} .. {int(labels.max())} of {class_count} classes",
            where=str(path),
            hint="they count from 0, as classes does",
        )


def _of_file(path: Path) -> ImageData:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, not several by their names")
        with file:
            arrays = dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path), hint="is it a complete .npz file?") from error
    parts: list[Tensor] = []
    for part in ("train", "test"):
        parts += [_pixels(arrays, part, path), torch.from_numpy(_array(arrays, f"{part}_label", path).astype("int64"))]
    images, labels, test_images, test_labels = parts
    if "classes" in arrays:
        classes = tuple(map(str, arrays["classes"]))
    else:
        classes = tuple(map(str, range(int(labels.max()) + 1))) if len(labels) else ()
    return ImageData(path.name, images, labels, test_images, test_labels, classes)


def _pixels(arrays: Mapping[str, Any], part: str, path: Path) -> Tensor:
    if f"{part}_jpeg" in arrays:
        content = _array(arrays, f"{part}_jpeg", path).tobytes()
        ends = np.cumsum(_array(arrays, f"{part}_size", path).astype("int64"))
        if len(ends) and ends[-1] != len(content):
            raise UsageError(
                f"{part}_size sums to {ends[-1]}, {part}_jpeg has {len(content)} bytes", where=str(path), hint=_KEYS
            )
        starts = [0, *ends[:-1].tolist()]
        files = (io.BytesIO(content[start:end]) for start, end in zip(starts, ends.tolist(), strict=True))
        return _stacked((_decoded(file, None) for file in files), path)
    pixels = _array(arrays, f"{part}_images", path)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise UsageError(
            f"{part}_images is {pixels.dtype}{list(pixels.shape)}",
            where=str(path),
            hint="it is u8[N,S,S,C] or u8[N,S,S]",
        )
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2).copy())


def _array(arrays: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in arrays:
        raise UsageError(f"it has no {name}", where=str(path), hint=_KEYS)
    return arrays[name]


def _of_folder(path: Path, size: int) -> ImageData:
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    kept: list[tuple[Path, int]] = []
    held_out: list[tuple[Path, int]] = []
    for label, folder in enumerate(classes):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        for index, file in enumerate(files):
            (kept if index % HELD_OUT else held_out).append((file, label))
    if not kept or not held_out:
        raise UsageError(
            "it has no images to train on",
            where=str(path),
            hint=f"give each class a subfolder of {', '.join(SUFFIXES)}",
        )
    parts: list[Tensor] = []
    for part in (kept, held_out):
        parts += [
            _stacked((_decoded(file, size) for file, _ in part), path),
            torch.tensor([label for _, label in part]),
        ]
    images, labels, test_images, test_labels = parts
    return ImageData(path.name, images, labels, test_images, test_labels, tuple(folder.name for folder in classes))


def _decoded(file: Path | io.BytesIO, size: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image u8[H,W] or u8[H,W,3], cropped to a square if a size is given."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if size is None:
                return np.asarray(image if image.mode == "L" else image.convert("RGB"))
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
    except (UnidentifiedImageError, OSError) as error:
        where = str(file) if isinstance(file, Path) else "an image"
        raise UsageError(f"cannot be read: {error}", where=where, hint="leave it out, or replace it") from error


def _stacked(images: Iterable[np.ndarray[Any, np.dtype[np.uint8]]], path: Path) -> Tensor:
    """Stack images u8[H,W] or u8[H,W,3] to u8[N,C,H,W]."""
    found = list(images)
    shapes = sorted({image.shape for image in found})
    if len(shapes) != 1:
        raise UsageError(f"images of {len(shapes)} sizes", where=str(path), hint="they must be square and of one size")
    stacked = np.stack(found)
    return torch.from_numpy(stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2).copy())
