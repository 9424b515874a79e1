"""qcgraph passes, models and targets: lists of all three."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.output import JsonOption, print_fields, print_heading, print_json, print_table
from qcgraph.errors import UsageError

if TYPE_CHECKING:
    from qcgraph.extensions import Extensions
    from qcgraph.pipeline import Pass

_ATTRIBUTE = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n      .*)*)", re.MULTILINE)


def passes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One pass, in full.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """List the passes, or show one with its options."""
    from qcgraph.pipeline import find_pass, registry
    from qcgraph.pipeline.pipeline import EXTENSIONS

    if name is not None:
        data = describe_pass(find_pass(name))
        if json:
            print_json(data)
        else:
            _print_pass(data)
        return
    rows = [describe_pass(kind) | {"distribution": ""} for kind in registry().values()]
    rows += [describe_pass(kind) | {"distribution": of} for kind, of in _offered(EXTENSIONS)]
    if json:
        print_json(rows)
    else:
        _print_rows(
            ("pass", "needs", "gives", "what it does"),
            rows,
            lambda row: (row["name"], _names(row["requires"]), _names(row["provides"]), row["summary"]),
        )


def models_command(json: JsonOption = False) -> None:
    """List the models that can be compiled."""
    from qcgraph.models import list_models
    from qcgraph.models.registry import EXTENSIONS

    _warn(EXTENSIONS.problems())
    rows = [asdict(model) for model in list_models()]
    if json:
        print_json(rows)
    else:
        _print_rows(("model", "parameters", "what it is"), rows, _model_cells, right=("parameters",))


def targets_command(json: JsonOption = False) -> None:
    """List the targets that a model can be compiled for."""
    from qcgraph.export.targets import EXTENSIONS, TARGETS

    rows = [asdict(target) | {"distribution": ""} for target in TARGETS.values()]
    rows += [asdict(target) | {"distribution": of} for target, of in _offered(EXTENSIONS)]
    if json:
        print_json(rows)
    else:
        _print_rows(
            ("target", "runs on", "legalization", "what it is"),
            rows,
            lambda row: (row["name"], _runs_on(row), row["legalize"] or "-", row["description"]),
        )


def _model_cells(row: dict[str, Any]) -> tuple[str, ...]:
    parameters = "-" if row["parameters"] is None else f"{row['parameters']:,}"
    return row["name"], parameters, row["description"]


def _runs_on(row: dict[str, Any]) -> str:
    return f"{row['runtime']}, checked on {row['stand_in']}" if row["stand_in"] else str(row["runtime"])


def _offered(extensions: Extensions) -> Iterator[tuple[Any, str]]:
    """Yield the offers of other distributions that load, each with its distribution; warn of those that do not."""
    _warn(extensions.problems())
    for name, offer in extensions.offers().items():
        try:
            yield extensions.load(name), offer.distribution
        except UsageError as error:
            _warn([f"{error.where}: {error.message}"])


def _warn(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def _print_rows(
    titles: tuple[str, ...],
    rows: list[dict[str, Any]],
    cells: Callable[[dict[str, Any]], tuple[str, ...]],
    right: tuple[str, ...] = (),
) -> None:
    """Print a table, with a column for the distribution if any row comes from another one than qcgraph."""
    if any(row["distribution"] for row in rows):
        titles = (*titles, "from")
        print_table(titles, [(*cells(row), row["distribution"] or "qcgraph") for row in rows], right=right)
    else:
        print_table(titles, [cells(row) for row in rows], right=right)


def describe_pass(kind: type[Pass]) -> dict[str, Any]:
    """Describe a pass as JSON data, from its fields and its docstring."""
    from qcgraph.pipeline.options import choices_of

    text, _, attributes = (inspect.getdoc(kind) or "").replace("``", "").partition("Attributes:")
    docs = {match["name"]: " ".join(match["text"].split()) for match in _ATTRIBUTE.finditer(attributes)}
    return {
        "name": kind.name,
        "summary": kind.summary().replace("``", ""),
        "description": text.strip(),
        "requires": [fact.__name__ for fact in kind.requires],
        "provides": [fact.__name__ for fact in kind.provides],
        "options": [
            {
                "name": item.name.replace("_", "-"),
                "type": item.type if isinstance(item.type, str) else inspect.formatannotation(item.type),
                "default": None if item.default is MISSING else item.default,
                "description": docs.get(item.name, ""),
                "choices": dict(choices_of(item)),
            }
            for item in fields(kind)
        ],
    }


def _print_pass(data: dict[str, Any]) -> None:
    print(f"{data['name']}\n\n{data['description']}\n")
    print_fields([("needs", _names(data["requires"])), ("gives", _names(data["provides"]))])
    if not data["options"]:
        print("\nIt has no options.")
        return
    print_heading("options")
    print_table(
        ("option", "type", "default", "what it is"),
        [(row["name"], row["type"], _shown(row["default"]), row["description"]) for row in data["options"]],
    )
    for row in data["options"]:
        if row["choices"]:
            print_heading(row["name"])
            print_table((row["name"], "what it is"), list(row["choices"].items()))
    example = data["options"][0]
    print(f"\nin a pipeline: {data['name']}{{{example['name']}={_shown(example['default'])}}}")


def _names(names: list[str]) -> str:
    return ", ".join(names) or "-"


def _shown(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
