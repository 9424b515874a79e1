"""Keep samples that take long to draw and that later evaluations need again, in a folder of the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from qcgraph.errors import QcgraphError
from qcgraph.files.atomic import writing_file
from qcgraph.plan.steps import digest_of
from qcgraph.sampling.runner import Array


def kept_folder() -> Path:
    """Return the folder of kept samples; it can be deleted at any time."""
    return Path.home() / ".cache" / "qcgraph" / "converged"


def kept(key: object, draw: Callable[[], Array], shape: tuple[int, ...]) -> Array:
    """Return samples from the folder, or draw them and keep them there if it can be written.

    Args:
        key: everything that the samples depend on, as data that JSON can hold.
        draw: draws the samples.
        shape: the shape of one sample, to notice a damaged file.
    """
    try:
        path = kept_folder() / f"{digest_of(key)}.npy"
    except RuntimeError:  # there is no home
        return draw()
    if (found := _read(path, shape)) is not None:
        return found
    samples = draw()
    if np.isfinite(samples).all():
        _write(path, samples)
    return samples


def _read(path: Path, shape: tuple[int, ...]) -> Array | None:
    try:
        samples = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_sound = samples.dtype == np.float32 and samples.shape[1:] == shape and bool(np.isfinite(samples).all())
    return samples if is_sound else None


def _write(path: Path, samples: Array) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as partial, partial.open("wb") as file:
            np.save(file, samples, allow_pickle=False)
    except (OSError, QcgraphError):
        return  # a folder that cannot be written keeps nothing
