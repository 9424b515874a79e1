"""qcgraph diff: the changes between two passes of a bundle, or the differences between two bundles."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.ir_text import op_changes, ops_text, read_program_text
from qcgraph.cli.output import JsonOption, console, print_heading, print_json, print_table
from qcgraph.cli.program_view import pass_text
from qcgraph.errors import UsageError

if TYPE_CHECKING:
    from qcgraph.bundle import Bundle

_STYLES = {"+": "green", "-": "red", "@": "cyan"}
SAME = "same"


def diff_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that qcgraph compile wrote.")],
    first: Annotated[str, typer.Argument(metavar="A|BUNDLE2", help="A pass (name or number), or another bundle.")],
    second: Annotated[str | None, typer.Argument(metavar="B", help="A later pass.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """Compare two passes, or two bundles.

    Two passes: qcgraph diff out/digits 0 insert-qdq (pass 0 is the program as it was captured).

    Two bundles: qcgraph diff out/digits out/other
    """
    from qcgraph.bundle import Bundle, is_bundle

    one = Bundle.open(bundle, check=False)
    if second is not None:
        data = diff_passes(one, first, second)
    elif is_bundle(first):
        data = diff_bundles(one, Bundle.open(first, check=False))
    else:
        raise UsageError(
            f"{first!r} is no bundle, and a second pass is missing",
            hint=f"qcgraph diff {bundle} A B compares two passes, qcgraph diff {bundle} OTHER two bundles",
        )
    if json:
        print_json(data)
        return
    if second is None:
        _print_bundle_differences(data)
    _print_program_difference(data)


def diff_passes(bundle: Bundle, first: str, second: str) -> dict[str, Any]:
    """Return the changes of the program from one pass to another, as JSON data."""
    before, after = pass_text(bundle, first), pass_text(bundle, second)
    first, second = (f"{text.index:03d}_{text.name}" for text in (before, after))
    return _program_difference(before.text, after.text, first, second)


def diff_bundles(one: Bundle, other: Bundle) -> dict[str, Any]:
    """Return the differences between two bundles as JSON data: recipe, plan, facts, and the final program."""
    before, after = (pass_text(bundle, None).text for bundle in (one, other))
    return {
        "recipe": _changes(_flat(one.recipe.model_dump()), _flat(other.recipe.model_dump())),
        "plan": _changes(_plan_fields(one), _plan_fields(other)),
        "facts": _changes(_fact_fields(one), _fact_fields(other)),
        "manifest": _changes(_manifest_fields(one), _manifest_fields(other)),
    } | _program_difference(before, after, str(one.path), str(other.path))


def _program_difference(before: str, after: str, first: str, second: str) -> dict[str, Any]:
    changes = op_changes(read_program_text(before), read_program_text(after))
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), first, second, lineterm="")
    return {
        "first": first,
        "second": second,
        "graphs": {name: {"added": dict(added), "removed": dict(gone)} for name, (added, gone) in changes.items()},
        "diff": "\n".join(lines),
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return key -> [value before, value after] for all keys whose values differ; None stands for a missing key."""
    keys = dict.fromkeys([*before, *after])
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def _plan_fields(bundle: Bundle) -> dict[str, Any]:
    plan = bundle.plan
    return {
        "weights": plan.fingerprint.model,
        "sampling": plan.describe(),
        "schedule": plan.schedule(),
        "groups": " ".join(str(step.group) for step in plan.steps),
    }


def _fact_fields(bundle: Bundle) -> dict[str, Any]:
    """Return a digest of every fact, by name; equal facts have equal digests."""
    from qcgraph.plan.steps import digest_of

    return {name: digest_of(value) for name, value in bundle.facts.encode().items()}


def _manifest_fields(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {"qcgraph": manifest.qcgraph, "model": manifest.model, "target": manifest.target, **manifest.packages}


def _print_bundle_differences(data: Mapping[str, Any]) -> None:
    for section, title in (("manifest", "made with"), ("recipe", "recipe"), ("plan", "plan"), ("facts", "facts")):
        rows = [
            (key, "-" if old is None else old, "-" if new is None else new) for key, (old, new) in data[section].items()
        ]
        if rows:
            print_heading(title)
            print_table(("", data["first"], data["second"]), rows)
        else:
            print(f"{title}: {SAME}")


def _print_program_difference(data: Mapping[str, Any]) -> None:
    for name, change in data["graphs"].items():
        added, removed = (ops_text(Counter(change[side]), sign) for side, sign in (("added", "+"), ("removed", "-")))
        print(f"graph {name}: {', '.join(filter(None, (added, removed))) or 'no nodes'}")
    if not data["diff"]:
        print(f"program: {SAME}")
        return
    if not data["graphs"]:
        print("nodes: the same number of each op in every graph")
    print()
    _print_coloured(data["diff"].splitlines())


def _print_coloured(lines: list[str]) -> None:
    from rich.text import Text

    screen = console()
    for line, style in zip(lines, _styles(lines), strict=True):
        screen.print(Text(line, style=style), soft_wrap=True)


def _styles(lines: list[str]) -> Iterator[str]:
    for line in lines:
        yield "bold" if line.startswith(("+++", "---")) else _STYLES.get(line[:1], "")
