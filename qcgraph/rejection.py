"""What becomes of a bundle whose exported graphs fail a check: it is kept beside its place, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qcgraph.bundle import writing
from qcgraph.errors import UsageError, VerificationError
from qcgraph.export.check import Check

FAILED_CHECKS = "failed-checks"  # the override by which the manifest of a rejected bundle can be told


def rejected_place(output: Path) -> Path:
    """Return the folder that keeps a bundle which was to be ``output`` and failed its checks."""
    return output.with_name(f"{output.name}.rejected")


def reject(
    checks: Sequence[Check],
    folder: Path,
    output: Path,
    fill: Callable[[Path], None],
    *,
    model: str,
    target: str,
    precision: str,
) -> VerificationError:
    """Keep a bundle whose checks failed in `rejected_place`, and return the error that says which.

    Args:
        checks: all checks that were made; at least one failed.
        folder: holds what was exported, which is moved.
        output: where the bundle was to be; what is there is not touched.
        fill: writes what a bundle has besides its graphs and weights into the folder that it is given.
        model: the name of the model.
        target: the name of the target.
        precision: the floating-point type of what is not quantized.
    """
    place = rejected_place(output)
    failed = [check for check in checks if check.failed]
    try:
        with writing(
            place, model=model, target=target, precision=precision, overrides=(FAILED_CHECKS,), force=True
        ) as kept:
            for path in list(folder.iterdir()):
                path.rename(kept / path.name)
            fill(kept)
        where_kept = f"what was exported is kept in {place}: qcgraph verify shows the checks again"
    except UsageError as error:
        where_kept = f"what was exported is not kept, because {place} {error.message}"
    return VerificationError(
        f"{len(failed)} of {len(checks)} checks of the exported graphs failed: {'; '.join(map(failure_text, failed))}",
        hint=f"nothing was written to {output}; {where_kept}",
    )


def failure_text(check: Check) -> str:
    """Return one failed check in words: the variant, the check, what was found and what was allowed."""
    place = f"variant {check.variant}, " if check.variant else ""
    return f"{place}{check.name}: {check.detail} (found {check.value:.2g}, limit {check.limit:.2g})"
