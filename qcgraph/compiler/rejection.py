"""What becomes of a bundle whose exported graphs fail a check: it is kept beside its place, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qcgraph.bundle import Bundle, writing
from qcgraph.bundle.write import BUNDLE_FOLDER
from qcgraph.errors import BundleError, UsageError, VerificationError
from qcgraph.export.check.check import Check, failure_text
from qcgraph.export.targets import Target, record_of
from qcgraph.files.atomic import resolved

FAILED_CHECKS = "failed-checks"  # the override by which the manifest of a rejected bundle can be told


def rejected_place(output: Path) -> Path:
    """Return the folder that keeps a bundle which was to be ``output`` and failed its checks."""
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
    """Keep a bundle whose checks failed in `rejected_place`, and return the error that says which.

    Args:
        checks: all checks that were made; at least one failed.
        folder: holds what was exported, which is moved.
        output: where the bundle was to be; what is there is not touched.
        fill: writes what a bundle has besides its graphs and weights into the folder that it is given.
        model: the name of the model.
        target: what it was exported for.
        precision: the floating-point type of what is not quantized.
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
    """Remove what an earlier compilation to ``output`` left in `rejected_place`, now that one has passed its checks.

    A folder that is not such a bundle, or holds anything that qcgraph did not write, stays as it is.
    """
    place = rejected_place(output)
    try:
        if FAILED_CHECKS in Bundle.open(place, check=False).manifest.overrides:
            BUNDLE_FOLDER.remove(place)
    except (BundleError, UsageError):
        return  # nothing is there, or it is not ours to remove
