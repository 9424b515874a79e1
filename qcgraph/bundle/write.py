"""Writing of a bundle in one piece or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcgraph.bundle.engines import ENGINES, written_engines
from qcgraph.bundle.manifest import PLAN, SCHEDULER, write_manifest, written_files
from qcgraph.bundle.read import PLAN_FORMAT
from qcgraph.facts import encode
from qcgraph.files import atomic
from qcgraph.plan.fitted import SCHEDULER_CLASS, fitted_settings
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan

_LINE_WIDTH = 280  # characters of a value that plan.json keeps on one line; a step that refers to one earlier step fits


def write_plan(folder: Path, spec: ModelSpec, plan: StepPlan, interfaces: Mapping[str, Interface]) -> None:
    """Write ``plan.json`` into a folder, one line for each step, so that people can read it too."""
    data = {
        "format": PLAN_FORMAT,
        "model": encode(spec),
        "plan": encode(plan),
        "variants": {name: encode(interface) for name, interface in interfaces.items()},
    }
    (folder / PLAN).write_text(readable_json(data) + "\n", "utf-8")


def write_scheduler(folder: Path, spec: ModelSpec, plan: StepPlan) -> None:
    """Write the settings of `qcgraph.schedulers.FittedScheduler` into a folder, as diffusers saves a scheduler.

    The version of diffusers, which diffusers adds, is left out: loading does not need it.
    """
    place = folder / SCHEDULER
    place.parent.mkdir()
    data = {"_class_name": SCHEDULER_CLASS, **fitted_settings(plan, spec.noise_schedule)}
    place.write_text(readable_json(data) + "\n", "utf-8")


def readable_json(value: Any, indent: str = "") -> str:
    """Return JSON in which every value that fits is on one line."""
    flat = json.dumps(value, allow_nan=False)
    if (len(flat) <= _LINE_WIDTH and indent) or not isinstance(value, (dict, list, tuple)) or not value:
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(str(key))}: {readable_json(item, inner)}" for key, item in value.items()]
    else:
        items = [f"{inner}{readable_json(item, inner)}" for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(items), f"{indent}{closing}"])


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a place that a bundle cannot be written to; called before any work begins.

    Raises:
        UsageError: something exists there (with ``force``: something other than a bundle), the folder around it is not
            writable, or another process writes there now.
    """
    BUNDLE_FOLDER.check(path, force=force)


@contextmanager
def writing(
    path: Path,
    *,
    model: str,
    target: str,
    precision: str = "f32",
    overrides: tuple[str, ...] = (),
    target_record: dict[str, str | int | bool] | None = None,
    force: bool = False,
) -> Iterator[Path]:
    """Write a bundle in one piece.

    The body fills the yielded folder with at least ``plan.json`` and ``recipe.lock.toml``. The manifest is written
    after the body, and then the folder takes its place. Nothing changes when the body raises.

    Args:
        path: the place of the bundle.
        model: the name of the model.
        target: the name of the target.
        precision: the floating-point type of values that are not quantized.
        overrides: failed checks that the user allowed, see `Manifest`.
        target_record: the target as data where another distribution defines it.
        force: whether an existing bundle is replaced.

    Yields:
        The folder to fill.

    Raises:
        UsageError: see `check_output`.
        BundleError: the body left out a file that every bundle has.
    """
    with BUNDLE_FOLDER.writing(path, force=force) as folder:
        yield folder
        write_manifest(folder, model, target, precision, overrides, target_record)


def written_bundle(folder: Path) -> atomic.Written | None:
    """Return the files of a bundle and of its engines, and their sha256; None for any other folder."""
    files = written_files(folder)
    if files is None:
        return None
    engines = written_engines(folder / ENGINES) or {}
    return {**files, **{f"{ENGINES}/{name}": digest for name, digest in engines.items()}}


BUNDLE_FOLDER = atomic.FolderKind(written_bundle, "exists and is not a bundle")
