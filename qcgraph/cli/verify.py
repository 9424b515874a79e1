"""qcgraph verify: integrity, legality and parity of a bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qcgraph.cli.output import JsonOption, count_text, print_json, print_table
from qcgraph.errors import VerificationError


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    json: JsonOption = False,
) -> None:
    """Check a bundle.

    Every file must be unchanged, and every exported graph must do what its program does. Exits with 1 when a graph
    does not, and with 2 when a file is missing or was changed: then there is nothing to check.
    """
    from qcgraph.bundle import Bundle

    opened = Bundle.open(bundle)
    from qcgraph.compiler import verify_bundle
    from qcgraph.progress import progress_for

    count = count_text(len(opened.manifest.files), "file")
    integrity = {"name": "integrity", "variant": "", "passed": True, "value": None, "limit": None}
    checks: list[dict[str, Any]] = [integrity | {"detail": f"{count} are there and unchanged"}]
    checks += [asdict(check) for check in verify_bundle(opened, progress_for(sys.stderr))]
    failed = [check for check in checks if not check["passed"]]
    if json:
        print_json({"bundle": str(bundle), "passed": not failed, "checks": checks})
    else:
        _print_checks(checks)
    if failed:
        raise VerificationError(
            f"{len(failed)} of {count_text(len(checks), 'check')} failed: {failed[0]['name']}",
            where=str(bundle),
            hint="compile the bundle again; report it if that does not help",
        )


def _print_checks(checks: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            "ok" if check["passed"] else "FAILED",
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
