"""Keep samples and fitted solvers that take long to make and that evaluations need again, in a folder of the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from qcgraph.errors import QcgraphError
from qcgraph.facts import decode, encode
from qcgraph.files.atomic import writing_file
from qcgraph.plan.steps import StepPlan, digest_of
from qcgraph.sampling.runner import Array


def kept_folder() -> Path:
    """Return the folder of kept samples and solvers; it can be deleted at any time."""
    return Path.home() / ".cache" / "qcgraph" / "converged"


def kept(key: object, draw: Callable[[], Array], shape: tuple[int, ...]) -> Array:
    """Return samples from the folder, or draw them and keep them there if it can be written.

    Args:
        key: everything that the samples depend on, as data that JSON can hold.
        draw: draws the samples.
        shape: the shape of one sample, to notice a damaged file.
    """
    path = _path(key, "npy")
    if path is not None and (found := _read(path, shape)) is not None:
        return found
    samples = draw()
    if path is not None and np.isfinite(samples).all():
        _write(path, lambda file: np.save(file, samples, allow_pickle=False))
    return samples


def kept_plan(key: object, fit: Callable[[], StepPlan]) -> StepPlan:
    """Return the step plan of a fitted solver from the folder, or fit it and keep it there if it can be written.

    Args:
        key: everything that the plan depends on, as data that JSON can hold.
        fit: fits the solver.
    """
    path = _path(key, "json")
    if path is not None and (found := _read_plan(path)) is not None:
        return found
    plan = fit()
    if path is not None:
        _write(path, lambda file: file.write(json.dumps(encode(plan), allow_nan=False).encode()))
    return plan


def _path(key: object, suffix: str) -> Path | None:
    """Return the file of a key, or None if there is no home to keep it in."""
    try:
        return kept_folder() / f"{digest_of(key)}.{suffix}"
    except RuntimeError:
        return None


def _read(path: Path, shape: tuple[int, ...]) -> Array | None:
    try:
        samples = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_sound = samples.dtype == np.float32 and samples.shape[1:] == shape and bool(np.isfinite(samples).all())
    return samples if is_sound else None


def _read_plan(path: Path) -> StepPlan | None:
    try:
        return decode(StepPlan, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ValidationError, QcgraphError):
        return None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as partial, partial.open("wb") as file:
            write(file)
    except (OSError, ValueError, QcgraphError):
        return  # nothing is kept in a folder that cannot be written, and no numbers that are not finite
