"""Writing a bundle, in one piece or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcgraph.bundle.engines import ENGINES, written_engines
from qcgraph.bundle.manifest import PLAN, write_manifest, written_files
from qcgraph.bundle.read import PLAN_FORMAT
from qcgraph.facts import encode
from qcgraph.files import atomic
from qcgraph.plan.spec import Interface, ModelSpec
from qcgraph.plan.steps import StepPlan

_LINE_WIDTH = 280  # of a value that plan.json keeps on one line; a step that looks back to one other fits


def write_plan(folder: Path, spec: ModelSpec, plan: StepPlan, interfaces: Mapping[str, Interface]) -> None:
    """Write ``plan.json`` into a folder, to be read by people too: a step a line."""
    data = {
        "format": PLAN_FORMAT,
        "model": encode(spec),
        "plan": encode(plan),
        "variants": {name: encode(interface) for name, interface in interfaces.items()},
    }
    (folder / PLAN).write_text(readable_json(data) + "\n", "utf-8")


def readable_json(value: Any, indent: str = "") -> str:
    """JSON with every value on one line that fits there."""
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
    """Refuse a place that a bundle cannot be written to; call it before any work begins.

    Raises:
        UsageError: something is there (with ``force``: something else than a bundle), the folder around it cannot be
            written, or another process writes there now.
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

    The body fills the folder that it is given; it writes at least ``plan.json`` and ``recipe.lock.toml``. The manifest
    is written after it, and then the folder takes its place. When the body raises, nothing changes.

    Args:
        path: where the bundle is to be.
        model: the name of the model.
        target: the name of the target.
        precision: the floating-point type of what is not quantized.
        overrides: what was let through on demand, see `Manifest`.
        target_record: the target as data where it is of another distribution.
        force: whether a bundle that is there is replaced.

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
    """Return the files of a bundle and of its engines, which go with it, and their sha256; None of another folder."""
    files = written_files(folder)
    if files is None:
        return None
    engines = written_engines(folder / ENGINES) or {}
    return {**files, **{f"{ENGINES}/{name}": digest for name, digest in engines.items()}}


BUNDLE_FOLDER = atomic.FolderKind(written_bundle, "exists and is not a bundle")
