"""Define the command-line application: its commands, and how it reports their errors."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
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
from qcgraph.errors import QcgraphError, UsageError, shown
from qcgraph.files.documents import is_text

WRONG_INPUT = 2
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells count
UNREAD = 141  # the exit code of a process that SIGPIPE ended: the reader of its output has closed it
# Errors that the path given by the user explains; any other error of the operating system is a bug of qcgraph.
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
    """A signal from the user or the system that asks the process to end."""


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
    """Compile Diffusion Transformers into quantized, cached graphs.

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
    """Run the command line as the entry point, and exit with its code."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    _open_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0 ok, 1 a verification failed, 2 wrong usage or input, 130 interrupted, 141 the reader of the
        output has closed it. Errors of the user, and of user code that qcgraph called, are reported. A bug of qcgraph
        is raised: Python prints its traceback and exits with 1.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()  # notices here, not at exit, that the reader of stdout has closed it
    except QcgraphError as error:
        _report(f"{error.where}: {error.message}" if error.where else error.message, error.hint)
        return error.exit_code
    except typer.TyperException as error:
        _report(error.format_message(), f"see {_command_path(error)} --help")
        return WRONG_INPUT
    except (Interrupted, KeyboardInterrupt):
        _report("interrupted; nothing was written", "run it again; what was there before is as it was")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return UNREAD
    except MemoryError:
        _report("there is not enough memory", "close other programs, or take a smaller model, fewer samples or steps")
        return WRONG_INPUT
    except Exception as error:  # noqa: BLE001 - the last resort: it reports errors of users, raises ours
        return _unexpected(error)
    return code


def _run(arguments: Sequence[str]) -> int:
    for argument in arguments:
        if not is_text(argument):
            raise UsageError(
                f"{shown(argument)} is not valid text",
                hint="arguments are in the encoding of the terminal; rename a file whose name is not",
            )
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries that are imported later would end the process with this error
        raise UsageError("the current folder was removed", hint="change into one that is there") from None
    try:
        return int(app(list(arguments) or ["--help"], prog_name="qcgraph", standalone_mode=False) or 0)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):
            return UNREAD  # typer has stopped all output
        raise


def _unexpected(error: Exception) -> int:
    """Report an error that no command expects, if the system or user code caused it.

    Returns:
        The exit code.

    Raises:
        Exception: the error is a bug of qcgraph.
    """
    if isinstance(error, OSError) and error.errno in PATH_ERRORS:
        _report(f"{error.filename or 'cannot write'}: {error.strerror}", "choose a place that can be read and written")
        return WRONG_INPUT
    frame = users_frame(error)
    if frame is not None:
        place = f"{frame.filename}:{frame.lineno}, in {frame.name}"
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _report(f"{place}: {what}", "this is code of the model, not of qcgraph: mend it, or try it alone in Python")
        return WRONG_INPUT
    error.add_note("this is a bug of qcgraph")
    raise error


def users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame of user code that an error came through, or None if there is none.

    User code is code that qcgraph called and that belongs to neither qcgraph, nor Python, nor an installed library.

    Args:
        error: the error that was raised.
    """
    found, is_called = None, False
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "qcgraph":
            found, is_called = None, True  # qcgraph called by user code is qcgraph again
        elif is_called and not _is_library(frame.f_code.co_filename):
            found = traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name)
    return found


def _is_library(file: str) -> bool:
    """Return whether a file belongs to Python or an installed package, or is no file (generated code)."""
    if file.startswith("<"):
        return True
    path = Path(file)
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or path.is_relative_to(
        sysconfig.get_path("stdlib")
    )


def _open_streams() -> None:
    """Make printing safe: open missing streams, and print characters that an encoding lacks as escapes.

    A process may be started with closed descriptors. The next file that it opens would then become its stdout.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this descriptor
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - it lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _report(what: str, hint: str | None) -> None:
    text = f"error: {what}\n\nhint: {hint}" if hint else f"error: {what}"
    with contextlib.suppress(BrokenPipeError):  # the reader of stderr may have closed it
        print(text, file=sys.stderr)


def _command_path(error: typer.TyperException) -> str:
    """Return the path of the command with the usage error, such as ``qcgraph sample``."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "qcgraph"
