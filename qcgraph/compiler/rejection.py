"""Keep a bundle whose exported graphs fail a check, beside its intended folder, for inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qcgraph.bundle import Bundle, writing
from qcgraph.bundle.write import BUNDLE_FOLDER
from qcgraph.errors import BundleError, UsageError, VerificationError
from qcgraph.export.check.check import Check, failure_text
from qcgraph.export.targets import Target, record_of
from qcgraph.files.atomic import resolved

FAILED_CHECKS = "failed-checks"  # the override that marks the manifest of a rejected bundle


def rejected_place(output: Path) -> Path:
    """Return the folder that keeps a rejected bundle which was meant for ``output``."""
    place = resolved(output)
    return (output.parent if place.name == output.name else place.parent) / f"{place.name}.rejected"


def reject(
    checks: Sequence[Check],
    folder: Path,
    output: Path,
    fill: Callable[[Path], object],
    *,
    model: str,
    target: Target,
    precision: str,
) -> VerificationError:
    """Keep a bundle whose checks failed in `rejected_place`, and return an error that names the failed checks.

    Args:
        checks: all checks of the export; at least one failed.
        folder: the folder of the export; its files are moved.
        output: the intended folder of the bundle; it is not touched.
        fill: writes everything in a bundle except its graphs and weights into the given folder.
        model: the name of the model.
        target: the target of the export.
        precision: the floating-point type of values that are not quantized.
    """
    place = rejected_place(output)
    failed = sum(check.failed for check in checks)
    try:
        with writing(
            place,
            model=model,
            target=target.name,
            target_record=record_of(target),
            precision=precision,
            overrides=(FAILED_CHECKS,),
            force=True,
        ) as kept:
            for path in list(folder.iterdir()):
                path.rename(kept / path.name)
            fill(kept)
        where_kept = f"what was exported is kept in {place}: qcgraph verify shows the checks again"
    except UsageError as error:
        where_kept = f"what was exported is not kept, because {place} {error.message}"
    return VerificationError(
        f"{failed} of {len(checks)} checks of the exported graphs failed\n{failure_text(checks)}",
        hint=f"nothing was written to {output}; {where_kept}",
    )


def forget_rejected(output: Path) -> None:
    """Remove the rejected bundle of an earlier compilation to ``output``, after a compilation that passed its checks.

    The folder is kept if it is not a rejected bundle, or if it holds files that qcgraph did not write.
    """
    place = rejected_place(output)
    try:
        if FAILED_CHECKS in Bundle.open(place, check=False).manifest.overrides:
            BUNDLE_FOLDER.remove(place)
    except (BundleError, UsageError):
        return  # no such folder, or not a bundle of qcgraph
