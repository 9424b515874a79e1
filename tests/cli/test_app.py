"""The application: help, exit codes, and what becomes of every kind of error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from qcgraph.bundle import Bundle
from qcgraph.cli import app as app_module
from qcgraph.cli import run
from qcgraph.recipe import Recipe

COMMANDS = ("compile", "sample", "verify", "inspect", "diff", "passes", "models", "targets")
Command = Callable[..., Any]


def test_no_arguments_show_the_help(qcgraph: Command) -> None:
    done = qcgraph()
    assert (done.code, done.err) == (0, "")
    assert all(f"  {name} " in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(qcgraph: Command, name: str) -> None:
    done = qcgraph(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: qcgraph {name} ")


def test_the_list_of_commands_is_not_cut(qcgraph: Command) -> None:
    assert "..." not in qcgraph("--help").out.replace("[ARGS]...", "")


def test_version(qcgraph: Command) -> None:
    assert qcgraph("--version").out.startswith("qcgraph 0.")


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["compil"], "No such command 'compil'. Did you mean 'compile'?", "see qcgraph --help"),
        (["compile"], "Missing argument 'MODEL'.", "see qcgraph compile --help"),
        (["compile", "digits", "--bitz", "3"], "No such option: --bitz", "see qcgraph compile --help"),
        (["compile", "digits", "--steps", "many"], "--steps", "see qcgraph compile --help"),
        (["inspect", "digits", "--show", "all"], "'all' is not one of", "see qcgraph inspect --help"),
        (["sample", "x", "--threads", str(2**63)], "less than or equal to 4096", "see qcgraph sample --help"),
        (["sample", "x", "-n", "10000000000"], "less than or equal to 1000000", "see qcgraph sample --help"),
        (["sample", "x", "--seed", str(2**64)], "less than or equal to", "see qcgraph sample --help"),
        (["eval", "x", "--seed", "9" * 4301], "as an integer", "see qcgraph eval --help"),
        (["bench", "x", "--threads", str(2**63)], "less than or equal to 4096", "see qcgraph bench --help"),
        (["bench", "x", "--batches", "1,9999999"], "'1,9999999' is too many", "1000000 at once at most"),
    ],
)
def test_wrong_usage(qcgraph: Command, arguments: list[str], what: str, hint: str) -> None:
    done = qcgraph(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert what in done.err
    assert done.err.endswith(f"\n\nhint: {hint}\n")


def as_ours(function: Callable[..., Any], **values: object) -> Callable[..., Any]:
    """A function that stands for one of qcgraph, which knows these values by name."""
    return FunctionType(function.__code__, {"__name__": "qcgraph.part", "__builtins__": __builtins__, **values})


def raising(error: BaseException) -> Callable[..., Any]:
    def app(*_: object, **__: object) -> None:
        raise problem  # type: ignore[name-defined]  # noqa: F821

    return as_ours(app, problem=error)


@pytest.mark.parametrize("error", [app_module.Interrupted(), KeyboardInterrupt()])
def test_interruption(qcgraph: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(app_module, "app", raising(error))
    done = qcgraph("models")
    assert done.code == 130
    assert done.err.startswith("error: interrupted; nothing was written\n\nhint: ")


def test_full_disk_is_no_bug(qcgraph: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "app", raising(OSError(errno.ENOSPC, "No space left on device", "out/toy")))
    done = qcgraph("models")
    assert done.code == 2
    assert done.err.startswith("error: out/toy: No space left on device\n\nhint: ")


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), OSError(errno.ENOENT, "No such file", "x")])
def test_a_bug_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(app_module, "app", raising(error))
    with pytest.raises(type(error)) as caught:
        run(["models"])
    assert caught.value.__notes__ == ["this is a bug of qcgraph"]


def test_a_bug_exits_with_one() -> None:
    code = "from qcgraph.cli import app; app.app = lambda *a, **k: 1 / 0; app.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\nthis is a bug of qcgraph\n")


def test_an_error_of_the_users_code_says_where(
    qcgraph: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "mine.py"
    source.write_text("import json\n\ndef forward():\n    return json.loads('{')\n")
    mine: dict[str, Any] = {"__name__": "mine"}
    exec(compile(source.read_text(), str(source), "exec"), mine)

    def call(*_: object, **__: object) -> None:
        theirs["forward"]()  # type: ignore[name-defined]  # noqa: F821

    monkeypatch.setattr(app_module, "app", as_ours(call, theirs=mine))
    done = qcgraph("models")
    assert done.code == 2
    assert done.err.startswith(f"error: {source}:4, in forward: JSONDecodeError: ")
    assert "\n\nhint: this is code of the model, not of qcgraph" in done.err


@pytest.mark.parametrize("argument", ["\udcff", "a\0b", "out/\ud800"])
def test_what_is_no_text_is_refused(qcgraph: Command, argument: str) -> None:
    for arguments in (
        ["compile", "digits", "--bits", argument],
        ["sample", argument],
        ["inspect", "x", "-o", argument],
    ):
        done = qcgraph(*arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {argument!r} is not valid text\n\nhint: ")


@pytest.mark.skipif(sys.platform == "win32", reason="shells")
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("models >&-", 0, ""),
        ("nothing >&- 2>&-", 2, ""),
        ("nothing 2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
        # It ends by itself, or because nobody reads it any more, whichever comes first.
        ("models | head -1; code=${PIPESTATUS[0]}; exit $((code == 141 ? 0 : code))", 0, "model "),
        ("targets >/dev/full", 2, "error: cannot write: No space left on device\n\nhint: "),
    ],
)
def test_streams_may_be_closed_or_full(line: str, code: int, said: str) -> None:
    command = f"'{sys.executable}' -m qcgraph {line}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == code
    assert done.stdout.decode().startswith(said)
    assert b"Traceback" not in done.stdout
    assert b"Exception ignored" not in done.stdout


def test_terminals_may_be_narrow_and_know_no_unicode(tmp_path: Path) -> None:
    narrow = os.environ | {"COLUMNS": "20", "PYTHONIOENCODING": "ascii"}
    for arguments, said in (
        (["compile", "--help"], b"Usage: "),
        (["compile", "digits", "--bits", "d\xe9"], b"'d\\xe9'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "qcgraph", *arguments], env=narrow, capture_output=True, check=False
        )
        assert said in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed")
def test_the_current_folder_may_be_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd()); from qcgraph.cli import main; main()"
    command = [sys.executable, "-c", code, "compile", "digits", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the current folder was removed\n\nhint: ")


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize(
    "arguments", [["-o", "loop"], ["-o", "loop/x"], ["--plan", "loop", "-o", "x"], ["--recipe", "loop", "-o", "x"]]
)
def test_links_in_a_circle_are_refused(
    qcgraph: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    done = qcgraph("compile", "digits", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: loop")
    assert "\n\nhint: " in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_may_leave(bundle: Path) -> None:
    command = f"'{sys.executable}' -m qcgraph inspect '{bundle}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 when all was written before the reader left


def test_every_recipe_option_is_an_option_of_compile(qcgraph: Command) -> None:
    text = qcgraph("compile", "--help").out
    assert all(f"--{name.replace('_', '-')} " in text for name in Recipe.OPTIONS)


INTERRUPTED_COMPILE = """
import time
from pathlib import Path
from qcgraph.bundle import writing
from qcgraph.cli import app
def compile_slowly(*_, **__):
    with writing(Path({place!r}), model="toy", target="torch", force=True) as folder:
        (folder / "weights").write_text("new")
        print("now", flush=True)
        time.sleep(60)
app.app = compile_slowly
app.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up(bundle: Path, number: signal.Signals) -> None:
    code = INTERRUPTED_COMPILE.format(place=str(bundle))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "now\n"
        os.kill(process.pid, number)
        assert process.stderr.read().startswith("error: interrupted; nothing was written\n\nhint: ")
        assert process.wait(30) == 130
    assert [path.name for path in bundle.parent.iterdir()] == ["toy"]
    assert Bundle.open(bundle).manifest.target == "onnxruntime-cpu"
