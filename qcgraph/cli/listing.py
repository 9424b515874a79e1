"""qcgraph passes, models and targets: what there is."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcgraph.cli.output import JsonOption, print_fields, print_heading, print_json, print_table
from qcgraph.errors import UsageError, closest

if TYPE_CHECKING:
    from qcgraph.pipeline import Pass

_ATTRIBUTE = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n      .*)*)", re.MULTILINE)


def passes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One pass, in full.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """List the passes, or show one with its options."""
    from qcgraph.pipeline import registry

    known = registry()
    if name is not None and name not in known:
        raise UsageError(f"unknown pass {name!r}", hint=closest(name, known))
    if name is not None:
        data = describe_pass(known[name])
        if json:
            print_json(data)
        else:
            _print_pass(data)
        return
    rows = [describe_pass(kind) for kind in known.values()]
    if json:
        print_json(rows)
    else:
        print_table(
            ("pass", "needs", "gives", "what it does"),
            [(row["name"], _names(row["requires"]), _names(row["provides"]), row["summary"]) for row in rows],
        )


def models_command(json: JsonOption = False) -> None:
    """List the models that can be compiled."""
    from qcgraph.models import list_models

    rows = [asdict(model) for model in list_models()]
    if json:
        print_json(rows)
    else:
        print_table(
            ("model", "parameters", "what it is"),
            [
                (row["name"], "-" if row["parameters"] is None else f"{row['parameters']:,}", row["description"])
                for row in rows
            ],
            right=("parameters",),
        )


def targets_command(json: JsonOption = False) -> None:
    """List the targets that a model can be compiled for."""
    from qcgraph.export.targets import TARGETS

    rows = [asdict(target) for target in TARGETS.values()]
    if json:
        print_json(rows)
    else:
        print_table(
            ("target", "runs on", "legalization", "what it is"),
            [(row["name"], row["runtime"], row["legalize"] or "-", row["description"]) for row in rows],
        )


def describe_pass(kind: type[Pass]) -> dict[str, Any]:
    """A pass as JSON data, from its fields and its docstring."""
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
                "type": str(item.type),
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
