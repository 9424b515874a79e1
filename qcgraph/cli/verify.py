"""qcgraph verify: integrity, legality and parity of a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.output import JsonOption, count_text, print_json, print_table
from qcgraph.errors import VerificationError

if TYPE_CHECKING:
    from qcgraph.export.check.check import Check

MARKS = {True: "ok", False: "FAILED", None: "-"}  # None: not checked, or not applicable


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Also check that the graphs are what this target takes; see `qcgraph targets`."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a bundle.

    Every file must be unchanged, and every exported graph must do what its program does. With a target, the graphs
    must also conform to it, whichever target the bundle was compiled for: for tensorrt-rtx, engines are built and
    inspected, which needs no GPU. Exits with 1 when a graph fails a check, and with 2 when a file is missing or was
    changed, or the check is not possible on this machine.
    """
    from qcgraph.bundle import Bundle
    from qcgraph.bundle.watch import reading

    opened = Bundle.open(bundle)
    from qcgraph.compiler.compilation import verify_bundle
    from qcgraph.progress import progress_for

    count = count_text(len(opened.manifest.files), "file")
    integrity = {"name": "integrity", "variant": "", "passed": True, "value": None, "limit": None}
    checks: list[dict[str, Any]] = [integrity | {"detail": f"{count} are there and unchanged"}]
    with reading(opened, done="verified"):
        checks += [_as_data(check) for check in verify_bundle(opened, progress_for(sys.stderr), target)]
    failed = [check for check in checks if check["passed"] is False]
    if json:
        print_json({"bundle": str(bundle), "passed": not failed, "checks": checks})
    else:
        _print_checks(checks)
    if failed:
        raise VerificationError(
            f"{len(failed)} of {count_text(len(checks), 'check')} failed: {failed[0]['name']}",
            where=str(bundle),
            hint=f"compile the model for it: --target {target}"
            if target not in (None, opened.manifest.target)
            else "compile the bundle again; report it if that does not help",
        )


def _as_data(check: Check) -> dict[str, Any]:
    """Return a check as JSON data; a check that did not run has no figures."""
    return asdict(check) | ({"value": None, "limit": None} if check.passed is None else {})


def _print_checks(checks: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            MARKS[check["passed"]],
            check["name"],
            check["variant"] or "-",
            _number(check["value"]),
            _number(check["limit"]),
            check["detail"],
        )
        for check in checks
    ]
    print_table(("", "check", "variant", "value", "limit", "detail"), rows, right=("value", "limit"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
