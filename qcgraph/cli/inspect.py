"""qcgraph inspect: the contents of a bundle, or the layers of a model before it is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qcgraph.cli.output import JsonOption
from qcgraph.cli.program_view import pass_text, print_program
from qcgraph.errors import UsageError

Show = Literal["schedule", "solver", "plan", "scales", "refused", "sites", "pipeline"]


def inspect_command(
    subject: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle's folder, or a model's name.")],
    after: Annotated[
        str | None, typer.Option(metavar="PASS|NN", help="Print the program after this pass (its name or number).")
    ] = None,
    graph: Annotated[str | None, typer.Option(metavar="NAME", help="Print this graph.")] = None,
    node: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Print the nodes whose name or module path matches.")
    ] = None,
    show: Annotated[Show | None, typer.Option(help="Print one table; plan: as a file for compile --plan.")] = None,
    json: JsonOption = False,
) -> None:
    """Show the contents of a bundle or a model.

    Of a bundle: its plan, its graphs, and the changes by every pass. Of a model: its blocks and layers. With --after,
    --graph or --node the program is printed; a bundle keeps the text of its program after every pass.
    """
    wants_text = after is not None or graph is not None or node is not None
    if wants_text and show is not None:
        raise UsageError(
            "--show prints a table, --after, --graph and --node print the program", hint="give one of them"
        )

    from qcgraph.bundle import Bundle, is_bundle

    if is_bundle(subject):
        from qcgraph.cli.inspect_bundle import inspect_bundle

        bundle = Bundle.open(subject, check=False)
        if wants_text:
            text = pass_text(bundle, after)
            print_program(text.text, graph, node, about={"index": text.index, "pass": text.name}, json=json)
        else:
            inspect_bundle(bundle, show, json=json)
        return
    if Path(subject).is_dir() and not _is_model_folder(Path(subject)):
        raise UsageError("is neither a bundle nor a model folder", where=subject, hint="a bundle holds a manifest.json")
    if "/" in subject and ":" not in subject and not Path(subject).exists():
        raise UsageError("there is no such bundle or model", where=subject, hint="give a folder, or see qcgraph models")
    if after is not None:
        raise UsageError("no pass has run on a model", where="--after", hint="compile it, and inspect the bundle")

    from qcgraph.cli.inspect_model import inspect_model

    inspect_model(subject, show, graph, node, json=json)


def _is_model_folder(path: Path) -> bool:
    from qcgraph.models.trained_folder import is_trained_folder

    return is_trained_folder(path) or (path / "config.json").is_file() or any(path.glob("*/config.json"))
