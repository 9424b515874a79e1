"""The application: its commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qcgraph.cli.bench import bench_command
from qcgraph.cli.build import build_command
from qcgraph.cli.compile import compile_command
from qcgraph.cli.diff import diff_command
from qcgraph.cli.evaluate import eval_command
from qcgraph.cli.export import export_command
from qcgraph.cli.inspect import inspect_command
from qcgraph.cli.listing import models_command, passes_command, targets_command
from qcgraph.cli.sample import sample_command
from qcgraph.cli.verify import verify_command
from qcgraph.errors import QcgraphError

WRONG_INPUT = 2
# What a path that was given can be wrong in; any other error of the system is ours.
PATH_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Interrupted(BaseException):
    """The user, or the system, asked the process to end."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"qcgraph {metadata.version('qcgraph')}")
        raise typer.Exit


@app.callback()
def qcgraph(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compiles Diffusion Transformers into quantized, cached graphs.

    Start with: qcgraph compile digits -o out/digits --recipe balanced
    """


app.command("compile")(compile_command)
app.command("sample")(sample_command)
app.command("bench")(bench_command)
app.command("build")(build_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)
app.command("diff")(diff_command)
app.command("passes")(passes_command)
app.command("models")(models_command)
app.command("targets")(targets_command)


def main() -> NoReturn:
    """The entry point: run the command line and exit with its code."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0 ok, 1 a verification failed, 2 wrong usage or input. What is not an error of the user, but of
        qcgraph, is raised on: Python shows where, and exits with 1.
    """
    try:
        code = int(app(list(arguments) or ["--help"], prog_name="qcgraph", standalone_mode=False) or 0)
        sys.stdout.flush()  # a reader of stdout that has left is noticed here, not at exit
    except QcgraphError as error:
        _report(f"{error.where}: {error.message}" if error.where else error.message, error.hint)
        return error.exit_code
    except typer.TyperException as error:
        _report(error.format_message(), f"see {_command_path(error)} --help")
        return WRONG_INPUT
    except (Interrupted, KeyboardInterrupt):
        _report("interrupted; nothing was written", "run it again; what was there before is as it was")
        return WRONG_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return 1
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            error.add_note("this is a bug of qcgraph")
            raise
        _report(f"{error.filename or 'cannot write'}: {error.strerror}", "choose a place that can be read and written")
        return WRONG_INPUT
    except Exception as error:
        error.add_note("this is a bug of qcgraph")
        raise
    return code


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _report(what: str, hint: str | None) -> None:
    text = f"error: {what}\n\nhint: {hint}" if hint else f"error: {what}"
    print(text, file=sys.stderr)


def _command_path(error: typer.TyperException) -> str:
    """``qcgraph sample`` for an error in the usage of that command."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "qcgraph"
